"""Slots that only some blocks of the tree have, where they lie: segments on runs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ssmcache.memory.base import GPU_TIER
from ssmcache.pins import Pin, PinTable
from ssmcache.pool_groups import PoolGroup
from ssmcache.pools import IntArray, StatePool, int_array
from ssmcache.segments import DEFAULT_RANK, SparseSegment
from ssmcache.tiers import Tiers
from ssmcache.tree import Run

if TYPE_CHECKING:
    from ssmcache.places import PlaceTable
    from ssmcache.store import BlockStore


class SparseSegments(Tiers[SparseSegment, IntArray]):
    """The segments of one layer group: found, made, cut and joined. Who goes, and when, is `SparseStore`'s."""

    def __init__(self, store: BlockStore, layer_group: int, pool_group: PoolGroup, pools: Sequence[StatePool]) -> None:
        super().__init__(layer_group, pool_group, pools)
        self._store = store
        self.pins = PinTable(len(pools))

    # -- finding -----------------------------------------------------------------------------------------------------

    def on(self, run: Run) -> Iterator[SparseSegment]:
        """The segments of this layer group on a run."""
        return (segment for segment in run.items if segment.store is self)

    def find(self, cursor: Run, first: int, end: int) -> dict[int, tuple[SparseSegment, int]]:
        """Where the slots of blocks `first`..`end - 1` of a path are: block -> (segment, position in it)."""
        found: dict[int, tuple[SparseSegment, int]] = {}
        run = cursor
        while run.end > first and run.parent is not None:
            if run.start < end:
                for segment in self.on(run):
                    for index, ordinal in enumerate(segment.ordinals):
                        if first <= ordinal < end:
                            found[ordinal] = segment, index
            run = run.parent
        return found

    def ordinals_on(self, cursor: Run, from_block: int) -> set[int]:
        """Blocks from `from_block` on, on the path of `cursor`, that have a slot."""
        found: set[int] = set()
        run = cursor
        while run.end > from_block and run.parent is not None:
            for segment in run.items:
                if segment.store is self and segment.ordinals[-1] >= from_block:
                    found.update(ordinal for ordinal in segment.ordinals if ordinal >= from_block)
            run = run.parent
        return found

    def _place_of(self, cursor: Run, tier: int, slot: int) -> tuple[SparseSegment, int]:
        for run in cursor.path():
            for segment in self.on(run):
                if segment.tier == tier and slot in segment.slots:
                    return segment, segment.slots.index(slot)
        raise AssertionError(f"slot {slot} of tier {tier} is not on this path")

    # -- adding ------------------------------------------------------------------------------------------------------

    def add(
        self, cursor: Run, ordinals: IntArray, slots: IntArray, stamp: int, rank: int = DEFAULT_RANK,
        tier: int = GPU_TIER,
    ) -> None:  # fmt: skip
        """Attach slots of a tier to blocks of the path of `cursor` that have none: ascending ordinals, a slot for each.
        The arrays become the tree's.
        """
        self._store.version += 1
        if self._store.events is not None:
            self._store.events.added(cursor, self.layer_group, ordinals)
        end = len(ordinals)
        run: Run | None = cursor
        queue = self.queues[tier]
        while end > 0:
            assert run is not None
            begin = end if ordinals[0] < run.start else 0
            while begin > 0 and ordinals[begin - 1] >= run.start:
                begin -= 1
            if begin < end:
                if begin > 0 or end < len(ordinals):
                    segment = self.new_segment(run, stamp, rank, tier, ordinals[begin:end], slots[begin:end])
                else:
                    segment = self.new_segment(run, stamp, rank, tier, ordinals, slots)
                queue.put(segment)
                if self._store.places is not None:
                    self._note_added(self._store.places, segment)
                end = begin
                if ordinals[begin] == run.start:
                    self._regain(run)
            run = run.parent
        self.cached[tier] += len(slots)

    def _regain(self, run: Run) -> None:
        """A partial look-up may find the first block of this run again."""
        parent = run.parent
        assert parent is not None
        if parent.siblings is not None and isinstance(run.edge, bytes):
            parent.siblings.regain(run.edge)

    def new_segment(
        self, run: Run, stamp: int, rank: int, tier: int, ordinals: IntArray, slots: IntArray
    ) -> SparseSegment:
        """A segment on a run, which is not in the queue yet."""
        segment = SparseSegment(self, run, stamp, rank, self.serial(), tier, ordinals, slots)
        run.items += (segment,)
        return segment

    def split_off(self, segment: SparseSegment, indices: list[int]) -> SparseSegment:
        """The slots at some ascending positions, not all, as a segment of their own, which is not in the queue yet."""
        assert segment.run is not None
        ordinals, slots = segment.take(indices)
        return self.new_segment(segment.run, segment.stamp, segment.rank, segment.tier, ordinals, slots)

    def rerank(self, segment: SparseSegment, indices_by_rank: dict[int, list[int]]) -> None:
        """Give the slots at some ascending positions other ranks, as segments of their own."""
        run = segment.run
        assert run is not None
        ordinals, slots = segment.ordinals[:], segment.slots[:]
        for rank, indices in indices_by_rank.items():
            first, end = indices[0], indices[-1] + 1
            if end - first == len(indices):
                chosen = ordinals[first:end], slots[first:end]
            else:
                chosen = int_array(ordinals[index] for index in indices), int_array(slots[index] for index in indices)
            self.queues[segment.tier].put(self.new_segment(run, segment.stamp, rank, segment.tier, *chosen))
        segment.take(sorted(index for indices in indices_by_rank.values() for index in indices))
        if not segment.slots:
            self.drop_empty(run)

    # -- changing ----------------------------------------------------------------------------------------------------

    def join_like(self, run: Run) -> None:
        """Make one segment of those of a run that lie in the same tier and were stamped together."""
        kept: dict[tuple[int, int, int], SparseSegment] = {}
        for segment in list(self.on(run)):
            same = (segment.tier, segment.stamp, segment.rank)
            kept[same] = self._merge(run, kept[same], segment) if same in kept else segment

    def _merge(self, run: Run, left: SparseSegment, right: SparseSegment) -> SparseSegment:
        """One segment of two with equal times. The one with the deeper tail stays, so that none gets older."""
        kept, other = (left, right) if left.tail > right.tail else (right, left)
        kept.absorb(other)
        if other.queued:
            self.queues[kept.tier].put(kept)
        self.queues[kept.tier].retire(other)
        run.items = tuple(segment for segment in run.items if segment is not other)
        return kept

    def drop_empty(self, run: Run) -> None:
        for segment in run.items:
            if not segment.slots:
                segment.store.queues[segment.tier].retire(segment)
                run.items = tuple(segment for segment in run.items if segment.slots)

    def take_over(self, cursor: Run, tier: int, slot: int) -> None:
        """Take a slot out of the tree; it becomes the caller's."""
        self._store.version += 1
        segment, index = self._place_of(cursor, tier, slot)
        run = segment.run
        assert run is not None
        ordinals, slots = segment.take([index])
        self.pins.break_off(tier, slot)
        self.cached[tier] -= 1
        self._forgotten(run, tier, slots)
        if self._store.events is not None:
            self._store.events.removed(self.layer_group, tier, run, ordinals)
        if not segment.slots:
            self.drop_empty(run)

    def replace(self, segment: SparseSegment, index: int, slot: int) -> None:
        """The copy of a slot that the caller has on the GPU takes its place; the old slot, of a tier below, is free."""
        run = segment.run
        assert run is not None
        tier = segment.tier
        ordinals, slots = segment.take([index])
        self.follow(tier, slots, GPU_TIER, int_array((slot,)))
        self.give_back(tier, slots)
        if not segment.slots:
            self.drop_empty(run)
        self.queues[GPU_TIER].put(
            self.new_segment(run, segment.stamp, segment.rank, GPU_TIER, ordinals, int_array((slot,)))
        )
        self.cached[GPU_TIER] += 1
        if self._store.events is not None:
            self._store.events.moved(self.layer_group, tier, GPU_TIER, run, ordinals)

    def follow(self, old_tier: int, old_slots: IntArray, tier: int, slots: IntArray) -> None:
        """What is known of the old slots is known of the new ones from now on."""
        if self.pins.by_slot[old_tier]:
            for slot, new_slot in zip(old_slots, slots, strict=True):
                self.pins.move(old_tier, slot, tier, new_slot)

    def give_back(self, tier: int, slots: IntArray) -> None:
        """Slots of the tree go back to the pool of their tier."""
        self.pools[tier].give_back(slots)
        self.cached[tier] -= len(slots)

    def drop_from(self, run: Run, segment: SparseSegment, new_end: int) -> None:
        """The blocks from `new_end` on leave the tree: so does what the segment has there, which is something."""
        raise NotImplementedError

    def _note_added(self, places: PlaceTable, segment: SparseSegment) -> None:
        """A segment is new on its run."""
        raise NotImplementedError

    def _forgotten(self, run: Run, tier: int, slots: Sequence[int]) -> int:
        """These slots left a run; returns how many of them somebody has made use of, as far as that is known."""
        return 0

    def lifts(self, runs: Iterable[Run], wanted: Container[Pin | None], tier: int) -> list[SparseSegment]:
        """The pinned slots on some runs that lie below a tier, as segments of their own."""
        found: list[SparseSegment] = []
        for run in runs:
            for segment in list(self.on(run)):
                pins = self.pins.by_slot[segment.tier]
                if segment.tier <= tier or not pins:
                    continue
                indices = [index for index, slot in enumerate(segment.slots) if pins.get(slot) in wanted]
                if len(indices) == len(segment.slots):
                    found.append(segment)
                elif indices:
                    part = self.split_off(segment, indices)
                    self.queues[segment.tier].put(part)
                    found.append(part)
        return found
