"""Room for the layer groups that share the pools of one slot size: how much can be had in each tier, what has to go for
it, and the moves.

Tiers are exclusive. Room is found from the top down: a victim of one tier moves to the next, which makes room for it in
the same way, and the last tier drops. If one tier has more victims than the next one can have slots, the oldest of them
go on to the tier after that. What a suspended sequence holds may move but not go, so where the tiers below are full of
such slots, others are dropped instead, oldest first.

Victims are chosen over all layer groups of the pool: the lowest priority, then the oldest, block by block; of one block
touched at one time first the snapshot, then window pages, then the page of full attention.

Moves are planned on net counts: a slot that is left by a page on its way up is free for a victim on its way down. The
tiers below the GPU have a few slots beside their capacity (`SlotPool.staging`), so that nothing is ever overwritten
before it was copied; a batch that needs more than those is done in rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmcache.memory.base import GPU_TIER, Copier, SlotMoves, TransferError
from ssmcache.pools import SlotPool
from ssmcache.segments import SparseSegment, use_of

if TYPE_CHECKING:
    from ssmcache.segments import Segment
    from ssmcache.store import BlockStore
    from ssmcache.tiers import Tiers
    from ssmcache.tree import Run


class PoolGroup:
    """The pools, by tier, of one or several layer groups. `members`: these, in their order."""

    def __init__(self, store: BlockStore, index: int, pools: Sequence[SlotPool[Any]], memory: Copier) -> None:
        self.index = index
        self.pools = tuple(pools)
        self.last_tier = len(pools) - 1
        self.members: tuple[Tiers[Any, Any], ...] = ()
        self.lost: list[tuple[Any, list[int]]] = []  # segments and positions, by the batch that has just failed
        self._store = store
        self._memory = memory
        self._under_way: list[list[Any]] = []  # segments that were chosen to move and have not
        self._is_moving = False  # segments are on their way between tiers
        self._goes_by_use = False

    def add(self, member: Tiers[Any, Any]) -> None:
        """One layer group more."""
        self.members += (member,)
        self._goes_by_use |= member.goes_by_use

    def _member_of(self, segment: Any) -> Tiers[Any, Any]:
        """The layer group of a segment; that of full attention comes before all others."""
        return segment.store if isinstance(segment, SparseSegment) else self.members[0]

    @property
    def is_shared(self) -> bool:
        return len(self.members) > 1

    # -- room --------------------------------------------------------------------------------------------------------

    def num_droppable(self, tier: int) -> int:
        """Slots of segments that nobody open depends on, soft holds aside."""
        return sum([member.num_droppable(tier) for member in self.members])

    def num_held(self, tier: int) -> int:
        """Slots that suspended sequences hold: they may move down but not go."""
        return sum([member.num_held(tier) for member in self.members])

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

    def make_room(self, count: int, stream: Any) -> bool:
        """Have `count` slots of the GPU free; what is in the way goes. False, and nothing has changed, if so many
        cannot be had.

        Errors: TransferError.
        """
        if self.last_tier > GPU_TIER:
            if count > self.obtainable():
                return False
            self.bring([], GPU_TIER, count, stream)
            return True
        pool = self.pools[GPU_TIER]
        short = count - (pool.capacity - pool.used)
        if short > self.num_droppable(GPU_TIER):
            return False
        self.drop(GPU_TIER, short)
        return True

    # -- victims -----------------------------------------------------------------------------------------------------

    def _settle_uses(self) -> None:
        """Bring up to date what the order of window pages depends on, which cuts segments: not while some move."""
        if self._goes_by_use and not self._is_moving and self._store.places is not None:
            self._store.places.settle()

    def _oldest(self, tier: int, dropping: bool) -> tuple[Any, int]:
        """The segment that goes first, and the block from which on it goes before all others; None without any."""
        if len(self.members) == 1:
            return self.members[0].queues[tier].oldest(), 0
        heads: list[tuple[int, int, int, Segment]] = []  # the layer groups differ: segments are never compared
        for member in self.members:
            segment = member.queues[tier].oldest()
            if segment is not None:
                time = segment.rank + segment.stamp - member.oldest_block(segment, dropping)
                heads.append((time, member.order_in_block, member.layer_group, segment))
        if not heads:
            return None, 0
        first = min(heads)
        segment = first[3]
        if len(heads) == 1:
            return segment, 0
        second = min(head for head in heads if head is not first)
        latest = second[0] if first[1:3] < second[1:3] else second[0] - 1
        return segment, segment.rank + segment.stamp - latest

    def drop(self, tier: int, count: int, only_unread: bool = False) -> None:
        """Free the `count` oldest droppable slots of a tier; `only_unread`: as far as nobody would read them."""
        pool, by_use = self.pools[tier], self._goes_by_use
        goal = pool.used - count
        passed_over: list[Any] = []
        only = self.members[0] if len(self.members) == 1 else None
        while pool.used > goal:
            if by_use:
                self._settle_uses()
            segment, from_block = self._oldest(tier, dropping=True) if only is None else (only.queues[tier].oldest(), 0)
            if only_unread and (segment is None or use_of(segment.rank)):
                break
            if segment is None:
                self._put_back(passed_over)
                self._store.drop_newest_soft_hold()
                continue
            member = self._member_of(segment) if only is None else only
            if not member.drop_oldest(segment, pool.used - goal, from_block):
                passed_over.append(segment)
        if passed_over:
            self._put_back(passed_over)

    def _select(self, tier: int, count: int) -> list[Any]:
        """Take the `count` oldest slots that may move out of the queues of a tier, as segments of their own."""
        selected: list[Any] = []
        self._under_way.append(selected)
        passed_over: list[Any] = []
        while count > 0:
            segment, from_block = self._oldest(tier, dropping=False)
            assert segment is not None, "room was promised that does not exist"
            victim = self._member_of(segment).select_oldest(segment, count, from_block)
            if victim is None:
                passed_over.append(segment)
            else:
                selected.append(victim)
                count -= len(victim.slots)
        self._put_back(passed_over)
        return selected

    def _put_back(self, passed_over: list[Any]) -> None:
        """Enter segments again that could not go just now."""
        for segment in passed_over:
            if segment.run is not None:
                self._member_of(segment).put_back(segment)
        passed_over.clear()

    def note_split(self, segment: Any, above: Any) -> bool:
        """The run of a segment was cut, which leaves the deeper of its slots, if any, and `above`, not queued. Whether
        it had been chosen to move: then both do.
        """
        for segments in self._under_way:
            for index, other in enumerate(segments):
                if other is segment:
                    segments[index : index + 1] = [segment, above] if segment.slots else [above]
                    return True
        return False

    # -- moves -------------------------------------------------------------------------------------------------------

    def bring(self, lifts: list[Any], tier: int, beside: int, stream: Any) -> None:
        """Move segments up to a tier and leave `beside` more of its slots free; what is in the way goes. The segments
        of each layer group come from the top of a path down. The caller has checked `obtainable`, and protects them by
        a lock.

        Errors: TransferError. Every page is in one place then, and those that were lost are out of the tree; a tier
        may have given up its oldest slots, or have taken more of them for good than before, which were its staging.
        """
        leaving = [0] * len(self.pools)
        for segment in lifts:
            leaving[segment.tier] += len(segment.slots)
        downs: list[tuple[int, list[Any]]] = []
        most_used = [max(pool.capacity, pool.used) for pool in self.pools]
        if not lifts:  # else the caller has, before it looked for them
            self._settle_uses()
        lifts = list(lifts)
        self._under_way.append(lifts)
        self._is_moving = True
        try:
            self._make_way(tier, beside + sum(leaving), leaving, downs)
            self._relocate(downs, lifts, tier, stream)
        except TransferError as error:
            self._under_way.clear()
            for _, segments in downs:
                for segment in segments:
                    self._member_of(segment).unselect(segment)
            self._settle_failure(error, most_used)
            raise
        finally:
            self._under_way.clear()
            self._is_moving = False
            for member in reversed(self.members):  # pages last: with them runs become one
                member.join_moved()

    def _settle_failure(self, error: TransferError, most_used: list[int]) -> None:
        """Some moves of a batch were not made, and none is under way any more. `most_used`: slots by tier that may stay
        in use, as many as there were before.
        """
        lost, self.lost = self.lost, []
        cuts: dict[Run, int] = {}  # paths are cut last: that would leave other segments with other slots
        for segment, indices in lost:
            run = segment.run
            if run is not None:  # else it went with another
                block = self._member_of(segment).take_lost(segment, indices)
                if block >= 0:
                    cuts[run] = min(block, cuts.get(run, block))
        for run, block in cuts.items():
            if run.end > run.start:
                self._store.lose(run, block)
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

    def _make_way(self, tier: int, count: int, leaving: list[int], downs: list[tuple[int, list[Any]]]) -> int:
        """Decide what goes so that `count` more slots of a tier are in use once everything has moved; adds (tier, what
        goes there) to `downs`, the lowest first. Returns how many of the `count` find no place and go on to the next
        tier: all else has gone there already.
        """
        if self._goes_by_use and tier < self.last_tier:  # what nobody reads moves down, but pushes nothing out
            below = range(tier + 1, self.last_tier + 1)
            room = sum(max(0, -self._short_by(lower, 0, leaving)) for lower in below)
            self.drop(tier, self._short_by(tier, count, leaving) - room, only_unread=True)
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
        selected = self._select(tier, num_own)  # the oldest first
        through: list[Any] = []
        self._under_way.append(through)
        while num_through:
            segment = selected.pop(0)
            if len(segment.slots) > num_through:
                segment, rest = self._member_of(segment).cut(segment, num_through, True)
                selected.insert(0, rest)
            through.append(segment)
            num_through -= len(segment.slots)
        if through:
            downs.append((tier + 2, through))
        downs.append((tier + 1, selected))
        return num_passing

    def _short_by(self, tier: int, count: int, leaving: list[int]) -> int:
        pool = self.pools[tier]
        return count - (pool.capacity - pool.used) - leaving[tier]

    def _relocate(self, downs: list[tuple[int, list[Any]]], lifts: list[Any], target: int, stream: Any) -> None:
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

    def _move(self, segments: list[Any], tier: int, stream: Any) -> int:
        """Move as many slots as there is room for, from the front of the list; returns their number."""
        pool = self.pools[tier]
        num_moved = 0
        while segments and pool.physically_free:
            source_tier = segments[0].tier
            batch: list[Any] = []
            self._under_way.append(batch)
            room = pool.physically_free
            while segments and room and segments[0].tier == source_tier:
                segment = segments.pop(0)
                count = len(segment.slots)
                if count > room:
                    segment, rest = self._member_of(segment).cut(segment, room, tier > source_tier)
                    segments.insert(0, rest)
                    count = room
                batch.append(segment)
                room -= count
            self._under_way.pop()
            num_moved += self._move_batch(batch, source_tier, tier, stream)
        return num_moved

    def _move_batch(self, batch: list[Any], source_tier: int, tier: int, stream: Any) -> int:
        sources = np.concatenate([segment.slots for segment in batch])
        pool = self.pools[tier]
        destinations = pool.take(len(sources))
        try:
            self._memory.copy(SlotMoves(self.index, source_tier, sources, tier, destinations), stream)
        except TransferError as error:
            pool.give_back(destinations)
            first = 0
            for segment in batch:
                end = first + len(segment.slots)
                indices = [position - first for position in error.lost if first <= position < end]
                if indices:
                    self.lost.append((segment, indices))
                if tier > source_tier:
                    self._member_of(segment).unselect(segment)
                first = end
            raise
        first = 0
        for segment in batch:
            member, count = self._member_of(segment), len(segment.slots)
            left = member.settle(segment, tier, destinations[first : first + count])
            member.pools[source_tier].give_back(left)
            member.cached[source_tier] -= count
            member.cached[tier] += count
            member.moved[source_tier][tier] += count
            first += count
        return len(sources)
