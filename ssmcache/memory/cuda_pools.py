"""Pools of slots in GPU memory and in pinned host memory, as tensors."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from ssmcache.memory.cuda_vmm import CudaDriverError, DevicePages, NoMemoryError, PagedPools, results_of

_LOG = logging.getLogger(__name__)
_MAX_HOST_BYTES = 1 << 46  # more than any host has; torch and the driver have other errors beyond their own limits


@cache
def say_once(message: str) -> None:
    """A warning in the log, once in a process."""
    _LOG.warning(message)


def access(slot_bytes: int) -> tuple[torch.dtype, int]:
    """(dtype, elements) of the widest accesses, 16 bytes at most, that slots of so many bytes consist of."""
    for num_bytes, dtype, count in (
        (16, torch.int64, 2),
        (8, torch.int64, 1),
        (4, torch.int32, 1),
        (2, torch.int16, 1),
    ):
        if slot_bytes % num_bytes == 0:
            return dtype, count
    return torch.uint8, 1


@dataclass(frozen=True, slots=True, eq=False)
class SlotPool:
    """The slots of one pool in one tier.

    Attributes:
        rows: [num_slots, slot_bytes] uint8.
        elements: the same as [num_slots * slot_bytes / element] of the dtype that kernels read.
        first_address: of slot 0.
    """

    rows: torch.Tensor
    elements: torch.Tensor
    slot_bytes: int
    on_gpu: bool
    first_address: int

    @classmethod
    def of(cls, memory: torch.Tensor, num_slots: int, slot_bytes: int) -> SlotPool:
        """The first bytes of a memory, [n] uint8, as slots."""
        used = memory[: num_slots * slot_bytes]
        rows, elements = used.view(num_slots, slot_bytes), used.view(access(slot_bytes)[0])
        return cls(rows, elements, slot_bytes, bool(rows.is_cuda), rows.data_ptr())

    def address(self, slot: int) -> int:
        """Where a slot lies."""
        return self.first_address + slot * self.slot_bytes


class TierPools(Protocol):
    """The pools of one tier. Nothing may be using them during a call."""

    grain: int
    pools: list[SlotPool]

    def resize(self, num_slots: Sequence[int]) -> bool:
        """See `Memory.resize`."""

    @property
    def num_bytes(self) -> int:
        """As they are taken from the system."""

    def close(self) -> None:
        """Give all back. Safe to call twice."""


class _Addresses:
    """Device memory at an address, in the form that torch takes up without a copy."""

    def __init__(self, address: int, num_bytes: int, owner: object) -> None:
        self.owner = owner  # as long as there is a tensor, there is the object that its memory came from
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class VirtualPools:
    """GPU pools that never move: growing maps pages behind them, shrinking takes pages from their end."""

    def __init__(self, driver: Any, device: torch.device, slot_bytes: Sequence[int]) -> None:
        pages = DevicePages(driver, device.index)
        self.grain = pages.page_bytes
        self._device = device
        self._slot_bytes = tuple(slot_bytes)
        total = torch.cuda.get_device_properties(device).total_memory
        self._memory = PagedPools(pages, len(self._slot_bytes), total)
        self.pools = self._views([0] * len(self._slot_bytes))

    def _views(self, num_slots: Sequence[int]) -> list[SlotPool]:
        pools = []
        for address, count, slot_bytes in zip(self._memory.addresses, num_slots, self._slot_bytes, strict=True):
            if count:
                place = _Addresses(address, count * slot_bytes, self._memory)
                memory = torch.as_tensor(place, device=self._device)
                assert memory.data_ptr() == address, "torch has copied the pool"
            else:
                memory = torch.empty(0, dtype=torch.uint8, device=self._device)
            pools.append(SlotPool.of(memory, count, slot_bytes))
        return pools

    def resize(self, num_slots: Sequence[int]) -> bool:
        sizes = [count * slot_bytes for count, slot_bytes in zip(num_slots, self._slot_bytes, strict=True)]
        if not self._memory.resize(sizes):
            return False
        self.pools = self._views(num_slots)
        return True

    @property
    def num_bytes(self) -> int:
        return self._memory.num_bytes

    def close(self) -> None:
        self.pools = []
        self._memory.close()


Allocate = Callable[[int], torch.Tensor]
"""Bytes -> [bytes] uint8. Errors: NoMemoryError."""


class CopiedPools:
    """Pools that are copied to a new place when their size changes; for that time there is the old and the new one.

    Args:
        allocate, free: memory for one pool.
        slot_bytes: of each pool.
        max_bytes: of all pools together.
    """

    grain = 1

    def __init__(
        self, allocate: Allocate, free: Callable[[torch.Tensor], None], slot_bytes: Sequence[int], max_bytes: int
    ) -> None:
        self._allocate, self._free = allocate, free
        self._slot_bytes = tuple(slot_bytes)
        self._max_bytes = max_bytes
        self._memory = [allocate(0) for _ in self._slot_bytes]
        self.pools = self._views(self._memory, [0] * len(self._slot_bytes))

    def _views(self, memory: Sequence[torch.Tensor], num_slots: Sequence[int]) -> list[SlotPool]:
        return [SlotPool.of(*pool) for pool in zip(memory, num_slots, self._slot_bytes, strict=True)]

    def resize(self, num_slots: Sequence[int]) -> bool:
        sizes = [count * slot_bytes for count, slot_bytes in zip(num_slots, self._slot_bytes, strict=True)]
        if sum(sizes) > self._max_bytes:
            return False
        memory: list[torch.Tensor] = []
        try:
            for old, size in zip(self._memory, sizes, strict=True):
                memory.append(old if old.numel() == size else self._allocate(size))
        except NoMemoryError:
            self._free_all_but(self._memory, memory)
            return False
        for old, new in zip(self._memory, memory, strict=True):
            kept = min(old.numel(), new.numel())
            if new is not old and kept:
                new[:kept].copy_(old[:kept])
        if any(new.is_cuda for new in memory):
            torch.cuda.synchronize(memory[0].device)  # the old ones go back now
        old_memory, self._memory = self._memory, memory
        self.pools = self._views(memory, num_slots)
        self._free_all_but(memory, old_memory)
        return True

    def _free_all_but(self, kept: Sequence[torch.Tensor], memory: Sequence[torch.Tensor]) -> None:
        for pool in memory:
            if not any(pool is other for other in kept):
                self._free(pool)

    @property
    def num_bytes(self) -> int:
        return sum(int(pool.numel()) for pool in self._memory)

    def close(self) -> None:
        self.pools = []
        for pool in self._memory:
            self._free(pool)
        self._memory = []


def gpu_pools(driver: Any, device: torch.device, slot_bytes: Sequence[int]) -> TierPools:
    """Pools on a device: in virtual memory, or in torch's where that cannot be. `driver`: see `cuda_driver`.

    Errors: NoMemoryError.
    """
    if driver is None:
        say_once("cuda-bindings is not installed: GPU pools are plain torch memory, and a change of size copies them")
    else:
        try:
            return VirtualPools(driver, device, slot_bytes)
        except CudaDriverError as error:
            say_once(f"{error}: GPU pools are plain torch memory, and a change of size copies them")

    def allocate(num_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        except torch.cuda.OutOfMemoryError as error:
            raise NoMemoryError(str(error)) from error

    total = torch.cuda.get_device_properties(device).total_memory
    return CopiedPools(allocate, lambda _: None, slot_bytes, total)  # torch frees what nobody refers to


class PinnedMemory:
    """Host memory that the GPU reads and writes over the link, in pieces of any size.

    Through cuda-bindings a piece has the size that was asked for; torch, which stands in where that is missing, rounds
    it up to a power of two. Several devices can use it.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8; to be given to `free` once nothing uses it. Errors: NoMemoryError."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if self._driver is None:
            try:
                return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                raise NoMemoryError(str(error)) from error
        flags = self._driver.CU_MEMHOSTALLOC_PORTABLE
        address = int(results_of("cuMemHostAlloc", self._driver.cuMemHostAlloc(num_bytes, flags)))
        return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)

    def free(self, memory: torch.Tensor) -> None:
        if self._driver is not None and memory.numel():
            results_of("cuMemFreeHost", self._driver.cuMemFreeHost(memory.data_ptr()))

    def pools(self, slot_bytes: Sequence[int]) -> TierPools:
        """The pools of a tier."""
        return CopiedPools(self.allocate, self.free, slot_bytes, _MAX_HOST_BYTES)
