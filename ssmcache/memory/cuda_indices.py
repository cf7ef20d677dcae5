"""The way of slot numbers to the GPU, without a wait of the caller."""

from collections import deque

import numpy as np
import torch

from ssmcache.memory.batches import SlotArray
from ssmcache.memory.cuda_calls import DriverCalls

MAX_SLOTS = 8192
"""Moves that one line takes."""

NUMBER_BYTES = 4
_LINES = 32
_ALIGNMENT = 4  # in numbers: 16 bytes, so that both arrays are aligned alike in every batch


class IndexLine:
    """Room for the sources and destinations of one batch, on the host and on the GPU."""

    __slots__ = ("_array", "_device", "_host", "_host_address", "address", "event")

    def __init__(self, host: torch.Tensor, device: torch.Tensor) -> None:
        self._host = host
        self._array = host.numpy()
        self._device = device
        self._host_address, self.address = host.data_ptr(), device.data_ptr()
        self.event = torch.cuda.Event()

    def fill(self, sources: SlotArray, destinations: SlotArray) -> tuple[int, int]:
        """Write slots, [n] each, on the host. Returns where the second ones begin, and how many numbers there are."""
        count = sources.size
        second = -(-count // _ALIGNMENT) * _ALIGNMENT
        total = second + count
        self._array[:count] = sources
        self._array[second:total] = destinations
        return second, total

    def send(self, total: int) -> torch.Tensor:
        """Queue so many numbers on the current stream. Returns them on the GPU, int32; good until the line is given
        back.
        """
        self._device[:total].copy_(self._host[:total], non_blocking=True)
        return self._device

    def send_by(self, calls: DriverCalls, total: int, stream: torch.cuda.Stream) -> None:
        """`send`, to `address`, by the driver."""
        calls.copy(self._host_address, self.address, NUMBER_BYTES * total, stream)


class IndexLines:
    """Lines that are used again once the kernels that read them are done; as many as there are batches under way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: deque[IndexLine] = deque()
        self._in_flight: deque[IndexLine] = deque()

    def take(self) -> IndexLine:
        """A line that nothing reads. Never waits: if all are in use there will be more."""
        if not self._free:
            self._collect()
        if not self._free:
            self._grow()
        return self._free.popleft()

    def give(self, line: IndexLine, stream: torch.cuda.Stream) -> None:
        """Give a line back whose readers are queued on `stream`."""
        line.event.record(stream)
        self._in_flight.append(line)

    def _collect(self) -> None:
        still: deque[IndexLine] = deque()
        for line in self._in_flight:
            (self._free if line.event.query() else still).append(line)
        self._in_flight = still

    def _grow(self) -> None:
        shape = (_LINES, 2 * MAX_SLOTS)
        host = torch.empty(shape, dtype=torch.int32, pin_memory=True)
        device = torch.empty(shape, dtype=torch.int32, device=self._device)
        self._free.extend(IndexLine(host[index], device[index]) for index in range(_LINES))


def pieces(sources: SlotArray, destinations: SlotArray, size: int) -> list[tuple[SlotArray, SlotArray]]:
    """A batch in pieces of so many moves."""
    if sources.size <= size:
        return [(sources, destinations)]
    starts = range(0, sources.size, size)
    return [(sources[start : start + size], destinations[start : start + size]) for start in starts]


def neighbours(sources: SlotArray, destinations: SlotArray) -> list[tuple[int, int, int]]:
    """(first source, first destination, count) of the stretches of a batch that are one copy each."""
    breaks = np.flatnonzero((np.diff(sources) != 1) | (np.diff(destinations) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    counts = np.diff(np.append(starts, sources.size))
    return list(zip(sources[starts].tolist(), destinations[starts].tolist(), counts.tolist(), strict=True))
