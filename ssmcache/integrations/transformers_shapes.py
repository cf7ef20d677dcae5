"""What a transformers model keeps for a sequence, read off the tensors of one short pass, and the layers of a cache
for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ssmcache.config import (
    AttentionLayerConfig,
    BufferConfig,
    CacheTierConfig,
    KVCacheManagerConfig,
    LayerConfig,
    SsmLayerConfig,
)
from ssmcache.integrations.transformers_cache import (
    EMPTY_LAYERS,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    cache_argument,
)

ALIGNMENT_BYTES = 256
"""Buffers are whole multiples of this, so every tensor in a slot starts at one: kernels are chosen by alignment."""

_WITH_WINDOW = (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer)
_WITH_KV = (DynamicLayer, LinearAttentionAndFullAttentionLayer, *_WITH_WINDOW)
_KNOWN = (*_WITH_KV, LinearAttentionLayer, *EMPTY_LAYERS)
STATE_DTYPES = {"exact": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}

REFUSALS = {
    "jamba": "its Mamba-1 scan takes no initial state, so several tokens after a restored state start from zero",
    "mamba": "its Mamba-1 scan takes no initial state, so several tokens after a restored state start from zero",
    "falcon_mamba": "its Mamba-1 scan takes no initial state, so several tokens after a restored state start from zero",
    "minimax": "it has a cache class of its own and takes no other",
}
"""What is known to be wrong in transformers, by `model_type`."""


class NotResumableError(ValueError):
    """A model that does not go on exactly from a restored cache. The message says what failed and, if known, why."""


@dataclass(frozen=True, slots=True)
class BufferShape:
    """One tensor of a slot, without the batch: for KV one block, [tokens, heads, width]."""

    layer_id: int
    role: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def config(self) -> BufferConfig:
        num_bytes = self.num_elements * self.dtype.itemsize
        return BufferConfig(self.role, -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one model layer keeps. `key` and `value` are (heads, width), with widths of their own (MLA keeps the latent
    as the key); `convs` and `recurrents` are the states by number. None and empty where there is nothing.
    """

    index: int
    kv_dtype: torch.dtype | None
    key: tuple[int, int] | None
    value: tuple[int, int] | None
    window: int | None
    convs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    recurrents: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    @property
    def has_states(self) -> bool:
        return bool(self.convs or self.recurrents)


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """All layers of a model, those that keep nothing included."""

    layers: tuple[LayerShape, ...]

    def state_id(self, layer: LayerShape) -> int:
        """The layer id of the states of a layer, as in `ModelSpec.cache_layers`."""
        return layer.index if layer.key is None else layer.index + len(self.layers)

    def kv_buffers(self, layer: LayerShape, tokens_per_block: int) -> tuple[BufferShape, ...]:
        if layer.key is None or layer.value is None or layer.kv_dtype is None:
            return ()
        return (
            BufferShape(layer.index, "key", (tokens_per_block, *layer.key), layer.kv_dtype),
            BufferShape(layer.index, "value", (tokens_per_block, *layer.value), layer.kv_dtype),
        )

    def state_buffers(self, layer: LayerShape, state_dtype: torch.dtype | None) -> tuple[BufferShape, ...]:
        """Recurrent states, then convolution windows. `state_dtype`: of the recurrent ones; None: the model's own."""
        layer_id = self.state_id(layer)
        recurrents = [
            BufferShape(layer_id, _role("ssm_state", number), shape, state_dtype or dtype)
            for number, (shape, dtype) in enumerate(layer.recurrents)
        ]
        convs = [
            BufferShape(layer_id, _role("conv_state", number), shape, dtype)
            for number, (shape, dtype) in enumerate(layer.convs)
        ]
        return (*recurrents, *convs)

    def cache_layers(self, tokens_per_block: int, state_dtype: torch.dtype | None) -> Iterator[LayerConfig]:
        for layer in self.layers:
            kv = self.kv_buffers(layer, tokens_per_block)
            if kv:
                configs = tuple(buffer.config for buffer in kv)
                yield AttentionLayerConfig(layer.index, configs, sliding_window_size=layer.window)
            if layer.has_states:
                states = tuple(buffer.config for buffer in self.state_buffers(layer, state_dtype))
                yield SsmLayerConfig(self.state_id(layer), states)


