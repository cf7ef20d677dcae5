"""The pages of one sliding window life cycle that one sequence needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ssmcache.memory.base import GPU_TIER
from ssmcache.pins import Pin
from ssmcache.pools import IntArray, SlotArray, int_array
from ssmcache.priority import Priority, by_rank
from ssmcache.tree import Run
from ssmcache.windows import WindowStore

if TYPE_CHECKING:
    from ssmcache.soft_holds import PathHolder


class WindowChange(NamedTuple):
    """What becomes of the pages of a window at other lengths: blocks that need one, and those that are stale, of which
    `num_own` have a private page.
    """

    window: SequenceWindow
    shape: tuple[int, int, int]
    missing: list[int]
    stale: list[int]
    num_own: int


def apply_changes(changes: list[WindowChange], slots: IntArray, num_pages: int) -> IntArray:
    """Make changes of windows that share a pool, out of slots that were taken for it and of what goes stale; returns
    `num_pages` slots for full attention, which shares the pool too. Nothing can fail.
    """
    num_needed = num_pages + sum(len(change.missing) for change in changes)
    for change in changes:
        slots += change.window.take_stale(change.stale)
    for change in changes:  # all else is needed: stale pages leave the tree at once
        if len(slots) < num_needed:
            slots += change.window.take_over_stale(change.stale, num_needed - len(slots))
    pages, slots = slots[:num_pages], slots[num_pages:]
    for change in changes:
        count = len(change.missing)
        change.window.apply(change, slots[:count])
        slots = slots[count:]
    if slots:
        changes[0].window.store.gpu_pool.give_back(slots)
    return pages


class SequenceWindow:
    """`own`: private pages by block, of blocks that are not in the tree. `pins`: pages of the tree that the sequence
    needs, by block, locked while it is ACTIVE. Pages leave both when their block goes stale.
    """

    __slots__ = ("_holder", "_priority", "_same_below", "_shape", "own", "pins", "stamp", "store")

    def __init__(self, store: WindowStore, holder: PathHolder, priority: Priority | None) -> None:
        self.store = store
        self._holder = holder
        self.own: dict[int, int] = {}
        self.pins: dict[int, Pin] = {}
        self._priority = priority
        self.stamp = 0  # of the pages that are committed until the next suspend
        self._shape = (0, 0, 0)  # number of blocks, and the stale range, that the pages are there for
        self._same_below = 0  # the history length from which on the range may be another

    # -- lengths -----------------------------------------------------------------------------------------------------

    def _shape_for(self, history_length: int, num_blocks: int) -> tuple[int, int, int]:
        first, end = self.store.window.stale_blocks(history_length)
        # blocks that were taken up beyond the capacity stay, since nobody writes them again
        return max(num_blocks, self._holder.cursor.end), first, end

    def _changes(self, shape: tuple[int, int, int]) -> tuple[list[int], list[int]]:
        """Blocks whose pages are missing for a shape, and those whose pages are there and stale."""
        num_blocks, first, end = shape
        old_num_blocks, _, old_end = self._shape
        missing = [block for block in range(old_num_blocks, num_blocks) if not first <= block < end]
        candidates: Iterable[int]
        if old_num_blocks:  # all that was needed is there, and nothing else
            candidates = (*range(old_end, min(end, old_num_blocks)), *range(num_blocks, old_num_blocks))
        else:
            candidates = (*self.own, *self.pins)
            missing = [block for block in missing if block not in candidates]
        return missing, [block for block in candidates if block >= num_blocks or first <= block < end]

    def would_change(self, history_length: int, num_blocks: int) -> bool:
        """Whether a change to these lengths, history not below that of now, takes pages or gives some up."""
        if history_length < self._same_below and num_blocks == self._shape[0]:
            return False
        shape = self._shape_for(history_length, num_blocks)
        if shape != self._shape:
            return True
        self._same_below = self.store.window.next_change(history_length)
        return False

    def missing(self, history_length: int, num_blocks: int) -> int:
        """Slots that must be obtained for these lengths, counting those that go stale as free already."""
        shape = self._shape_for(history_length, num_blocks)
        if shape == self._shape:
            return 0
        missing, stale = self._changes(shape)
        freed = 0
        for block in stale:
            pin = self.pins.get(block)
            freed += block in self.own if pin is None else pin.locked == 1 and not pin.held
        return len(missing) - freed

    def plan(self, history_length: int, num_blocks: int) -> WindowChange | None:
        """What changes with these lengths; None if nothing does."""
        shape = self._shape_for(history_length, num_blocks)
        if shape == self._shape:
            return None
        missing, stale = self._changes(shape)
        return WindowChange(self, shape, missing, stale, sum(block in self.own for block in stale))

    def take_stale(self, stale: list[int]) -> IntArray:
        """The slots of stale pages that are private."""
        return int_array(self.own.pop(block) for block in stale if block in self.own)

    def take_over_stale(self, stale: list[int], count: int) -> IntArray:
        """The slots of at most so many stale pages that nobody else needs, which leave the tree."""
        slots = int_array()
        for block in stale:
            pin = self.pins.get(block)
            if pin is not None and len(slots) < count and pin.locked == 1 and not pin.held:
                del self.pins[block]
                slots.append(pin.slot)
                self.store.take_over(self._holder.cursor, GPU_TIER, pin.slot)
        return slots

    def apply(self, change: WindowChange, slots: IntArray) -> None:
        """The pages of what is missing lie in these slots, and what is stale is given up."""
        self._drop(change.stale)
        self.own.update(zip(change.missing, slots, strict=True))
        self.store.num_allocated += len(slots)
        self._shape = change.shape

    def incomplete(self, history_length: int, num_blocks: int) -> list[int]:
        """Blocks whose pages should be there and are not, for checks."""
        there = self.own.keys() | {block for block, pin in self.pins.items() if pin.tier == GPU_TIER}
        needed = self.store.window.needed_blocks(history_length, self._shape[0])
        return [block for block in needed if block not in there]

    def forget_stale(self, history_length: int, num_blocks: int) -> None:
        """Give up what went stale; nothing new is needed."""
        shape = self._shape_for(history_length, num_blocks)
        if shape != self._shape:
            self._drop(self._changes(shape)[1])
            self._shape = shape

    def _drop(self, stale: list[int]) -> None:
        """Give up the pages of these blocks, where there are any."""
        slots = int_array(self.own.pop(block) for block in stale if block in self.own)
        if slots:
            self.store.gpu_pool.give_back(slots)
        gone = [self.pins.pop(block) for block in stale if block in self.pins]
        for pin in gone:
            self.store.pins.count(pin, locked=-1)
        if gone:
            self.store.release(self._holder.cursor)

    # -- status ------------------------------------------------------------------------------------------------------

    def lock(self, pins: dict[int, Pin], history_length: int, num_blocks: int) -> None:
        """The first resume: the pins that were soft are locks from now on."""
        self.pins = pins
        self._same_below = 0
        self.begin_activity()
        for pin in pins.values():
            self.store.pins.count(pin, locked=1)
            self.store.pins.end_soft(pin)
        self._shape = self._shape_for(history_length, num_blocks)

    def unlock_softly(self) -> None:
        """Undo `lock`."""
        for pin in self.pins.values():
            pin.soft += 1
            self.store.pins.count(pin, locked=-1)
        self.store.release(self._holder.cursor)
        self.pins = {}

    def begin_activity(self) -> None:
        """The sequence is ACTIVE from now on."""
        self.stamp = self.store.stamp_of_activity()

    def set_idle(self, idle: bool) -> None:
        """The sequence is suspended: its pages may move; or the other way round."""
        change = 1 if idle else -1
        for pin in self.pins.values():
            self.store.pins.count(pin, held=change, locked=-change)
        if idle:
            self.store.release(self._holder.cursor)
        else:
            self.begin_activity()

    def is_lost(self) -> bool:
        return any(pin.slot < 0 for pin in self.pins.values())

    def close(self, idle: bool) -> None:
        """Give everything up; private pages are still on the GPU, or were parked before."""
        if self.own:
            self.store.gpu_pool.give_back(int_array(self.own.values()))
            self.own = {}
        for pin in self.pins.values():
            self.store.pins.count(pin, held=-1 if idle else 0, locked=0 if idle else -1)
        self.store.release(self._holder.cursor)
        self.pins = {}

    # -- committing --------------------------------------------------------------------------------------------------

    def commit(self, cursor: Run, first: int, last: int) -> None:
        """The blocks `first`..`last - 1` are on the path of `cursor` now: give their private pages to the tree, or
        take those that are there already.
        """
        blocks = sorted(block for block in self.own if first <= block < last)
        if not blocks:
            return
        there = self.store.find(cursor, first, last)
        new = [block for block in blocks if block not in there]
        for block in [block for block in blocks if block in there]:
            segment, position = there[block]
            slot = segment.slots[position]
            pin = self.store.pins.pin(segment.tier, slot)
            own = self.own.pop(block)
            if segment.tier == GPU_TIER:
                self.store.gpu_pool.give_back_one(own)
            else:  # keep the copy on the GPU
                self.store.replace(segment, position, own)
                there = self.store.find(cursor, first, last)
            self.pins[block] = pin
            self.store.pins.count(pin, locked=1)
        self._add(cursor, new)

    def _add(self, cursor: Run, blocks: list[int]) -> None:
        for rank, positions in by_rank(self._priority, self.store.layer_group, blocks).items():
            same = [blocks[position] for position in positions]
            slots = int_array(self.own.pop(block) for block in same)
            self.store.add(cursor, int_array(same), slots, self.stamp, rank)
            self.store.merge_new(cursor, same[0])
            for block, slot in zip(same, slots.tolist(), strict=True):
                self.pins[block] = pin = self.store.pins.pin(GPU_TIER, slot)
                self.store.pins.count(pin, locked=1)

    # -- what kernels read -------------------------------------------------------------------------------------------

    @property
    def stale_end(self) -> int:
        """The block from which on the window has pages, beside those of its sinks."""
        return self._shape[2]

    def slot_of(self, block: int) -> int:
        """Its slot on the GPU, -1 without one."""
        slot = self.own.get(block)
        if slot is None:
            pin = self.pins.get(block)
            slot = -1 if pin is None or pin.tier != GPU_TIER else pin.slot
        return slot

    def slots(self, first: int, end: int) -> SlotArray:
        """`slot_of` of the blocks `first`..`end - 1`."""
        found = np.full(end - first, -1, dtype=np.int32)
        is_short = end - first < len(self.own) + len(self.pins)
        for block in range(first, end) if is_short else (*self.own, *self.pins):
            if first <= block < end:
                found[block - first] = self.slot_of(block)
        return found
