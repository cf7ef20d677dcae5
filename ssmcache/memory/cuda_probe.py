"""What torch, the driver and a CUDA device can do for `CudaMemory`, asked one thing at a time; for `ssmcache doctor`.

Each question is one function, and one that cannot be answered raises whatever torch or the driver raise.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from ssmcache.memory.base import SlotMoves
from ssmcache.memory.cuda_engine import copy_engine
from ssmcache.memory.cuda_pools import PinnedMemory
from ssmcache.memory.cuda_timing import GPU, device_seconds, opened, timed_copies
from ssmcache.memory.cuda_vmm import DevicePages, cuda_driver
from ssmcache.memory.slot_timing import medians

_PROBE_SLOT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A device as torch sees it; memory of all processes together."""

    index: int
    name: str
    capability: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class CopySeconds:
    """Median seconds of a plain copy, and of a batch of slots with as many bytes."""

    plain: float
    slots: float


def why_no_device() -> str | None:
    """None where torch sees a CUDA device."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    return str(said[-1].message).splitlines()[0] if said else "torch sees no CUDA device"


def torch_cuda_version() -> str | None:
    """The CUDA that torch was built for; None: for none."""
    version: str | None = torch.version.cuda
    return version


def devices() -> tuple[CudaDevice, ...]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(CudaDevice(index, properties.name, capability, int(total_bytes), int(free_bytes)))
    return tuple(found)


def page_bytes(index: int) -> int | None:
    """Bytes of a page of CUDA virtual memory; None without cuda-bindings."""
    driver = cuda_driver()
    if driver is None:
        return None
    with torch.cuda.device(index):
        torch.cuda.synchronize()  # makes its context the thread's
        return DevicePages(driver, index).page_bytes


def has_copy_engine(index: int) -> bool:
    """Whether batches of large slots go over the link by `cuMemcpyBatchAsync`."""
    with torch.cuda.device(index):
        torch.cuda.synchronize()
        return copy_engine(cuda_driver(), torch.device("cuda", index)) is not None


def pin(num_bytes: int) -> None:
    """Take so much pinned memory, and give it back. Errors: NoMemoryError."""
    torch.cuda.synchronize()
    pinned = PinnedMemory(cuda_driver())
    pinned.free(pinned.allocate(num_bytes))


def move_a_few_slots(index: int) -> None:
    """A batch within the GPU: with Triton its kernel is compiled and launched. Errors: RuntimeError for wrong bytes."""
    with torch.cuda.device(index), opened(_PROBE_SLOT_BYTES, 4, device=index) as memory:
        memory.copy(SlotMoves(0, GPU, [0, 1], GPU, [3, 2]), None)
        rows = memory.view(0)
        if not (torch.equal(rows[0], rows[3]) and torch.equal(rows[1], rows[2])):
            raise RuntimeError("a batch of two slots arrived with other bytes")


def copy_seconds(
    index: int, source: int, destination: int, slot_bytes: int, num_slots: int, repeats: int
) -> CopySeconds:
    """How long the device takes; the bytes of the last batch are compared. See `cuda_timing.timed_copies`.

    Errors: MemoryError; WrongBytesError.
    """
    with torch.cuda.device(index):
        try:
            return _copy_seconds(index, source, destination, slot_bytes, num_slots, repeats)
        finally:
            torch.cuda.empty_cache()  # of the plain copies, to which nothing refers any more


def _copy_seconds(
    index: int, source: int, destination: int, slot_bytes: int, num_slots: int, repeats: int
) -> CopySeconds:
    with timed_copies(source, destination, slot_bytes, num_slots, index) as copies:
        plain, slots = medians(repeats, device_seconds, copies.plain, copies.slots)
        copies.check()
    return CopySeconds(plain, slots)
