"""A memory that knows which accesses of a slot are ordered by streams and events, and refuses those that are not.

Every stream has a vector clock, as threads have in a race detector: what is queued on a stream comes after everything
that was queued there before, and after everything that an event it waited for stands for. A read must come after the
last write, a write after the last write and all reads since.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

from payload import Request, Runner, Shape

from ssmcache.memory.base import GPU_TIER, SlotMoves
from ssmcache.memory.host import HostMemory

Clock = dict[Hashable, int]
Place = tuple[int, int, int]  # tier, layer group, slot


class OrderedMemory(HostMemory):
    """Copies happen at once, but count as accesses of their stream."""

    def __init__(self) -> None:
        super().__init__()
        self._clocks: defaultdict[Hashable, Clock] = defaultdict(dict)
        self._written: dict[Place, tuple[Hashable, int]] = {}
        self._read: defaultdict[Place, Clock] = defaultdict(dict)
        self.num_checked = 0

    def access(self, stream: Hashable, places: Iterable[Place], writes: bool) -> None:
        """Errors: AssertionError for an access that is not ordered after others."""
        clock = self._clocks[stream]
        now = clock[stream] = clock.get(stream, 0) + 1
        for place in places:
            others = dict([self._written[place]] if place in self._written else [])
            if writes:
                for reader, time in self._read.pop(place, {}).items():
                    others[reader] = max(time, others.get(reader, 0))
            for other, time in others.items():
                self.num_checked += 1
                what = "writes" if writes else "reads"
                assert clock.get(other, 0) >= time, f"stream {stream} {what} {place} and has not waited for {other}"
            if writes:
                self._written[place] = (stream, now)
            else:
                self._read[place][stream] = now

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        group, source_tier, sources, tier, slots = moves
        self.access(stream, [(source_tier, group, int(slot)) for slot in sources], writes=False)
        self.access(stream, [(tier, group, int(slot)) for slot in slots], writes=True)
        super().copy(moves, stream)

    def record(self, stream: Any) -> Any:
        return dict(self._clocks[stream])

    def wait(self, stream: Any, event: Any) -> None:
        clock = self._clocks[stream]
        for other, time in event.items():
            clock[other] = max(time, clock.get(other, 0))


class OrderedRunner(Runner):
    """Sequences compute on streams of their own choice: request i on stream i modulo their number."""

    def __init__(self, shape: Shape, path: Path, num_streams: int, memory: OrderedMemory | None = None) -> None:
        self.memory = memory or OrderedMemory()
        super().__init__(shape, str(path), self.memory)
        self._num_streams = num_streams
        self._numbers = count()
        self._stream_of: dict[Request, int] = {}

    def stream_of(self, request: Request) -> int:
        if request not in self._stream_of:
            self._stream_of[request] = next(self._numbers) % self._num_streams
        return self._stream_of[request]

    def _access(self, request: Request, group: int, slots: Iterable[int], writes: bool) -> None:
        places = [(GPU_TIER, group, int(slot)) for slot in slots if slot >= 0]
        self.memory.access(self.stream_of(request), places, writes)

    def check_pages(self, request: Request, end: int) -> None:
        num_blocks = -(-end // self.shape.block)
        for group in {group for group, _, _ in self.layers()}:
            self._access(request, group, request.kv.page_indices(group)[:num_blocks], writes=False)
        super().check_pages(request, end)

    def write_pages(self, request: Request, start: int, end: int) -> None:
        blocks = slice(start // self.shape.block, -(-end // self.shape.block))
        if start < end:
            for group in {group for group, _, _ in self.layers()}:
                self._access(request, group, request.kv.page_indices(group)[blocks], writes=True)
        super().write_pages(request, start, end)

    def check_state(self, request: Request, end: int) -> None:
        if self.shape.ssm and end:
            group = self.manager.state_group
            self._access(request, group, [request.kv.ssm_slot(group)], writes=False)
        super().check_state(request, end)

    def write_state(self, request: Request, slot: int, end: int) -> None:
        self._access(request, self.manager.state_group, [slot], writes=True)
        super().write_state(request, slot, end)
