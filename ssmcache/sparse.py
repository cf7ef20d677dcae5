"""Slots that only some blocks of the tree have: snapshots of SSM states, and the pages of sliding windows.

Unlike a page of full attention, such a slot may go while a sequence goes on below it. What somebody depends on is
pinned, slot by slot.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

from ssmcache.memory.base import GPU_TIER, Copier
from ssmcache.pools import IntArray, StatePool
from ssmcache.segments import SparseSegment, use_of
from ssmcache.sparse_segments import SparseSegments
from ssmcache.tree import Run

if TYPE_CHECKING:
    from ssmcache.store import BlockStore


class SparseStore(SparseSegments):
    """The slots of one layer group that lie on blocks of the tree, or are parked by a suspended sequence."""

    def __init__(self, store: BlockStore, layer_group: int, pools: Sequence[StatePool], memory: Copier) -> None:
        super().__init__(store, layer_group, pools, memory)
        self.gpu_pool = pools[GPU_TIER]
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

    def take_one(self, stream: Any) -> int:
        """`take` for one."""
        pool = self.gpu_pool
        return pool.take_one() if pool.used < pool.capacity else self.take(1, stream)[0]

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

    def drop(self, tier: int, count: int, only_unread: bool = False) -> None:
        """`only_unread`: no more than are of no use and come before all others."""
        queue, kept, pool = self.queues[tier], self.pins.by_slot[tier], self.pools[tier]
        passed_over: list[SparseSegment] = []
        goal = pool.used - count
        while pool.used > goal:
            self._settle_uses()
            segment = queue.oldest()
            if only_unread and (segment is None or use_of(segment.rank)):
                break
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

    def _settle_uses(self) -> None:
        """Bring up to date what the order of the queues depends on."""

    def _stays_out(self, segment: SparseSegment) -> bool:
        """Whether a segment that could not go comes back to the queue by other means."""
        return False

    def _evict(self, run: Run, tier: int, ordinals: IntArray, slots: IntArray) -> None:
        """Slots that were taken out of a run go."""
        count = len(slots)
        self.give_back(tier, slots)
        self.num_evicted += count
        self.num_evicted_unused += count - self._forgotten(run, tier, slots)
        self._store.version += 1
        if self._store.events is not None:
            self._store.events.removed(self.layer_group, tier, run, ordinals)

    def drop_from(self, run: Run, segment: SparseSegment, new_end: int) -> None:
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

    def drop_unpinned(self, run: Run) -> None:
        """Drop what lies on a run that nobody depends on."""
        for segment in list(self.on(run)):
            ordinals, slots = segment.take_oldest(len(segment.slots), self.pins.by_slot[segment.tier])
            if slots:
                self._evict(run, segment.tier, ordinals, slots)
        self.drop_empty(run)

    def _num_at_once(self, segment: SparseSegment, count: int, kept: Container[int]) -> int:
        """How many slots of a segment may be dropped before the effect of that has to be seen."""
        return count

    def _settle_loser(self, run: Run, block: int) -> None:
        """A run has lost slots, of `block` and deeper ones: without pages a block may have nothing left."""
        if run.pages is None and run.end > run.start:
            self._store.settle_leaf(run)

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
        self._forgotten(run, tier, slots)
        if not segment.slots:
            self.drop_empty(run)
        self._settle_lost(run, ordinals[0])

    def _settle_lost(self, run: Run, block: int) -> None:
        """A run lost slots, the first of them that of `block`."""
        self._settle_loser(run, block)

    def lose_slot(self, cursor: Run, tier: int, slot: int) -> None:
        """`lose` for a slot of the path of `cursor`."""
        segment, index = self._place_of(cursor, tier, slot)
        self.lose(segment, [index])