def _role(name: str, number: int) -> str:
    return name if number == 0 else f"{name}_{number}"


def probe(model: Any) -> ModelShapes:
    """The shapes of a model, from a pass over two tokens with a cache of transformers.

    Errors: NotResumableError for a model that takes no such cache, or has layers that keep something unknown.
    """
    name = type(model).__name__
    cache = DynamicCache(config=model.config)
    tokens = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            positions = torch.arange(2, device=model.device)[None]
            model(input_ids=tokens, position_ids=positions, **{cache_argument(model): cache})
    except (TypeError, ValueError) as error:
        reason = REFUSALS.get(model.config.model_type, str(error))
        raise NotResumableError(f"{name}: expected a model that takes a DynamicCache, but {reason}") from error
    chunked = "chunked_attention" in (getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    unknown = {type(layer).__name__ for layer in cache.layers if type(layer) not in _KNOWN}
    if unknown or chunked:
        kinds = ", ".join(sorted(unknown)) or "chunked attention"
        raise NotResumableError(f"{name}: expected layers of attention, sliding windows and states, got {kinds}")
    layers = tuple(_shape(index, layer) for index, layer in enumerate(cache.layers))
    if not any(layer.key or layer.has_states for layer in layers):
        reason = REFUSALS.get(model.config.model_type, "it kept nothing there")
        raise NotResumableError(f"{name}: expected a model that keeps its state in a DynamicCache, but {reason}")
    return ModelShapes(layers)


def _shape(index: int, layer: Any) -> LayerShape:
    keys = layer.keys if isinstance(layer, _WITH_KV) else None
    values = layer.values if isinstance(layer, _WITH_KV) else None
    conv_states = layer.conv_states if isinstance(layer, LinearAttentionLayer) else {}
    recurrent_states = layer.recurrent_states if isinstance(layer, LinearAttentionLayer) else {}
    return LayerShape(
        index=index,
        kv_dtype=None if keys is None else keys.dtype,
        key=None if keys is None else (keys.shape[1], keys.shape[3]),
        value=None if values is None else (values.shape[1], values.shape[3]),
        window=layer.sliding_window if isinstance(layer, _WITH_WINDOW) else None,
        convs=_tensors(conv_states),
        recurrents=_tensors(recurrent_states),
    )


def _tensors(states: dict[int, torch.Tensor | None]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    return tuple((tuple(state.shape[1:]), state.dtype) for state in states.values() if state is not None)


def cache_config(
    model: Any,
    *,
    tokens_per_block: int,
    cache_tiers: Sequence[CacheTierConfig],
    state_dtype: str = "exact",
    **settings: Any,
) -> KVCacheManagerConfig:
    """The config of a manager for a model, with layers and bytes as the model's own tensors have them.

    Layer ids and roles are those of `ModelSpec.cache_layers`, and so are the bytes, but for the convolution windows,
    of which transformers keeps one column more, and for sizes that are rounded up to 256 bytes.

    Args:
        model: a causal language model of transformers, on its device.
        cache_tiers: as in `KVCacheManagerConfig`.
        state_dtype: of recurrent states: "exact", as the model has them (float32), or "bf16": half the bytes, but they
            are rounded after every pass, so results differ from exact ones.
        settings: anything else that `KVCacheManagerConfig` takes.

    Errors: NotResumableError for a model that cannot be cached; ValueError as from `KVCacheManagerConfig`.
    """
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype: expected one of {', '.join(STATE_DTYPES)}, got {state_dtype!r}")
    layers = tuple(probe(model).cache_layers(tokens_per_block, STATE_DTYPES[state_dtype]))
    return KVCacheManagerConfig(tokens_per_block, layers, tuple(cache_tiers), **settings)
