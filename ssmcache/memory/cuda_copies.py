"""Which way a batch of slots is copied between the GPU and pinned host memory, and within each."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from ssmcache.memory.batches import SlotArray
from ssmcache.memory.cuda_calls import PreparedKernel, driver_calls
from ssmcache.memory.cuda_engine import CopyEngine, copy_engine
from ssmcache.memory.cuda_indices import MAX_SLOTS, NUMBER_BYTES, IndexLines, neighbours, pieces
from ssmcache.memory.cuda_pools import SlotPool, access, say_once
from ssmcache.memory.cuda_vmm import CudaDriverError

ENGINE_BYTES = 512 << 10
"""Slots from this size on go over the host link by the copy engines. They lose about 1.3 microseconds a copy (26 GB/s
at 64 KiB where the link has 54.6), which is half of their rate at 64 KiB and 4 % at 2 MiB. A kernel has about nine
tenths of the link at any size, and needs multiprocessors. Beside a busy GPU the faster one is the same.
"""

_ALIGNMENT = 16  # of addresses, which Triton makes use of
_GATHER_BYTES = 64 << 20  # of a copy within the GPU without Triton, which goes through a buffer


def _kernels() -> ModuleType | None:
    try:
        from ssmcache.memory import kernels
    except ImportError:
        say_once("Triton is not installed: slots are copied by torch, at about half the speed within the GPU")
        return None
    return kernels


class SlotBatch(NamedTuple):
    """Slots of two pools, [n] each, n > 0, which follow the rules of `SlotMoves`."""

    source: SlotPool
    sources: SlotArray
    destination: SlotPool
    destinations: SlotArray


class SlotCopier:
    """Copies batches of slots of equal size.

    - One slot: one copy of the driver.
    - Within the GPU: one launch of a kernel (for each 8,192 moves).
    - Over the host link: the copy engines where the slots are large, one call a batch; else a kernel that reads or
      writes the pinned memory, on few multiprocessors.
    - Within the host: the same kernel, so that it is in the order of the stream.
    - Without Triton: `index_select` and `index_copy_` within the GPU, else a copy for each stretch of slots.

    Nothing here waits for the GPU. With cuda-bindings all but the first launch of a kernel is queued by the driver.

    Args:
        device: with a context that is current.
        driver: of cuda-bindings, or None.
    """

    def __init__(self, device: torch.device, driver: Any) -> None:
        self._device = device
        self._kernels = _kernels()
        self._calls = driver_calls(driver, device)
        self._engine = copy_engine(driver, device)
        self._prepared: dict[Any, PreparedKernel | None] = {}
        self._lines = IndexLines(device)

    def copy(self, batch: SlotBatch, stream: torch.cuda.Stream) -> None:
        """Queue a batch on a stream of the device."""
        source, destination = batch.source, batch.destination
        is_single = batch.sources.size == 1 and (source.on_gpu or destination.on_gpu)
        over_link = source.on_gpu != destination.on_gpu
        if is_single:
            self._one(source, int(batch.sources[0]), destination, int(batch.destinations[0]), stream)
        elif over_link and self._engine is not None and source.slot_bytes >= ENGINE_BYTES:
            with torch.cuda.device(self._device):
                self._by_engine(self._engine, batch, stream)
        elif self._kernels is not None:
            self._by_kernel(self._kernels, batch, stream)
        else:
            with torch.cuda.stream(stream):
                self._by_torch(batch, over_link, stream)

    def _one(self, source: SlotPool, slot: int, destination: SlotPool, into: int, stream: torch.cuda.Stream) -> None:
        if self._calls is not None:
            with self._calls.current():
                self._calls.copy(source.address(slot), destination.address(into), source.slot_bytes, stream)
        else:
            with torch.cuda.stream(stream):
                destination.rows[into].copy_(source.rows[slot], non_blocking=True)

    def _by_torch(self, batch: SlotBatch, over_link: bool, stream: torch.cuda.Stream) -> None:
        source, destination = batch.source, batch.destination
        if source.on_gpu and destination.on_gpu:
            self._by_gather(batch, stream)
        elif over_link:
            for first, into, count in neighbours(batch.sources, batch.destinations):
                destination.rows[into : into + count].copy_(source.rows[first : first + count], non_blocking=True)
        else:
            self._by_way_of_gpu(batch)

    def _by_kernel(self, kernels: ModuleType, batch: SlotBatch, stream: torch.cuda.Stream) -> None:
        source, destination = batch.source, batch.destination
        most = kernels.MAX_PROGRAMS if source.on_gpu and destination.on_gpu else kernels.LINK_PROGRAMS
        dtype, unit = access(source.slot_bytes)
        shape = kernels.shape_of(source.slot_bytes // dtype.itemsize, unit, dtype.itemsize)
        # Triton compiles another kernel for each of these
        addresses = source.address(0), destination.address(0)
        key = dtype, unit, shape, *(address % _ALIGNMENT == 0 for address in addresses)
        prepared = self._prepared.get(key)
        for sources, destinations in pieces(batch.sources, batch.destinations, MAX_SLOTS):
            line, count = self._lines.take(), sources.size
            second, total = line.fill(sources, destinations)
            num_programs = shape.num_programs(count, most)
            if prepared is not None and self._calls is not None:
                with self._calls.current():
                    line.send_by(self._calls, total, stream)
                    slots = line.address, line.address + NUMBER_BYTES * second
                    prepared.launch(num_programs, stream, *addresses, *slots, count, shape.num_units)
            else:
                with torch.cuda.stream(stream):
                    on_gpu = line.send(total)
                    compiled = kernels.launch(
                        source.elements, destination.elements, on_gpu, on_gpu[second:], count, unit, shape, num_programs
                    )
                if key not in self._prepared:
                    prepared = self._prepared[key] = self._prepare(kernels, compiled)
            self._lines.give(line, stream)

    def _prepare(self, kernels: ModuleType, compiled: Any) -> PreparedKernel | None:
        """For the launches that follow the first one."""
        if self._calls is None:
            return None
        try:
            return PreparedKernel(self._calls, compiled, kernels.PARAMETER_BYTES)
        except CudaDriverError as error:
            say_once(f"{error}: Triton launches it, at more time of the host")
            return None

    def _by_gather(self, batch: SlotBatch, stream: torch.cuda.Stream) -> None:
        size = min(MAX_SLOTS, max(1, _GATHER_BYTES // batch.source.slot_bytes))
        for sources, destinations in pieces(batch.sources, batch.destinations, size):
            line, count = self._lines.take(), sources.size
            second, total = line.fill(sources, destinations)
            numbers = line.send(total)
            rows = batch.source.rows.index_select(0, numbers[:count])
            batch.destination.rows.index_copy_(0, numbers[second:total].long(), rows)
            self._lines.give(line, stream)

    def _by_engine(self, engine: CopyEngine, batch: SlotBatch, stream: torch.cuda.Stream) -> None:
        num_bytes = np.uint64(batch.source.slot_bytes)
        reading = batch.sources.astype(np.uint64) * num_bytes + np.uint64(batch.source.rows.data_ptr())
        writing = batch.destinations.astype(np.uint64) * num_bytes + np.uint64(batch.destination.rows.data_ptr())
        engine.copy(reading, writing, batch.source.slot_bytes, stream)

    def _by_way_of_gpu(self, batch: SlotBatch) -> None:
        """Between two places on the host. A copy of torch between them would not wait for the stream."""
        row = torch.empty(batch.source.slot_bytes, dtype=torch.uint8, device=self._device)
        for slot, into in zip(batch.sources.tolist(), batch.destinations.tolist(), strict=True):
            row.copy_(batch.source.rows[slot], non_blocking=True)
            batch.destination.rows[into].copy_(row, non_blocking=True)
