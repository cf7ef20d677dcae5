"""Slots that only some blocks of the tree have: snapshots of SSM states, and the pages of sliding windows.

Unlike a page of full attention, such a slot may go while a sequence goes on below it. What somebody depends on is
pinned, slot by slot.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ssmcache.memory.base import GPU_TIER, Memory
from ssmcache.pins import Pin, PinTable
from ssmcache.pools import IntArray, StatePool, int_array
from ssmcache.segments import DEFAULT_RANK, SparseSegment
from ssmcache.tiers import Tiers
from ssmcache.tree import Run

if TYPE_CHECKING:
    from ssmcache.store import BlockStore


class SparseStore(Tiers[SparseSegment, IntArray]):
    """The slots of one layer group that lie on blocks of the tree, or are parked by a suspended sequence."""

    def __init__(self, store: BlockStore, layer_group: int, pools: Sequence[StatePool], memory: Memory) -> None:
        super().__init__(layer_group, pools, memory)
        self.gpu_pool = pools[GPU_TIER]
        self._store = store
        self.pins = PinTable(len(pools))
        self.num_evicted_unused = 0
        self._moved_runs: dict[Run, None] = {}  # by the batch under way
        self._own: Run | None = None
        self._own_runs: set[Run] | None = None

    # -- room --------------------------------------------------------------------------------------------------------

    def num_droppable(self, tier: int) -> int:
        return self.cached[tier] - self.pins.held[tier] - self.pins.locked[tier] - self._num_own(tier)

    def has_room_for(self, count: int) -> bool:
        """Whether so many GPU slots are certainly obtainable; a quick answer, False may be wrong."""
        return self.gpu_pool.free + self.cached[GPU_TIER] - len(self.pins.by_slot[GPU_TIER]) >= count

    def num_held(self, tier: int) -> int:
        return self.pins.held[tier]

    def protect(self, own: Run | None) -> None:
        """From now on nothing goes from the path of `own`, which is locked, until `protect(None)`."""
        self._own = own
        self._own_runs = None

    def _num_own(self, tier: int) -> int:
        if self._own is None:
            return 0
        pins = self.pins.by_slot[tier]
        own = [
            slot
            for run in self._own.path()
            for segment in self.on(run)
            if segment.tier == tier
            for slot in segment.slots
        ]
        return len(own) - sum(bool(pins[slot].held or pins[slot].locked) for slot in own if slot in pins)

    def _is_own(self, run: Run) -> bool:
        if self._own is None or not run.holds:
            return False
        if self._own_runs is None:
            self._own_runs = set(self._own.path())
        return run in self._own_runs

    # -- going -------------------------------------------------------------------------------------------------------

    def drop(self, tier: int, count: int) -> None:
        queue, kept, pool = self.queues[tier], self.pins.by_slot[tier], self.pools[tier]
        passed_over: list[SparseSegment] = []
        goal = pool.used - count
        while pool.used > goal:
            segment = queue.oldest()
            if segment is None:
                self._put_back(passed_over)
                self._store.drop_newest_soft_hold()
                continue
            assert isinstance(segment, SparseSegment)
            run = segment.run
            assert run is not None
            if self._is_own(run):
                queue.take_out(segment)
                passed_over.append(segment)
                continue
            ordinals, slots = segment.take_oldest(self._num_at_once(segment, pool.used - goal, kept), kept)
            if slots:
                self._evict(run, tier, ordinals, slots)
            if not segment.slots:
                self.drop_empty(run)
            elif not slots:  # what is left of it is pinned
                queue.take_out(segment)
                passed_over.append(segment)
            if slots:  # which may take others with it
                self._settle_loser(run, ordinals[0])
        self._put_back(passed_over)

    def _put_back(self, passed_over: list[SparseSegment]) -> None:
        """Enter segments again that could not go just now."""
        for segment in passed_over:
            if segment.run is not None and not self._stays_out(segment):
                self.queues[segment.tier].put(segment)
        passed_over.clear()

    def _stays_out(self, segment: SparseSegment) -> bool:
        """Whether a segment that could not go comes back to the queue by other means."""
        return False

    def _evict(self, run: Run, tier: int, ordinals: IntArray, slots: IntArray) -> None:
        """Slots that were taken out of a run go."""
        count = len(slots)
        self.pools[tier].give_back(slots)
        self.cached[tier] -= count
        self.num_evicted += count
        self.num_evicted_unused += count - self._forgotten(tier, slots)
        self._store.version += 1
        if self._store.events is not None:
            self._store.events.removed(self.layer_group, tier, run, ordinals)

    def _num_at_once(self, segment: SparseSegment, count: int, kept: Container[int]) -> int:
        """How many slots of a segment may be dropped before the effect of that has to be seen."""
        return count

    def _settle_loser(self, run: Run, block: int) -> None:
        """A run has lost slots, of `block` and deeper ones: without pages a block may have nothing left."""
        if run.pages is None and run.end > run.start:
            self._store.settle_leaf(run)

    def give_back(self, tier: int, slots: IntArray) -> None:
        """Slots of the tree go back to the pool of their tier."""
        self.pools[tier].give_back(slots)
        self.cached[tier] -= len(slots)

    def select(self, tier: int, count: int) -> list[SparseSegment]:
        queue = self.queues[tier]
        locked = (
            {slot for slot, pin in self.pins.by_slot[tier].items() if pin.locked}
            if self.pins.locked[tier]
            else frozenset()
        )
        selected: list[SparseSegment] = []
        passed_over: list[SparseSegment] = []
        while count > 0:
            segment = queue.oldest()
            assert isinstance(segment, SparseSegment), "room was promised that does not exist"
            run = segment.run
            assert run is not None
            queue.take_out(segment)
            if self._is_own(run):
                passed_over.append(segment)
                continue
            if count >= len(segment.slots) and not locked:
                victim = segment
            else:
                ordinals, slots = segment.take_oldest(count, locked)
                if segment.slots:
                    passed_over.append(segment)
                else:
                    self.drop_empty(run)
                if not slots:
                    continue
                victim = self.new_segment(run, segment.stamp, segment.rank, tier, ordinals, slots)
            selected.append(victim)
            count -= len(victim.slots)
        self._put_back(passed_over)
        return selected

    def unselect(self, segment: SparseSegment) -> None:
        self.queues[segment.tier].put(segment)

    def must_be_queued(self, segment: SparseSegment) -> bool:
        return not self._stays_out(segment)

    # -- moving ------------------------------------------------------------------------------------------------------

    def slots_of(self, segment: SparseSegment) -> IntArray:
        return segment.slots

    def cut(self, segment: SparseSegment, count: int, selected: bool) -> tuple[SparseSegment, SparseSegment]:
        size = len(segment.slots)
        first = self.split_off(segment, list(range(size - count, size) if selected else range(count)))
        if not selected:
            self.queues[segment.tier].put(first)
        return first, segment

    def settle(self, segment: SparseSegment, tier: int, slots: IntArray) -> IntArray:
        run, old_tier, old_slots = segment.run, segment.tier, segment.slots
        assert run is not None
        self.follow(old_tier, old_slots, tier, slots)
        run.items = tuple(other for other in run.items if other is not segment)
        self.queues[old_tier].retire(segment)
        moved = self.new_segment(run, segment.stamp, segment.rank, tier, segment.ordinals, slots)
        self.queues[tier].put(moved)
        if self._store.events is not None:
            self._store.events.moved(self.layer_group, old_tier, tier, run, segment.ordinals)
        self._moved_runs[run] = None
        return old_slots

    def join_moved(self) -> None:
        for run in self._moved_runs:
            self.join_like(run)
        self._moved_runs.clear()

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

    def follow(self, old_tier: int, old_slots: IntArray, tier: int, slots: IntArray) -> None:
        """What is known of the old slots is known of the new ones from now on."""
        if self.pins.by_slot[old_tier]:
            for slot, new_slot in zip(old_slots, slots, strict=True):
                self.pins.move(old_tier, slot, tier, new_slot)

    def lose(self, segment: SparseSegment, indices: list[int]) -> None:
        run, tier = segment.run, segment.tier
        assert run is not None
        self._store.version += 1
        ordinals, slots = segment.take(indices)
        if self._store.events is not None:
            self._store.events.removed(self.layer_group, tier, run, ordinals)
        for slot in slots:
            self.pins.break_off(tier, slot)
        self.give_back(tier, slots)
        self._forgotten(tier, slots)
        if not segment.slots:
            self.drop_empty(run)
        self._settle_lost(run, ordinals[0])

    def _settle_lost(self, run: Run, block: int) -> None:
        """A run lost slots, the first of them that of `block`."""
        self._settle_loser(run, block)

    def _forgotten(self, tier: int, slots: Sequence[int]) -> int:
        """These slots left the tree; returns how many of them somebody has made use of, as far as that is known."""
        return 0

    # -- following the tree ------------------------------------------------------------------------------------------

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

    def on(self, run: Run) -> Iterator[SparseSegment]:
        """The segments of this layer group on a run."""
        return (segment for segment in run.items if segment.store is self)

    def drop_from(self, run: Run, segment: SparseSegment, new_end: int) -> None:
        """The blocks from `new_end` on leave the tree: so does what the segment has there, which is something."""
        tier = segment.tier
        if segment.ordinals[0] >= new_end:
            ordinals, slots = segment.ordinals, segment.slots
            self.queues[tier].retire(segment)
            if new_end > run.start:  # else the run goes, with all that is on it
                run.items = tuple(other for other in run.items if other is not segment)
        else:
            ordinals, slots = segment.cut(bisect_left(segment.ordinals, new_end))
        if self.pins.by_slot[tier]:
            for slot in slots:
                self.pins.break_off(tier, slot)
        self._evict(run, tier, ordinals, slots)

    def drop_empty(self, run: Run) -> None:
        for segment in run.items:
            if not segment.slots:
                segment.store.queues[segment.tier].retire(segment)
                run.items = tuple(segment for segment in run.items if segment.slots)

    # -- adding and finding ------------------------------------------------------------------------------------------

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

    def add(self, cursor: Run, ordinals: IntArray, slots: IntArray, stamp: int, rank: int = DEFAULT_RANK) -> None:
        """Attach GPU slots to blocks of the path of `cursor` that have none: ascending ordinals, a slot for each.
        The arrays become the tree's.
        """
        self._store.version += 1
        if self._store.events is not None:
            self._store.events.added(cursor, self.layer_group, ordinals)
        end = len(ordinals)
        run: Run | None = cursor
        queue = self.queues[GPU_TIER]
        while end > 0:
            assert run is not None
            begin = end if ordinals[0] < run.start else 0
            while begin > 0 and ordinals[begin - 1] >= run.start:
                begin -= 1
            if begin < end:
                if begin > 0 or end < len(ordinals):
                    segment = self.new_segment(run, stamp, rank, GPU_TIER, ordinals[begin:end], slots[begin:end])
                else:
                    segment = self.new_segment(run, stamp, rank, GPU_TIER, ordinals, slots)
                queue.put(segment)
                end = begin
            run = run.parent
        self.cached[GPU_TIER] += len(slots)

    def take_one(self, stream: Any) -> int:
        """`take` for one."""
        pool = self.gpu_pool
        return pool.take_one() if pool.used < pool.capacity else self.take(1, stream)[0]

    def _place_of(self, cursor: Run, tier: int, slot: int) -> tuple[SparseSegment, int]:
        for run in cursor.path():
            for segment in self.on(run):
                if segment.tier == tier and slot in segment.slots:
                    return segment, segment.slots.index(slot)
        raise AssertionError(f"slot {slot} of tier {tier} is not on this path")

    def take_over(self, cursor: Run, tier: int, slot: int) -> None:
        """Take a slot out of the tree; it becomes the caller's."""
        segment, index = self._place_of(cursor, tier, slot)
        run = segment.run
        assert run is not None
        ordinals, slots = segment.take([index])
        self.pins.break_off(tier, slot)
        self.cached[tier] -= 1
        self._forgotten(tier, slots)
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

    def lose_slot(self, cursor: Run, tier: int, slot: int) -> None:
        """`lose` for a slot of the path of `cursor`."""
        segment, index = self._place_of(cursor, tier, slot)
        self.lose(segment, [index])

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
