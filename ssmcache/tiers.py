"""Slots of one layer group in all tiers: how much room can be had, what has to go for it, and the moves.

Tiers are exclusive. Room is found from the top down: a victim of one tier moves to the next, which makes room for it in
the same way, and the last tier drops. If one tier has more victims than the next one can have slots, the oldest of them
go on to the tier after that. What a suspended sequence holds may move but not go, so where the tiers below are full of
such slots, others are dropped instead, oldest first.

Moves are planned on net counts: a slot that is left by a page on its way up is free for a victim on its way down. The
tiers below the GPU have a few slots beside their capacity (`SlotPool.staging`), so that nothing is ever overwritten
before it was copied; a batch that needs more than those is done in rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from ssmcache.eviction import EvictionQueue
from ssmcache.memory.base import GPU_TIER, Copier, SlotMoves, TransferError
from ssmcache.pools import IntArray, SlotArray, SlotPool
from ssmcache.segments import Segment

S = TypeVar("S", bound=Segment)
Slots = TypeVar("Slots", SlotArray, IntArray)


class Tiers(Generic[S, Slots]):
    """One layer group. What its slots are, pages or states, and who may go, is said by the class below.

    Attributes, each by tier: `pools`; `queues` of segments; `cached`, the slots of segments, in the tree or parked by a
    suspended sequence (other used slots of the GPU are private to ACTIVE ones); `moved`, slots moved from tier to tier.
    """

    def __init__(self, layer_group: int, pools: Sequence[SlotPool[Slots]], memory: Copier) -> None:
        self.layer_group = layer_group
        self.pools: tuple[SlotPool[Slots], ...] = tuple(pools)
        self.last_tier = len(pools) - 1
        self.queues = [EvictionQueue() for _ in pools]
        self.cached = [0] * len(pools)
        self.moved = [[0] * len(pools) for _ in pools]
        self.num_evicted = 0  # slots dropped by want of room
        self.num_allocated = 0  # slots taken for new content
        self._memory = memory
        self._lost: list[tuple[S, list[int]]] = []  # by the batch that has just failed
        self._num_segments = 0

    def serial(self) -> int:
        self._num_segments += 1
        return self._num_segments

    # -- said by the kind of slots -----------------------------------------------------------------------------------

    def num_droppable(self, tier: int) -> int:
        """Slots of segments that nobody open depends on, soft holds aside."""
        raise NotImplementedError

    def num_held(self, tier: int) -> int:
        """Slots that suspended sequences hold: they may move down but not go."""
        raise NotImplementedError

    def drop(self, tier: int, count: int) -> None:
        """Free the `count` oldest droppable slots of a tier."""
        raise NotImplementedError

    def select(self, tier: int, count: int) -> list[S]:
        """Take the `count` oldest slots that may move out of the queue of a tier, as segments of their own."""
        raise NotImplementedError

    def unselect(self, segment: S) -> None:
        """Undo `select` for a segment that could not be moved."""
        raise NotImplementedError

    def cut(self, segment: S, count: int, selected: bool) -> tuple[S, S]:
        """A segment as two, the one with `count` of its slots first: the lower part, which is older, if the segment was
        selected to move down, the upper part if it moves up.
        """
        raise NotImplementedError

    def must_be_queued(self, segment: S) -> bool:
        """Whether a segment can be asked to go, and so has to be in the queue of its tier."""
        return segment.may_go()

    def slots_of(self, segment: S) -> Slots:
        raise NotImplementedError

    def settle(self, segment: S, tier: int, slots: Slots) -> Slots:
        """The segment lies in `slots` of `tier` now; returns the slots that it leaves."""
        raise NotImplementedError

    def join_moved(self) -> None:
        """A batch of moves is over: what lies beside its like now may become one segment with it."""
        raise NotImplementedError

    def lose(self, segment: S, indices: list[int]) -> None:
        """The slots of a segment, in the tree or parked, at some ascending positions cannot be read any more."""
        raise NotImplementedError

    # -- room --------------------------------------------------------------------------------------------------------

    def obtainable(self, tier: int = GPU_TIER, leaving: Sequence[int] | None = None) -> int:
        """Slots of a tier that can be had by moving and dropping. `leaving`: by tier, slots about to move up."""
        pool = self.pools[tier]
        room = pool.capacity - pool.used + self.num_droppable(tier)
        if leaving is not None:
            room += leaving[tier]
        if tier < self.last_tier:
            held = self.num_held(tier)
            if held:
                room += min(held, self.room_below(tier, leaving))
        return room

    def room_below(self, tier: int, leaving: Sequence[int] | None = None) -> int:
        """Slots of the tiers below one that can be had for what has to go from there: what others hold stays."""
        room = 0
        for below in range(tier + 1, self.last_tier + 1):
            pool = self.pools[below]
            room += pool.capacity - pool.used + self.num_droppable(below)
            if leaving is not None:
                room += leaving[below]
        return room

    def take(self, count: int, stream: Any) -> Slots:
        """`try_take` for a count that is known to be obtainable."""
        slots = self.try_take(count, stream)
        assert slots is not None, "room was promised that does not exist"
        return slots

    def try_take(self, count: int, stream: Any) -> Slots | None:
        """`count` slots of the GPU for new content; what is in the way goes. None, and nothing has changed, if so many
        cannot be had.

        Errors: TransferError; no slot was taken then.
        """
        pool = self.pools[GPU_TIER]
        short = count - (pool.capacity - pool.used)
        if short > 0:
            if self.last_tier > GPU_TIER:
                if count > self.obtainable():
                    return None
                self.bring([], GPU_TIER, count, stream)
            elif short > self.num_droppable(GPU_TIER):
                return None
            else:
                self.drop(GPU_TIER, short)
        self.num_allocated += count
        return pool.take(count)

    def bring(self, lifts: list[S], tier: int, beside: int, stream: Any) -> None:
        """Move segments up to a tier and leave `beside` more of its slots free; what is in the way goes. The segments
        come from the top of a path down. The caller has checked `obtainable`, and protects them by a lock.

        Errors: TransferError. Every page is in one place then, and those that were lost are out of the tree; a tier
        may have given up its oldest slots, or have taken more of them for good than before, which were its staging.
        """
        leaving = [0] * len(self.pools)
        for segment in lifts:
            leaving[segment.tier] += len(self.slots_of(segment))
        downs: list[tuple[int, list[S]]] = []
        most_used = [max(pool.capacity, pool.used) for pool in self.pools]
        self._make_way(tier, beside + sum(leaving), leaving, downs)
        try:
            self._relocate(downs, list(lifts), tier, stream)
        except TransferError as error:
            for _, segments in downs:
                for segment in segments:
                    self.unselect(segment)
            self._settle_failure(error, most_used)
            raise
        finally:
            self.join_moved()

    def _settle_failure(self, error: TransferError, most_used: list[int]) -> None:
        """Some moves of a batch were not made, and none is under way any more. `most_used`: slots by tier that may stay
        in use, as many as there were before.
        """
        lost, self._lost = self._lost, []
        for segment, indices in lost:
            if segment.run is not None:  # else it went with another
                self.lose(segment, indices)
        for tier, pool in enumerate(self.pools):
            excess = pool.used - most_used[tier]
            if excess > 0:  # what was to make room for it is still there
                self.drop(tier, min(excess, self.num_droppable(tier)))
                pool.staging -= max(0, pool.used - pool.capacity)
                pool.capacity = max(pool.capacity, pool.used)
        if not error.lost:  # what lies there can still be read, but nothing more fits
            pool = self.pools[error.tier]
            kept = min(pool.capacity, pool.used)
            pool.staging += pool.capacity - kept  # the memory still has the slots, and some in use may be the last
            pool.capacity = kept

    def _make_way(self, tier: int, count: int, leaving: list[int], downs: list[tuple[int, list[S]]]) -> int:
        """Decide what goes so that `count` more slots of a tier are in use once everything has moved; adds (tier, what
        goes there) to `downs`, the lowest first. Returns how many of the `count` find no place and go on to the next
        tier: all else has gone there already.
        """
        short = self._short_by(tier, count, leaving)
        if short <= 0:
            return 0
        if tier == self.last_tier:
            self.drop(tier, short)
            return 0
        num_down = min(short, self.room_below(tier, leaving))
        if short > num_down:  # before anything below is on its way: what is dropped may take that with it
            self.drop(tier, short - num_down)
            num_down = max(0, self._short_by(tier, count, leaving))
        num_own = min(num_down, self.num_droppable(tier) + self.num_held(tier))
        num_passing = num_down - num_own
        num_through = self._make_way(tier + 1, num_down, leaving, downs)
        # a sink page that was dropped below may have taken slots of this tier along
        num_own = min(num_own, max(0, self._short_by(tier, count, leaving) - num_passing))
        num_through = min(num_through, num_own)
        selected = self.select(tier, num_own)  # the oldest first
        through: list[S] = []
        while num_through:
            segment = selected.pop(0)
            if len(self.slots_of(segment)) > num_through:
                segment, rest = self.cut(segment, num_through, True)
                selected.insert(0, rest)
            through.append(segment)
            num_through -= len(self.slots_of(segment))
        if through:
            downs.append((tier + 2, through))
        downs.append((tier + 1, selected))
        return num_passing

    def _short_by(self, tier: int, count: int, leaving: list[int]) -> int:
        pool = self.pools[tier]
        return count - (pool.capacity - pool.used) - leaving[tier]

    def _relocate(self, downs: list[tuple[int, list[S]]], lifts: list[S], target: int, stream: Any) -> None:
        """Carry the moves out, and take what is done out of the lists. Each round gets further: what is above its
        capacity by staging has a move to come. `in_order`: pages that go past a tier do so before those above them go
        there, unless that would be the end of all progress.
        """
        in_order = True
        while lifts or any(segments for _, segments in downs):
            num_moved = 0
            for tier, segments in downs:  # the lowest first, since a failed write spoils least there
                num_moved += self._move(segments, tier, stream)
                if in_order and segments and tier > segments[0].tier + 1:
                    break  # what stays in the tier between lies above these, and should not go before them
            num_moved += self._move(lifts, target, stream)
            if in_order or num_moved:
                in_order = num_moved > 0
            else:
                full = [tier for tier in range(1, self.last_tier + 1) if not self.pools[tier].staging]
                assert full, "moves were planned that have no room"
                raise TransferError(full[0], (), "earlier failures left no room to move anything through")

    def _move(self, segments: list[S], tier: int, stream: Any) -> int:
        """Move as many slots as there is room for, from the front of the list; returns their number."""
        pool = self.pools[tier]
        num_moved = 0
        while segments and pool.physically_free:
            source_tier = segments[0].tier
            batch: list[S] = []
            room = pool.physically_free
            while segments and room and segments[0].tier == source_tier:
                segment = segments.pop(0)
                count = len(self.slots_of(segment))
                if count > room:
                    segment, rest = self.cut(segment, room, tier > source_tier)
                    segments.insert(0, rest)
                    count = room
                batch.append(segment)
                room -= count
            num_moved += self._move_batch(batch, source_tier, tier, stream)
        return num_moved

    def _move_batch(self, batch: list[S], source_tier: int, tier: int, stream: Any) -> int:
        sources = np.concatenate([self.slots_of(segment) for segment in batch])
        pool = self.pools[tier]
        destinations = pool.take(len(sources))
        try:
            self._memory.copy(SlotMoves(self.layer_group, source_tier, sources, tier, destinations), stream)
        except TransferError as error:
            pool.give_back(destinations)
            first = 0
            for segment in batch:
                end = first + len(self.slots_of(segment))
                indices = [position - first for position in error.lost if first <= position < end]
                if indices:
                    self._lost.append((segment, indices))
                if tier > source_tier:
                    self.unselect(segment)
                first = end
            raise
        first = 0
        for segment in batch:
            end = first + len(self.slots_of(segment))
            self.pools[source_tier].give_back(self.settle(segment, tier, destinations[first:end]))
            first = end
        self.cached[source_tier] -= len(sources)
        self.cached[tier] += len(sources)
        self.moved[source_tier][tier] += len(sources)
        return len(sources)
