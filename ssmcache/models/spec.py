"""What a model leaves in a cache: elements of KV per token, shapes of SSM states, and the bytes both come to.

Shapes and bytes are those of one sequence on one device, without tensor parallelism, without padding, and without the
layers of a multi-token-prediction head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from ssmcache.config import AttentionLayerConfig, BufferConfig, LayerConfig, SsmLayerConfig
from ssmcache.units import format_size

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
_DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}
DTYPE_NAMES = (*DTYPE_BYTES, *_DTYPE_ALIASES)

FeedForward = Literal["mlp", "moe"]


class ModelError(ValueError):
    """A model that cannot be described: one line that says what, where, expected and got."""


def dtype_name(name: str) -> str:
    """The canonical name of a dtype: `bf16`, `torch.bfloat16` and `bfloat16` are all `bfloat16`.

    Errors: ModelError for an unknown name; it lists the known ones.
    """
    key = name.lower().removeprefix("torch.")
    key = _DTYPE_ALIASES.get(key, key)
    if key not in DTYPE_BYTES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPE_NAMES)}, got {name!r}")
    return key


def _bytes_per_element(dtype: str) -> int:
    return DTYPE_BYTES[dtype_name(dtype)]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Elements that one attention layer keeps for each token, and those that it computes with.

    Grouped-query attention keeps a key and a value of `kv_heads * head_dim` elements each. Multi-head latent attention
    (MLA) keeps one latent vector instead, from which keys and values are projected, so it has no separate value.

    `num_query_elements` and `num_output_elements` are those of all query heads, per token: nothing of it is kept, it
    decides the work. None where the config does not state the heads.
    """

    num_key_elements: int = 0
    num_value_elements: int = 0
    num_latent_elements: int = 0
    num_query_elements: int | None = None
    num_output_elements: int | None = None

    @property
    def num_elements(self) -> int:
        """All elements of one token."""
        return self.num_key_elements + self.num_value_elements + self.num_latent_elements

    def elements_by_role(self) -> tuple[tuple[str, int], ...]:
        """The buffers of this layer as (role, elements per token), without empty ones."""
        roles = (
            ("key", self.num_key_elements),
            ("value", self.num_value_elements),
            ("latent", self.num_latent_elements),
        )
        return tuple((role, count) for role, count in roles if count)


