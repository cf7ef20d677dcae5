"""Layers of a transformers cache whose tensors belong to somebody else: slots of a pool, or scratch that pages were
gathered into. They are bound to one sequence at a time, of batch 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ssmcache.integrations.transformers_cache import CacheLayerMixin, LinearAttentionLayer
from ssmcache.integrations.transformers_shapes import LayerShape


class PagedKVLayer(CacheLayerMixin):
    """KV in two tensors [tokens, heads, width], addressed by the position of a token, so that what attention reads lies
    the same way wherever the pages are.
    """

    is_sliding = False

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.window = shape.window
        self.is_sliding = shape.window is not None
        self.is_initialized = True
        self.num_tokens = 0
        self._keys = self._values = torch.empty(0)

    def bind(self, keys: torch.Tensor, values: torch.Tensor, num_tokens: int) -> None:
        """Go on after `num_tokens`, whose KV is in the tensors as far as the window reaches."""
        self._keys, self._values, self.num_tokens = keys, values, num_tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise RuntimeError("lazy_initialization: expected tensors to be bound before a pass")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [1, heads, n, width] behind what is there; returns views of all that a query of them may see."""
        start, first = self.num_tokens, self._first()
        end = start + key_states.shape[-2]
        self._keys[start:end].copy_(key_states[0].transpose(0, 1))
        self._values[start:end].copy_(value_states[0].transpose(0, 1))
        self.num_tokens = end
        return self._keys[first:end].transpose(0, 1)[None], self._values[first:end].transpose(0, 1)[None]

    def _first(self) -> int:
        return 0 if self.window is None else max(0, self.num_tokens - self.window + 1)

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens - self._first() + query_length, self._first()

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window


class SlotStateLayer(LinearAttentionLayer):
    """States that lie in a slot of a pool: models write them in place."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(number_of_states=max(1, len(shape.convs), len(shape.recurrents)))
        for number, (conv, dtype) in enumerate(shape.convs):
            self.conv_kernel_size[number] = conv[-1]
            self.is_conv_states_initialized[number] = True
            self.dtype = dtype
        for number in range(len(shape.recurrents)):
            self.is_recurrent_states_initialized[number] = True

    def bind_states(self, convs: Sequence[torch.Tensor], recurrents: Sequence[torch.Tensor], has_state: bool) -> None:
        """Go on from states [1, ...], or from none: whatever is in the tensors then is not read."""
        for number, conv in enumerate(convs):
            self.conv_states[number] = conv
            self.device = conv.device
        for number, recurrent in enumerate(recurrents):
            self.recurrent_states[number] = recurrent
        for number in self.has_previous_state:
            self.has_previous_state[number] = has_state


class SlotAndKVLayer(SlotStateLayer, PagedKVLayer):
    """Both, for models that have attention and states in one layer."""

    is_compileable = False

    def __init__(self, shape: LayerShape) -> None:
        PagedKVLayer.__init__(self, shape)
        SlotStateLayer.__init__(self, shape)

    def get_max_length(self) -> int:
        return PagedKVLayer.get_max_length(self)


def cache_layer(shape: LayerShape) -> PagedKVLayer | SlotStateLayer | None:
    """The layer for a shape; None if the model layer keeps nothing."""
    if shape.key is not None:
        return SlotAndKVLayer(shape) if shape.has_states else PagedKVLayer(shape)
    return SlotStateLayer(shape) if shape.has_states else None
