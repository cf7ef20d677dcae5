"""The pools of a manager as tensors of a model, and the scratch that the KV of one sequence is gathered into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ssmcache.integrations.transformers_layers import PagedKVLayer, SlotStateLayer, cache_layer
from ssmcache.integrations.transformers_shapes import STATE_DTYPES, BufferShape, LayerShape, ModelShapes
from ssmcache.manager import KVCacheManager
from ssmcache.pools import SlotArray


class Tensors:
    """Room for one sequence outside the pools: KV by position, and, if asked for, states.

    Attributes:
        kv: [tokens, heads, width], by (model layer, 0 for keys and 1 for values); `num_tokens` rounded up to blocks.
        states: [1, ...], by (model layer, number), recurrent ones first; empty for scratch that has none.
    """

    def __init__(self, layout: Layout, num_tokens: int, device: torch.device, with_states: bool) -> None:
        block = layout.tokens_per_block
        num_rows = -(-num_tokens // block) * block
        self.kv = {
            (layer.index, part): torch.empty((num_rows, *buffer.shape[1:]), dtype=buffer.dtype, device=device)
            for layer in layout.shapes.layers
            for part, buffer in enumerate(layout.kv(layer))
        }
        self.states = {
            (layer.index, number): torch.empty((1, *buffer.shape), dtype=buffer.dtype, device=device)
            for layer in layout.shapes.layers
            for number, buffer in enumerate(layout.states(layer))
            if with_states
        }


class Layout:
    """The buffers of a model in the slots of a manager.

    Errors: ValueError if the layers of the manager are not those of the model.
    """

    def __init__(self, shapes: ModelShapes, manager: KVCacheManager) -> None:
        self.shapes = shapes
        self.tokens_per_block = manager.tokens_per_block
        for dtype in dict.fromkeys(STATE_DTYPES.values()):
            if manager.config.layers == tuple(shapes.cache_layers(self.tokens_per_block, dtype)):
                self.state_dtype = dtype
                return
        raise ValueError(
            "manager: expected the layers that cache_config gives for this model, got others (another model, dtype, or "
            "state_dtype)"
        )

    def kv(self, layer: LayerShape) -> tuple[BufferShape, ...]:
        return self.shapes.kv_buffers(layer, self.tokens_per_block)

    def states(self, layer: LayerShape) -> tuple[BufferShape, ...]:
        return self.shapes.state_buffers(layer, self.state_dtype)


class ModelPools:
    """Views of the GPU pools of a manager, and the layers of a transformers cache that are bound to them.

    Views are good until `adjust` or `resize_tier` of the manager; `refresh` looks.
    """

    def __init__(self, layout: Layout, manager: KVCacheManager, device: torch.device) -> None:
        self._layout = layout
        self._manager = manager
        self._device = device
        self._groups = {layer: group for group, layers in enumerate(manager.layer_grouping) for layer in layers}
        self.layers = {layer.index: cache_layer(layer) for layer in layout.shapes.layers}
        self._pools: list[Any] = []
        self._kv: dict[tuple[int, int], torch.Tensor] = {}
        self._states: dict[tuple[int, int], torch.Tensor] = {}
        self._slots: dict[int, dict[tuple[int, int], torch.Tensor]] = {}
        self.refresh()

    def refresh(self) -> bool:
        """Whether the pools have changed their place, so that what was bound must be bound again."""
        pools = [self._manager.memory.view(group.pool) for group in self._manager.groups]
        if len(pools) == len(self._pools) and all(map(_is, pools, self._pools)):
            return False
        self._pools, self._slots = pools, {}
        for layer in self._layout.shapes.layers:
            for part, buffer in enumerate(self._layout.kv(layer)):
                self._kv[layer.index, part] = self._rows(buffer)
            for number, buffer in enumerate(self._layout.states(layer)):
                self._states[layer.index, number] = self._rows(buffer)
        return True

    def _rows(self, buffer: BufferShape) -> torch.Tensor:
        """[slots, elements], a view. Errors: ValueError for pools without bytes, or on another device."""
        pool = self._manager.buffer(buffer.layer_id, buffer.role)
        if pool is None:
            raise ValueError("manager: expected a memory with bytes, got one that only counts them")
        rows = torch.from_numpy(pool) if isinstance(pool, np.ndarray) else pool
        if rows.device != self._device:
            raise ValueError(f"manager: expected memory on {self._device}, as the model, got {rows.device}")
        return rows.view(buffer.dtype)[:, : buffer.num_elements]

    def states_of(self, slot: int) -> dict[tuple[int, int], torch.Tensor]:
        """The states in a slot, [1, ...], by (model layer, number). Not copies."""
        if slot not in self._slots:
            self._slots[slot] = {
                (layer.index, number): self._states[layer.index, number][slot].view(1, *buffer.shape)
                for layer in self._layout.shapes.layers
                for number, buffer in enumerate(self._layout.states(layer))
            }
        return self._slots[slot]

    def bind(self, tensors: Tensors, states: dict[tuple[int, int], torch.Tensor], num_tokens: int) -> None:
        """The model goes on after `num_tokens`, with the KV in `tensors` and these states."""
        for shape in self._layout.shapes.layers:
            layer = self.layers[shape.index]
            if isinstance(layer, PagedKVLayer):
                layer.bind(tensors.kv[shape.index, 0], tensors.kv[shape.index, 1], num_tokens)
            if isinstance(layer, SlotStateLayer):
                mine = [states[shape.index, number] for number in range(len(self._layout.states(shape)))]
                num_recurrents = len(shape.recurrents)
                layer.bind_states(mine[num_recurrents:], mine[:num_recurrents], num_tokens > 0)

    def gather(self, tables: Sequence[SlotArray | None], into: Tensors) -> None:
        """Copy the pages of a sequence, by layer group, into scratch; blocks without a page are left out."""
        self._transfer(tables, 0, into, write=False)

    def write(self, tables: Sequence[SlotArray | None], first_block: int, tensors: Tensors) -> None:
        """Copy whole blocks, from `first_block` on, from scratch to their pages."""
        self._transfer(tables, first_block, tensors, write=True)

    def _transfer(self, tables: Sequence[SlotArray | None], first_block: int, tensors: Tensors, write: bool) -> None:
        places: dict[int, tuple[torch.Tensor, slice]] = {}
        for group, table in enumerate(tables):
            if table is None:
                continue
            there = first_block + np.flatnonzero(table[first_block:] >= 0)
            if there.size:
                first, end = int(there[0]), int(there[-1]) + 1  # the window of a sequence is in one piece
                slots = torch.from_numpy(table[first:end].astype(np.int64)).to(self._device)
                places[group] = slots, slice(first, end)
        for (index, part), rows in self._kv.items():
            place = places.get(self._groups[index])
            if place is not None:
                slots, blocks = place
                scratch = tensors.kv[index, part]
                scratch_rows = scratch.view(-1, rows.shape[1])[blocks]
                if write:
                    rows.index_copy_(0, slots, scratch_rows)
                else:
                    torch.index_select(rows, 0, slots, out=scratch_rows)


def _is(one: object, other: object) -> bool:
    return one is other
