"""Sliding windows with sinks: which blocks a sequence needs, and the pages of them in the tree."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from ssmcache.integers import MAX_BLOCKS
from ssmcache.pool_groups import PoolGroup
from ssmcache.pools import StatePool
from ssmcache.segments import SparseSegment, use_of, with_use
from ssmcache.sparse import SparseStore
from ssmcache.tree import Run

if TYPE_CHECKING:
    from ssmcache.places import PlaceTable
    from ssmcache.store import BlockStore


class Window:
    """The shape of a sliding window life cycle: `size` tokens are seen, and the first `num_sink_tokens` always.

    A query at position h sees the keys of the positions above h - `size`, itself included.
    """

    __slots__ = ("num_sink_blocks", "size", "tokens_per_block")

    def __init__(self, size: int, num_sink_tokens: int, tokens_per_block: int) -> None:
        self.size = size
        self.tokens_per_block = tokens_per_block
        self.num_sink_blocks = -(-num_sink_tokens // tokens_per_block)

    def stale_blocks(self, history_length: int) -> tuple[int, int]:
        """Blocks [first, end) that nobody needs once `history_length` tokens are computed, [min(S, ceil(h/B)),
        max(first, floor((h + 1 - W)/B))).
        """
        block = self.tokens_per_block
        first = min(self.num_sink_blocks, -(-history_length // block))
        return first, max(first, (history_length + 1 - self.size) // block)

    def next_change(self, history_length: int) -> int:
        """A longer history up to which, itself left out, `stale_blocks` stays the same."""
        block = self.tokens_per_block
        end = ((history_length + 1 - self.size) // block + 1) * block + self.size - 1
        if history_length > (self.num_sink_blocks - 1) * block:  # all sinks are there
            return end
        return min(end, -(-history_length // block) * block + 1)

    def needed_blocks(self, history_length: int, num_blocks: int) -> list[int]:
        """Of `num_blocks` blocks, those that are not stale."""
        first, end = self.stale_blocks(history_length)
        return [*range(min(first, num_blocks)), *range(end, num_blocks)]


class WindowStore(SparseStore):
    """Pages of one sliding window life cycle. A path touch reaches only those that who goes on at the end of the path
    needs, or at a place on it. Whatever their age, pages that nobody would read go first (`places.py`).
    """

    order_in_block = 1
    goes_by_use = True

    def __init__(
        self, store: BlockStore, layer_group: int, pool_group: PoolGroup, pools: Sequence[StatePool], window: Window
    ) -> None:
        super().__init__(store, layer_group, pool_group, pools)
        self.window = window

    # -- uses --------------------------------------------------------------------------------------------------------

    def _note_added(self, places: PlaceTable, segment: SparseSegment) -> None:
        assert segment.run is not None
        places.note_pages(segment.run, segment.ordinals[0], segment.ordinals[-1] + 1)

    def set_uses(self, run: Run, first: int, uses: bytearray) -> None:
        """Give the pages of some blocks of a run, from `first` on, their uses."""
        any_changed = False
        for segment in list(self.on(run)):
            ordinals, use = segment.ordinals, use_of(segment.rank)
            begin, end = max(ordinals[0] - first, 0), min(ordinals[-1] + 1 - first, len(uses))
            if begin >= end or uses.count(use, begin, end) == end - begin:
                continue
            changed: dict[int, list[int]] = {}
            for index in range(bisect_left(ordinals, first + begin), bisect_left(ordinals, first + end)):
                new = uses[ordinals[index] - first]
                if new != use:
                    changed.setdefault(with_use(segment.rank, new), []).append(index)
            if changed:
                self.rerank(segment, changed)
                any_changed = True
        if any_changed:
            self.join_like(run)

    # -- going -------------------------------------------------------------------------------------------------------

    def _num_at_once(self, segment: SparseSegment, count: int, kept: Container[int]) -> int:
        # with a sink page goes all that is below it, and that may be enough
        if count == 1 or segment.ordinals[0] >= self.window.num_sink_blocks:
            return count
        places = zip(segment.ordinals, segment.slots, strict=True)
        return min(
            count, max(1, sum(block >= self.window.num_sink_blocks and slot not in kept for block, slot in places))
        )

    def _settle_loser(self, run: Run, block: int) -> None:
        # without a sink page nothing from its block on can be used any more
        if block < self.window.num_sink_blocks and run.start <= block < run.end:
            self._store.drop_subtree(run, block)
        super()._settle_loser(run, block)

    def _cuts_path(self, block: int) -> bool:
        return block < self.window.num_sink_blocks

    def _stays_out(self, segment: SparseSegment) -> bool:
        # what is all locked comes back with `release`: ACTIVE sequences lock many, which would come up again and again
        return self.pins.num_locked_of(segment.tier, segment.slots) == len(segment.slots)

    def stamp_of_activity(self) -> int:
        """A time for all pages that a sequence commits before it is suspended or closed: with one for each block
        they would stay segments of their own.
        """
        return self._store.clock.touch(MAX_BLOCKS)

    def merge_new(self, cursor: Run, block: int) -> None:
        """Join what was just added to the path of `cursor` from `block` on with its like."""
        run = cursor
        while run.end > block and run.parent is not None:
            self.join_like(run)
            run = run.parent

    def touch(self, cursor: Run, stamp: int, ends: Sequence[int]) -> None:
        """Stamp the pages that a sequence needs which goes on at one of `ends` (tokens) of the path of `cursor`."""
        needed: set[int] = set()
        for end in ends:
            needed.update(self.window.needed_blocks(end, -(-end // self.window.tokens_per_block)))
        run = cursor
        while run.parent is not None:
            for segment in list(self.on(run)):
                indices = [index for index, ordinal in enumerate(segment.ordinals) if ordinal in needed]
                if len(indices) == len(segment.ordinals):
                    segment.stamp = stamp
                elif indices:
                    touched = self.split_off(segment, indices)
                    touched.stamp = stamp
                    self.queues[segment.tier].put(touched)
            self.join_like(run)
            run = run.parent

    def release(self, cursor: Run) -> None:
        """Pages of a path are not locked any more: let the segments that were left out come up again."""
        for run in cursor.path():
            for segment in self.on(run):
                self.queues[segment.tier].put(segment)
