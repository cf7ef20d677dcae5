"""Slots of one layer group in all tiers: its queues, its counts, and what its kind of slots makes of being moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

from ssmcache.eviction import EvictionQueue
from ssmcache.memory.base import GPU_TIER
from ssmcache.pool_groups import PoolGroup
from ssmcache.pools import IntArray, SlotArray, SlotPool
from ssmcache.segments import Segment

S = TypeVar("S", bound=Segment)
Slots = TypeVar("Slots", SlotArray, IntArray)


class Tiers(Generic[S, Slots]):
    """One layer group. What its slots are, pages or states, and who may go, is said by the class below.

    Attributes: `pool_group`, which has room for it and perhaps for others. By tier: `pools`, its own or shared;
    `queues` of segments; `cached`, the slots of segments, in the tree or parked by a suspended sequence (other used
    slots of the GPU are private to ACTIVE ones); `moved`, slots moved from tier to tier.
    """

    order_in_block: ClassVar[int]
    """Of one block touched at one time the slots with the lowest go first."""
    goes_by_use: ClassVar[bool] = False
    """Whether slots go by their use before their age (`places.py`)."""

    def __init__(self, layer_group: int, pool_group: PoolGroup, pools: Sequence[SlotPool[Slots]]) -> None:
        self.layer_group = layer_group
        self.pool_group = pool_group
        self.pools: tuple[SlotPool[Slots], ...] = tuple(pools)
        self.last_tier = len(pools) - 1
        self.queues = [EvictionQueue() for _ in pools]
        self.cached = [0] * len(pools)
        self.moved = [[0] * len(pools) for _ in pools]
        self.num_evicted = 0  # slots dropped by want of room
        self.num_allocated = 0  # slots taken for new content
        self._num_segments = 0
        pool_group.add(self)

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

    def oldest_block(self, segment: S, dropping: bool) -> int:
        """The deepest block of a segment that may be dropped, or moved: its tail, unless somebody needs that."""
        return segment.tail

    def drop_oldest(self, segment: S, count: int, from_block: int) -> bool:
        """Free up to `count` slots of the segment that is the oldest in its queue, the deepest first, and of those from
        `from_block` on at least one; what is no more use without them goes along. False, and it is out of the queue,
        if nothing of it can go just now: `put_back` is called later.
        """
        raise NotImplementedError

    def select_oldest(self, segment: S, count: int, from_block: int) -> S | None:
        """Take up to `count` slots that may move, as `drop_oldest`, out of the queue, as a segment of their own. None,
        and all of it is out of the queue, if nothing of it can move just now: `put_back` is called later.
        """
        raise NotImplementedError

    def put_back(self, segment: S) -> None:
        """Enter a segment again that could not go."""
        raise NotImplementedError

    def unselect(self, segment: S) -> None:
        """Undo `select_oldest` for a segment that could not be moved."""
        raise NotImplementedError

    def cut(self, segment: S, count: int, selected: bool) -> tuple[S, S]:
        """A segment as two, the one with `count` of its slots first: the lower part, which is older, if the segment was
        selected to move down, the upper part if it moves up.
        """
        raise NotImplementedError

    def must_be_queued(self, segment: S) -> bool:
        """Whether a segment can be asked to go, and so has to be in the queue of its tier."""
        return segment.may_go()

    def settle(self, segment: S, tier: int, slots: Slots) -> Slots:
        """The segment lies in `slots` of `tier` now; returns the slots that it leaves."""
        raise NotImplementedError

    def join_moved(self) -> None:
        """A batch of moves is over: what lies beside its like now may become one segment with it."""
        raise NotImplementedError

    def take_lost(self, segment: S, indices: list[int]) -> int:
        """The slots of a segment, in the tree or parked, at some ascending positions cannot be read any more. Returns
        the block from which on nothing of its path can be used, -1 if only these slots are gone, as they are now.
        """
        raise NotImplementedError

    # -- room --------------------------------------------------------------------------------------------------------

    def obtainable(self, tier: int = GPU_TIER, leaving: Sequence[int] | None = None) -> int:
        """See `PoolGroup.obtainable`: what others have that share the pool counts as well."""
        return self.pool_group.obtainable(tier, leaving)

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
        if count > pool.capacity - pool.used and not self.pool_group.make_room(count, stream):
            return None
        self.num_allocated += count
        return pool.take(count)
