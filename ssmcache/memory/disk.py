"""The disk as a tier: slots in files that nobody else can see, moved through a bounded staging buffer."""

import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ssmcache.memory.base import TransferError
from ssmcache.memory.batches import SlotArray
from ssmcache.memory.page_cache import forget_cached

ByteArray: TypeAlias = npt.NDArray[np.uint8]

MAX_STAGING_BYTES = 8 << 20
ALLOCATION_BYTES = 64 << 20

# What a file system says that cannot allocate ahead; then a full disk shows only at the writes.
_CANNOT_ALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def staging_bytes(slot_bytes: Sequence[int]) -> int:
    """Bytes that a staging buffer for these pools should have: bounded, but room for one slot of each."""
    return max(MAX_STAGING_BYTES, *slot_bytes)


class DiskTier:
    """One file for each pool in the directory `path`, of mode 0600.

    The files have no name from the start, so the system frees them when this process ends in whatever way, no other
    process takes them for its own, and there is nothing to clean up. (Where the file system cannot do that they lose
    their name at once; a process killed just in between leaves an empty file.)

    A write is on the disk when `store` or `move` returns: were it only in the system's cache, a later failure to write
    it out would turn up as a wrong page. Space is allocated before it is written. So a full or broken disk is a
    failed `store`, while the caller still has the bytes. Calls that a signal interrupts are taken up again (PEP 475).

    Args:
        tier: its index, for errors.
        path: a directory.
        slot_bytes: of each pool.
        staging: [at least `staging_bytes(slot_bytes)`] buffer that all transfers go through; the caller's own.

    Slots are not checked: the caller has done so (`batches.BatchCheck`).

    Errors: ValueError for a directory in which no file can be made.
    """

    def __init__(self, tier: int, path: str, slot_bytes: Sequence[int], staging: ByteArray) -> None:
        self.tier = tier
        self.slot_bytes = tuple(slot_bytes)
        self._staging = staging
        self._pools: list[_FilePool] = []
        try:
            for num_bytes in slot_bytes:
                file = tempfile.TemporaryFile(buffering=0, prefix="ssmcache-", dir=path)  # noqa: SIM115 -- until `close`
                self._pools.append(_FilePool(file, num_bytes))
        except OSError as error:
            self.close()
            raise ValueError(
                f"path of the disk tier: expected a directory to make files in, got {path!r}: {error.strerror}"
            ) from error

    def resize(self, num_slots: Sequence[int]) -> bool:
        """Pools of so many slots; what lies in slots that remain stays. False, and nothing has changed, if the file
        system has not the space. It is allocated later, as it is needed, and somebody else may have taken it by then.
        """
        sizes = [count * pool.slot_bytes for count, pool in zip(num_slots, self._pools, strict=True)]
        growth = sum(sizes) - sum(pool.num_allocated_bytes for pool in self._pools)
        if growth > 0 and growth > self._free_bytes():
            return False
        for pool, count in zip(self._pools, num_slots, strict=True):
            pool.resize(count)
        return True

    def store(self, pool: int, slots: SlotArray, fill: Callable[[SlotArray, ByteArray], None]) -> None:
        """Write slots, [n]. `fill(positions, rows)` is called for one piece of the batch after the other and must have
        filled rows [k, slot_bytes] with what goes to `slots[positions]`, positions being [k], when it returns.

        Errors: TransferError without lost positions; what lies in `slots` is undefined then.
        """
        self.allocate(pool, slots)
        for positions, rows in self.pieces(pool, slots, self._staging):
            fill(positions, rows)
            self.write(pool, slots[positions], rows)
        self.sync(pool)

    def load(self, pool: int, slots: SlotArray, drain: Callable[[SlotArray, ByteArray], None]) -> None:
        """Read slots, [n]. `drain(positions, rows)` is called for one piece of the batch after the other with what lies
        in `slots[positions]`, and must be done with rows when it returns; not any more once something is lost.

        Errors: TransferError with the positions of all slots that cannot be read.
        """
        lost: dict[int, str] = {}
        for positions, rows in self.pieces(pool, slots, self._staging):
            found = self.read(pool, slots[positions], rows)
            lost.update((int(positions[row]), why) for row, why in found.items())
            if not lost:
                drain(positions, rows)
        self.raise_if_lost(lost, slots.size)

    def move(self, pool: int, sources: SlotArray, destinations: SlotArray) -> None:
        """Copy slots to other slots. Errors: as of `load` and `store`."""
        self.allocate(pool, destinations)
        self.load(pool, sources, lambda positions, rows: self.write(pool, destinations[positions], rows))
        self.sync(pool)

    # -- steps of these, for callers with buffers of their own; `write`, `sync` and `read` may run in several threads at
    # -- once, on different slots and buffers

    def allocate(self, pool: int, slots: SlotArray) -> None:
        """Make sure of the space for slots that will be written. Errors: TransferError without lost positions."""
        with self._write_errors():
            self._pools[pool].allocate(slots)

    def write(self, pool: int, slots: SlotArray, rows: ByteArray) -> None:
        """Write rows, [k, slot_bytes], to slots, [k]; `sync` brings them to the disk. Errors: as of `allocate`."""
        with self._write_errors():
            self._pools[pool].write(slots, rows)

    def sync(self, pool: int) -> None:
        """Wait until the disk has what was written. Errors: as of `allocate`."""
        with self._write_errors():
            self._pools[pool].sync()

    def read(self, pool: int, slots: SlotArray, rows: ByteArray) -> dict[int, str]:
        """Fill rows, [k, slot_bytes], from slots, [k]. Returns the rows that cannot be read, ascending, and why."""
        return self._pools[pool].read(slots, rows)

    def forget_cached(self, pool: int) -> bool:
        """Have the next reads come from the disk, see `forget_cached`. For whoever measures."""
        return forget_cached(self._pools[pool].file.fileno())

    def pieces(self, pool: int, slots: SlotArray, buffer: ByteArray) -> Iterator[tuple[SlotArray, ByteArray]]:
        """Positions of a batch, a buffer full at a time and in the order of the slots so that neighbours go together,
        with the rows of the buffer for them.
        """
        slot_bytes = self._pools[pool].slot_bytes
        order = np.argsort(slots)
        num_rows = buffer.size // slot_bytes
        rows = buffer[: num_rows * slot_bytes].reshape(num_rows, slot_bytes)
        for start in range(0, slots.size, num_rows):
            positions = order[start : start + num_rows]
            yield positions, rows[: positions.size]

    def raise_if_lost(self, lost: Mapping[int, str], num_slots: int) -> None:
        """Errors: TransferError if positions of a batch of so many slots are lost, saying why the first is."""
        if lost:
            reason = f"disk tier: cannot read {len(lost)} of {num_slots} slots: {next(iter(lost.values()))}"
            raise TransferError(self.tier, sorted(lost), reason)

    def close(self) -> None:
        """Free the files. Safe to call twice."""
        for pool in self._pools:
            # nobody needs what is in the file; it is gone whatever its last write says
            with suppress(OSError):
                pool.file.close()
        self._pools = []

    def _free_bytes(self) -> float:
        try:
            space = os.fstatvfs(self._pools[0].file.fileno())
        except OSError:
            return 0
        # some file systems tell nothing about their space
        return space.f_bavail * space.f_frsize if space.f_blocks else float("inf")

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TransferError(self.tier, (), f"disk tier: cannot write: {error.strerror}") from error


