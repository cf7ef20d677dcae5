"""What models weigh: checked against published figures and arithmetic by hand, never against the readers themselves."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from ssmcache.config import AttentionLayerConfig, GpuCacheTierConfig, KVCacheManagerConfig, SsmLayerConfig
from ssmcache.models import CONFIDENCES, ModelError, ModelSpec, dtype_name, family_names, load_model, preset_names

KIB = 1024


def write_config(folder: Path, **fields: object) -> Path:
    """A config.json in a folder of its own; fields set to None are left out."""
    path = folder / "config.json"
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}), encoding="utf-8")
    return path


NEMOTRON: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-*E",
    "num_hidden_layers": 4,
    "hidden_size": 4480,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 80,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "expand": 2,
    "torch_dtype": "bfloat16",
}
BAMBA: dict[str, Any] = {
    "model_type": "bamba",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "attn_layer_indices": [1],
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
QWEN3_NEXT: dict[str, Any] = {
    "model_type": "qwen3_next",
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
}


# ---- published figures, by hand ------------------------------------------------------------------------------------

# name: attention layers, SSM layers, bytes of KV a token, bytes of SSM state in fp32, bytes of convolution in bf16
BY_HAND = {
    # 4 layers x (K + V) x 8 heads x 128 x 2 B = 16 KiB; 24 x 128 heads x 64 x 128 x 4 B;
    # conv 128 x 64 + 2 x 8 groups x 128 = 10,240 channels x 3 positions x 2 B x 24
    "nemotron-h-8b": (4, 24, 16 * KIB, 24 * 128 * 64 * 128 * 4, 24 * 10_240 * 3 * 2),
    # NVIDIA's provider: 256 heads x 64, d_state 256, so conv 16,384 + 2 x 8 x 256 = 20,480 channels
    "nemotron-h-47b": (5, 45, 5 * 2 * 8 * 128 * 2, 45 * 256 * 64 * 256 * 4, 45 * 20_480 * 3 * 2),
    "nemotron-h-56b": (10, 54, 10 * 2 * 8 * 128 * 2, 54 * 256 * 64 * 256 * 4, 54 * 20_480 * 3 * 2),
    # 128 heads x 80 = 10,240 (not 2 x 4,480 = 8,960); conv 10,240 + 2,048 = 12,288
    "nemotron-nano-2-9b": (4, 27, 16 * KIB, 27 * 10_240 * 128 * 4, 27 * 12_288 * 3 * 2),
    # 2 KV heads x 128 in 6 layers; 64 heads x 64 = 4,096; conv 4,096 + 2,048 = 6,144
    "nemotron-3-nano-30b": (6, 23, 6 * 2 * 2 * 128 * 2, 23 * 4_096 * 128 * 4, 23 * 6_144 * 3 * 2),
    # 3 x 2 x 8 x 128 x 2 B; 29 x 8,192 x 128; one group: conv 8,192 + 256 = 8,448
    "bamba-9b": (3, 29, 12 * KIB, 29 * 8_192 * 128 * 4, 29 * 8_448 * 3 * 2),
    # Mamba-1: [8,192, 16], conv over 8,192 alone; attention in 4 of 32 layers (1:7)
    "jamba-1.5-mini": (4, 28, 16 * KIB, 28 * 8_192 * 16 * 4, 28 * 8_192 * 3 * 2),
    # 9 blocks of 8 layers, hidden size 8,192, head size 128, 8 KV heads
    "jamba-1.5-large": (9, 63, 36 * KIB, 63 * 16_384 * 16 * 4, 63 * 16_384 * 3 * 2),
    # 13 uses of a shared block with 32 heads of 2 x 3,584 / 32 = 224; Mamba-2 in all 81: 7,168 wide, 2 groups of 64
    "zamba2-7b": (13, 81, 13 * 2 * 32 * 224 * 2, 81 * 7_168 * 64 * 4, 81 * (7_168 + 256) * 3 * 2),
    # both kinds in every layer; d_ssm 3,072 (not 2 x 3,072); conv 3,072 + 2 x 256
    "falcon-h1-7b": (44, 44, 44 * 2 * 2 * 128 * 2, 44 * 3_072 * 256 * 4, 44 * 3_584 * 3 * 2),
    # d_ssm 4,096 (not 2 x 5,120); 2 groups: conv 4,096 + 4 x 256 = 5,120
    "falcon-h1-34b": (72, 72, 72 * 2 * 4 * 128 * 2, 72 * 4_096 * 256 * 4, 72 * 5_120 * 3 * 2),
    "granite-4.0-h-small": (4, 36, 16 * KIB, 36 * 8_192 * 128 * 4, 36 * 8_448 * 3 * 2),
    # 12 heads of 128, 4 KV heads; 48 heads x 64 = 3,072; conv 3,072 + 256
    "granite-4.0-h-tiny": (4, 36, 8 * KIB, 36 * 3_072 * 128 * 4, 36 * 3_328 * 3 * 2),
    # 12 x 2 x 2 x 256 x 2 B = 24 KiB; 36 x 32 x 128 x 128; conv 2 x 16 x 128 + 32 x 128 = 8,192
    "qwen3-next-80b-a3b": (12, 36, 24 * KIB, 36 * 32 * 128 * 128 * 4, 36 * 8_192 * 3 * 2),
    "qwen3.5-9b": (8, 24, 32 * KIB, 24 * 32 * 128 * 128 * 4, 24 * 8_192 * 3 * 2),
    # MLA: 512 + 64 elements a token in 7 layers; KDA: 32 x 128 x 128, conv q, k, v of 4,096 channels each
    "kimi-linear-48b-a3b": (7, 20, 7 * 576 * 2, 20 * 32 * 128 * 128 * 4, 20 * 3 * 4_096 * 3 * 2),
    # 30 KV heads of 128; 30 x 192 x 96; conv 2 x 2,880 + 5,760 = 11,520
    "olmo-hybrid-7b": (8, 24, 120 * KIB, 24 * 30 * 192 * 96 * 4, 24 * 11_520 * 3 * 2),
    "llama-3.1-8b": (32, 0, 128 * KIB, 0, 0),
    # 2 x 2,560 = 5,120 wide; one group of 128: conv 5,376
    "mamba2-2.7b": (0, 64, 0, 64 * 5_120 * 128 * 4, 64 * 5_376 * 3 * 2),
    # Marconi counts in fp16, so its "fp32 state" is twice its own figure
    "marconi-7b": (4, 24, 64 * KIB, 24 * 4_096 * 128 * 4, 24 * 8_448 * 4 * 2),
}


def test_every_preset_has_figures_by_hand() -> None:
    assert set(BY_HAND) == set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_preset_equals_arithmetic_by_hand(name: str) -> None:
    spec = load_model(name)
    num_attention, num_ssm, kv_bytes, state_bytes, conv_bytes = BY_HAND[name]
    assert (spec.num_attention_layers, spec.num_ssm_layers) == (num_attention, num_ssm)
    assert spec.kv_bytes_per_token() == kv_bytes
    assert spec.ssm_state_bytes("fp32") == state_bytes
    assert spec.conv_state_bytes() == conv_bytes
    assert spec.snapshot_bytes("fp32") == state_bytes + conv_bytes


@pytest.mark.parametrize("name", preset_names())
def test_preset_states_source_and_confidence(name: str) -> None:
    spec = load_model(name)
    assert spec.name == name
    assert spec.source
    assert spec.confidence in CONFIDENCES
    assert spec.num_parameters
    assert spec.parameters_source
    has_experts = any(layer.feed_forward == "moe" for layer in spec.layers)
    assert has_experts == (spec.num_active_parameters is not None)


def test_marconi_accounts_exactly_as_published() -> None:
    spec = load_model("marconi-7b")
    # per layer: d_model x N x 2 B, and 4 positions of (2 d_model + 2 N) channels x 2 B
    assert 4096 * 128 * 2 + (2 * 4096 + 2 * 128) * 4 * 2 == 1_116_160
    assert spec.snapshot_bytes() == 24 * 1_116_160 == 26_787_840
    assert spec.kv_bytes_per_token() == 4 * 2 * 4096 * 2 == 65_536
    assert spec.kv_tokens_per_snapshot() == 408.75


@pytest.mark.parametrize(
    ("name", "state_dtype", "megabytes", "tokens"),
    [
        ("nemotron-h-8b", "bf16", 51.8, 3_162),
        ("nemotron-h-8b", None, 102.1, 6_234),
        ("qwen3-next-80b-a3b", None, 77.3, 3_144),
        ("qwen3.5-9b", None, 51.5, 1_572),
        ("olmo-hybrid-7b", None, 54.7, 445.5),
    ],
)
def test_snapshot_weighs_what_others_measured(
    name: str, state_dtype: str | None, megabytes: float, tokens: float
) -> None:
    spec = load_model(name)
    assert spec.snapshot_bytes(state_dtype) / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert spec.kv_tokens_per_snapshot(state_dtype=state_dtype) == pytest.approx(tokens, abs=0.5)


def test_a_snapshot_weighs_no_tokens_without_both_kinds_of_layers() -> None:
    assert load_model("llama-3.1-8b").kv_tokens_per_snapshot() is None
    assert load_model("mamba2-2.7b").kv_tokens_per_snapshot() is None


# ---- traps, one each -----------------------------------------------------------------------------------------------


def only(spec: ModelSpec, kind: str) -> Any:
    """The one shape of attention or of SSM that the model has."""
    shapes = {getattr(layer, kind) for layer in spec.layers if getattr(layer, kind)}
    assert len(shapes) == 1
    return shapes.pop()


def test_nemotron_reads_heads_and_never_expands_the_hidden_size(tmp_path: Path) -> None:
    spec = load_model(str(write_config(tmp_path, **NEMOTRON)))
    assert only(spec, "ssm").state_shape == (128, 80, 128)
    assert only(spec, "ssm").conv_shape == (128 * 80 + 2 * 8 * 128, 3)
    assert only(spec, "attention").elements_by_role() == (("key", 8 * 128), ("value", 8 * 128))
    assert [layer.kinds for layer in spec.layers] == [("ssm",), ("mlp",), ("attention",), ("moe",)]


def test_nemotron_layers_may_be_a_list_of_names(tmp_path: Path) -> None:
    names = ["mamba", "mlp", "full_attention", "moe"]
    listed = {**NEMOTRON, "hybrid_override_pattern": None, "layers_block_type": names}
    by_pattern = load_model(str(write_config(tmp_path, **NEMOTRON)))
    assert load_model(str(write_config(tmp_path, **listed))).layers == by_pattern.layers


def test_falcon_h1_state_is_as_wide_as_d_ssm(tmp_path: Path) -> None:
    path = write_config(
        tmp_path,
        model_type="falcon_h1",
        num_hidden_layers=3,
        hidden_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        mamba_expand=2,
        mamba_d_ssm=768,
        mamba_n_heads=24,
        mamba_d_head="auto",
        mamba_d_state=64,
        mamba_n_groups=1,
        mamba_d_conv=4,
    )
    spec = load_model(str(path))
    assert only(spec, "ssm").state_shape == (24, 32, 64)
    assert only(spec, "ssm").conv_shape == (768 + 2 * 64, 3)
    assert [layer.kinds for layer in spec.layers] == [("attention", "ssm", "mlp")] * 3


def test_zamba2_keeps_kv_at_each_use_of_the_shared_block() -> None:
    spec = load_model("zamba2-7b")
    assert sum(1 for layer in spec.layers if layer.kinds == ("attention", "ssm", "mlp")) == 13
    assert only(spec, "attention").num_key_elements == 32 * 224  # twice the hidden size of 3,584


def test_zamba2_reads_the_older_spelling_of_its_fields(tmp_path: Path) -> None:
    # as in Zyphra/Zamba2-1.2B, revision 4f8e85cd31975fe07d8fc3145239d58913192294: 6 of 38 layers share a block
    path = write_config(
        tmp_path,
        model_type="zamba2",
        num_hidden_layers=38,
        layers_block_type=["g" if index in (5, 11, 17, 23, 29, 35) else "m" for index in range(38)],
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=32,
        expansion_factor=2,
        mamba_headdim=64,
        state_size=128,
        conv_dimension=4,
    )
    spec = load_model(str(path))
    assert spec.kv_bytes_per_token() == 6 * 2 * 32 * 128 * 2
    assert only(spec, "ssm").state_shape == (64, 64, 128)
    assert only(spec, "ssm").conv_shape == (4096 + 2 * 128, 3)


def test_jamba_places_attention_by_period_and_offset() -> None:
    spec = load_model("jamba-1.5-mini")
    assert [index for index, layer in enumerate(spec.layers) if layer.attention] == [4, 12, 20, 28]
    assert spec.layers[4].kinds == ("attention", "mlp")
    assert spec.layers[5].kinds == ("ssm", "moe")


def test_jamba_convolves_the_inner_width_alone() -> None:
    assert only(load_model("jamba-1.5-mini"), "ssm").conv_shape == (8192, 3)


def test_bamba_places_attention_by_index() -> None:
    assert [index for index, layer in enumerate(load_model("bamba-9b").layers) if layer.attention] == [9, 18, 27]


def test_granite_without_experts_has_dense_layers(tmp_path: Path) -> None:
    # as in granite-4.0-h-1b, whose config.json says num_local_experts: 0
    fields = {**BAMBA, "model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"] * 2}
    spec = load_model(str(write_config(tmp_path, **fields, num_local_experts=0)))
    assert [layer.kinds for layer in spec.layers] == [("ssm", "mlp"), ("attention", "mlp")] * 2


def test_qwen3_next_has_its_own_key_and_value_heads(tmp_path: Path) -> None:
    spec = load_model(str(write_config(tmp_path, **QWEN3_NEXT)))
    assert only(spec, "ssm").state_shape == (32, 64, 128)
    assert only(spec, "ssm").conv_shape == (2 * 16 * 128 + 32 * 64, 3)
    assert [index for index, layer in enumerate(spec.layers) if layer.attention] == [3, 7]


def test_layer_types_win_over_the_interval(tmp_path: Path) -> None:
    names = ["full_attention", *["linear_attention"] * 7]
    spec = load_model(str(write_config(tmp_path, **QWEN3_NEXT, layer_types=names)))
    assert [index for index, layer in enumerate(spec.layers) if layer.attention] == [0]


def test_qwen3_5_is_described_by_its_text_config(tmp_path: Path) -> None:
    text = {**QWEN3_NEXT, "model_type": "qwen3_5_text", "mamba_ssm_dtype": "float32", "dtype": "float16"}
    spec = load_model(str(write_config(tmp_path, model_type="qwen3_5", text_config=text)))
    assert (spec.family, spec.num_ssm_layers) == ("qwen3_5_text", 6)
    assert (spec.state_dtype, spec.conv_dtype) == ("float32", "float16")


def test_kimi_keeps_one_latent_vector_and_counts_layers_from_one() -> None:
    spec = load_model("kimi-linear-48b-a3b")
    assert only(spec, "attention").elements_by_role() == (("latent", 512 + 64),)
    assert [index for index, layer in enumerate(spec.layers) if layer.attention] == [3, 7, 11, 15, 19, 23, 26]
    assert spec.layers[0].kinds == ("ssm", "mlp")
    assert spec.layers[1].kinds == ("ssm", "moe")


def test_kda_convolves_queries_keys_and_values() -> None:
    assert only(load_model("kimi-linear-48b-a3b"), "ssm").conv_shape == (3 * 32 * 128, 3)


def test_kv_heads_are_all_heads_where_not_stated(tmp_path: Path) -> None:
    spec = load_model(str(write_config(tmp_path, **{**LLAMA, "num_key_value_heads": None})))
    assert spec.kv_bytes_per_token() == 2 * 2 * 256 * 2


def test_pure_mamba2_of_transformers(tmp_path: Path) -> None:
    # mistralai/Mamba-Codestral-7B-v0.1
    path = write_config(
        tmp_path,
        model_type="mamba2",
        num_hidden_layers=64,
        hidden_size=4096,
        expand=2,
        num_heads=128,
        head_dim=64,
        state_size=128,
        n_groups=8,
        conv_kernel=4,
    )
    spec = load_model(str(path))
    assert spec.ssm_state_bytes("bf16") == 64 * 128 * 64 * 128 * 2
    assert spec.conv_state_bytes() == 64 * (8192 + 2 * 8 * 128) * 3 * 2


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({"model_type": "mixtral"}, ("attention", "moe")),
        ({"model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False}, ("attention", "mlp")),
        ({"model_type": "qwen3_moe", "head_dim": 128, "num_experts": 8, "mlp_only_layers": [1]}, ("attention", "moe")),
    ],
)
def test_plain_transformers(tmp_path: Path, fields: dict[str, Any], kinds: tuple[str, ...]) -> None:
    spec = load_model(str(write_config(tmp_path, **{**LLAMA, **fields})))
    assert spec.layers[0].kinds == kinds
    assert spec.kv_bytes_per_token() == 2 * 2 * 2 * fields.get("head_dim", 32) * 2


# ---- dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "name"),
    [("fp32", "float32"), ("BF16", "bfloat16"), ("torch.float16", "float16"), ("fp8", "float8_e4m3fn")],
)
def test_dtypes_have_short_names(alias: str, name: str) -> None:
    assert dtype_name(alias) == name


def test_states_are_float32_and_the_rest_bfloat16_where_a_config_states_nothing(tmp_path: Path) -> None:
    spec = load_model(str(write_config(tmp_path, **BAMBA)))
    assert (spec.kv_dtype, spec.state_dtype, spec.conv_dtype) == ("bfloat16", "float32", "bfloat16")


@pytest.mark.parametrize("field", ["mamba_ssm_cache_dtype", "mamba_ssm_dtype"])
def test_a_config_may_state_the_dtype_of_its_states(tmp_path: Path, field: str) -> None:
    assert load_model(str(write_config(tmp_path, **BAMBA, **{field: "bfloat16"}))).state_dtype == "bfloat16"


def test_dtypes_scale_kv_and_states_apart() -> None:
    spec = load_model("nemotron-h-8b")
    assert spec.kv_bytes_per_token("fp8") == 8 * KIB
    assert spec.ssm_state_bytes("fp16") == spec.ssm_state_bytes() // 2
    assert spec.snapshot_bytes("fp16") - spec.ssm_state_bytes("fp16") == spec.conv_state_bytes()


def test_an_unknown_dtype_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"expected one of float32, .*fp8, got 'int4'"):
        load_model("nemotron-h-8b").kv_bytes_per_token("int4")


# ---- layers of a manager -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_cache_layers_sum_to_the_figures_of_the_model(name: str) -> None:
    spec = load_model(name)
    layers = spec.cache_layers(16)
    kv_bytes = sum(buf.size for layer in layers if isinstance(layer, AttentionLayerConfig) for buf in layer.buffers)
    snapshot = sum(buf.size for layer in layers if isinstance(layer, SsmLayerConfig) for buf in layer.buffers)
    assert (kv_bytes, snapshot) == (16 * spec.kv_bytes_per_token(), spec.snapshot_bytes())
    KVCacheManagerConfig(tokens_per_block=16, layers=layers, cache_tiers=(GpuCacheTierConfig(quota=None),))


def test_layer_ids_are_the_layers_of_the_model(tmp_path: Path) -> None:
    layers = load_model(str(write_config(tmp_path, **NEMOTRON))).cache_layers(32)
    assert [(type(layer), layer.layer_id) for layer in layers] == [(SsmLayerConfig, 0), (AttentionLayerConfig, 2)]
    assert [(buffer.role, buffer.size) for buffer in layers[0].buffers] == [
        ("ssm_state", 128 * 80 * 128 * 4),
        ("conv_state", 12_288 * 3 * 2),
    ]
    assert [(buffer.role, buffer.size) for buffer in layers[1].buffers] == [
        ("key", 32 * 8 * 128 * 2),
        ("value", 32 * 8 * 128 * 2),
    ]


def test_a_layer_of_both_kinds_gives_two_configs_with_ids_of_their_own() -> None:
    ids = [layer.layer_id for layer in load_model("falcon-h1-7b").cache_layers(1)]
    assert ids == [part for index in range(44) for part in (index, index + 44)]


def test_mla_has_one_buffer() -> None:
    attention = load_model("kimi-linear-48b-a3b").cache_layers(64, kv_dtype="fp8")[3]
    assert [(buffer.role, buffer.size) for buffer in attention.buffers] == [("latent", 64 * 576)]


def test_cache_layers_take_other_dtypes() -> None:
    ssm = load_model("nemotron-h-8b").cache_layers(64, state_dtype="bf16")[0]
    assert ssm.buffers[0].size == 128 * 64 * 128 * 2


def test_a_block_needs_tokens() -> None:
    with pytest.raises(ModelError, match="tokens_per_block: expected a positive integer, got 0"):
        load_model("bamba-9b").cache_layers(0)


# ---- finding models, and bad input ---------------------------------------------------------------------------------


def test_presets_are_found_in_any_case() -> None:
    assert load_model("Nemotron-H-8B") == load_model("nemotron-h-8b")


def test_a_folder_stands_for_its_config_and_names_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    path = write_config(folder, **BAMBA)
    spec = load_model(str(folder))
    assert spec == load_model(str(path))
    assert (spec.name, spec.family, spec.num_parameters) == ("my-model", "bamba", None)


def test_specs_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        load_model("bamba-9b").name = "other"  # type: ignore[misc]


def message(name_or_path: object) -> str:
    """The error of a model that cannot be loaded; every one is a single line."""
    with pytest.raises(ModelError) as caught:
        load_model(str(name_or_path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_name_suggests_close_ones_and_lists_all() -> None:
    text = message("zamba2-8b")
    assert "did you mean zamba2-7b" in text
    assert all(name in text for name in preset_names())


def test_a_missing_file_is_not_taken_for_a_name(tmp_path: Path) -> None:
    assert message(tmp_path / "nothing.json").startswith(f"{tmp_path / 'nothing.json'}: expected a config.json to read")


def test_an_unknown_family_lists_the_known_ones(tmp_path: Path) -> None:
    text = message(write_config(tmp_path, **{**LLAMA, "model_type": "rwkv7"}))
    assert (
        text
        == f"{tmp_path / 'config.json'}: field 'model_type': expected one of {', '.join(family_names())}, got 'rwkv7'"
    )


def test_a_config_without_model_type_says_so(tmp_path: Path) -> None:
    assert (
        message(write_config(tmp_path, hidden_size=8)) == f"{tmp_path / 'config.json'}: field 'model_type' is missing"
    )


def test_broken_json_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n  "model_type": "llama",\n  oops\n}', encoding="utf-8")
    assert message(path).startswith(f"{path}:3: expected JSON, got")


@pytest.mark.parametrize(
    ("content", "expected"), [(b"[1]", "expected a JSON object, got list"), (b"\xff\xfe", "UTF-8")]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert expected in message(path)


@pytest.mark.parametrize(
    ("base", "fields", "expected"),
    [
        (BAMBA, {"mamba_d_state": None}, "field 'mamba_d_state' is missing"),
        (NEMOTRON, {"conv_kernel": None}, "field 'conv_kernel' (or 'mamba_d_conv') is missing"),
        (NEMOTRON, {"head_dim": None}, "field 'head_dim' (or 'attention_head_dim') is missing"),
        (BAMBA, {"mamba_d_state": "16"}, "field 'mamba_d_state': expected a positive integer, got '16'"),
        (BAMBA, {"num_hidden_layers": True}, "field 'num_hidden_layers': expected a positive integer, got True"),
        (BAMBA, {"attn_layer_indices": [4]}, "field 'attn_layer_indices': expected layers in 0..3, got [4]"),
        (BAMBA, {"attn_layer_indices": 1}, "field 'attn_layer_indices': expected a list of integers, got 1"),
        (BAMBA, {"mamba_d_head": 32}, "Mamba heads x head size: expected the inner width 512, got 256"),
        (BAMBA, {"mamba_ssm_cache_dtype": "int3"}, "field 'mamba_ssm_cache_dtype': dtype: expected one of"),
        (NEMOTRON, {"num_hidden_layers": 5}, "length of hybrid_override_pattern: expected num_hidden_layers = 5"),
        (
            NEMOTRON,
            {"hybrid_override_pattern": "M-*X"},
            "hybrid_override_pattern[3]: expected one of 'M', '*', '-', 'E'",
        ),
        (LLAMA, {"hidden_size": 250}, "field 'hidden_size': expected a multiple of num_attention_heads = 8, got 250"),
        (LLAMA, {"sliding_window": 4096}, "field 'sliding_window': expected null"),
        (LLAMA, {"layer_types": ["sliding_attention"] * 2}, "layer_types[0]: expected one of 'full_attention'"),
        (LLAMA, {"text_config": 3}, "field 'text_config': expected an object, got 3"),
        (LLAMA, {"model_type": "qwen3"}, "field 'head_dim' (or 'attention_head_dim') is missing"),
        (QWEN3_NEXT, {"full_attention_interval": None}, "field 'full_attention_interval' is missing"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, base: dict[str, Any], fields: dict[str, Any], expected: str) -> None:
    text = message(write_config(tmp_path, **{**base, **fields}))
    assert text.startswith(f"{tmp_path / 'config.json'}: {expected}")


MAMBA_SSM: dict[str, Any] = {"d_model": 256, "n_layer": 2, "ssm_cfg": {"layer": "Mamba2"}}
ZAMBA2: dict[str, Any] = {
    "model_type": "zamba2",
    "layers_block_type": ["mamba", "hybrid"],
    "hidden_size": 256,
    "num_attention_heads": 8,
    "mamba_expand": 2,
    "mamba_headdim": 64,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
}


@pytest.mark.parametrize(
    ("base", "fields", "expected"),
    [
        (LLAMA, {"num_hidden_layers": 10**9}, "field 'num_hidden_layers': expected at most 10,000, got 1000000000"),
        (BAMBA, {"num_hidden_layers": 10**9}, "field 'num_hidden_layers': expected at most 10,000, got 1000000000"),
        (
            QWEN3_NEXT,
            {"num_hidden_layers": 10**9},
            "field 'num_hidden_layers': expected at most 10,000, got 1000000000",
        ),
        (MAMBA_SSM, {"n_layer": 10**9}, "field 'n_layer': expected at most 10,000, got 1000000000"),
        (NEMOTRON, {"hybrid_override_pattern": "M" * 10_001}, "length of hybrid_override_pattern: expected at most"),
        (BAMBA, {"attn_layer_indices": [1] * 10_001}, "length of attn_layer_indices: expected at most 10,000, got"),
        (BAMBA, {"attn_layer_indices": [True]}, "field 'attn_layer_indices': expected a list of integers, got [True]"),
        (LLAMA, {"num_key_value_heads": 10**18}, "field 'num_key_value_heads': expected at most 16,777,216, got"),
        (
            LLAMA,
            {"head_dim": 1 << 24, "num_key_value_heads": 1 << 24},
            "bytes of a token or a snapshot: expected at most",
        ),
        (
            NEMOTRON,
            {"ssm_state_size": 1 << 24, "mamba_head_dim": 1 << 24},
            "bytes of a token or a snapshot: expected at",
        ),
        (QWEN3_NEXT, {"layer_types": [["linear_attention"]] * 8}, "layer_types[0]: expected one of 'linear_attention'"),
        (QWEN3_NEXT, {"num_experts": False}, "field 'num_experts': expected a positive integer, got False"),
        (ZAMBA2, {"mamba_headdim": 1024}, "Mamba heads x head size: expected the inner width 512, got 0"),
        (ZAMBA2, {"num_attention_heads": 1024}, "field 'num_attention_heads': expected at most 2 x hidden_size = 512"),
        (MAMBA_SSM, {"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}, ", ssm_cfg: field 'headdim': expected a positive"),
        (MAMBA_SSM, {"ssm_cfg": {"layer": "Mamba2", "d_conv": 0}}, ", ssm_cfg: field 'd_conv': expected a positive"),
        (LLAMA, {"torch_dtype": "x" * 10_000}, "field 'torch_dtype': dtype: expected one of"),
        (LLAMA, {"head_dim": "x" * 10_000}, "field 'head_dim': expected a positive integer, got 'xxx"),
    ],
)
def test_an_absurd_field_is_named_shortly(
    tmp_path: Path, base: dict[str, Any], fields: dict[str, Any], expected: str
) -> None:
    text = message(write_config(tmp_path, **{**base, **fields}))
    assert text.removeprefix(f"{tmp_path / 'config.json'}").removeprefix(": ").startswith(expected)
    assert len(text) < 600 + len(str(tmp_path))


HOSTILE = (0, -1, 1, True, 1.5, float("inf"), float("nan"), "", "M", [], [[1]], {}, 1 << 24, 10**9, 10**18, 10**400)


@pytest.mark.parametrize(
    "base", [NEMOTRON, BAMBA, LLAMA, QWEN3_NEXT, MAMBA_SSM, ZAMBA2], ids=lambda base: str(base)[:25]
)
def test_any_value_of_any_field_is_a_model_or_one_line(tmp_path: Path, base: dict[str, Any]) -> None:
    for field in base:
        for value in HOSTILE:
            path = write_config(tmp_path, **{**base, field: value})
            try:
                spec = load_model(str(path))
            except ModelError as error:
                text = str(error)
            else:
                text = repr(spec.kv_tokens_per_snapshot())
                assert len(spec.layers) <= 10_000
                assert max(spec.kv_bytes_per_token(), spec.snapshot_bytes()) <= 1 << 40
                assert all(buffer.size > 0 for layer in spec.cache_layers(16) for buffer in layer.buffers)
            assert 0 < len(text.replace(str(tmp_path), "")) < 600


def test_a_convolution_of_one_position_keeps_nothing(tmp_path: Path) -> None:
    spec = load_model(str(write_config(tmp_path, **{**BAMBA, "mamba_d_conv": 1})))
    assert spec.conv_state_bytes() == 0
    roles = {buffer.role for layer in spec.cache_layers(16) for buffer in layer.buffers}
    assert roles == {"key", "value", "ssm_state"}


def test_files_that_are_no_config_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(f'{{"model_type": "llama", "hidden_size": {"1" * 5000}}}')
    assert "expected JSON of a model, got: Exceeds the limit" in message(path)
    path.write_text("[" * 100_000)
    assert "expected JSON of a model, got: maximum recursion depth" in message(path)
    path.write_bytes(b" " * ((1 << 24) + 1))
    assert message(path) == f"{path}: expected a config.json of at most 16,777,216 bytes, got more"
    assert "unknown model" in message("x" * 5000)


def test_kimi_layers_must_be_listed_once_each(tmp_path: Path) -> None:
    linear = {"kda_layers": [1, 2], "full_attn_layers": [2]}
    path = write_config(tmp_path, model_type="kimi_linear", num_hidden_layers=3, linear_attn_config=linear)
    expected = "linear_attn_config: kda_layers and full_attn_layers: expected each layer of 1..3 once, got [1, 2, 2]"
    assert message(path) == f"{path}, {expected}"


def test_attention_of_the_mamba_ssm_package_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path, d_model=256, n_layer=2, ssm_cfg={"layer": "Mamba2"}, attn_layer_idx=[1])
    assert "attn_layer_idx and d_intermediate: expected none" in message(path)
    assert "expected 'Mamba2'" in message(write_config(tmp_path, d_model=256, n_layer=2, ssm_cfg={"layer": "Mamba1"}))


def test_the_documented_table_holds_the_figures() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    for name in preset_names():
        spec = load_model(name)
        counts = (
            spec.kv_bytes_per_token(),
            spec.ssm_state_bytes(),
            spec.conv_state_bytes(),
            spec.snapshot_bytes(),
            round(spec.kv_tokens_per_snapshot() or 0),
        )
        cells = " | ".join(f"{count:,}" if count else "-" for count in counts)
        layers = f"{spec.num_attention_layers}/{spec.num_ssm_layers}"
        (row,) = (line for line in lines if line.startswith(f"| `{name}` |") and f"| {layers} |" in line)
        assert row.endswith(f"| {layers} | {cells} | {spec.confidence} |")
        assert any(line.startswith(f"| `{name}` |") and f"| {spec.source} |" in line for line in lines)
