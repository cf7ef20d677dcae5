"""Which way a batch of slots is copied between the GPU and pinned host memory, and within each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from ssmcache.memory.batches import SlotArray
from ssmcache.memory.cuda_engine import CopyEngine, copy_engine
from ssmcache.memory.cuda_indices import MAX_SLOTS, IndexLines, neighbours, pieces
from ssmcache.memory.cuda_pools import SlotPool, access, say_once

ENGINE_BYTES = 512 << 10
"""Slots from this size on go over the host link by the copy engines. They lose about 1.3 microseconds a copy (26 GB/s
at 64 KiB where the link has 54.6), which is half of their rate at 64 KiB and 4 % at 2 MiB. A kernel has about nine
tenths of the link at any size, and needs multiprocessors.
"""

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

    Nothing here waits for the GPU.

    Args:
        device: with a context that is current.
        driver: of cuda-bindings, or None.
    """

    def __init__(self, device: torch.device, driver: Any) -> None:
        self._device = device
        self._kernels = _kernels()
        self._engine = copy_engine(driver, device)
        self._lines = IndexLines(device)

    def copy(self, batch: SlotBatch, stream: torch.cuda.Stream) -> None:
        """Queue a batch on a stream of the device."""
        source, sources, destination, destinations = batch
        with nullcontext() if torch.cuda.current_stream() == stream else torch.cuda.stream(stream):
            over_link = source.on_gpu != destination.on_gpu
            if sources.size == 1 and (source.on_gpu or destination.on_gpu):
                destination.rows[int(destinations[0])].copy_(source.rows[int(sources[0])], non_blocking=True)
            elif over_link and self._engine is not None and source.slot_bytes >= ENGINE_BYTES:
                self._by_engine(self._engine, batch, stream)
            elif self._kernels is not None:
                self._by_kernel(self._kernels, batch, stream)
            elif source.on_gpu and destination.on_gpu:
                self._by_gather(batch, stream)
            elif over_link:
                for first, into, count in neighbours(sources, destinations):
                    destination.rows[into : into + count].copy_(source.rows[first : first + count], non_blocking=True)
            else:
                self._by_way_of_gpu(batch)

    def _by_kernel(self, kernels: ModuleType, batch: SlotBatch, stream: torch.cuda.Stream) -> None:
        source, destination = batch.source, batch.destination
        options = {} if source.on_gpu and destination.on_gpu else {"max_programs": kernels.LINK_PROGRAMS}
        unit = access(source.slot_bytes)[1]
        slot_elements = source.slot_bytes // source.elements.element_size()
        for *slots, count in self._on_gpu(batch, MAX_SLOTS, stream):
            kernels.launch(source.elements, destination.elements, *slots, count, slot_elements, unit, **options)

    def _by_gather(self, batch: SlotBatch, stream: torch.cuda.Stream) -> None:
        size = min(MAX_SLOTS, max(1, _GATHER_BYTES // batch.source.slot_bytes))
        for reading, writing, count in self._on_gpu(batch, size, stream):
            rows = batch.source.rows.index_select(0, reading[:count])
            batch.destination.rows.index_copy_(0, writing[:count].long(), rows)

    def _on_gpu(
        self, batch: SlotBatch, size: int, stream: torch.cuda.Stream
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """The slots of a batch on the GPU, so many moves at a time: (sources, destinations, how many of their entries).
        Good for what is queued before the next.
        """
        for sources, destinations in pieces(batch.sources, batch.destinations, size):
            line = self._lines.take()
            yield *line.send(sources, destinations), sources.size
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
