"""Memory without bytes: counts what would be moved, and when the move would be done."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import product
from typing import Any

from ssmcache.config import CacheTierConfig, DiskCacheTierConfig
from ssmcache.memory.bandwidths import DEFAULT_BANDWIDTHS, BandwidthProfile
from ssmcache.memory.base import GPU_TIER, SlotMoves, check_any_stream


@dataclass(frozen=True, slots=True)
class CopiedSlots:
    """How many slots were copied from one tier to another, and the bytes of them."""

    num_slots: int
    num_bytes: int


@dataclass(slots=True)
class _Channel:
    """Carries one copy at a time."""

    bytes_per_second: float
    free_at_s: float = 0.0


@dataclass(slots=True)
class _Direction:
    channel: _Channel
    num_slots: int = 0
    num_bytes: int = 0


def _channel_name(source: CacheTierConfig, destination: CacheTierConfig) -> str:
    # what goes to the disk shares its channel wherever it comes from, and likewise what comes from it
    if isinstance(destination, DiskCacheTierConfig):
        return "to disk"
    if isinstance(source, DiskCacheTierConfig):
        return "from disk"
    return f"{type(source).__name__} to {type(destination).__name__}"


class SimulatedMemory:
    """Counts the slots and bytes copied in each direction; copies take virtual time, in seconds.

    A copy begins when all that was queued on its stream is done and its channel is free, and keeps the channel to its
    end. There is a channel within the GPU, one within the host, one each way between them, one to the disk and one from
    it; a copy within the disk counts as one to it. An event is the virtual time at which it happens, so `record` tells
    how far a stream is.

    There is always enough of it, and the pools of the GPU may be unlimited. The slots of a batch are not looked at: a
    memory with bytes checks them.

    Args:
        grains: by tier, what the size of a pool is rounded up to, in bytes; 1 for tiers beyond its end. Those of a
            memory with bytes give pools of as many slots as there.
    """

    def __init__(self, bandwidths: BandwidthProfile = DEFAULT_BANDWIDTHS, grains: Sequence[int] = ()) -> None:
        self._bandwidths = bandwidths
        self._grains = tuple(grains)
        self._is_open = False
        self._slot_bytes: tuple[int, ...] = ()
        self._directions: list[list[_Direction]] = []
        self._num_slots: list[tuple[int | None, ...]] = []
        self._stream_time_s: dict[Any, float] = {}

    def open(self, tiers: Sequence[CacheTierConfig], slot_bytes: Sequence[int]) -> None:
        if self._directions:
            raise RuntimeError("open: expected a memory that was never opened, got one that was")
        channels: dict[str, _Channel] = {}

        def direction(source: CacheTierConfig, destination: CacheTierConfig) -> _Direction:
            channel = _Channel(self._bandwidths.between(source, destination))
            return _Direction(channels.setdefault(_channel_name(source, destination), channel))

        self._slot_bytes = tuple(slot_bytes)
        self._directions = [[direction(source, destination) for destination in tiers] for source in tiers]
        self._num_slots = [(0,) * len(slot_bytes) for _ in tiers]
        self._is_open = True

    def grain(self, tier: int) -> int:
        return self._grains[tier] if tier < len(self._grains) else 1

    def resize(self, tier: int, num_slots: Sequence[int | None]) -> bool:
        self._require_open("resize")
        if tier != GPU_TIER and None in num_slots:
            raise ValueError(f"slots of tier {tier}: expected a number, got None: only the GPU can be unlimited")
        self._num_slots[tier] = tuple(num_slots)
        return True

    def check_stream(self, call: str, stream: Any) -> None:
        check_any_stream(call, stream)

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        # once a request in a replay: no calls, no arrays
        if not self._is_open:
            self._require_open("copy")
        count = len(moves.sources)
        if count != len(moves.destinations):
            raise AssertionError(f"a batch of {count} sources and {len(moves.destinations)} destinations")
        if count == 0:
            return
        num_bytes = count * self._slot_bytes[moves.pool]
        direction = self._directions[moves.source_tier][moves.destination_tier]
        direction.num_slots += count
        direction.num_bytes += num_bytes
        channel = direction.channel
        times = self._stream_time_s
        start_s = times.get(stream, 0.0)
        if channel.free_at_s > start_s:
            start_s = channel.free_at_s
        times[stream] = channel.free_at_s = start_s + num_bytes / channel.bytes_per_second

    def record(self, stream: Any) -> float:
        return self._stream_time_s.get(stream, 0.0)

    def wait(self, stream: Any, event: float) -> None:
        if event > self._stream_time_s.get(stream, 0.0):
            self._stream_time_s[stream] = event

    def view(self, pool: int) -> None:
        self._require_open("view")

    def copied(self, source_tier: int, destination_tier: int) -> CopiedSlots:
        """What was copied from a tier to a tier so far, also after `close`."""
        direction = self._directions[source_tier][destination_tier]
        return CopiedSlots(direction.num_slots, direction.num_bytes)

    @property
    def num_copied_slots(self) -> int:
        """Of all directions together."""
        return sum(self.copied(*pair).num_slots for pair in product(range(len(self._directions)), repeat=2))

    @property
    def num_copied_bytes(self) -> int:
        """Of all directions together."""
        return sum(self.copied(*pair).num_bytes for pair in product(range(len(self._directions)), repeat=2))

    def loads(self) -> Sequence[Future[Any]]:
        return ()

    @property
    def bytes_in_use(self) -> int:
        return sum(
            count * slot_bytes
            for counts in self._num_slots
            for count, slot_bytes in zip(counts, self._slot_bytes, strict=True)
            if count is not None
        )

    def close(self) -> None:
        self._is_open = False
        self._num_slots = []

    def _require_open(self, call: str) -> None:
        if not self._is_open:
            raise RuntimeError(f"{call}: expected an open memory, got one that is not open")
