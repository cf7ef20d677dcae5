"""Slots that only some blocks of the tree have: snapshots of SSM states, and the pages of sliding windows.

Unlike a page of full attention, such a slot may go while a sequence goes on below it. What somebody depends on is
pinned, slot by slot.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

from ssmcache.memory.base import GPU_TIER
from ssmcache.pool_groups import PoolGroup
from ssmcache.pools import IntArray, StatePool, int_array
from ssmcache.segments import SparseSegment
from ssmcache.sparse_segments import SparseSegments
from ssmcache.tree import Run

if TYPE_CHECKING:
    from ssmcache.store import BlockStore


class SparseStore(SparseSegments):
    """The slots of one layer group that lie on blocks of the tree, or are parked by a suspended sequence."""

    def __init__(self, store: BlockStore, layer_group: int, pool_group: PoolGroup, pools: Sequence[StatePool]) -> None:
        super().__init__(store, layer_group, pool_group, pools)
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

    def take_some(self, count: int, stream: Any) -> IntArray:
        """As many slots, up to `count`, as can be had; the caller counts them once they are used.

        Errors: TransferError; no slot was taken then.
        """
        pool, count = self.gpu_pool, min(count, self.obtainable())
        if count <= 0:
            return int_array()
        if count > pool.capacity - pool.used:
            self.pool_group.make_room(count, stream)
        return pool.take(count)

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

    def oldest_block(self, segment: SparseSegment, dropping: bool) -> int:
        pins = self.pins.by_slot[segment.tier]
        for ordinal, slot in zip(reversed(segment.ordinals), reversed(segment.slots), strict=True):
            pin = pins.get(slot)
            if pin is None or not (dropping or pin.locked):
                return ordinal
        return segment.tail

    def drop_oldest(self, segment: SparseSegment, count: int, from_block: int) -> bool:
        queue, kept = self.queues[segment.tier], self.pins.by_slot[segment.tier]
        run = segment.run
        assert run is not None
        if self._is_own(run):
            queue.take_out(segment)
            return False
        count = min(self._num_at_once(segment, count, kept), _num_from(segment, from_block, kept))
        ordinals, slots = segment.take_oldest(count, kept)
        if slots:
            self._evict(run, segment.tier, ordinals, slots)
        if not segment.slots:
            self.drop_empty(run)
        elif not slots:  # what is left of it is pinned
            queue.take_out(segment)
        if slots:  # which may take others with it
            self._settle_loser(run, ordinals[0])
        return bool(slots)

    def put_back(self, segment: SparseSegment) -> None:
        if not self._stays_out(segment):
            self.queues[segment.tier].put(segment)

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

    def select_oldest(self, segment: SparseSegment, count: int, from_block: int) -> SparseSegment | None:
        run, tier = segment.run, segment.tier
        assert run is not None
        queue = self.queues[tier]
        queue.take_out(segment)
        if self._is_own(run):
            return None
        locked: Container[int] = ()
        if self.pins.locked[tier]:
            locked = {pin.slot for pin in self.pins.of(tier, segment.slots) if pin.locked}
        count = min(count, _num_from(segment, from_block, locked))
        if count >= len(segment.slots) and not locked:
            return segment
        ordinals, slots = segment.take_oldest(count, locked)
        if not slots:  # what is left of it is locked
            return None
        if segment.slots:
            queue.put(segment)
        else:
            self.drop_empty(run)
        return self.new_segment(run, segment.stamp, segment.rank, tier, ordinals, slots)

    def unselect(self, segment: SparseSegment) -> None:
        self.queues[segment.tier].put(segment)

    def must_be_queued(self, segment: SparseSegment) -> bool:
        return not self._stays_out(segment)

    # -- moving ------------------------------------------------------------------------------------------------------

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

    def take_lost(self, segment: SparseSegment, indices: list[int]) -> int:
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
        if self._cuts_path(ordinals[0]):
            return ordinals[0]
        self._settle_loser(run, ordinals[0])
        return -1

    def _cuts_path(self, block: int) -> bool:
        """Whether nothing from a block on can be used once its slot is lost."""
        return False

    def lose_slot(self, cursor: Run, tier: int, slot: int) -> None:
        """A slot of the path of `cursor` cannot be read any more: it is gone, and what cannot be used without it."""
        segment, index = self._place_of(cursor, tier, slot)
        run = segment.run
        assert run is not None
        block = self.take_lost(segment, [index])
        if block >= 0:
            self._store.lose(run, block)


def _num_from(segment: SparseSegment, from_block: int, kept: Container[int]) -> int:
    """How many slots of a segment that are not among `kept` are of blocks from `from_block` on, at least one."""
    if from_block <= segment.ordinals[0]:
        return len(segment.slots)
    first = bisect_left(segment.ordinals, from_block)
    return max(1, sum(slot not in kept for slot in segment.slots[first:]))
