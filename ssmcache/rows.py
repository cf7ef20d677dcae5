"""Block tables for kernels: the slots of a sequence's pages, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ssmcache.pools import SlotArray

if TYPE_CHECKING:
    from ssmcache.sequence_pages import SequencePages
    from ssmcache.sequence_windows import SequenceWindow


class PageRows:
    """The page indices of one sequence, and the rows of callers' buffers that follow them."""

    __slots__ = ("_bound", "_sequence")

    def __init__(self, sequence: SequencePages) -> None:
        self._sequence = sequence
        self._bound: dict[int, _BoundRow] = {}  # by layer group

    def _num_blocks(self) -> int:
        return -(-self._sequence.capacity // self._sequence.manager.tokens_per_block)

    def indices(self, layer_group: int, out: SlotArray | None = None) -> SlotArray:
        """See `KVCache.page_indices`."""
        sequence = self._sequence
        num_blocks = self._num_blocks()
        if out is not None:
            _check_row(out, num_blocks)
        window = self._window(layer_group)
        if sequence.parked is not None:
            indices: SlotArray = np.full(num_blocks, -1, dtype=np.int32)
        else:
            indices = _slots(sequence, window, 0, num_blocks)
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
        self._bound[layer_group] = _BoundRow(self._sequence, self._window(layer_group), row, self._num_blocks())

    def _window(self, layer_group: int) -> SequenceWindow | None:
        """The window of a layer group; None for full attention. Errors: ValueError for another layer group."""
        pages = self._sequence.store.pages
        if pages is not None and layer_group == pages.layer_group:
            return None
        for window in self._sequence.windows:
            if window.store.layer_group == layer_group:
                return window
        raise ValueError(f"page_indices: expected a layer group of attention, got {layer_group}")

    def check(self, num_blocks: int) -> None:
        """Errors: ValueError if a bound row is too short for so many blocks, or read-only by now."""
        for bound in self._bound.values():
            if num_blocks > bound.row.size or not bound.row.flags.writeable:
                _check_row(bound.row, num_blocks)

    def refresh(self) -> None:
        """Write what has changed since into the rows."""
        num_blocks = self._num_blocks()
        for bound in self._bound.values():
            bound.refresh(num_blocks)


class _BoundRow:
    """A row, what was written there, and the lengths that it was last written for. The row itself is never read again:
    it may lie in memory that is slow to read. While a sequence is ACTIVE, its pages in the tree stay where they are; so
    the entries that may be others are those of blocks that came or went at the end of the capacity, that were
    committed, or that went out of a window.
    """

    __slots__ = ("_num_blocks", "_num_shared", "_sequence", "_stale_end", "_window", "_written", "row")

    def __init__(self, sequence: SequencePages, window: SequenceWindow | None, row: SlotArray, num_blocks: int) -> None:
        self._sequence = sequence
        self._window = window
        self.row = row
        self._written: SlotArray = np.array(row)
        self._num_blocks = num_blocks
        self._num_shared = sequence.cursor.end
        self._stale_end = 0 if window is None else window.stale_end

    def refresh(self, num_blocks: int) -> None:
        """Cost: O(1) if nothing has changed, else O(blocks that did, and runs that have them)."""
        old_num_blocks, old_num_shared, old_stale_end = self._num_blocks, self._num_shared, self._stale_end
        num_shared = self._sequence.cursor.end
        stale_end = 0 if self._window is None else self._window.stale_end
        if stale_end != old_stale_end:
            self._stale_end = stale_end
            self._write(old_stale_end, min(stale_end, num_blocks, old_num_blocks))
        if num_shared != old_num_shared:
            self._num_shared = num_shared
            self._write(old_num_shared, min(num_shared, num_blocks, old_num_blocks))
        if num_blocks != old_num_blocks:
            self._num_blocks = num_blocks
            self._write(old_num_blocks, num_blocks)
            if num_blocks < old_num_blocks:
                self.row[num_blocks:old_num_blocks] = self._written[num_blocks:old_num_blocks] = -1

    def _write(self, first: int, end: int) -> None:
        """Bring the entries `first`..`end - 1` up to date, of which those that stay the same are not written."""
        written = self._written
        if end - first == 1:  # NumPy takes as long for one as for a hundred
            slot = _slot(self._sequence, self._window, first)
            if written.item(first) != slot:
                self.row[first] = written[first] = slot
        elif end > first:
            slots = _slots(self._sequence, self._window, first, end)
            changed = np.flatnonzero(written[first:end] != slots)
            self.row[first + changed] = written[first + changed] = slots[changed]


def _slot(sequence: SequencePages, window: SequenceWindow | None, block: int) -> int:
    if window is not None:
        return window.slot_of(block)
    index = block - sequence.cursor.end
    return (sequence.own_pages if index >= 0 else _slots(sequence, None, block, block + 1)).item(max(index, 0))


def _slots(sequence: SequencePages, window: SequenceWindow | None, first: int, end: int) -> SlotArray:
    """Slots of the blocks `first`..`end - 1`, -1 where a window has no page on the GPU."""
    if window is not None:
        return window.slots(first, end)
    run = sequence.cursor
    parts = [sequence.own_pages[max(first - run.end, 0) : max(end - run.end, 0)]]
    while run.parent is not None and run.end > first:
        assert run.pages is not None
        parts.append(run.pages.slots[max(first - run.start, 0) : max(end - run.start, 0)])
        run = run.parent
    return np.concatenate(parts[::-1])


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
