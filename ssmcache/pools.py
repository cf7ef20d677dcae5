"""Slots: equal-sized pieces of one tier's memory, handed out last in, first out."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

SlotArray = npt.NDArray[np.int32]
IntArray: TypeAlias = "array[int]"  # of 64-bit integers: a handful of slots or ordinals

UNLIMITED_SLOTS = sys.maxsize
NO_SLOTS: SlotArray = np.empty(0, dtype=np.int32)


def int_array(values: Iterable[int] = ()) -> IntArray:
    """Machine integers, 64 bits each."""
    return array("q", values)


Scalar = TypeVar("Scalar", bound=np.generic)


def fitting(buffer: npt.NDArray[Scalar], used: int) -> npt.NDArray[Scalar]:
    """The buffer, whose first `used` entries matter, or a copy of those where it would keep more than twice their
    memory: what is left of a long array must not keep all of it. Amortised O(entries given up).

    What cannot be written is a part of a longer array of the caller's, who keeps that.
    """
    base = buffer.base
    kept = buffer.size if base is None or type(base) is not np.ndarray else base.size
    return buffer if kept <= 2 * used or not buffer.flags.writeable else buffer[:used].copy()


Slots = TypeVar("Slots", SlotArray, IntArray)


class SlotPool(Generic[Slots]):
    """Which slots of a pool are free. Knows numbers of slots only, no bytes and no content.

    Slots that came back are handed out first, the last one first, so that the order of slots depends on the calls
    alone, never on time; slots never used before follow in ascending order.

    Args:
        capacity: slots that may be in use.
        staging: slots beside them, in use only while a batch of moves is under way.
    """

    __slots__ = ("_next_fresh", "capacity", "peak_used", "staging", "used")

    def __init__(self, capacity: int, staging: int = 0) -> None:
        self.capacity = capacity
        self.staging = staging
        self.used = 0
        self.peak_used = 0
        self._next_fresh = 0

    @property
    def free(self) -> int:
        return self.capacity - self.used

    @property
    def physically_free(self) -> int:
        return self.capacity + self.staging - self.used

    @property
    def physical(self) -> SlotPool[Any]:
        """The pool that hands out the slots: this one, or the one that it shows otherwise."""
        return self

    def take(self, count: int) -> Slots:
        """Hand out `count` slots, of the caller's own. The caller has checked that so many are free."""
        raise NotImplementedError

    def give_back(self, slots: Slots) -> None:
        """Take slots back; nobody may use them from here on."""
        raise NotImplementedError

    @property
    def num_ever_used(self) -> int:
        return self._next_fresh

    def returned_slots(self) -> list[int]:
        """The free slots that have been in use before."""
        raise NotImplementedError

    def plan_compaction(self, limit: int, in_use: list[int]) -> dict[int, int]:
        """Where the slots in use from `limit` on can go: {slot: free slot below the limit}."""
        free = sorted(set(range(limit)) - set(in_use)) if any(slot >= limit for slot in in_use) else []
        return dict(zip(sorted(slot for slot in in_use if slot >= limit), free, strict=False))

    def compact(self, limit: int, in_use: list[int]) -> None:
        """Hand out slots below `limit` only; `in_use` are those that are in use, all below it."""
        self._next_fresh = min(self._next_fresh, limit)
        if in_use:
            self._next_fresh = max(self._next_fresh, max(in_use) + 1)
        self._set_returned(sorted(set(range(self._next_fresh)) - set(in_use)))

    def _set_returned(self, slots: list[int]) -> None:
        raise NotImplementedError


