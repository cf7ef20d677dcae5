"""The last uses of each slot of a pool, by stream: what has to be over before somebody else reads or writes it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ssmcache.memory.base import MovedSlots
from ssmcache.pools import SlotPool

Clock = Mapping[Hashable, int]  # stream -> number of the last of its events that something comes after; never changed


class Event:
    """All that was queued on a stream up to the end of a call.

    Attributes:
        number: ascending in the order of recording, so of two events of a stream the later covers the earlier; 0 while
            it is not recorded.
        handle: the memory's.
        seen: what the stream had waited for by then, which the event covers, too.
    """

    __slots__ = ("handle", "number", "seen", "stream")

    def __init__(self, stream: Hashable) -> None:
        self.stream = stream
        self.number = 0
        self.handle: Any = None
        self.seen: Clock = {}

    def is_before(self, stream: Hashable, clock: Clock) -> bool:
        """Whether what is queued on a stream with this clock comes after the event anyway."""
        return self.stream == stream or 0 < self.number <= clock.get(self.stream, 0)


class Fence:
    """The last write of some slots, and the reads since, none of which covers another, the latest last. Never changed,
    and shared by slots that were used together; it and its events go with the last slot that has it.
    """

    __slots__ = ("reads", "write")

    def __init__(self, write: Event | None, reads: tuple[Event, ...] = ()) -> None:
        self.write = write
        self.reads = reads

    def read(self, event: Event, clock: Clock) -> Fence:
        """The fence after one more read."""
        reads = [read for read in self.reads if not read.is_before(event.stream, clock)]
        return Fence(self.write, (*reads, event))

    def too_old(self, stream: Hashable, most: int) -> tuple[Event, ...]:
        """Reads that are to go where there may be no more than so many events of reads, one of this stream included."""
        if len(self.reads) < most or any(read.stream == stream for read in self.reads):
            return ()
        return self.reads[: len(self.reads) + 1 - most]

    def before_writing(self) -> tuple[Event, ...]:
        """What has to be over before the slots get new content."""
        return self.reads if self.write is None else (self.write, *self.reads)


_UNUSED = Fence(None)


class Fences:
    """The fences of one pool. All calls are for one slot or more.

    Args:
        pool: its slots; what was in use before has the fence `first`.
    Cost: O(slots) NumPy work for each call, and O(different fences among them).
    """

    __slots__ = ("_cells", "_pool")

    def __init__(self, pool: SlotPool[Any], first: Fence) -> None:
        self._pool = pool
        self._cells: npt.NDArray[np.object_] = np.full(pool.num_ever_used, first, dtype=object)

    def of(self, slots: MovedSlots) -> set[Fence]:
        """The different fences of some slots."""
        places = self._places(slots)
        return set(self._cells[places].tolist())

    def write(self, slots: MovedSlots, event: Event) -> None:
        """Slots were written, or given up by somebody who could have."""
        places = self._places(slots)
        self._cells[places] = Fence(event)

    def take(self, slots: MovedSlots) -> None:
        """Slots belong to somebody who has waited for all uses, until they are given up."""
        places = self._places(slots)
        self._cells[places] = _UNUSED

    def read(self, slots: MovedSlots, event: Event, clock: Clock) -> None:
        """Slots were read; `clock` is that of the stream."""
        places = self._places(slots)
        fences = self._cells[places].tolist()
        after = {fence: fence.read(event, clock) for fence in set(fences)}
        self._cells[places] = after[fences[0]] if len(after) == 1 else [after[fence] for fence in fences]

    def _places(self, slots: MovedSlots) -> npt.NDArray[np.intp]:
        size = self._cells.size
        if self._pool.num_ever_used > size:
            grown = np.full(max(self._pool.num_ever_used, 2 * size), _UNUSED, dtype=object)
            grown[:size] = self._cells
            self._cells = grown
        return np.asarray(slots, dtype=np.intp)
