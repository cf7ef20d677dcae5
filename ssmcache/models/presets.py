"""Presets of published models: the fields of their config.json that matter here, read by the same readers as any file.

`confidence` is one of `CONFIDENCES`. No repository revision was recorded where `source` states none. Parameter counts
are the vendor's, as it rounds them.
"""

from dataclasses import replace

from ssmcache.models.families import read_config
from ssmcache.models.published import Preset
from ssmcache.models.published.mamba_hybrids import MAMBA_HYBRIDS
from ssmcache.models.published.others import DELTA_HYBRIDS, PURE_MODELS
from ssmcache.models.spec import AttentionSpec, LayerSpec, ModelSpec, SsmSpec

CONFIDENCES = {
    "published config": "every deciding field was seen in a copy or quotation of the model's own config.json",
    "vendor code": "the fields come from code that the vendor publishes for the model, or from its defaults",
    "paper": "the fields come from the model's paper, completed from a named sibling",
    "derived": "at least one deciding field was inferred; the source says which",
}

_BILLION = 10**9

PRESETS = (*MAMBA_HYBRIDS, *DELTA_HYBRIDS, *PURE_MODELS)


def marconi_7b() -> ModelSpec:
    """The hybrid 7B of Marconi (2411.19379), counted as its simulator counts; no such checkpoint is published.

    d_model 4096, d_state 128, all in 2 bytes. A layer's state is d_model x d_state (no expansion), its convolution
    keeps all 4 positions of 2 x d_model + 2 x d_state channels, and attention has as many KV heads as query heads.
    The counts of layers are the paper's; their order is not given and not needed, so attention is every seventh here.
    """
    ssm = SsmSpec("mamba2 (Marconi's accounting)", (4096, 128), (2 * 4096 + 2 * 128, 4))
    attention = AttentionSpec(4096, 4096, num_query_elements=4096, num_output_elements=4096)
    mixers = tuple(LayerSpec(attention=attention) if index % 7 == 6 else LayerSpec(ssm=ssm) for index in range(28))
    return ModelSpec(
        name="marconi-7b",
        family="marconi",
        source="paper 2411.19379 and its code, ruipeterpan/marconi (get_mamba_state_size, get_kvs_size)",
        confidence="vendor code",
        layers=tuple(part for mixer in mixers for part in (mixer, LayerSpec(feed_forward="mlp"))),
        kv_dtype="float16",
        state_dtype="float16",
        conv_dtype="float16",
        num_parameters=7 * _BILLION,
        parameters_source="paper 2411.19379",
    )


def read_preset(preset: Preset) -> ModelSpec:
    """The preset through the reader of its family."""
    spec = read_config(
        preset.config,
        name=preset.name,
        where=f"preset {preset.name}",
        source=preset.source,
        confidence=preset.confidence,
    )
    active = preset.billion_active_parameters
    return replace(
        spec,
        num_parameters=round(preset.billion_parameters * _BILLION),
        num_active_parameters=None if active is None else round(active * _BILLION),
        parameters_source=preset.parameters_source,
    )
