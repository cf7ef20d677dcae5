"""The snapshots in the tree: states to start from, and whether anybody ever did."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssmcache.memory.base import Memory
from ssmcache.pools import IntArray, StatePool
from ssmcache.segments import DEFAULT_RANK, SparseSegment
from ssmcache.sparse import SparseStore
from ssmcache.tree import Run

if TYPE_CHECKING:
    from ssmcache.store import BlockStore


class SnapshotStore(SparseStore):
    """Slots of the SSM layer group as far as snapshots own them. Live states are private slots of the sequences, and
    parked ones of those that are suspended.
    """

    def __init__(self, store: BlockStore, layer_group: int, pools: Sequence[StatePool], memory: Memory) -> None:
        super().__init__(store, layer_group, pools, memory)
        self._was_reused = [bytearray() for _ in pools]  # by tier and slot: whether anybody has started from it
        self.num_evicted_unused = 0

    def note_reuse(self, tier: int, slot: int) -> None:
        self._was_reused[tier][slot] = 1

    def reused_slots(self) -> set[tuple[int, int]]:
        """(tier, slot) of the snapshots that somebody has started from."""
        return {(tier, slot) for tier, flags in enumerate(self._was_reused) for slot, flag in enumerate(flags) if flag}

    def _make_flags(self, tier: int) -> None:
        missing = self.pools[tier].num_ever_used - len(self._was_reused[tier])
        if missing > 0:
            self._was_reused[tier].extend(bytes(missing))

    def add(self, cursor: Run, ordinals: IntArray, slots: IntArray, stamp: int, rank: int = DEFAULT_RANK) -> None:
        self._make_flags(0)
        super().add(cursor, ordinals, slots, stamp, rank)

    def _forgotten(self, tier: int, slots: Sequence[int]) -> int:
        flags = self._was_reused[tier]
        if not flags:
            return 0
        num_reused = sum(map(flags.__getitem__, slots))
        if num_reused:
            for slot in slots:
                flags[slot] = 0
        return num_reused

    def _note_evicted(self, run: Run, tier: int, ordinals: IntArray, slots: IntArray) -> None:
        super()._note_evicted(run, tier, ordinals, slots)
        self.num_evicted_unused += len(slots) - self._forgotten(tier, slots)

    def _follow(self, old_tier: int, old_slots: IntArray, tier: int, slots: IntArray) -> None:
        super()._follow(old_tier, old_slots, tier, slots)
        self._make_flags(tier)
        self._make_flags(old_tier)
        old, new = self._was_reused[old_tier], self._was_reused[tier]
        for slot, new_slot in zip(old_slots, slots, strict=True):
            new[new_slot], old[slot] = old[slot], 0

    def stamp(self, run: Run, stamp: int) -> None:
        """Stamp the snapshots of a run, which makes one segment of those that lie in the same tier."""
        if len(run.items) > 1:
            self._join(run)
        for segment in run.items:
            if segment.store is self:
                segment.stamp = stamp

    def _join(self, run: Run) -> None:
        kept: dict[tuple[int, int], SparseSegment] = {}
        for segment in list(self.on(run)):
            same = segment.tier, segment.rank
            kept[same] = self._merge(run, kept[same], segment) if same in kept else segment

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

    def num_on(self, cursor: Run) -> int:
        """Snapshots on the path of `cursor`. Cost: O(runs)."""
        return sum(len(segment.slots) for run in cursor.path() for segment in self.on(run))
