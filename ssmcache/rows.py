"""Block tables for kernels: the slots of a sequence's pages, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ssmcache.pools import SlotArray

if TYPE_CHECKING:
    from ssmcache.sequence_pages import SequencePages


_NO_PAGE: SlotArray = np.array([-1], dtype=np.int32)


class PageRows:
    """The page indices of one sequence, and the rows of callers' buffers that follow them."""

    __slots__ = ("_bound", "_sequence")

    def __init__(self, sequence: SequencePages) -> None:
        self._sequence = sequence
        self._bound: dict[int, tuple[SlotArray, int]] = {}  # layer group -> (row, entries in use)

    def _num_blocks(self) -> int:
        return -(-self._sequence.capacity // self._sequence.manager.tokens_per_block)

    def indices(self, layer_group: int, out: SlotArray | None = None) -> SlotArray:
        """See `KVCache.page_indices`."""
        sequence = self._sequence
        num_blocks = self._num_blocks()
        if out is not None:
            _check_row(out, num_blocks)
        is_away = sequence.parked is not None
        pages = sequence.store.pages
        if pages is not None and layer_group == pages.layer_group:
            parts = [sequence.own_pages]
            parts += [run.pages.slots for run in sequence.cursor.path() if run.pages is not None]
            indices: SlotArray = _NO_PAGE.repeat(num_blocks) if is_away else np.concatenate(parts[::-1])[:num_blocks]
        else:
            window = next((window for window in sequence.windows if window.store.layer_group == layer_group), None)
            if window is None:
                raise ValueError(f"page_indices: expected a layer group of attention, got {layer_group}")
            indices = np.full(num_blocks, -1, dtype=np.int32)
            if not is_away:
                window.fill(indices, num_blocks)
        if out is None:
            return indices
        out[:num_blocks] = indices
        out[num_blocks:] = -1
        return out

    def bind(self, layer_group: int, row: SlotArray | None) -> None:
        """See `KVCache.bind_page_indices`."""
        if row is None:
            self._bound.pop(layer_group, None)
            return
        self.indices(layer_group, row)
        self._bound[layer_group] = row, self._num_blocks()

    def check(self, num_blocks: int) -> None:
        """Errors: ValueError if a bound row is too short for so many blocks."""
        for row, _ in self._bound.values():
            _check_row(row, num_blocks)

    def refresh(self) -> None:
        """Write what has changed since into the rows."""
        for layer_group, (row, num_used) in self._bound.items():
            num_blocks = self._num_blocks()
            indices = self.indices(layer_group)
            changed = np.flatnonzero(row[:num_blocks] != indices)
            row[changed] = indices[changed]
            if num_blocks < num_used:
                row[num_blocks:num_used] = -1
            self._bound[layer_group] = row, num_blocks


def _check_row(row: SlotArray, num_blocks: int) -> None:
    if not isinstance(row, np.ndarray):
        raise TypeError(f"row of page indices: expected a NumPy array, got {type(row).__name__}")
    if row.dtype != np.int32 or row.ndim != 1 or row.size < num_blocks:
        raise ValueError(
            f"row of page indices: expected at least {num_blocks} int32 in one dimension, got {row.dtype} of shape "
            f"{row.shape}"
        )
    if not row.flags.writeable:
        raise ValueError("row of page indices: expected an array that can be written, got a read-only one")