@dataclass(frozen=True, slots=True)
class SsmSpec:
    """The state of one recurrent layer for one sequence.

    `kind` names the recurrence. `state_shape` is the recurrent state: [heads, head_dim, d_state] for Mamba-2,
    [d_inner, d_state] for Mamba-1, [value heads, value head_dim, key head_dim] for delta rules. `conv_shape` is the
    window of the causal convolution: [channels, positions kept], where d_conv - 1 positions are enough.
    """

    kind: str
    state_shape: tuple[int, ...]
    conv_shape: tuple[int, int]

    @property
    def num_state_elements(self) -> int:
        """Elements of the recurrent state."""
        return prod(self.state_shape)

    @property
    def num_conv_elements(self) -> int:
        """Elements of the convolution window."""
        return prod(self.conv_shape)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer of the model, in the model's own numbering; any of the three parts may be missing."""

    attention: AttentionSpec | None = None
    ssm: SsmSpec | None = None
    feed_forward: FeedForward | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the layer is made of, in this order: `attention`, `ssm`, `mlp` or `moe`."""
        parts = ("attention" if self.attention else None, "ssm" if self.ssm else None, self.feed_forward)
        return tuple(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as a cache sees it.

    `family` is the `model_type` whose reader made it; `source` says where the figures come from, `confidence` how sure
    they are. `num_parameters` and `num_active_parameters` are totals as the vendor rounds them (see
    `parameters_source`); None if not published, and None for active parameters of a model without experts.
    The three dtypes are canonical names; the methods take other ones for KV and SSM state, and raise ModelError for an
    unknown name.
    """

    name: str
    family: str
    source: str
    confidence: str
    layers: tuple[LayerSpec, ...]
    kv_dtype: str
    state_dtype: str
    conv_dtype: str
    num_parameters: int | None = None
    num_active_parameters: int | None = None
    parameters_source: str = ""

    def __repr__(self) -> str:
        parts = []
        if self.num_attention_layers:
            kv = format_size(self.kv_bytes_per_token())
            parts.append(f"{self.num_attention_layers} attention layers: {kv} of {self.kv_dtype} KV a token")
        if self.num_ssm_layers:
            snapshot = format_size(self.snapshot_bytes())
            parts.append(f"{self.num_ssm_layers} SSM layers: {snapshot} a snapshot, states in {self.state_dtype}")
        return "\n  ".join([f"ModelSpec({self.name})", *parts])

    @property
    def num_attention_layers(self) -> int:
        """Model layers that keep KV."""
        return sum(1 for layer in self.layers if layer.attention)

    @property
    def num_ssm_layers(self) -> int:
        """Model layers that keep a state."""
        return sum(1 for layer in self.layers if layer.ssm)

    def kv_bytes_per_token(self, kv_dtype: str | None = None) -> int:
        """Bytes of KV that one token adds, all layers."""
        elements = sum(layer.attention.num_elements for layer in self.layers if layer.attention)
        return elements * _bytes_per_element(kv_dtype or self.kv_dtype)

    def ssm_state_bytes(self, state_dtype: str | None = None) -> int:
        """Bytes of the recurrent states of one sequence, all layers, without the convolution windows."""
        elements = sum(layer.ssm.num_state_elements for layer in self.layers if layer.ssm)
        return elements * _bytes_per_element(state_dtype or self.state_dtype)

    def conv_state_bytes(self) -> int:
        """Bytes of the convolution windows of one sequence, all layers, in the model's own dtype."""
        elements = sum(layer.ssm.num_conv_elements for layer in self.layers if layer.ssm)
        return elements * _bytes_per_element(self.conv_dtype)

    def snapshot_bytes(self, state_dtype: str | None = None) -> int:
        """Bytes of one snapshot: recurrent states and convolution windows of all layers."""
        return self.ssm_state_bytes(state_dtype) + self.conv_state_bytes()

    def kv_tokens_per_snapshot(self, kv_dtype: str | None = None, state_dtype: str | None = None) -> float | None:
        """How many tokens of KV weigh as much as one snapshot; None without attention or without SSM layers."""
        kv_bytes, snapshot_bytes = self.kv_bytes_per_token(kv_dtype), self.snapshot_bytes(state_dtype)
        return snapshot_bytes / kv_bytes if kv_bytes and snapshot_bytes else None

    def cache_layers(
        self, tokens_per_block: int, kv_dtype: str | None = None, state_dtype: str | None = None
    ) -> tuple[LayerConfig, ...]:
        """The layers for `KVCacheManagerConfig.layers`, in model order; model layers that cache nothing are left out.

        A `layer_id` is the index of the model layer. A model layer with both attention and SSM gives two configs: its
        attention keeps the index, its SSM part gets the index plus `len(self.layers)`. Roles are `key` and `value`
        (`latent` for MLA) with the bytes of a block of `tokens_per_block`, `ssm_state` and `conv_state` with the bytes
        of the whole state.

        Errors: ModelError for an unknown dtype, or for a block without tokens.
        """
        if tokens_per_block < 1:
            raise ModelError(f"tokens_per_block: expected a positive integer, got {tokens_per_block!r}")
        return tuple(self._cache_layers(tokens_per_block, kv_dtype or self.kv_dtype, state_dtype or self.state_dtype))

    def _cache_layers(self, tokens_per_block: int, kv_dtype: str, state_dtype: str) -> Iterator[LayerConfig]:
        kv_bytes, state_bytes = _bytes_per_element(kv_dtype), _bytes_per_element(state_dtype)
        conv_bytes = _bytes_per_element(self.conv_dtype)
        for index, layer in enumerate(self.layers):
            if layer.attention:
                kv_buffers = tuple(
                    BufferConfig(role, tokens_per_block * elements * kv_bytes)
                    for role, elements in layer.attention.elements_by_role()
                )
                yield AttentionLayerConfig(layer_id=index, buffers=kv_buffers)
            if layer.ssm:
                sizes = (
                    ("ssm_state", layer.ssm.num_state_elements * state_bytes),
                    ("conv_state", layer.ssm.num_conv_elements * conv_bytes),
                )
                ssm_buffers = tuple(
                    BufferConfig(role, size) for role, size in sizes if size
                )  # d_conv = 1 keeps nothing
                yield SsmLayerConfig(index + len(self.layers) if layer.attention else index, ssm_buffers)