class PagePool(SlotPool[SlotArray]):
    """Slots for pages, which come and go by the hundred: a stack in one array, which never keeps an array that it was
    given, and gives none that it keeps.

    Cost: O(n) NumPy work to give back n slots or to take them; the array grows to the most slots that were ever free.
    """

    __slots__ = ("_num_returned", "_stack")

    def __init__(self, capacity: int, staging: int = 0) -> None:
        super().__init__(capacity, staging)
        self._stack = NO_SLOTS
        self._num_returned = 0

    def take(self, count: int) -> SlotArray:
        """`SlotPool.take`: [count] int32."""
        self.used = used = self.used + count
        assert used <= self.capacity + self.staging, f"{count} slots taken, {self.capacity + count - used} free"
        if used > self.peak_used:
            self.peak_used = used
        top = self._num_returned
        if count <= top:
            self._num_returned = left = top - count
            return self._stack[left:top].copy()
        self._num_returned = 0
        first_fresh = self._next_fresh
        self._next_fresh = first_fresh + count - top
        fresh = np.arange(first_fresh, self._next_fresh, dtype=np.int32)
        return np.concatenate((self._stack[:top], fresh)) if top else fresh

    def give_back(self, slots: SlotArray) -> None:
        count = slots.size
        bottom = self._num_returned
        self._num_returned = top = bottom + count
        if top > self._stack.size:
            grown = np.empty(2 * top, dtype=np.int32)
            grown[:bottom] = self._stack[:bottom]
            self._stack = grown
        self._stack[bottom:top] = slots
        self.used -= count

    def returned_slots(self) -> list[int]:
        returned: list[int] = self._stack[: self._num_returned].tolist()
        return returned

    def _set_returned(self, slots: list[int]) -> None:
        self._stack = np.array(slots, dtype=np.int32)
        self._num_returned = len(slots)


class StatePool(SlotPool[IntArray]):
    """Slots for states, which come and go by the handful."""

    __slots__ = ("_stack",)

    def __init__(self, capacity: int, staging: int = 0) -> None:
        super().__init__(capacity, staging)
        self._stack = int_array()

    def take(self, count: int) -> IntArray:
        self.used = used = self.used + count
        assert used <= self.capacity + self.staging, f"{count} slots taken, {self.capacity + count - used} free"
        if used > self.peak_used:
            self.peak_used = used
        stack = self._stack
        if len(stack) >= count:
            first = len(stack) - count
            slots = stack[first:]
            del stack[first:]
            return slots
        fresh = count - len(stack)
        self._stack = int_array()
        stack.extend(range(self._next_fresh, self._next_fresh + fresh))
        self._next_fresh += fresh
        return stack

    def take_one(self) -> int:
        """Hand out one slot. The caller has checked that one is free."""
        if not self._stack or self.used >= self.peak_used:
            return self.take(1)[0]
        self.used += 1
        return self._stack.pop()

    def give_back(self, slots: IntArray) -> None:
        self._stack += slots
        self.used -= len(slots)

    def give_back_one(self, slot: int) -> None:
        self._stack.append(slot)
        self.used -= 1

    def returned_slots(self) -> list[int]:
        return self._stack.tolist()

    def _set_returned(self, slots: list[int]) -> None:
        self._stack = int_array(slots)


def _of_shared(count: str) -> Any:
    """A count of the pool that is shared."""
    return property(
        lambda shared: getattr(shared._pool, count), lambda shared, value: setattr(shared._pool, count, value)
    )


class SharedPages(SlotPool[SlotArray]):
    """A `StatePool` as full attention sees it, which shares it with other layer groups: the same slots and counts,
    slots in NumPy arrays.
    """

    __slots__ = ("_pool",)

    _next_fresh = _of_shared("_next_fresh")
    capacity = _of_shared("capacity")
    peak_used = _of_shared("peak_used")
    staging = _of_shared("staging")
    used = _of_shared("used")

    def __init__(self, pool: StatePool) -> None:
        self._pool = pool

    @property
    def physical(self) -> SlotPool[Any]:
        return self._pool

    def take(self, count: int) -> SlotArray:
        return np.array(self._pool.take(count), dtype=np.int32)

    def give_back(self, slots: SlotArray) -> None:
        self._pool.give_back(int_array(slots.tolist()))

    def returned_slots(self) -> list[int]:
        return self._pool.returned_slots()


AnyPool = PagePool | StatePool


def is_unlimited(pool: SlotPool[Any]) -> bool:
    return pool.capacity == UNLIMITED_SLOTS
