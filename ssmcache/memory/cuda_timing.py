"""Copies of `CudaMemory` and plain copies of as many bytes, to be timed side by side on the device.

Rates are of payload over device time between two events (a copy within the GPU moves twice as many bytes); a delay
before the first event lets the host run ahead, so that its calls are not in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ssmcache.config import DiskCacheTierConfig, GpuCacheTierConfig, HostCacheTierConfig
from ssmcache.memory.base import SlotMoves
from ssmcache.memory.cuda import CudaMemory
from ssmcache.memory.slot_timing import RandomMoves, check_moved

GPU, HOST, DISK = 0, 1, 2
_DELAY_CYCLES = 2_000_000  # about a millisecond

Device: TypeAlias = torch.device | str | int | None
"""As `CudaMemory` takes it; it has to be torch's current one, since the events are recorded there."""


def device_seconds(queue: Callable[[], object]) -> float:
    """How long the current device takes for what a call queues on its current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(_DELAY_CYCLES)
    start.record()
    queue()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@contextmanager
def opened(
    slot_bytes: int, gpu_slots: int, host_slots: int = 1, disk: str | None = None, device: Device = None
) -> Iterator[CudaMemory]:
    """A memory with random bytes in its GPU pool. Errors: MemoryError where there is not enough for it."""
    tiers: list[Any] = [GpuCacheTierConfig(1), HostCacheTierConfig(1)]
    if disk:
        tiers.append(DiskCacheTierConfig(1, disk))
    memory = CudaMemory(device)
    memory.open(tiers, [slot_bytes])
    try:
        for tier, name, count in ((GPU, "GPU", gpu_slots), (HOST, "pinned host", host_slots)):
            if not memory.resize(tier, [count]):
                raise MemoryError(f"expected {count * slot_bytes / 1e6:,.0f} MB of {name} memory, got less")
        memory.view(0).random_()
        torch.cuda.synchronize(memory.device)
        yield memory
    finally:
        memory.close()


@dataclass(frozen=True, slots=True)
class TimedCopies:
    """A batch of slots and a plain copy of as many bytes, both ready to be queued any number of times.

    Attributes:
        moves: where the slots of the next batch lie.
        scratch: a slot of the GPU that no batch uses.
    """

    memory: CudaMemory
    moves: RandomMoves
    scratch: int
    plain: Callable[[], object]

    def slots(self) -> None:
        """Queue the next batch."""
        self.memory.copy(self.moves.next(), None)

    def check(self) -> None:
        """The last batch has arrived. Errors: WrongBytesError."""
        check_moved(self.memory, self.moves.last, self.scratch)


@contextmanager
def timed_copies(
    source: int, destination: int, slot_bytes: int, num_slots: int, device: Device = None
) -> Iterator[TimedCopies]:
    """Copies within the GPU, or between it and the host, each way.

    Memory: four times what is copied on the GPU for copies within it; else twice as much on each side.
    Errors: MemoryError.
    """
    total, within_gpu = slot_bytes * num_slots, source == destination == GPU
    scratch = 2 * num_slots if within_gpu else num_slots
    with opened(slot_bytes, scratch + 1, 1 if within_gpu else num_slots, device=device) as memory:
        on_gpu = torch.randint(0, 256, (total,), dtype=torch.uint8, device=memory.device)
        if within_gpu:
            other = torch.empty_like(on_gpu)
        else:
            order = range(num_slots)
            memory.copy(SlotMoves(0, GPU, order, HOST, order), None)
            other = torch.empty(total, dtype=torch.uint8, pin_memory=True)
            other.copy_(on_gpu)
        into, source_bytes = (on_gpu, other) if source == HOST else (other, on_gpu)
        moves = RandomMoves(source, destination, num_slots)
        yield TimedCopies(memory, moves, scratch, lambda: into.copy_(source_bytes, non_blocking=True))
