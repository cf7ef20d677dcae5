"""The cost model against arithmetic by hand, a walk pass by pass, and Marconi's published formulas."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmcache.config import Admission
from ssmcache.memory.bandwidths import BandwidthProfile
from ssmcache.models import load_model
from ssmcache_sim.cost import PrefillCost, prefill_cost
from ssmcache_sim.device_profile import DeviceProfile
from ssmcache_sim.errors import SettingsError
from ssmcache_sim.settings import Prefill

# one operation and one byte take a nanosecond
SLOW = DeviceProfile("slow", 2e9, 0.5, BandwidthProfile(0.5e9), launch_seconds=7e-9, pass_tokens=10, pass_seconds=1e-6)
TINY = PrefillCost(SLOW, "chunked", 100, 10, attention_flops_per_pair=4, snapshot_bytes=50)


def array(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def test_a_prefill_of_nemotron_h_8b_by_hand() -> None:
    cost = prefill_cost(load_model("nemotron-h-8b"))
    assert cost.linear_flops_per_token == 2 * 8_000_000_000
    assert cost.attention_flops_per_pair == 4 * (4 * 32 * 128)  # 4 layers, 32 heads of 128
    # 24 layers of 128 heads of [64, 128], in chunks of 256
    assert cost.ssm_flops_per_token == 24 * 2 * 128 * (256 * (64 + 128) + 2 * 64 * 128)
    flops = 1000 * (16_000_000_000 + 402_653_184) + 65_536 * (2000 * 1000 + 1000 * 1000 // 2)
    assert flops == 16_566_493_184_000
    assert cost.flops(array(1000), array(2000)).tolist() == [flops]
    # 3,000 tokens in a pass of 5 ms at half of 989 TFLOP/s
    plain = 3000 * 16_402_653_184 + 65_536 * 4_500_000
    assert cost.plain_ns(array(3000)).tolist() == [round((plain / 494.5e12 + 0.005) * 1e9)]
    # from 2,000: one pass of 1,000 tokens, a copy of 102,137,856 bytes to start with, and one of the state at 3,000
    copy = 10e-6 + 2 * 102_137_856 / 2.7e12
    assert cost.reuse_ns(array(3000), array(2000), 1000).tolist() == [
        round((flops / 494.5e12 + 0.005 + 2 * copy) * 1e9)
    ]


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 10_000))
def test_operations_do_not_depend_on_where_a_prefill_is_cut(cached: int, first: int, second: int) -> None:
    whole = TINY.flops(array(first + second), array(cached))
    parts = TINY.flops(array(first), array(cached)) + TINY.flops(array(second), array(cached + first))
    assert whole.tolist() == parts.tolist()


def walk(prompt: int, known: int, step: int, prefill: Prefill) -> int:
    """Nanoseconds with `TINY`, token by token."""
    start = known
    while prompt and start >= prompt:
        start -= step
    time, in_pass = 0, 0
    for position in range(start, prompt):
        time += 110 + 4 * position + 2  # a token sees all before it, and half of itself
        if in_pass == 0:
            time += 1000
        in_pass += 1
        if in_pass == 10 or (prefill == "chunked" and (position + 1) % step == 0):
            in_pass = 0
        if (position + 1) % step == 0 and position + 1 > known:
            time += 107 if prefill == "chunked" else 50
    return time + (107 if start else 0)


@pytest.mark.parametrize("prefill", ["chunked", "reserved"])
@given(st.integers(0, 70), st.integers(1, 25), st.data())
def test_a_request_costs_what_a_walk_token_by_token_costs(
    prefill: Prefill, prompt: int, step: int, data: st.DataObject
) -> None:
    known = step * data.draw(st.integers(0, prompt // step))
    cost = PrefillCost(SLOW, prefill, 100, 10, attention_flops_per_pair=4, snapshot_bytes=50)
    assert cost.reuse_ns(array(prompt), array(known), step).tolist() == [walk(prompt, known, step, prefill)]


@pytest.mark.parametrize("admission", ["every", "last"])
@given(
    st.integers(1, 90), st.integers(1, 25), st.integers(0, 4000), st.sampled_from([0, 0.5, 3]),
    st.sampled_from([0, 0.5, 3]), st.data(),
)  # fmt: skip
def test_a_floor_holds_pass_by_pass(
    admission: Admission, prompt: int, step: int, floor: int, cold: float, cached: float, data: st.DataObject
) -> None:
    """Against a walk over the passes, for measured devices: a floor, and attention of other prices."""
    start = step * data.draw(st.integers(0, (prompt - 1) // step))
    device = replace(SLOW, pass_floor_seconds=floor * 1e-9, attention_factor=cold, cached_attention_factor=cached)
    cost = PrefillCost(device, "chunked", 100, 10, attention_flops_per_pair=4, snapshot_bytes=50)
    cuts = {*range(step, prompt, step)} if admission == "every" else {prompt // step * step}
    expected, position = 0.0, start
    while position < prompt:
        end = min([position + 10, prompt, *(cut for cut in cuts if cut > position)])
        pairs = sum(token + 0.5 for token in range(position, end))
        factor = cached if position else cold
        expected += max(floor, 1000 + 110 * (end - position) + 4 * factor * pairs)
        position = end
    (got,) = cost.prefill_ns(array(prompt), array(start), step, admission).tolist()
    assert got == pytest.approx(expected, abs=1)


@given(st.integers(0, 70), st.integers(1, 25), st.data())
def test_without_ssm_layers_nothing_is_cut_or_copied(prompt: int, block: int, data: st.DataObject) -> None:
    known = block * data.draw(st.integers(0, prompt // block))
    cost = PrefillCost(SLOW, "chunked", 100, 10, attention_flops_per_pair=4, snapshot_bytes=0)
    start = known if known < prompt else max(known - block, 0)
    expected = sum(112 + 4 * position for position in range(start, prompt)) + 1000 * -(-(prompt - start) // 10)
    assert cost.reuse_ns(array(prompt), array(known), block).tolist() == [expected]


def test_marconi_s_model_costs_what_its_paper_says() -> None:
    cost = prefill_cost(load_model("marconi-7b"))
    width, d_state = 4096, 128
    # 2411.19379, table 1, for L tokens of width D: attention 8 L D^2 + 4 L^2 D, MLP 16 L D^2,
    # SSM 12 L D^2 + 16 L D N; 4, 28 and 24 layers
    assert cost.ssm_flops_per_token == 24 * 16 * width * d_state
    linear = (4 * 8 + 28 * 16 + 24 * 12) * width**2
    assert cost.linear_flops_per_token == pytest.approx(linear, rel=0.1)  # "7B" is rounded, and has embeddings
    length = 10_000  # it counts all pairs, also those that a causal mask leaves out
    attention = cost.flops(array(length), array(0)) - length * (cost.linear_flops_per_token + cost.ssm_flops_per_token)
    assert attention.tolist() == [4 * 4 * length**2 * width / 2]


@pytest.mark.parametrize(
    ("name", "per_pair"),
    [
        ("kimi-linear-48b-a3b", 7 * 2 * 32 * (128 + 64 + 128)),  # MLA: keys of 192 elements, values of 128
        ("zamba2-7b", 13 * 4 * 32 * 224),
        ("qwen3.5-9b", 8 * 4 * 16 * 256),
        ("llama-3.1-8b", 32 * 4 * 32 * 128),
        ("mamba2-2.7b", 0),
    ],
)
def test_attention_heads_of_presets_by_hand(name: str, per_pair: int) -> None:
    assert prefill_cost(load_model(name)).attention_flops_per_pair == per_pair


def test_experts_cost_their_active_parameters() -> None:
    assert prefill_cost(load_model("nemotron-3-nano-30b")).linear_flops_per_token == 6_000_000_000


@pytest.mark.parametrize(
    ("name", "each_layer", "num_layers"),
    [
        ("jamba-1.5-mini", 16 * 8192 * 16, 28),
        ("qwen3-next-80b-a3b", 2 * 32 * (2 * 64 * 256 + 3 * 128 * 128), 36),
    ],
)
def test_recurrences_of_other_kinds_by_hand(name: str, each_layer: int, num_layers: int) -> None:
    assert prefill_cost(load_model(name)).ssm_flops_per_token == each_layer * num_layers


def config_file(folder: Path, **fields: object) -> str:
    path = folder / "mine.json"
    path.write_text(json.dumps(fields))
    return str(path)


def test_a_config_without_a_number_of_parameters_needs_one(tmp_path: Path) -> None:
    heads = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    model = load_model(config_file(tmp_path, model_type="llama", **heads))
    with pytest.raises(
        SettingsError, match=r"^billion_parameters: expected a number.*config of mine states none$"
    ) as e:
        prefill_cost(model)
    assert "\n" not in str(e.value)
    assert prefill_cost(model, billion_parameters=1.5).linear_flops_per_token == 3_000_000_000


def test_latent_attention_without_its_heads_is_refused(tmp_path: Path) -> None:
    linear = {"kda_layers": [1], "full_attn_layers": [2], "num_heads": 2, "head_dim": 8, "short_conv_kernel_size": 4}
    sizes = {"num_hidden_layers": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
    model = load_model(config_file(tmp_path, model_type="kimi_linear", linear_attn_config=linear, **sizes))
    assert model.kv_bytes_per_token() == 2 * (16 + 8)
    with pytest.raises(SettingsError, match=r"^mine: expected num_attention_heads, qk_nope_head_dim and v_head_dim"):
        prefill_cost(model, billion_parameters=1)


def test_the_state_s_dtype_changes_the_copies_alone() -> None:
    full, half = (prefill_cost(load_model("nemotron-h-8b"), state_dtype=dtype) for dtype in ("fp32", "bf16"))
    assert (full.snapshot_bytes, half.snapshot_bytes) == (102_137_856, 51_806_208)
    assert full.copy_seconds - half.copy_seconds == pytest.approx(50_331_648 / 1.35e12)
