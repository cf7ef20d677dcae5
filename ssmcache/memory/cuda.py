"""Memory on a CUDA device: the GPU tier, a pinned host tier, a disk tier. Needs torch; see `CudaMemory`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from typing import Any, NoReturn

import numpy as np
import torch

from ssmcache.config import CacheTierConfig, DiskCacheTierConfig
from ssmcache.memory.base import GPU_TIER, SlotMoves
from ssmcache.memory.batches import BatchCheck, SlotArray
from ssmcache.memory.cuda_copies import SlotBatch, SlotCopier
from ssmcache.memory.cuda_device import cuda_device, recorded
from ssmcache.memory.cuda_pools import PinnedMemory, SlotPool, TierPools, gpu_pools
from ssmcache.memory.cuda_vmm import CudaDriverError, NoMemoryError, cuda_driver
from ssmcache.memory.disk import DiskTier, staging_bytes
from ssmcache.memory.disk_loads import LoadedSlots
from ssmcache.memory.disk_queue import DiskQueue
from ssmcache.memory.disk_ring import BufferRing, ring_shape


class CudaMemory:
    """Real bytes on one GPU, with a pinned host tier and a disk tier below it.

    With cuda-bindings the GPU pools are CUDA virtual memory: their addresses stay, `grain` is a page (2 MiB), and a
    page that one pool gives up goes to another. Without, they are torch memory, copied when their size changes. Triton
    copies slots; torch stands in for it, slower. The log says once what is missing. New slots hold anything.

    Streams are `torch.cuda.Stream`s of the device; None is torch's current stream at the time of the call, so whoever
    changes that names streams instead. Events are `torch.cuda.Event`s.

    What blocks the caller:
    - `copy` between GPU and host: nothing, or what is still being read from the disk into one of the slots.
    - `copy` to the disk: only a ring that is full; see `DiskQueue`. From the disk to the host: nothing; to the GPU:
      reading the file. So whoever must not wait for a file brings pages to the host tier first
      (`KVCache.prefetch(1)`), and resumes once `KVCache.is_loading` is over.
    - What goes to the disk is written after the call, and what goes from there to the host is read after it: a failure
      loses those slots, and the copy that would read one raises `TransferError`.
    - `open`, `resize` and `close` wait for all that was queued on the device.

    Once the device has failed (an illegal access of any kernel, say) every call but `close` raises one RuntimeError
    that says so: nothing on it can be saved.

    Args:
        device: a CUDA device, or its index; None for torch's current one.

    Errors: ValueError for a device that is not there.
    """

    def __init__(self, device: torch.device | str | int | None = None) -> None:
        self._device = cuda_device(device)
        self._was_opened = self._is_open = False
        self._failure: str | None = None
        self._slot_bytes: tuple[int, ...] = ()
        self._num_slots: list[list[int]] = []
        self._tiers: list[TierPools | DiskQueue] = []
        self._loaded: dict[int, LoadedSlots] = {}  # by tier: those of the host, beside a disk
        self._ring: list[list[SlotPool]] = []  # by pool and buffer
        self._check = BatchCheck()
        self._end = ExitStack()

    @property
    def device(self) -> torch.device:
        return self._device

    def open(self, tiers: Sequence[CacheTierConfig], slot_bytes: Sequence[int]) -> None:
        if self._was_opened:
            raise RuntimeError("open: expected a memory that was never opened, got one that was")
        if any(tier.quota is None for tier in tiers):
            raise ValueError("quota of the GPU tier: expected bytes, got None: only a simulation has no limit")
        num_disks = sum(isinstance(tier, DiskCacheTierConfig) for tier in tiers)
        if num_disks > 1:
            raise ValueError(f"disk tiers: expected at most one, got {num_disks}")
        self._slot_bytes = tuple(slot_bytes)
        with ExitStack() as end, torch.cuda.device(self._device):
            torch.cuda.synchronize()  # also makes its context the thread's
            driver = cuda_driver()
            pinned = PinnedMemory(driver)
            places: list[TierPools | DiskQueue] = []
            try:
                for index, tier in enumerate(tiers):
                    if isinstance(tier, DiskCacheTierConfig):
                        places.append(self._open_disk(index, tier.path, pinned, end))
                    else:
                        pools = pinned.pools(slot_bytes) if index else gpu_pools(driver, self._device, slot_bytes)
                        end.callback(pools.close)
                        places.append(pools)
            except NoMemoryError as error:
                raise ValueError(
                    f"tier {len(places)}: expected memory for what it needs beside its pools: {error}"
                ) from error
            self._copier = SlotCopier(self._device, driver)
            torch.cuda.synchronize()
            self._end = end.pop_all()
        self._tiers = places
        self._loaded = {
            tier: LoadedSlots(tier, disk, len(slot_bytes))
            for disk in places
            if isinstance(disk, DiskQueue)
            for tier, place in enumerate(places)
            if tier != GPU_TIER and place is not disk
        }
        self._num_slots = [[0] * len(slot_bytes) for _ in tiers]
        self._was_opened = self._is_open = True

    def _open_disk(self, index: int, path: str, pinned: PinnedMemory, end: ExitStack) -> DiskQueue:
        files = DiskTier(index, path, self._slot_bytes, np.empty(staging_bytes(self._slot_bytes), dtype=np.uint8))
        end.callback(files.close)
        num_buffers, num_bytes = ring_shape(self._slot_bytes)
        memory = pinned.allocate(num_buffers * num_bytes)
        end.callback(pinned.free, memory)
        buffers = list(memory.split(num_bytes))
        self._ring = [[SlotPool.of(buffer, num_bytes // size, size) for buffer in buffers] for size in self._slot_bytes]
        queue = DiskQueue(files, BufferRing([buffer.numpy() for buffer in buffers]), self._slot_bytes)
        end.callback(queue.close)
        return queue

    def grain(self, tier: int) -> int:
        self._require_open("grain")
        place = self._tiers[tier]
        return 1 if isinstance(place, DiskQueue) else place.grain

    def resize(self, tier: int, num_slots: Sequence[int | None]) -> bool:
        """See `Memory.resize`. Waits for all that was queued on the device.

        Cost: on a GPU with virtual memory about 50 microseconds a page that changes its place; elsewhere a copy of the
        pools whose size changes, and for that time memory for both.
        """
        self._require_open("resize")
        counts = [count for count in num_slots if count is not None]
        if len(counts) != len(num_slots):
            raise ValueError(f"slots of tier {tier}: expected a number, got None: only a simulation has no limit")
        try:
            with torch.cuda.device(self._device):
                torch.cuda.synchronize()
                loaded = self._loaded.get(tier)
                if loaded is not None:
                    loaded.wait()
                if not self._tiers[tier].resize(counts):
                    return False
                if loaded is not None:
                    loaded.resize(counts)
        except RuntimeError as error:
            self._raise_if_device_failed("resize", error)
            raise
        self._num_slots[tier] = counts
        return True

    def check_stream(self, call: str, stream: Any) -> None:
        """See `Memory.check_stream`."""
        self._stream(call, stream)

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        self._require_open("copy")
        on = self._stream("copy", stream)
        group = moves.pool
        num_slots = self._num_slots[moves.source_tier][group], self._num_slots[moves.destination_tier][group]
        sources, destinations = self._check.slots(moves, *num_slots)
        if sources.size == 0:
            return
        source, destination = self._tiers[moves.source_tier], self._tiers[moves.destination_tier]
        try:
            if self._loaded and self._is_loaded_later(moves, sources, destinations, on):
                return
            if isinstance(source, DiskQueue):
                if isinstance(destination, DiskQueue):
                    source.move(group, sources, destinations)  # there is only one disk
                else:
                    self._load(source, group, sources, destination.pools[group], destinations, on)
            elif isinstance(destination, DiskQueue):
                self._store(source.pools[group], sources, destination, group, destinations, on)
            else:
                self._copier.copy(SlotBatch(source.pools[group], sources, destination.pools[group], destinations), on)
        except RuntimeError as error:
            self._raise_if_device_failed("copy", error)
            raise

    def _is_loaded_later(
        self, moves: SlotMoves, sources: SlotArray, destinations: SlotArray, stream: torch.cuda.Stream
    ) -> bool:
        """Whether a copy has been left to the disk's threads, which is one from the disk to the host. For any other
        one, the slots of the host are waited for. Errors: TransferError.
        """
        group = moves.pool
        read, written = self._loaded.get(moves.source_tier), self._loaded.get(moves.destination_tier)
        if read is not None:
            read.read(group, sources)
        if written is None:
            return False
        if not isinstance(self._tiers[moves.source_tier], DiskQueue):
            written.overwrite(group, destinations)
            return False
        pools = self._tiers[moves.destination_tier]
        assert not isinstance(pools, DiskQueue)
        rows = pools.pools[group].rows.numpy()
        written.load(group, sources, rows, destinations, recorded(stream, blocking=True).synchronize)
        return True

    def _load(
        self, disk: DiskQueue, group: int, sources: SlotArray, pool: SlotPool, destinations: SlotArray,
        stream: torch.cuda.Stream,
    ) -> None:  # fmt: skip
        def drain(positions: SlotArray, buffer: int) -> torch.cuda.Event:
            rows = np.arange(positions.size)
            self._copier.copy(SlotBatch(self._ring[group][buffer], rows, pool, destinations[positions]), stream)
            return recorded(stream, blocking=True)

        disk.load(group, sources, drain)

    def _store(
        self, pool: SlotPool, sources: SlotArray, disk: DiskQueue, group: int, destinations: SlotArray,
        stream: torch.cuda.Stream,
    ) -> None:  # fmt: skip
        def fill(positions: SlotArray, buffer: int) -> torch.cuda.Event:
            rows = np.arange(positions.size)
            self._copier.copy(SlotBatch(pool, sources[positions], self._ring[group][buffer], rows), stream)
            return recorded(stream, blocking=True)

        disk.store(group, destinations, fill)

    def record(self, stream: Any) -> torch.cuda.Event:
        """See `Memory.record`. Errors: ValueError for a stream of another device, or none at all."""
        self._require_open("record")
        on = self._stream("record", stream)
        try:
            return recorded(on)
        except RuntimeError as error:
            self._raise_if_device_failed("record", error)
            raise

    def wait(self, stream: Any, event: Any) -> None:
        self._require_open("wait")
        on = self._stream("wait", stream)
        if not isinstance(event, torch.cuda.Event):
            raise ValueError(f"wait: expected an event of torch.cuda, got {event!r}")
        try:
            on.wait_event(event)
        except RuntimeError as error:
            self._raise_if_device_failed("wait", error)
            raise

    def view(self, pool: int) -> torch.Tensor:
        """A pool of the GPU, [num_slots, slot_bytes] uint8 on the device, not a copy. It is good until the
        next `resize`, and must not be used after `close`.
        """
        self._require_open("view")
        pools = self._tiers[GPU_TIER]
        assert not isinstance(pools, DiskQueue)
        return pools.pools[pool].rows

    def loads(self) -> Sequence[Future[Any]]:
        """See `Memory.loads`: those from the disk to the host tier."""
        return [future for loaded in self._loaded.values() for future in loaded.under_way()]

    @property
    def bytes_in_use(self) -> int:
        total = 0
        for place, counts in zip(self._tiers, self._num_slots, strict=True):
            if isinstance(place, DiskQueue):
                total += sum(map(operator.mul, counts, self._slot_bytes))
            else:
                total += place.num_bytes
        return total

    def close(self) -> None:
        """Wait for all that is under way and give everything back. Safe to call twice, and on a failed device, whose
        memory goes when the process ends.
        """
        if not self._is_open:
            return
        self._is_open = False
        self._tiers, self._num_slots, self._ring, self._loaded = [], [], [], {}
        if self._device_fails() is None:
            with torch.cuda.device(self._device):
                self._end.close()
        else:
            with suppress(RuntimeError, NoMemoryError):
                self._end.close()
        del self._copier

    def _stream(self, call: str, stream: Any) -> torch.cuda.Stream:
        if stream is None:
            return torch.cuda.current_stream(self._device)
        if not isinstance(stream, torch.cuda.Stream) or stream.device != self._device:
            raise ValueError(f"{call}: expected a torch.cuda.Stream of {self._device} or None, got {stream!r}")
        return stream

    def _require_open(self, call: str) -> None:
        if not self._is_open:
            raise RuntimeError(f"{call}: expected an open memory, got one that is not open")
        if self._failure is not None:
            raise CudaDriverError(f"{call}: expected a working device, but {self._device} has failed: {self._failure}")

    def _device_fails(self) -> str | None:
        """What every call on the device says if it has failed."""
        if self._failure is None:
            try:
                torch.cuda.synchronize(self._device)
            except RuntimeError as error:
                self._failure = str(error).splitlines()[0]
        return self._failure

    def _raise_if_device_failed(self, call: str, error: RuntimeError) -> None:
        if self._failure is None and self._device_fails() is not None:
            self._fail(call, error)

    def _fail(self, call: str, error: RuntimeError) -> NoReturn:
        message = f"{call}: expected a working device, but {self._device} has failed: {self._failure}"
        raise CudaDriverError(message) from error
