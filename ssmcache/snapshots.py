"""The snapshots in the tree: states to start from, and whether anybody ever did."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssmcache.pool_groups import PoolGroup
from ssmcache.pools import IntArray, StatePool
from ssmcache.segments import SparseSegment
from ssmcache.sparse import SparseStore
from ssmcache.tree import Run

if TYPE_CHECKING:
    from ssmcache.places import PlaceTable
    from ssmcache.store import BlockStore


class SnapshotStore(SparseStore):
    """Slots of the SSM layer group as far as snapshots own them. Live states are private slots of the sequences, and
    parked ones of those that are suspended.
    """

    order_in_block = 0

    def __init__(self, store: BlockStore, layer_group: int, pool_group: PoolGroup, pools: Sequence[StatePool]) -> None:
        super().__init__(store, layer_group, pool_group, pools)
        self._reused: list[set[int]] = [set() for _ in pools]  # by tier: slots that somebody has started from

    def note_reuse(self, tier: int, slot: int) -> None:
        self._reused[tier].add(slot)

    def is_of_use(self, tier: int, slot: int) -> bool:
        """Whether somebody has started from the snapshot in a slot, or depends on it."""
        return slot in self._reused[tier] or slot in self.pins.by_slot[tier]

    def reused_slots(self) -> set[tuple[int, int]]:
        """(tier, slot) of the snapshots that somebody has started from."""
        return {(tier, slot) for tier, slots in enumerate(self._reused) for slot in slots}

    def _note_added(self, places: PlaceTable, segment: SparseSegment) -> None:
        assert segment.run is not None
        places.note(segment.run)

    def _forgotten(self, run: Run, tier: int, slots: Sequence[int]) -> int:
        if self._store.places is not None:
            self._store.places.note(run)
        reused = self._reused[tier]
        if not reused:
            return 0
        num_before = len(reused)
        reused.difference_update(slots)
        return num_before - len(reused)

    def follow(self, old_tier: int, old_slots: IntArray, tier: int, slots: IntArray) -> None:
        super().follow(old_tier, old_slots, tier, slots)
        old, new = self._reused[old_tier], self._reused[tier]
        for slot, new_slot in zip(old_slots, slots, strict=True):
            if slot in old:
                old.discard(slot)
                new.add(new_slot)

    def stamp(self, run: Run, stamp: int) -> None:
        """Stamp the snapshots of a run, which makes one segment of those that lie in the same tier."""
        for segment in run.items:
            if segment.store is self:
                segment.stamp = stamp
        if len(run.items) > 1:
            self.join_like(run)

    def deepest(self, run: Run, max_blocks: int) -> tuple[int, SparseSegment | None, int]:
        """Deepest snapshot of the path of `run` after at most `max_blocks` blocks: (blocks before it, its segment, its
        position there), or (0, None, -1).
        """
        while run.parent is not None:
            best, found, position = 0, None, -1
            for segment in run.items:
                if segment.store is self:
                    index = bisect_right(segment.ordinals, max_blocks - 1) - 1
                    if index >= 0 and segment.ordinals[index] >= best:
                        best, found, position = segment.ordinals[index] + 1, segment, index
            if found is not None:
                return best, found, position
            run = run.parent
        return 0, None, -1
