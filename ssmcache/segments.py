"""Segments: blocks of one run and one layer group that lie in one tier and were stamped by the same touch.

Full attention has a page for every block of a run, in one segment (`PageSegment`). Sliding windows and SSM have slots
for some blocks only, in a few segments (`SparseSegment`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container
from typing import TYPE_CHECKING

import numpy as np

from ssmcache.pools import IntArray, SlotArray, fitting, int_array

if TYPE_CHECKING:
    from ssmcache.sparse_segments import SparseSegments
    from ssmcache.tree import Run

# a run that grows gets this much room ahead: long conversations copy each block O(1) times
GROWTH = 1.25

DEFAULT_PRIORITY = 35
# a priority weighs more than any time: the clock counts touched blocks and stays far below this
_PRIORITY_SHIFT = 54
DEFAULT_RANK = 0  # small numbers are fast
# what a window page is of use for (`places.py`) weighs less than a priority and more than any time
_USE_SHIFT = 52
_MOST_USE = 2


def rank_of(priority: int) -> int:
    """A priority as a number to be added to times: a higher one outweighs every recency."""
    return (priority - DEFAULT_PRIORITY) << _PRIORITY_SHIFT


def use_of(rank: int) -> int:
    """The use in the rank of a window page; that of anything else is the greatest."""
    return (rank + (_MOST_USE << _USE_SHIFT)) >> _USE_SHIFT & 3


def with_use(rank: int, use: int) -> int:
    """The rank with the same priority for a window page of another use."""
    return rank + ((use - use_of(rank)) << _USE_SHIFT)


class Segment:
    """`tail` is the deepest, hence oldest, block. Who goes first: the lowest `rank + stamp - tail`. The rank weighs
    more than any time: it is a priority, and of window pages, within that, their use.

    `run` is None once the segment has left the tree, which also breaks the circle between the two; `queued` says that
    the eviction queue of its tier has an entry for it.
    """

    __slots__ = ("queued", "rank", "run", "serial", "stamp", "tail", "tier")

    run: Run | None
    stamp: int
    rank: int
    serial: int
    tail: int
    tier: int
    queued: bool

    def may_go(self) -> bool:
        """Whether eviction may take the tail of this segment, which is in the tree: move it down, or drop it."""
        raise AssertionError("a segment is of pages or sparse")


class PageSegment(Segment):
    """The pages of all blocks of a run: block `start + i` lies in slot `slots[i]` of `tier`.

    `colder` says that there is a tier below: then what a suspended sequence holds may go, too, since it only moves.
    """

    __slots__ = ("_buffer", "colder", "count", "start")

    def __init__(
        self, run: Run, stamp: int, rank: int, serial: int, tier: int, colder: bool, start: int, slots: SlotArray
    ) -> None:
        self.run, self.stamp, self.rank, self.serial, self.tier, self.queued = run, stamp, rank, serial, tier, False
        self.colder = colder
        self.start = start
        self.count = count = len(slots)
        self.tail = start + count - 1
        self._buffer = fitting(slots, count)

    def may_go(self) -> bool:
        run = self.run
        if run is None:
            return False
        if self.colder:
            return run.holds == run.idle_holds and not run.warm_children
        return not (run.children or run.holds or run.soft_holds)

    @property
    def slots(self) -> SlotArray:
        return self._buffer[: self.count]

    def renumber(self, slots: SlotArray) -> None:
        """The same blocks lie in other slots of the same tier."""
        self._buffer = slots

    def extend(self, slots: SlotArray) -> None:
        end = self.count + len(slots)
        if end > self._buffer.size:
            grown = np.empty(int(end * GROWTH) + 1, dtype=np.int32)
            grown[: self.count] = self._buffer[: self.count]
            self._buffer = grown
        self._buffer[self.count : end] = slots
        self.count = end
        self.tail = self.start + end - 1

    def prepend(self, slots: SlotArray) -> None:
        self._buffer = np.concatenate((slots, self.slots))
        self.count = len(self._buffer)
        self.start -= len(slots)

    def drop_tail(self, count: int) -> SlotArray:
        """Forget the last `count` blocks and return their slots, a view of memory that may be written again."""
        self.tail -= count
        buffer, end = self._buffer, self.count
        self.count = left = end - count
        if left and 2 * left < (buffer.size if buffer.base is None else buffer.base.size):
            self._buffer = buffer[:left].copy()
        return buffer[left:end]

    def split_upper(self, upper: Run, at: int, serial: int) -> PageSegment:
        """Leave the blocks from `at` on here; return the ones before it as a segment of `upper`."""
        count = at - self.start
        slots = self._buffer[:count]
        above = PageSegment(upper, self.stamp, self.rank, serial, self.tier, self.colder, self.start, slots)
        self.count -= count
        self._buffer = fitting(self._buffer[count:], self.count)
        self.start = at
        return above


class SparseSegment(Segment):
    """Some slots of a run, by ascending block ordinal: what belongs to block `ordinals[i]` lies in slot `slots[i]`.

    For SSM that is the state after the block. Both are machine integers: lists would be of objects all over the memory,
    each a cache miss when its turn comes.
    """

    __slots__ = ("ordinals", "slots", "store")

    def __init__(
        self, store: SparseSegments, run: Run, stamp: int, rank: int, serial: int, tier: int, ordinals: IntArray,
        slots: IntArray,
    ) -> None:  # fmt: skip
        self.store = store
        self.run, self.stamp, self.rank, self.serial, self.tier, self.queued = run, stamp, rank, serial, tier, False
        self.ordinals = ordinals
        self.slots = slots
        self.tail = ordinals[-1]

    def may_go(self) -> bool:
        return True

    def take_oldest(self, count: int, kept: Container[int]) -> tuple[IntArray, IntArray]:
        """Forget up to `count` slots that are not among `kept`, the deepest first: (ordinals, ascending, slots)."""
        if not kept:
            first = max(0, len(self.slots) - count)
            return self.cut(first)
        deepest_first = range(len(self.slots) - 1, -1, -1)
        victims = [index for index in deepest_first if self.slots[index] not in kept][:count]
        return self.take(victims[::-1])

    def cut(self, first: int) -> tuple[IntArray, IntArray]:
        """Forget the slots from position `first` on: (their ordinals, the slots)."""
        taken = self.ordinals[first:], self.slots[first:]
        del self.ordinals[first:], self.slots[first:]
        if first:
            self.tail = self.ordinals[-1]
        return taken

    def take(self, indices: list[int]) -> tuple[IntArray, IntArray]:
        """Forget the slots at some positions, ascending: (their ordinals, the slots)."""
        taken = int_array(self.ordinals[index] for index in indices), int_array(self.slots[index] for index in indices)
        for index in reversed(indices):
            del self.ordinals[index], self.slots[index]
        if self.ordinals:
            self.tail = self.ordinals[-1]
        return taken

    def split_upper(self, upper: Run, at: int, serial: int) -> SparseSegment | None:
        """Leave the slots from block `at` on here; return the ones before it, if any, as a segment of `upper`."""
        count = bisect_left(self.ordinals, at)
        if count == 0:
            return None
        above = SparseSegment(
            self.store, upper, self.stamp, self.rank, serial, self.tier, self.ordinals[:count], self.slots[:count]
        )
        del self.ordinals[:count], self.slots[:count]
        return above

    def absorb(self, other: SparseSegment) -> None:
        """Take over the slots of another segment, in the order of their blocks. Cost: O(1) each if one is deeper."""
        if other.ordinals[0] > self.ordinals[-1]:
            self.ordinals += other.ordinals
            self.slots += other.slots
        elif other.ordinals[-1] < self.ordinals[0]:
            other.ordinals += self.ordinals
            other.slots += self.slots
            self.ordinals, self.slots = other.ordinals, other.slots
        else:
            pairs = sorted(zip(self.ordinals + other.ordinals, self.slots + other.slots, strict=True))
            self.ordinals = int_array(ordinal for ordinal, _ in pairs)
            self.slots = int_array(slot for _, slot in pairs)
        self.tail = self.ordinals[-1]
