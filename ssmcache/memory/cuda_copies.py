"""Which way a batch of slots is copied between the GPU and pinned host memory, and within each."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ssmcache.memory.batches import SlotArray
from ssmcache.memory.cuda_engine import copy_engine
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

    def copy(
        self,
        source: SlotPool,
        sources: SlotArray,
        destination: SlotPool,
        destinations: SlotArray,
        stream: torch.cuda.Stream,
    ) -> None:
        """Queue a batch on a stream of the device. Slots are [n], n > 0, and follow the rules of `SlotMoves`."""
        with nullcontext() if torch.cuda.current_stream() == stream else torch.cuda.stream(stream):
            over_link = source.on_gpu != destination.on_gpu
            if sources.size == 1 and (source.on_gpu or destination.on_gpu):
                destination.rows[int(destinations[0])].copy_(source.rows[int(sources[0])], non_blocking=True)
            elif over_link and self._engine is not None and source.slot_bytes >= ENGINE_BYTES:
                self._by_engine(source, sources, destination, destinations, stream)
            elif self._kernels is not None:
                max_programs = (
                    {} if source.on_gpu and destination.on_gpu else {"max_programs": self._kernels.LINK_PROGRAMS}
                )
                self._by_kernel(source, sources, destination, destinations, stream, max_programs)
            elif source.on_gpu and destination.on_gpu:
                self._by_gather(source, sources, destination, destinations, stream)
            elif over_link:
                for first, into, count in neighbours(sources, destinations):
                    destination.rows[into : into + count].copy_(source.rows[first : first + count], non_blocking=True)
            else:
                self._by_way_of_gpu(source, sources, destination, destinations)

    def _by_kernel(
        self,
        source: SlotPool,
        sources: SlotArray,
        destination: SlotPool,
        destinations: SlotArray,
        stream: torch.cuda.Stream,
        options: dict[str, int],
    ) -> None:
        assert self._kernels is not None
        unit = access(source.slot_bytes)[1]
        slot_elements = source.slot_bytes // source.elements.element_size()
        for some_sources, some_destinations in pieces(sources, destinations, MAX_SLOTS):
            line = self._lines.take()
            slots = line.send(some_sources, some_destinations)
            self._kernels.launch(
                source.elements, destination.elements, *slots, some_sources.size, slot_elements, unit, **options
            )
            self._lines.give(line, stream)

    def _by_engine(
        self,
        source: SlotPool,
        sources: SlotArray,
        destination: SlotPool,
        destinations: SlotArray,
        stream: torch.cuda.Stream,
    ) -> None:
        assert self._engine is not None
        num_bytes = source.slot_bytes
        reading = sources.astype(np.uint64) * np.uint64(num_bytes) + np.uint64(source.rows.data_ptr())
        writing = destinations.astype(np.uint64) * np.uint64(num_bytes) + np.uint64(destination.rows.data_ptr())
        self._engine.copy(reading, writing, num_bytes, stream)

    def _by_gather(
        self,
        source: SlotPool,
        sources: SlotArray,
        destination: SlotPool,
        destinations: SlotArray,
        stream: torch.cuda.Stream,
    ) -> None:
        size = min(MAX_SLOTS, max(1, _GATHER_BYTES // source.slot_bytes))
        for some_sources, some_destinations in pieces(sources, destinations, size):
            line = self._lines.take()
            reading, writing = line.send(some_sources, some_destinations)
            count = some_sources.size
            rows = source.rows.index_select(0, reading[:count])
            destination.rows.index_copy_(0, writing[:count].long(), rows)
            self._lines.give(line, stream)

    def _by_way_of_gpu(
        self, source: SlotPool, sources: SlotArray, destination: SlotPool, destinations: SlotArray
    ) -> None:
        """Between two places on the host. A copy of torch between them would not wait for the stream."""
        row = torch.empty(source.slot_bytes, dtype=torch.uint8, device=self._device)
        for slot, into in zip(sources.tolist(), destinations.tolist(), strict=True):
            row.copy_(source.rows[slot], non_blocking=True)
            destination.rows[into].copy_(row, non_blocking=True)
