"""`cache_config` says what `ssmcache.models` says, from the tensors of the model; on models of full size, too, which
cost nothing on the meta device.
"""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.17")

from small_runners import CUTS, REUSED, prompt, small_runner  # noqa: E402
from tiny_models import HYBRIDS, tiny_model  # noqa: E402

from ssmcache import BufferConfig, GpuCacheTierConfig, SsmLayerConfig  # noqa: E402
from ssmcache.config import AttentionLayerConfig  # noqa: E402
from ssmcache.integrations.transformers import cache_config  # noqa: E402
from ssmcache.models import load_model  # noqa: E402
from ssmcache.models.presets import PRESETS  # noqa: E402

TIER = [GpuCacheTierConfig(8 << 30)]
CLASSES = {
    "bamba": "Bamba",
    "falcon_h1": "FalconH1",
    "granitemoehybrid": "GraniteMoeHybrid",
    "kimi_linear": "KimiLinear",
    "llama": "Llama",
    "nemotron_h": "NemotronH",
    "olmo_hybrid": "OlmoHybrid",
    "qwen3_5": "Qwen3_5",
    "qwen3_next": "Qwen3Next",
    "zamba2": "Zamba2",
}
FULL_SIZE = {preset.name: preset for preset in PRESETS if preset.config.get("model_type") in CLASSES}


def full_size_model(fields):
    name = CLASSES[fields["model_type"]]
    fields = {**fields, **fields.get("text_config", {})}
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    fields = {key: value for key, value in fields.items() if key not in ("model_type", "text_config")}
    config = config_class(**{key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()})
    with torch.device("meta"):
        return getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16).eval()


def as_models_has_it(layer):
    """A layer of `cache_config` as `ModelSpec.cache_layers` would have it: windows with a column less, one latent."""
    buffers = {buffer.role: buffer.size for buffer in layer.buffers}
    if isinstance(layer, SsmLayerConfig):
        return {**buffers, "conv_state": buffers["conv_state"] * 3 // 4}  # d_conv is 4 in all of them
    return buffers


@pytest.mark.parametrize("name", FULL_SIZE)
def test_layers_and_bytes_of_published_models_are_those_of_the_presets(name):
    config = cache_config(full_size_model(FULL_SIZE[name].config), tokens_per_block=32, cache_tiers=TIER)
    expected = load_model(name).cache_layers(tokens_per_block=32)
    assert [layer.layer_id for layer in config.layers] == [layer.layer_id for layer in expected]
    for layer, known in zip(config.layers, expected, strict=True):
        assert type(layer) is type(known)
        sizes = {buffer.role: buffer.size for buffer in known.buffers}
        found = as_models_has_it(layer)
        if "latent" in sizes:
            found = {"latent": found["key"] + found["value"]}
        assert found == sizes


@pytest.mark.parametrize("family", HYBRIDS)
def test_buffers_are_whole_multiples_of_256_bytes(family):
    config = cache_config(tiny_model(family), tokens_per_block=3, cache_tiers=TIER, ssm_reuse_interval=6)
    assert all(buffer.size % 256 == 0 for layer in config.layers for buffer in layer.buffers)


def test_keys_and_values_of_mla_have_widths_of_their_own():
    config = cache_config(tiny_model("kimi_linear"), tokens_per_block=32, cache_tiers=TIER)
    (attention,) = [layer for layer in config.layers if isinstance(layer, AttentionLayerConfig)]
    assert attention.buffers == (BufferConfig("key", 32 * 24 * 4), BufferConfig("value", 32 * 8 * 4))


def test_a_sliding_window_is_a_group_of_its_own():
    config = cache_config(tiny_model("gemma3"), tokens_per_block=32, cache_tiers=TIER)
    assert [layer.sliding_window_size for layer in config.layers] == [24, None, 24]


def test_settings_reach_the_manager_and_bad_ones_are_refused():
    model = tiny_model("bamba")
    assert cache_config(model, tokens_per_block=32, cache_tiers=TIER, ssm_reuse_interval=96).ssm_reuse_interval == 96
    with pytest.raises(ValueError, match="ssm_reuse_interval: expected a multiple of tokens_per_block"):
        cache_config(model, tokens_per_block=32, cache_tiers=TIER, ssm_reuse_interval=40)
    with pytest.raises(ValueError, match="state_dtype: expected one of exact, float32, bfloat16, bf16, got 'int8'"):
        cache_config(model, tokens_per_block=32, cache_tiers=TIER, state_dtype="int8")


@pytest.mark.parametrize("family", HYBRIDS)
def test_bf16_states_take_half_the_bytes_and_cost_a_known_error(family):
    model = tiny_model(family)
    exact, rounded = small_runner(model, 20, 12), small_runner(model, 20, 12, state_dtype="bf16")
    sizes = [
        sum(
            buffer.size
            for layer in small.manager.config.layers
            for buffer in layer.buffers
            if buffer.role == "ssm_state"
        )
        for small in (exact, rounded)
    ]
    assert sizes[0] == 2 * sizes[1]
    _, expected = exact.all_logits(prompt(1))
    _, unused = rounded.all_logits(prompt(1), reuse=False)
    rounded.all_logits(prompt(1))
    reused, logits = rounded.all_logits(prompt(1))
    assert reused == REUSED == CUTS[-1]
    assert torch.equal(logits, unused[REUSED:])  # rounded at the same places
    error = (logits - expected[REUSED:]).abs().max().item()
    assert error < 0.2
    assert (error > 0) == (family != "lfm2")  # which has windows alone
