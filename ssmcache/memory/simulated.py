"""Memory without bytes: counts what would be moved, and when the move would be done."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# A device copy on one H100 moves 2.7 TB/s, bytes read plus bytes written (docs/measurements.md): 1.35 TB/s of payload.
DEFAULT_COPY_BYTES_PER_SECOND = 1.35e12


@dataclass(slots=True)
class _SimulatedPool:
    slot_bytes: int
    num_slots: int | None


class SimulatedMemory:
    """Counts bytes; copies complete at a virtual time, in seconds, one after the other on each stream.

    Args:
        copy_bytes_per_second: payload that a copy within the GPU moves in a second.
    """

    def __init__(self, copy_bytes_per_second: float = DEFAULT_COPY_BYTES_PER_SECOND) -> None:
        if not copy_bytes_per_second > 0:
            raise ValueError(f"copy_bytes_per_second: expected a positive number, got {copy_bytes_per_second!r}")
        self._bytes_per_second = copy_bytes_per_second
        self._pools: dict[int, _SimulatedPool] = {}
        self._stream_time_s: dict[Any, float] = {}
        self.num_copied_slots = 0
        self.num_copied_bytes = 0

    def reserve(self, layer_group: int, slot_bytes: int, num_slots: int | None) -> None:
        self._pools[layer_group] = _SimulatedPool(slot_bytes, num_slots)

    def copy(self, layer_group: int, sources: Sequence[int], destinations: Sequence[int], stream: Any) -> float:
        """Queue a batch of copies on `stream`; the event is the virtual time of its end, in seconds."""
        count = len(sources)
        num_bytes = count * self._pools[layer_group].slot_bytes
        self.num_copied_slots += count
        self.num_copied_bytes += num_bytes
        times = self._stream_time_s
        times[stream] = end = times.get(stream, 0.0) + num_bytes / self._bytes_per_second
        return end

    def wait(self, stream: Any, event: float) -> None:
        if event > self._stream_time_s.get(stream, 0.0):
            self._stream_time_s[stream] = event

    @property
    def bytes_in_use(self) -> int:
        return sum(pool.slot_bytes * pool.num_slots for pool in self._pools.values() if pool.num_slots is not None)

    def close(self) -> None:
        self._pools.clear()
