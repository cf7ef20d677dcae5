"""Slots: equal-sized pieces of one tier's memory for one layer group, handed out last in, first out."""

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SlotArray = npt.NDArray[np.int32]

UNLIMITED_SLOTS = sys.maxsize
_FIRST_STACK_SIZE = 64


class SlotPool:
    """Which slots of a pool are free. Knows numbers of slots only, no bytes and no content.

    Slots that came back are handed out first, the last one first, so that the order of slots depends on the calls
    alone, never on time; slots never used before follow in ascending order.

    Cost: O(n) NumPy work for n slots, one call of each kind.
    """

    __slots__ = ("_next_fresh", "_returned", "_stack", "capacity", "peak_used", "used")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.peak_used = 0
        self._stack: SlotArray = np.empty(_FIRST_STACK_SIZE, dtype=np.int32)
        self._returned = 0
        self._next_fresh = 0

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def take(self, count: int) -> SlotArray:
        """Hand out `count` slots, [count] int32. The caller has checked that so many are free."""
        assert count <= self.capacity - self.used, f"{count} slots taken, {self.free} free"
        self.used += count
        if self.used > self.peak_used:
            self.peak_used = self.used
        returned = self._returned
        if count <= returned:
            self._returned = returned - count
            return self._stack[returned - count : returned].copy()
        fresh = count - returned
        self._returned = 0
        slots = np.empty(count, dtype=np.int32)
        slots[:returned] = self._stack[:returned]
        slots[returned:] = np.arange(self._next_fresh, self._next_fresh + fresh, dtype=np.int32)
        self._next_fresh += fresh
        return slots

    def give_back(self, slots: SlotArray | Sequence[int]) -> None:
        """Take slots back; nobody may use them from here on."""
        count = len(slots)
        end = self._returned + count
        if end > self._stack.size:
            grown = np.empty(max(end, 2 * self._stack.size), dtype=np.int32)
            grown[: self._returned] = self._stack[: self._returned]
            self._stack = grown
        self._stack[self._returned : end] = slots
        self._returned = end
        self.used -= count

    def returned_slots(self) -> list[int]:
        """The free slots that have been in use before."""
        returned: list[int] = self._stack[: self._returned].tolist()
        return returned

    @property
    def num_ever_used(self) -> int:
        return self._next_fresh
