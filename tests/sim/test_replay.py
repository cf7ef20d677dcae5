import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import GpuCacheTierConfig, KVCache, KVCacheManagerConfig
from ssmcache.models import load_model
from ssmcache_sim.accounting import ReplayResult
from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.errors import MemoryTooSmallError, SettingsError, TraceError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import build_config, make_settings, parse_prefill
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
TinyConfig = Callable[..., KVCacheManagerConfig]
MIB = 1 << 20
prompts_of_few_tokens = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=24), min_size=1, max_size=25)


def check_accounts(result: ReplayResult) -> None:
    """What must hold for every replay."""
    lost = result.lost_evicted + result.lost_alignment + result.lost_snapshot
    assert np.array_equal(result.usable + lost, result.kv_ceiling)
    for tokens in (result.lost_evicted, result.lost_alignment, result.lost_snapshot):
        assert (tokens >= 0).all()
    assert (result.usable <= result.ceiling).all()
    assert (result.ceiling <= result.kv_ceiling).all()
    totals = result.totals
    assert totals.usable_hit_tokens == result.usable.sum()
    assert totals.prompt_tokens == result.trace.prompt_tokens.sum()
    assert totals.kv_ceiling_hit_tokens == result.kv_ceiling.sum()


@pytest.mark.parametrize("prefill", ["reserved", "chunked"])
@pytest.mark.parametrize("model", ["nemotron-h-8b", "llama-3.1-8b", "mamba2-2.7b"])
def test_unlimited_memory_hits_the_ceiling_of_every_request(sample_path: Path, model: str, prefill: str) -> None:
    trace, spec = read_trace(sample_path), load_model(model)
    setting = make_settings(spec, 1024, ssm_reuse_interval=2048, gpu_memory_bytes=None, prefill=parse_prefill(prefill))
    result = replay(trace, build_config(spec, setting), prefill=setting.prefill)
    expected = infinite_cache(trace.with_block(1024), 2048 if spec.num_ssm_layers else None)
    check_accounts(result)
    assert np.array_equal(result.usable, expected.tokens)
    assert np.array_equal(result.attention, expected.kv_tokens)
    assert result.totals.lost_evicted_tokens == 0
    assert result.totals.snapshots.evicted == 0