@dataclass(slots=True)
class _FilePool:
    """The slots of one pool in one file. Slots are [n], rows [n, slot_bytes] and contiguous."""

    file: io.FileIO
    slot_bytes: int
    num_slots: int = 0
    num_allocated_bytes: int = 0

    def resize(self, num_slots: int) -> None:
        self.num_slots = num_slots
        size = num_slots * self.slot_bytes
        if self.num_allocated_bytes > size:
            self._truncate(size)

    def allocate(self, slots: SlotArray) -> None:
        """Make sure of the space for these slots, and of some ahead. Errors: OSError."""
        needed = (int(slots.max(initial=-1)) + 1) * self.slot_bytes
        if needed <= self.num_allocated_bytes:
            return
        rounded = -(-needed // ALLOCATION_BYTES) * ALLOCATION_BYTES
        size = min(rounded, self.num_slots * self.slot_bytes)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.file.fileno(), self.num_allocated_bytes, size - self.num_allocated_bytes)
        except OSError as error:
            if error.errno not in _CANNOT_ALLOCATE:
                self._truncate(self.num_allocated_bytes)  # a part may have been allocated
                raise
        self.num_allocated_bytes = size

    def write(self, slots: SlotArray, rows: ByteArray) -> None:
        """Errors: OSError."""
        for start, end in _neighbours(slots):
            left, offset = rows[start:end].reshape(-1).data, int(slots[start]) * self.slot_bytes
            while left:
                count = os.pwrite(self.file.fileno(), left, offset)
                if count == 0:
                    raise OSError(errno.EIO, "nothing was written")
                left, offset = left[count:], offset + count

    def sync(self) -> None:
        """Wait until the disk has what was written. Errors: OSError."""
        os.fsync(self.file.fileno())

    def read(self, slots: SlotArray, rows: ByteArray) -> dict[int, str]:
        """Fill rows. Returns the rows that cannot be read, ascending, and why."""
        lost: dict[int, str] = {}
        for start, end in _neighbours(slots):
            found = self._read_neighbours(int(slots[start]), rows[start:end].reshape(-1).data)
            lost.update((start + row, why) for row, why in found.items())
        return lost

    def _read_neighbours(self, slot: int, buffer: memoryview) -> dict[int, str]:
        """Fill a buffer from a slot on, in as few reads as it takes; after a failure slot by slot, to know which."""
        lost: dict[int, str] = {}
        done, base, one_by_one = 0, slot * self.slot_bytes, False
        while done < len(buffer):
            slot_end = (done // self.slot_bytes + 1) * self.slot_bytes
            end = slot_end if one_by_one else len(buffer)
            count, why = 0, "the file ends before it"
            try:
                count = os.preadv(self.file.fileno(), [buffer[done:end]], base + done)
            except OSError as error:
                why = str(error.strerror)
            if count:
                done += count
            elif one_by_one:
                lost[done // self.slot_bytes] = why
                done = slot_end
            else:
                one_by_one = True
        return lost

    def _truncate(self, size: int) -> None:
        """Give space back; if that fails it merely stays taken."""
        with suppress(OSError):
            os.ftruncate(self.file.fileno(), size)
            self.num_allocated_bytes = size


def _neighbours(slots: SlotArray) -> Iterator[tuple[int, int]]:
    """Ranges of positions whose slots follow each other in the file."""
    breaks = (np.flatnonzero(np.diff(slots) != 1) + 1).tolist()
    return pairwise([0, *breaks, slots.size])
