"""How fast the disk tier is in a directory, beside plain writes and reads of as many bytes.

Writes end with `fsync`, so they are on the disk; before reads the system is asked to forget the file, and looked at
whether it did. Slots lie at random places and go through the queue that `CudaMemory` uses, in eight batches; the bytes
do not compress, and what comes back is compared. All files are without a name: nothing can be left behind.

A first piece of 8 MiB tells how much can be moved in about half a second; no more than 128 MiB are, six times each way:
the faster of two rounds counts, since a disk may be slow where it was never written before. There is no second round
where the first took five seconds.
"""

import errno
import io
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from ssmcache.memory.batches import SlotArray
from ssmcache.memory.disk import ByteArray, DiskTier, staging_bytes
from ssmcache.memory.disk_queue import DiskQueue
from ssmcache.memory.disk_ring import BufferRing, ring_shape
from ssmcache.memory.page_cache import forget_cached
from ssmcache.memory.slot_timing import Call, WrongBytesError, wall_seconds
from ssmcache_sim.diagnosis import LARGE_SLOT_BYTES, SMALL_SLOT_BYTES, Measurement

MAX_BYTES = 128 << 20
_PIECE_BYTES = 8 << 20
_SECONDS = 0.5  # for one way, about
_NUM_BATCHES = 8
_NUM_ROUNDS = 2
_MAX_ROUND_SECONDS = 5.0

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Attributes:
    written_bytes: in all; none of them is there any more.
    is_uncached: reads came from the disk, as far as the system knows.
    """

    measurements: tuple[Measurement, ...]
    written_bytes: int
    is_uncached: bool


@dataclass(frozen=True, slots=True)
class _Seconds:
    write: float
    read: float
    is_uncached: bool


def disk_rates(path: str, clock: Clock) -> DiskRates:
    """Errors: OSError, ValueError, TransferError for a directory that cannot be written or is full; WrongBytesError."""
    space = os.statvfs(path)
    free_bytes = space.f_bavail * space.f_frsize
    if free_bytes < 2 * _PIECE_BYTES:
        raise OSError(errno.ENOSPC, f"expected {2 * _PIECE_BYTES >> 20} MiB of free space, got {free_bytes >> 20}")
    pool = np.random.default_rng(0).integers(0, 256, MAX_BYTES, dtype=np.uint8)
    first = _plain_seconds(path, pool[:_PIECE_BYTES], clock)
    possible = int(_PIECE_BYTES * _SECONDS / max(first.write, first.read, 1e-9))
    num_bytes = max(_PIECE_BYTES, min(possible, free_bytes // 2, MAX_BYTES)) // _PIECE_BYTES * _PIECE_BYTES
    pool = pool[:num_bytes]
    found: dict[int | None, list[_Seconds]] = {}
    start, num_rounds = clock(), 0
    while num_rounds < _NUM_ROUNDS and clock() - start < _MAX_ROUND_SECONDS:
        num_rounds += 1
        found.setdefault(None, []).append(_plain_seconds(path, pool, clock))
        for slot_bytes in (SMALL_SLOT_BYTES, LARGE_SLOT_BYTES):
            found.setdefault(slot_bytes, []).append(_slot_seconds(path, pool.reshape(-1, slot_bytes), clock))
    return DiskRates(
        tuple(
            Measurement(way, slot_bytes, num_bytes / seconds)
            for slot_bytes, rounds in found.items()
            for way, seconds in (
                ("to_disk", min(each.write for each in rounds)),
                ("from_disk", min(each.read for each in rounds)),
            )
        ),
        _PIECE_BYTES + num_rounds * len(found) * num_bytes,
        all(each.is_uncached for rounds in found.values() for each in rounds),
    )


def _plain_seconds(path: str, pool: ByteArray, clock: Clock) -> _Seconds:
    """One file from start to end, in pieces."""
    into = np.full_like(pool, 0)  # its pages are there before they are read into
    with tempfile.TemporaryFile(buffering=0, prefix="ssmcache-", dir=path) as file:
        assert isinstance(file, io.FileIO)

        def write() -> None:
            left = pool.data
            while left:
                left = left[file.write(left[:_PIECE_BYTES]) :]
            os.fsync(file.fileno())

        def read() -> None:
            left = into.data
            while left:
                count = os.preadv(file.fileno(), [left[:_PIECE_BYTES]], into.size - len(left))
                if count == 0:
                    raise WrongBytesError("a file ends before what was written to it")
                left = left[count:]

        return _seconds(write, lambda: forget_cached(file.fileno()), read, pool, into, clock)


class _Done:
    """The event of a copy that has been made already."""

    def synchronize(self) -> None:
        return None


def _slot_seconds(path: str, pool: ByteArray, clock: Clock) -> _Seconds:
    """Slots, [n, slot_bytes], at random places."""
    num_slots, slot_bytes = pool.shape
    into = np.full_like(pool, 0)
    order = np.random.default_rng(1).permutation(num_slots).astype(np.int64)
    batches = np.array_split(order, min(_NUM_BATCHES, num_slots))
    with ExitStack() as end:
        files = DiskTier(0, path, [slot_bytes], np.empty(staging_bytes([slot_bytes]), dtype=np.uint8))
        end.callback(files.close)
        num_buffers, buffer_bytes = ring_shape([slot_bytes])
        ring = BufferRing([np.full(buffer_bytes, 0, dtype=np.uint8) for _ in range(num_buffers)])
        queue = DiskQueue(files, ring, [slot_bytes])
        end.callback(queue.close)
        if not queue.resize([num_slots]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def rows(buffer: int, count: int) -> ByteArray:
            return ring.buffers[buffer][: count * slot_bytes].reshape(count, slot_bytes)

        def write() -> None:
            for slots in batches:

                def fill(positions: SlotArray, buffer: int, slots: SlotArray = slots) -> _Done:
                    np.take(pool, slots[positions], axis=0, out=rows(buffer, positions.size), mode="clip")
                    return _Done()

                queue.store(0, slots, fill)
            queue.resize([num_slots])  # waits for the writes, each batch with its sync

        def read() -> None:
            for slots in batches:

                def drain(positions: SlotArray, buffer: int, slots: SlotArray = slots) -> _Done:
                    into[slots[positions]] = rows(buffer, positions.size)
                    return _Done()

                queue.load(0, slots, drain)

        return _seconds(write, lambda: files.forget_cached(0), read, pool, into, clock)


def _seconds(
    write: Call, forget: Callable[[], bool], read: Call, pool: ByteArray, into: ByteArray, clock: Clock
) -> _Seconds:
    written = wall_seconds(write, clock)
    is_uncached = forget()
    seconds = _Seconds(written, wall_seconds(read, clock), is_uncached)
    if not np.array_equal(pool, into):
        raise WrongBytesError("what came from the disk is not what went there")
    return seconds
