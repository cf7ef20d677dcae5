"""The disk tier for copies that are queued on streams: one writer and several readers over a ring of buffers."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Condition
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ssmcache.memory.base import TransferError
from ssmcache.memory.batches import SlotArray
from ssmcache.memory.disk import ByteArray, DiskTier
from ssmcache.memory.disk_ring import BufferRing, Event

Number = TypeVar("Number", bound=np.generic)

_NUM_READERS = 4


Transfer = Callable[[SlotArray, int], Event]
"""Queues the copy of some positions of a batch from or to the first rows of a ring buffer; the event is its end."""


@dataclass(slots=True)
class _Batch:
    """Slots to be written; the writer alone changes it once it was queued."""

    pool: int
    slots: SlotArray
    read_before: tuple[Future[dict[int, str]], ...]  # background loads that still need what lay there
    error: str | None = None


class DiskQueue:
    """Reads and writes a `DiskTier` for a caller whose bytes are behind streams.

    Writes: the caller queues copies into the ring and returns; one thread waits for them, writes and syncs, in the
    order of the batches. Space is allocated before anything is moved, so a full disk is a failed `store`. A write that
    fails later has lost the slots of its batch: the next `load` of them says so, until they are written again.

    Reads: several threads fill the ring while the caller queues copies out of it; or they fill the caller's rows in the
    background (`load_later`). A slot that is still being written is waited for, and one that a background load still
    reads is not written before.

    What blocks the caller: `store` while the ring is full, which is more than 64 MiB (or three slots) that the disk has
    not taken yet; `load` until its last piece was read; `move`, `resize` and `close` until all that is under way is
    done; `load_later` nothing.

    Args:
        files: owned by the queue from now on.
        ring: buffers of at least one slot each, lent to it.
        slot_bytes: of each pool.
    """

    def __init__(self, files: DiskTier, ring: BufferRing, slot_bytes: Sequence[int]) -> None:
        self._files = files
        self._ring = ring
        self._lost = [np.zeros(0, dtype=np.bool_) for _ in slot_bytes]
        # number of the last batch that writes a slot; batches end in order, so one counter tells which are done
        self._written_by: list[npt.NDArray[np.int64]] = [np.zeros(0, dtype=np.int64) for _ in slot_bytes]
        # number of the last background load that reads a slot, and those that may be under way
        self._read_by: list[npt.NDArray[np.int64]] = [np.zeros(0, dtype=np.int64) for _ in slot_bytes]
        self._reading: dict[int, Future[dict[int, str]]] = {}
        self._num_loads = 0
        self._num_queued = self._num_done = 0
        self._why_lost = ""
        self._changed = Condition()
        self._writer = ThreadPoolExecutor(1, "ssmcache-disk-writer")
        self._readers = ThreadPoolExecutor(_NUM_READERS, "ssmcache-disk-reader")
        # of their own: those that wait for a stream keep no thread from the caller who waits for a read
        self._loaders = ThreadPoolExecutor(_NUM_READERS, "ssmcache-disk-loader")

    def resize(self, num_slots: Sequence[int]) -> bool:
        """See `DiskTier.resize`. Waits for all that is under way."""
        self._wait_for_all()
        if not self._files.resize(num_slots):
            return False
        self._lost = [_resized(flags, count) for flags, count in zip(self._lost, num_slots, strict=True)]
        self._written_by = [
            _resized(numbers, count) for numbers, count in zip(self._written_by, num_slots, strict=True)
        ]
        self._read_by = [np.zeros(count, dtype=np.int64) for count in num_slots]
        return True

    def store(self, pool: int, slots: SlotArray, fill: Transfer) -> None:
        """Write slots, [n] and not empty. `fill(positions, buffer)` queues copies of what goes to `slots[positions]`
        into the first rows of a buffer of the ring.

        Errors: TransferError without lost positions if there is no space; nothing was moved then. What `fill` raises;
        the slots are lost then.
        """
        self._files.allocate(pool, slots)
        batch = _Batch(pool, slots.copy(), self._readers_of(pool, slots))
        self._num_queued += 1
        self._written_by[pool][slots] = self._num_queued
        try:
            for positions, _ in self._files.pieces(pool, slots, self._ring.buffers[0]):
                index = self._ring.take()
                try:
                    event = fill(positions, index)
                except BaseException:
                    self._ring.give(index)
                    raise
                self._writer.submit(self._write, batch, slots[positions], index, event)
        except BaseException as error:
            self._writer.submit(self._fail, batch, str(error))
            raise
        finally:
            self._writer.submit(self._finish, batch)

    def load(self, pool: int, slots: SlotArray, drain: Transfer) -> None:
        """Read slots, [n] and not empty. `drain(positions, buffer)` queues copies of what lay in `slots[positions]` out
        of the first rows of a buffer of the ring; not any more once something is lost.

        Errors: TransferError with the positions of all slots that cannot be read.
        """
        self._wait_for_batch(int(self._written_by[pool][slots].max()))
        lost = {int(position): self._why_lost for position in np.flatnonzero(self._lost[pool][slots])}
        pieces = deque(positions for positions, _ in self._files.pieces(pool, slots, self._ring.buffers[0]))
        reads: deque[tuple[SlotArray, int, Future[dict[int, str]]]] = deque()
        try:
            while pieces or reads:
                index = self._ring.try_take() if pieces else None
                if index is None and not reads:
                    index = self._ring.take()
                if index is not None:
                    positions = pieces.popleft()
                    reads.append((positions, index, self._readers.submit(self._read, pool, slots[positions], index)))
                    continue
                positions, index, read = reads[0]
                lost.update((int(positions[row]), why) for row, why in read.result().items())
                event = None if lost else drain(positions, index)
                reads.popleft()
                self._ring.give(index, event)
        finally:
            for _, index, read in reads:  # none, unless something was raised
                read.exception()
                self._ring.give(index)
        self._files.raise_if_lost(lost, slots.size)

    def load_later(
        self, pool: int, slots: SlotArray, rows: ByteArray, into: SlotArray, ready: Callable[[], None]
    ) -> Future[dict[int, str]]:
        """Read slots, [n] and not empty, into `rows[into]` in the background, once `ready` has returned.

        Returns a future of the positions that could not be read, and why; of what `ready` raises, if it does. Rows are
        the caller's, [any, slot_bytes], and must stay until then.
        """
        written_by = int(self._written_by[pool][slots].max())
        self._reading = {number: future for number, future in self._reading.items() if not future.done()}
        self._num_loads += 1
        self._read_by[pool][slots] = self._num_loads
        future = self._loaders.submit(self._load_into, pool, slots.copy(), rows, into.copy(), ready, written_by)
        self._reading[self._num_loads] = future
        return future

    def move(self, pool: int, sources: SlotArray, destinations: SlotArray) -> None:
        """Copy slots to other slots, now. Errors: as of `load` and `store`."""
        self._wait_for_all()
        lost = {int(position): self._why_lost for position in np.flatnonzero(self._lost[pool][sources])}
        self._files.raise_if_lost(lost, sources.size)
        self._files.move(pool, sources, destinations)
        self._lost[pool][destinations] = False

    def close(self) -> None:
        """Finish what is under way and free the files. Safe to call twice."""
        self._loaders.shutdown()
        self._writer.shutdown()
        self._readers.shutdown()
        self._files.close()

    def _readers_of(self, pool: int, slots: SlotArray) -> tuple[Future[dict[int, str]], ...]:
        """Background loads that still read some of these slots."""
        if not self._reading:
            return ()
        numbers = set(self._read_by[pool][slots].tolist())
        return tuple(future for number, future in self._reading.items() if number in numbers)

    def _wait_for_all(self) -> None:
        for future in self._reading.values():
            future.exception()
        self._wait_for_batch(self._num_queued)

    # -- in the threads ----------------------------------------------------------------------------------------------

    def _rows(self, pool: int, index: int, count: int) -> ByteArray:
        num_bytes = count * self._files.slot_bytes[pool]
        return self._ring.buffers[index][:num_bytes].reshape(count, -1)

    def _read(self, pool: int, slots: SlotArray, index: int) -> dict[int, str]:
        return self._files.read(pool, slots, self._rows(pool, index, slots.size))

    def _load_into(
        self,
        pool: int,
        slots: SlotArray,
        rows: ByteArray,
        into: SlotArray,
        ready: Callable[[], None],
        batch: int,
    ) -> dict[int, str]:
        ready()
        self._wait_for_batch(batch)
        with self._changed:
            lost = {int(position): self._why_lost for position in np.flatnonzero(self._lost[pool][slots])}
        order = np.argsort(slots)
        breaks = np.flatnonzero((np.diff(slots[order]) != 1) | (np.diff(into[order]) != 1)) + 1
        for positions in np.split(order, breaks):  # neighbours on both sides
            first = int(into[positions[0]])
            found = self._files.read(pool, slots[positions], rows[first : first + positions.size])
            lost.update((int(positions[row]), why) for row, why in found.items())
        return lost

    def _write(self, batch: _Batch, slots: SlotArray, index: int, event: Event) -> None:
        try:
            event.synchronize()
            for load in batch.read_before:
                load.exception()
            if batch.error is None:
                self._files.write(batch.pool, slots, self._rows(batch.pool, index, slots.size))
        except Exception as error:
            batch.error = str(error)  # whatever it is: the slots do not have their bytes
        finally:
            self._ring.give(index)

    def _fail(self, batch: _Batch, why: str) -> None:
        batch.error = why

    def _finish(self, batch: _Batch) -> None:
        try:
            if batch.error is None:
                self._files.sync(batch.pool)
        except TransferError as error:
            batch.error = str(error)
        with self._changed:
            self._lost[batch.pool][batch.slots] = batch.error is not None
            self._why_lost = batch.error or self._why_lost
            self._num_done += 1
            self._changed.notify_all()

    def _wait_for_batch(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._num_done >= number)


def _resized(values: npt.NDArray[Number], count: int) -> npt.NDArray[Number]:
    resized: npt.NDArray[Number] = np.zeros(count, dtype=values.dtype)
    resized[: min(count, values.size)] = values[:count]
    return resized
