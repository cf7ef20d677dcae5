"""Memory with real bytes on any machine: NumPy buffers play the GPU and the host tier, files the disk tier."""

import operator
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from ssmcache.config import CacheTierConfig, DiskCacheTierConfig
from ssmcache.memory.base import GPU_TIER, SlotMoves, check_any_stream
from ssmcache.memory.batches import BatchCheck, SlotArray
from ssmcache.memory.disk import MAX_STAGING_BYTES, ByteArray, DiskTier, staging_bytes

POISON = 0xA5
"""The byte that new slots of a buffer are full of, so that reading what nobody wrote shows."""
_ALIGNMENT = 256  # of a pool, as on a GPU


class HostMemory:
    """Copies happen at once, so streams and events have nothing to do, and anything passes for one.

    Every batch is checked. Beside the pools it needs at most 8 MiB, or one slot where that is more, and twice that if
    there is a disk; `resize` needs room for the old and the new pools of the tier.
    """

    def __init__(self) -> None:
        self._was_opened = False
        self._slot_bytes: tuple[int, ...] = ()
        self._num_slots: list[list[int]] = []
        self._tiers: list[list[ByteArray] | DiskTier] = []
        self._check = BatchCheck()

    def open(self, tiers: Sequence[CacheTierConfig], slot_bytes: Sequence[int]) -> None:
        if self._was_opened:
            raise RuntimeError("open: expected a memory that was never opened, got one that was")
        if any(tier.quota is None for tier in tiers):
            raise ValueError("quota of the GPU tier: expected bytes, got None: only a simulation has no limit")
        num_disks = sum(isinstance(tier, DiskCacheTierConfig) for tier in tiers)
        if num_disks > 1:
            raise ValueError(f"disk tiers: expected at most one, got {num_disks}")
        places: list[list[ByteArray] | DiskTier] = []
        for index, tier in enumerate(tiers):
            if isinstance(tier, DiskCacheTierConfig):
                staging = np.empty(staging_bytes(slot_bytes), dtype=np.uint8)
                places.append(DiskTier(index, tier.path, slot_bytes, staging))
            else:
                places.append([_new_pool(0, num_bytes) for num_bytes in slot_bytes])
        self._tiers = places
        self._slot_bytes = tuple(slot_bytes)
        self._num_slots = [[0] * len(slot_bytes) for _ in tiers]
        self._was_opened = True

    def grain(self, tier: int) -> int:
        return 1

    def resize(self, tier: int, num_slots: Sequence[int | None]) -> bool:
        self._require_open("resize")
        counts = [count for count in num_slots if count is not None]
        if len(counts) != len(num_slots):
            raise ValueError(f"slots of tier {tier}: expected a number, got None: only a simulation has no limit")
        place = self._tiers[tier]
        if isinstance(place, DiskTier):
            if not place.resize(counts):
                return False
        else:
            try:
                self._tiers[tier] = [_resized(pool, count) for pool, count in zip(place, counts, strict=True)]
            except MemoryError:
                return False
        self._num_slots[tier] = counts
        return True

    def check_stream(self, call: str, stream: Any) -> None:
        check_any_stream(call, stream)

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        self._require_open("copy")
        group = moves.pool
        source, destination = self._tiers[moves.source_tier], self._tiers[moves.destination_tier]
        num_slots = self._num_slots[moves.source_tier][group], self._num_slots[moves.destination_tier][group]
        sources, destinations = self._check.slots(moves, *num_slots)
        if isinstance(source, DiskTier):
            if isinstance(destination, DiskTier):
                source.move(group, sources, destinations)  # there is only one disk
                return
            into = destination[group]

            def drain(positions: SlotArray, rows: ByteArray) -> None:
                into[destinations[positions]] = rows

            source.load(group, sources, drain)
        elif isinstance(destination, DiskTier):
            pool = source[group]

            def fill(positions: SlotArray, rows: ByteArray) -> None:
                # the slots are checked; "raise" would make a second copy
                np.take(pool, sources[positions], axis=0, out=rows, mode="clip")

            destination.store(group, destinations, fill)
        else:
            _copy_slots(source[group], sources, destination[group], destinations)

    def record(self, stream: Any) -> None:
        return None

    def wait(self, stream: Any, event: Any) -> None:
        return None

    def view(self, pool: int) -> ByteArray:
        self._require_open("view")
        pools = self._tiers[GPU_TIER]
        assert not isinstance(pools, DiskTier)
        return pools[pool]

    def loads(self) -> Sequence[Future[Any]]:
        return ()

    @property
    def bytes_in_use(self) -> int:
        return sum(sum(map(operator.mul, counts, self._slot_bytes)) for counts in self._num_slots)

    def close(self) -> None:
        for place in self._tiers:
            if isinstance(place, DiskTier):
                place.close()
        self._tiers, self._num_slots = [], []

    def _require_open(self, call: str) -> None:
        if not self._tiers:
            raise RuntimeError(f"{call}: expected an open memory, got one that is not open")


def _new_pool(num_slots: int, slot_bytes: int) -> ByteArray:
    """[num_slots, slot_bytes] of anything, which starts at a multiple of `_ALIGNMENT` bytes. Errors: MemoryError."""
    num_spare = -(-_ALIGNMENT // slot_bytes)
    buffer = np.empty((num_slots + num_spare, slot_bytes), dtype=np.uint8).reshape(-1)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + num_slots * slot_bytes].reshape(num_slots, slot_bytes)


def _resized(pool: ByteArray, num_slots: int) -> ByteArray:
    """Errors: MemoryError."""
    num_kept, slot_bytes = min(len(pool), num_slots), pool.shape[1]
    if num_slots == len(pool):
        return pool
    if num_slots * slot_bytes > sys.maxsize:
        raise MemoryError  # numpy has other errors for that
    resized = _new_pool(num_slots, slot_bytes)
    resized[:num_kept] = pool[:num_kept]
    resized[num_kept:] = POISON
    return resized


def _copy_slots(source: ByteArray, sources: SlotArray, destination: ByteArray, destinations: SlotArray) -> None:
    # no destination is a source, so pieces may go one after the other
    num_rows = max(1, MAX_STAGING_BYTES // source.shape[1])
    for start in range(0, sources.size, num_rows):
        piece = slice(start, start + num_rows)
        destination[destinations[piece]] = source[sources[piece]]