def lru_hits(prompts: list[list[int]], block: int, num_pages: int) -> tuple[list[int], list[bool]]:
    """Blocks of KV alone in one list by recency; a request moves its path to the front, the first block foremost."""
    kept: list[tuple[int, ...]] = []
    hits, too_large = [], []
    for prompt in prompts:
        path = [tuple(prompt[:end]) for end in range(block, len(prompt) + 1, block)]
        too_large.append(len(path) + 1 > num_pages)
        if too_large[-1]:
            hits.append(0)
            continue
        found = sum(1 for key in path if key in kept)
        hits.append(min(found, (len(prompt) - 1) // block) * block)
        kept = (path + [key for key in kept if key not in path])[: num_pages - 1]
    return hits, too_large


@settings(max_examples=200, deadline=None)
@given(prompts=prompts_of_few_tokens, block=st.integers(1, 4), num_pages=st.integers(2, 12))
def test_attention_only_hits_equal_a_block_list_in_order_of_use(
    trace_of: TraceOf, tiny_config: TinyConfig, prompts: list[list[int]], block: int, num_pages: int
) -> None:
    hits, too_large = lru_hits(prompts, block, num_pages)
    config = tiny_config(block, num_pages=num_pages)
    if all(too_large):
        with pytest.raises(MemoryTooSmallError):
            replay(trace_of(prompts, block), config)
        return
    result = replay(trace_of(prompts, block), config)
    check_accounts(result)
    assert result.usable.tolist() == hits
    assert result.too_large.tolist() == too_large


@settings(max_examples=100, deadline=None)
@given(prompts=prompts_of_few_tokens, num_pages=st.integers(14, 20), num_states=st.integers(2, 8))
def test_accounts_hold_under_pressure_on_pages_and_on_snapshots(
    trace_of: TraceOf, tiny_config: TinyConfig, prompts: list[list[int]], num_pages: int, num_states: int
) -> None:
    config = tiny_config(2, num_pages=num_pages, interval=4, num_states=num_states)
    result = replay(trace_of(prompts, 2), config)
    check_accounts(result)
    assert (result.used_bytes[0] <= num_pages * config.layers[0].buffers[0].size).all()
    assert result.totals.too_large_requests == 0


def test_requests_too_large_are_counted_and_stay_in_every_denominator(
    trace_of: TraceOf, tiny_config: TinyConfig
) -> None:
    long, short = [0] * 40, [0] * 9
    result = replay(trace_of([short, long, long, short], 4), tiny_config(4, num_pages=4))
    check_accounts(result)
    assert result.too_large.tolist() == [False, True, True, False]
    assert result.usable.tolist() == [0, 0, 0, 8]
    assert result.kv_ceiling.tolist() == [0, 8, 36, 8]
    assert result.lost_evicted.tolist() == [0, 8, 36, 0]
    assert (result.totals.too_large_requests, result.totals.prompt_tokens) == (2, 98)
    assert result.totals.usable_token_hit_rate == 8 / 98


def test_the_least_memory_named_by_the_error_is_enough_and_one_byte_less_is_not(sample_path: Path) -> None:
    trace, spec = read_trace(sample_path), load_model("nemotron-h-8b")
    config = build_config(spec, make_settings(spec, 512, gpu_memory_bytes=MIB))
    with pytest.raises(MemoryTooSmallError, match="memory too small for every request: expected at least") as caught:
        replay(trace, config)
    least = int(re.findall(r"at least (\d+) bytes", str(caught.value))[0])
    enough = replace(config, cache_tiers=(GpuCacheTierConfig(least),))
    assert replay(trace, enough).totals.too_large_requests < trace.num_requests
    with pytest.raises(MemoryTooSmallError, match=f"at least {least} bytes .* got {least - 1} bytes"):
        replay(trace, replace(config, cache_tiers=(GpuCacheTierConfig(least - 1),)))


def test_chunked_and_reserved_prefill_hit_the_same_at_finite_memory(sample_path: Path) -> None:
    trace, spec = read_trace(sample_path), load_model("marconi-7b")
    config = build_config(spec, make_settings(spec, 512, ssm_reuse_interval=1024, gpu_memory_bytes=60 << 30))
    reserved, chunked = replay(trace, config), replay(trace, config, prefill="chunked")
    assert 0 < reserved.totals.usable_hit_tokens < reserved.totals.ceiling_hit_tokens
    assert np.array_equal(reserved.usable, chunked.usable)
    assert np.array_equal(reserved.used_bytes, chunked.used_bytes)


def test_memory_after_each_request_and_peaks_are_bytes_by_layer_group(
    trace_of: TraceOf, tiny_config: TinyConfig
) -> None:
    config = tiny_config(4, num_pages=10, interval=8, num_states=3)
    page, state = (layer.buffers[0].size for layer in config.layers)
    result = replay(trace_of([[0] * 9, [1] * 5], 4), config)
    assert result.used_bytes.tolist() == [[2 * page, 3 * page], [1 * state, 1 * state]]
    assert [(peak.kind, peak.peak_bytes, peak.pool_bytes) for peak in result.totals.peaks] == [
        ("attention", 4 * page, 10 * page),
        ("ssm", 2 * state, 3 * state),
    ]


def test_progress_is_told_up_to_the_end(sample_path: Path) -> None:
    trace, spec = read_trace(sample_path), load_model("llama-3.1-8b")
    told: list[int] = []
    replay(trace, build_config(spec, make_settings(spec, 512, gpu_memory_bytes=None)), progress=told.append)
    assert told == sorted(told)
    assert told[-1] == trace.num_requests


def test_a_manager_that_refuses_what_fits_is_a_loud_bug(
    trace_of: TraceOf, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "resume", lambda self, stream=None: False)
    with pytest.raises(RuntimeError, match="request 0 of 10 tokens fits 16, but: "):
        replay(trace_of([[0] * 9], 4), tiny_config(4, num_pages=4))


def test_blocks_finer_than_the_trace_are_refused(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    with pytest.raises(TraceError, match="finer blocks are not recorded"):
        replay(trace_of([[0] * 9], 4), tiny_config(2, num_pages=None))


def test_the_default_interval_is_the_first_multiple_of_the_block_from_512_on() -> None:
    hybrid, dense = load_model("nemotron-h-8b"), load_model("llama-3.1-8b")
    intervals = [
        make_settings(hybrid, block, gpu_memory_bytes=None).ssm_reuse_interval for block in (16, 96, 512, 1024)
    ]
    assert intervals == [512, 576, 512, 1024]
    assert make_settings(dense, 96, gpu_memory_bytes=None, ssm_reuse_interval=700).ssm_reuse_interval is None
    assert build_config(dense, make_settings(dense, 96, gpu_memory_bytes=None)).tokens_per_block == 96


def test_settings_that_no_manager_can_have_are_one_line(sample_path: Path) -> None:
    spec = load_model("nemotron-h-8b")
    wrong = [
        (
            make_settings(spec, 512, gpu_memory_bytes=None, ssm_reuse_interval=700),
            "expected a multiple of tokens_per_block",
        ),
        (make_settings(spec, 0, gpu_memory_bytes=None), "tokens_per_block: expected a positive integer, got 0"),
        (make_settings(spec, 512, gpu_memory_bytes=None, ssm_fraction=1.5), "ssm_fraction: expected a share"),
    ]
    for setting, message in wrong:
        with pytest.raises(SettingsError, match=message):
            build_config(spec, setting)
    with pytest.raises(SettingsError, match="prefill: expected reserved or chunked, got 'both'"):
        parse_prefill("both")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("capacity_tokens", "attention_hits", "hybrid_hits"),
    [(10**6, 8_091_136, 1_900_544), (10**7, 43_093_504, 37_467_136)],
)
def test_finite_memory_gives_the_published_hits(
    conversation: Trace, tiny_config: TinyConfig, capacity_tokens: int, attention_hits: int, hybrid_hits: int
) -> None:
    num_pages, num_states = capacity_tokens // 512 + 1, capacity_tokens // 1024 + 1
    attention = replay(conversation, tiny_config(512, num_pages=num_pages))
    assert attention.totals.usable_hit_tokens == attention_hits
    config = tiny_config(512, num_pages=num_pages, interval=1024, num_states=num_states)
    hybrid = replay(conversation, config)
    check_accounts(hybrid)
    assert hybrid.totals.usable_hit_tokens == hybrid_hits


@pytest.mark.shared
def test_unlimited_memory_gives_the_published_ceiling_to_the_token(conversation: Trace) -> None:
    spec = load_model("nemotron-h-8b")
    for block, interval, tokens in ((512, 512, 54_063_104), (1024, 1024, 49_173_504)):
        setting = make_settings(spec, block, ssm_reuse_interval=interval, gpu_memory_bytes=None)
        assert replay(conversation, build_config(spec, setting)).totals.usable_hit_tokens == tokens
