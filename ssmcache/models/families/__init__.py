"""From the object in a config.json to a ModelSpec: one reader a family, chosen by `model_type`."""

from collections.abc import Callable, Mapping

from ssmcache.models.families import delta_hybrids, mamba_hybrids, plain_transformers
from ssmcache.models.families.fields import Fields
from ssmcache.models.spec import LayerSpec, ModelSpec

Reader = Callable[[Fields], tuple[LayerSpec, ...]]

_MAX_BYTES = 1 << 40  # of a token, and of a snapshot: sums over blocks and slots must stay within 64 bits

_READERS: dict[str, Reader] = {
    "bamba": mamba_hybrids.bamba,
    "falcon_h1": mamba_hybrids.falcon_h1,
    "granitemoehybrid": mamba_hybrids.granite_moe_hybrid,
    "jamba": mamba_hybrids.jamba,
    "kimi_linear": delta_hybrids.kimi_linear,
    "llama": plain_transformers.llama,
    "mamba2": mamba_hybrids.pure_mamba2,
    "mamba_ssm": mamba_hybrids.mamba_ssm,
    "mistral": plain_transformers.llama,
    "mixtral": plain_transformers.mixtral,
    "nemotron_h": mamba_hybrids.nemotron_h,
    "olmo_hybrid": delta_hybrids.olmo_hybrid,
    "qwen2": plain_transformers.llama,
    "qwen3": plain_transformers.qwen3,
    "qwen3_5": delta_hybrids.qwen3_next,
    "qwen3_5_moe": delta_hybrids.qwen3_next,
    "qwen3_5_moe_text": delta_hybrids.qwen3_next,
    "qwen3_5_text": delta_hybrids.qwen3_next,
    "qwen3_moe": plain_transformers.qwen3,
    "qwen3_next": delta_hybrids.qwen3_next,
    "zamba2": mamba_hybrids.zamba2,
}


def family_names() -> tuple[str, ...]:
    """The values of `model_type` that can be read; `mamba_ssm` stands for files of that package, which have none."""
    return tuple(_READERS)


def _text_fields(fields: Fields) -> Fields:
    """The object that describes the language model: `text_config` of a multimodal model, or the file itself."""
    return fields.section("text_config") if fields.has("text_config") else fields


def _family(outer: Fields, text: Fields) -> str:
    if not text.has("model_type") and text.has("ssm_cfg"):
        return "mamba_ssm"
    family = text.text("model_type") if text.has("model_type") else outer.text("model_type")
    if family not in _READERS:
        raise text.error("field 'model_type'", f"one of {', '.join(_READERS)}", family)
    return family


def read_config(config: Mapping[str, object], *, name: str, where: str, source: str, confidence: str) -> ModelSpec:
    """Describe a model from the object in its config.json.

    `where` opens every error. KV and convolution windows have the model's dtype (`dtype` or `torch_dtype`; bfloat16 if
    not stated); SSM states have `mamba_ssm_cache_dtype` or `mamba_ssm_dtype`, float32 if not stated, as transformers
    keeps them. Parameter counts are not computed.

    Errors: ModelError for an unknown family, and for a field that is missing, wrong, absurd, or at odds with another.
    """
    outer = Fields(config, where)
    text = _text_fields(outer)
    family = _family(outer, text)
    outer_dtype = outer.dtype("dtype", "torch_dtype", default="bfloat16")
    model_dtype = text.dtype("dtype", "torch_dtype", default=outer_dtype)
    state_dtype = text.dtype("mamba_ssm_cache_dtype", "mamba_ssm_dtype", default="float32")
    spec = ModelSpec(
        name=name,
        family=family,
        source=source,
        confidence=confidence,
        layers=_READERS[family](text),
        kv_dtype=model_dtype,
        state_dtype=state_dtype,
        conv_dtype=model_dtype,
    )
    most = max(spec.kv_bytes_per_token("float32"), spec.snapshot_bytes("float32"))
    if most > _MAX_BYTES:
        raise outer.error("bytes of a token or a snapshot", f"at most {_MAX_BYTES:,}", most)
    return spec


__all__ = ["family_names", "read_config"]
