"""A memory that knows which accesses of a slot are ordered by streams and events, and refuses those that are not; and
the same for waits that nothing needs.

Every stream has a vector clock, as threads have in a race detector: what is queued on a stream comes after everything
that was queued there before, and after everything that an event it waited for stands for. A read must come after the
last write, a write after the last write and all reads since.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from payload import Request, Runner, Shape

from ssmcache import KVCacheManager, KVCacheStatus
from ssmcache.memory.base import GPU_TIER, SlotMoves
from ssmcache.memory.host import HostMemory

Clock = dict[Hashable, int]
Place = tuple[int, int, int]  # tier, layer group, slot


def join(clock: Clock, other: Mapping[Hashable, int]) -> None:
    for stream, time in other.items():
        clock[stream] = max(time, clock.get(stream, 0))


def covers(clock: Mapping[Hashable, int], other: Mapping[Hashable, int]) -> bool:
    return all(clock.get(stream, 0) >= time for stream, time in other.items())


class OrderedMemory(HostMemory):
    """Copies happen at once, but count as accesses of their stream."""

    def __init__(self) -> None:
        super().__init__()
        self.clocks: defaultdict[Hashable, Clock] = defaultdict(dict)
        self._written: dict[Place, tuple[Hashable, int]] = {}
        self._read: defaultdict[Place, Clock] = defaultdict(dict)
        self._waits: dict[Hashable, tuple[Clock, list[Clock]]] = {}  # since the last access: clock before, and events
        self.num_checked = self.num_waits = self.num_events = 0

    def access(self, stream: Hashable, places: Iterable[Place], writes: bool) -> None:
        """Errors: AssertionError for an access that is not ordered after others."""
        clock = self.clocks[stream]
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
        self.num_events += 1
        return dict(self.clocks[stream])

    def wait(self, stream: Any, event: Any) -> None:
        self.num_waits += 1
        join(self.clocks[stream], event)


class Uses(dict[Place, bool]):
    """What a sequence may use from the end of a call to the next: place -> whether it may write there."""

    @classmethod
    def of(cls, manager: KVCacheManager, kv: Any) -> Uses:
        found = cls()
        if kv.status is not KVCacheStatus.ACTIVE:
            return found
        shared = kv.num_attention_tokens // manager.tokens_per_block
        for group, layer_group in enumerate(manager.groups):
            if layer_group.kind.value == "ssm":
                for slot in [kv.ssm_slot(group), *kv.reserve_snapshots(()).values()]:
                    found[GPU_TIER, group, slot] = True
                continue
            for block, slot in enumerate(kv.page_indices(group).tolist()):
                if slot >= 0:
                    found[GPU_TIER, group, slot] = block >= shared
        return found


class ExactMemory(OrderedMemory):
    """Says when a stream comes after more than it has to. What it has to come after is found anew, by brute force:
    from the slots that each ACTIVE sequence shows after each call, and from the copies.

    A use lasts from the call that gives a slot to the one that takes it back, or offers it to others, and all that was
    queued on its stream until the end of that call may belong to it. Nothing is known of what the first stream did
    before there was a second one, but that it was over by then.
    """

    def __init__(self) -> None:
        super().__init__()
        self._needed: defaultdict[Hashable, Clock] = defaultdict(dict)
        self._write_of: dict[Place, tuple[Hashable, Clock]] = {}
        self._reads_of: defaultdict[Place, dict[Hashable, Clock]] = defaultdict(dict)
        self._ends: dict[Hashable, Clock] = {}  # by stream: the end of the call under way, filled then
        self._uses: dict[Any, tuple[Hashable, Uses]] = {}
        self._streams: set[Hashable] = set()
        self._waits: dict[Hashable, tuple[Clock, list[Clock]]] = {}  # since the last access: clock before, and events
        self.num_joined = 0

    @contextmanager
    def call(self, manager: KVCacheManager, kv: Any = None, stream: Hashable = None) -> Iterator[None]:
        """One call of a sequence, for which it names a stream or not, or of the manager."""
        old_stream, before = self._uses.pop(kv, (stream, Uses()))
        if kv is not None:
            self.access(old_stream, (), writes=False)  # for all that a manager knows something was queued meanwhile
            self._enter(stream)
        yield
        after = Uses() if kv is None else Uses.of(manager, kv)
        if after and stream != old_stream and before:  # it goes on elsewhere
            for place, writes in before.items():
                self._leave(old_stream, place, writes)
            self._end(old_stream)
            before = Uses()
        for place, writes in after.items():
            if before.get(place) is not writes and not before.get(place):
                self._take(stream, place, writes)
        for place, writes in before.items():
            if after.get(place) is not writes:
                self._leave(stream, place, writes)
        for used in list(self._ends):
            self._end(used)
        if after:
            self._uses[kv] = stream, after
        for other, clock in self.clocks.items():
            now = self._now(other)
            if clock:
                assert covers(now, clock), f"stream {other} comes after {clock}, where {now} would do"
                assert covers(clock, now), f"stream {other} comes after {clock}, and not after {now}"

    def _now(self, stream: Hashable) -> Clock:
        own = self.clocks[stream].get(stream, 0)
        return {**self._needed[stream], stream: own} if own else dict(self._needed[stream])

    def _enter(self, stream: Hashable) -> None:
        if len(self._streams) == 1 and stream not in self._streams:
            (first,) = self._streams
            places = {*self._write_of, *self._reads_of, *(place for _, uses in self._uses.values() for place in uses)}
            for place in places:
                self._write_of[place] = first, self._now(first)
            self._reads_of.clear()
        self._streams.add(stream)

    def _take(self, stream: Hashable, place: Place, writes: bool) -> None:
        events = [self._write_of[place]] if place in self._write_of else []
        if writes:
            events += self._reads_of[place].items()
        for other, event in events:
            if other != stream:
                self.num_joined += not covers(self._needed[stream], event)
                join(self._needed[stream], event)
                self._needed[stream].pop(stream, None)

    def _leave(self, stream: Hashable, place: Place, writes: bool) -> None:
        end = self._ends.setdefault(stream, {})
        if writes:
            self._write_of[place] = stream, end
            self._reads_of.pop(place, None)
        else:
            self._reads_of[place][stream] = end

    def _end(self, stream: Hashable) -> None:
        self._ends.pop(stream, {}).update(self._now(stream))

    def access(self, stream: Hashable, places: Iterable[Place], writes: bool) -> None:
        self._waits.pop(stream, None)
        super().access(stream, places, writes)

    def wait(self, stream: Any, event: Any) -> None:
        """Errors: AssertionError for an event that the stream comes after anyway, by the others that it waits for."""
        before, events = self._waits.setdefault(stream, (dict(self.clocks[stream]), []))
        events.append(event)
        for index, one in enumerate(events):
            known = dict(before)
            for other in events[:index] + events[index + 1 :]:
                join(known, other)
            assert not covers(known, one), f"stream {stream} waits for {one} though it comes after it anyway"
        super().wait(stream, event)

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        group, source_tier, sources, tier, slots = moves
        for slot in sources:
            self._take(stream, (source_tier, group, int(slot)), False)
            self._leave(stream, (source_tier, group, int(slot)), False)
        for slot in slots:
            self._take(stream, (tier, group, int(slot)), True)
            self._leave(stream, (tier, group, int(slot)), True)
        super().copy(moves, stream)


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

    def change_sizes(self, tier: int, quota: int | None) -> bool:
        """`resize_tier`, or `adjust` if there is no quota."""
        return self.manager.adjust() if quota is None else self.manager.resize_tier(tier, quota)


class WatchedSequence:
    """A sequence whose calls are told to an `ExactMemory`."""

    def __init__(self, runner: ExactRunner, kv: Any) -> None:
        self._runner, self._kv = runner, kv

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kv, name)
        if name not in {
            "resume",
            "resize",
            "reserve_snapshots",
            "commit",
            "suspend",
            "prefetch",
            "set_stream",
            "close",
        }:
            return found

        def watched(*args: Any) -> Any:
            stream = args[0] if name in {"resume", "set_stream"} else self._kv.stream
            with self._runner.memory.call(self._runner.manager, self._kv, stream):
                return found(*args)

        return watched


class ExactRunner(OrderedRunner):
    """Sequences compute on streams at random, and change them; every wait has to be needed."""

    memory: ExactMemory

    def __init__(self, shape: Shape, path: Path, num_streams: int, random: Random) -> None:
        super().__init__(shape, path, num_streams, ExactMemory())
        self._random = random
        for stream in range(num_streams if num_streams > 5 else 0):  # of so many, new ones may wait for more
            request = self.create([1, 2])
            request.kv.resume(stream)
            self.close(request)

    def stream_of(self, request: Request) -> int:
        if request.kv.status is KVCacheStatus.ACTIVE:
            return request.kv.stream
        return self._random.randrange(self._num_streams)

    def create(self, *args: Any, **options: Any) -> Request:
        request = super().create(*args, **options)
        request.kv = WatchedSequence(self, request.kv)
        return request

    def compute(self, request: Request, end: int, reserve: bool) -> bool:
        choice = self._random.random()
        if choice < 0.2:
            request.kv.set_stream(self._random.randrange(self._num_streams))
            self.check_pages(request, request.computed)
            self.check_state(request, request.computed)
        elif choice < 0.4:
            request.kv.resize(request.kv.capacity + self._random.randrange(5), request.kv.history_length)
            request.kv.resize(request.kv.history_length)
        return super().compute(request, end, reserve)

    def change_sizes(self, tier: int, quota: int | None) -> bool:
        with self.memory.call(self.manager):
            return super().change_sizes(tier, quota)
