"""Several streams: whatever uses a slot is ordered after all earlier uses by others, by vector clocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from weakref import WeakSet

import pytest
from managers import make_manager
from payload import BYTES, Request, Runner, Shape, random_text

from ssmcache import KVCacheStatus, SimulatedMemory
from ssmcache.memory.base import GPU_TIER, SlotMoves
from ssmcache.streams import StreamOrder

SLOT = 2 * BYTES
SHAPES = {
    "full, 1 tier": Shape(slots=(10,)),
    "full, 2 tiers": Shape(slots=(8, 8)),
    "full, 3 tiers": Shape(slots=(6, 5, 7)),
    "hybrid, 1 tier": Shape(ssm=True, slots=(9,)),
    "hybrid, 3 tiers": Shape(ssm=True, slots=(6, 4, 6)),
    "SSM alone, 2 tiers": Shape(ssm=True, full=False, slots=(4, 5)),
    "windows, 1 tier": Shape(windows=((4, 2), (7, 0)), slots=(10,)),
    "windows, 2 tiers": Shape(windows=((4, 2), (7, 0)), slots=(10, 8)),
    "a window alone, 2 tiers": Shape(full=False, windows=((4, 2),), slots=(9, 8)),
    "window and SSM, 3 tiers": Shape(windows=((5, 3),), ssm=True, slots=(8, 4, 5)),
}


class Event(dict[Hashable, int]):
    """How far each stream had come, for all that the recording stream knew."""

    __hash__ = object.__hash__  # type: ignore[assignment]


class RaceError(AssertionError):
    """A use of a slot that is not ordered after one before it."""


class OrderedMemory(SimulatedMemory):
    """Keeps a vector clock for each stream, and for each slot its last write and the reads since."""

    def __init__(self) -> None:
        super().__init__()
        self.clocks: dict[Hashable, Event] = defaultdict(Event)
        self.written: dict[tuple[int, int, int], tuple[Hashable, int]] = {}
        self.read_since: dict[tuple[int, int, int], dict[Hashable, int]] = defaultdict(dict)
        self.num_events = self.num_waits = self.num_ordered = 0

    def record(self, stream: Any) -> Any:
        event = Event(self.clocks[stream])
        self.num_events += 1
        return event

    def wait(self, stream: Any, event: Any) -> None:
        self.num_waits += 1
        clock = self.clocks[stream]
        for other, count in event.items():
            clock[other] = max(clock.get(other, 0), count)

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        super().copy(moves, stream)
        group = moves.pool
        for slot in moves.sources:
            self.read(group, moves.source_tier, slot, stream)
        for slot in moves.destinations:
            self.write(group, moves.destination_tier, slot, stream)

    def read(self, group: int, tier: int, slot: int, stream: Hashable) -> None:
        place = group, tier, slot
        if place in self.written:  # what moves may be a page that nobody has computed yet
            self._require_after(stream, place, *self.written[place])
        self.read_since[place][stream] = self._tick(stream)

    def write(self, group: int, tier: int, slot: int, stream: Hashable) -> None:
        place = group, tier, slot
        if place in self.written:
            self._require_after(stream, place, *self.written[place])
        for other, count in self.read_since[place].items():
            self._require_after(stream, place, other, count)
        self.read_since[place].clear()
        self.written[place] = stream, self._tick(stream)

    def _tick(self, stream: Hashable) -> int:
        clock = self.clocks[stream]
        clock[stream] = clock.get(stream, 0) + 1
        return clock[stream]

    def _require_after(self, stream: Hashable, place: tuple[int, int, int], other: Hashable, count: int) -> None:
        self.num_ordered += other != stream
        if self.clocks[stream].get(other, 0) < count:
            raise RaceError(f"{place}: stream {stream} does not wait for {other}")


class StreamRunner(Runner):
    """A runner whose kernels say which slots they read and write on which stream."""

    def __init__(self, shape: Shape, path: str, streams: list[Hashable], random: Random) -> None:
        self.ordered = OrderedMemory()
        super().__init__(shape, path, memory=self.ordered)
        self.streams = streams
        self.random = random

    def slots(self, request: Request, end: int) -> list[tuple[int, int, int]]:
        """(layer group, block, slot) of all that attention sees after `end` tokens."""
        block, found = self.shape.block, []
        for index, group in enumerate(self.manager.groups):
            if group.kind.value != "ssm":
                rows = request.kv.page_indices(index)
                for b in range(-(-end // block)):
                    sinks = -(-group.num_sink_tokens // block)
                    if group.window_size is None or b < sinks or (b + 1) * block > end + 1 - group.window_size:
                        found.append((index, b, int(rows[b])))
        return found

    def check_pages(self, request: Request, end: int) -> None:
        for group, _, slot in self.slots(request, end):
            self.ordered.read(group, GPU_TIER, slot, request.kv.stream)

    def write_pages(self, request: Request, start: int, end: int) -> None:
        for group, b, slot in self.slots(request, end):
            if (b + 1) * self.shape.block > start:
                self.ordered.write(group, GPU_TIER, slot, request.kv.stream)

    def check_state(self, request: Request, end: int) -> None:
        if self.shape.ssm and end:
            slot = request.kv.ssm_slot(self.manager.state_group)
            self.ordered.read(self.manager.state_group, GPU_TIER, slot, request.kv.stream)

    def write_state(self, request: Request, slot: int, end: int) -> None:
        self.ordered.write(self.manager.state_group, GPU_TIER, slot, request.kv.stream)

    def resume(self, request: Request) -> bool:
        first = not request.kv.locked
        granted = request.kv.resume(self.random.choice(self.streams))
        if granted:
            if first:
                request.computed = request.kv.num_committed_tokens
            self.check_pages(request, request.computed)
            self.check_state(request, request.computed)
        return granted


def run_on_streams(runner: StreamRunner, random: Random, num_steps: int, prefetch: bool = True) -> None:
    """Any calls, with changes of streams and sizes among them."""
    manager, known = runner.manager, list[list[int]]()
    for _ in range(num_steps):
        active = [r for r in runner.requests if r.kv.status is KVCacheStatus.ACTIVE]
        suspended = [r for r in runner.requests if r.kv.status is KVCacheStatus.SUSPENDED]
        action = random.random()
        if action < 0.2 and len(runner.requests) < 5:
            runner.create(random_text(random, known, 12))
        elif action < 0.42 and suspended:
            runner.resume(random.choice(suspended))
        elif action < 0.7 and active:
            request = random.choice(active)
            left = len(request.tokens) - request.computed
            if left > 0:
                runner.compute(request, request.computed + random.randint(1, left), random.random() < 0.5)
        elif action < 0.74 and active:
            request = random.choice(active)
            request.kv.set_stream(random.choice(runner.streams))
            runner.check_pages(request, request.computed)
            runner.check_state(request, request.computed)
        elif action < 0.82 and active:
            runner.suspend(random.choice(active))
        elif action < 0.86 and suspended and prefetch:
            random.choice(suspended).kv.prefetch(random.randrange(len(manager.quotas)))
        elif action < 0.9 and not active:
            tier = random.randrange(len(manager.quotas))
            quota = sum(group.slot_bytes for group in manager.groups) * random.randint(1, runner.shape.slots[tier] + 3)
            _ = manager.adjust() if random.random() < 0.5 else manager.resize_tier(tier, quota)
        elif active and random.random() < 0.3:  # room in steps, and given back
            request = random.choice(active)
            request.kv.resize(request.kv.capacity + random.randrange(4), request.kv.history_length)
            request.kv.resize(request.kv.history_length)
        elif runner.requests:
            runner.close(random.choice(runner.requests))
        manager.check()
    runner.finish()


@pytest.mark.parametrize("name", SHAPES)
def test_every_use_of_a_slot_waits_for_the_uses_before_it(name: str, tmp_path: Path) -> None:
    num_ordered = 0
    for seed in range(12):
        random = Random(seed)
        streams = list("abc")[: random.randint(2, 3)]
        runner = StreamRunner(SHAPES[name], str(tmp_path), streams, random)
        run_on_streams(runner, random, 150)
        num_ordered += runner.ordered.num_ordered
    assert num_ordered > 300


@pytest.mark.parametrize("missing", ["acquire", "release", "follow", "switch", "a wait"])
def test_without_the_order_there_would_be_races(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "a wait":
        wait = OrderedMemory.wait

        def forgetful(self: OrderedMemory, stream: Any, event: Any) -> None:
            if (self.num_waits + 1) % 10:
                wait(self, stream, event)
            else:
                self.num_waits += 1

        monkeypatch.setattr(OrderedMemory, "wait", forgetful)
    else:
        monkeypatch.setattr(StreamOrder, missing, lambda self, *streams: None)
    num_races = 0
    for seed in range(20):
        shape = replace(SHAPES["window and SSM, 3 tiers"], slots=(14, 8, 9))
        runner = StreamRunner(shape, str(tmp_path), ["a", "b"], Random(seed))
        try:
            run_on_streams(runner, runner.random, 150)
        except RaceError:
            num_races += 1
    assert num_races >= 3


@pytest.mark.parametrize("stream", [None, "compute"])
@pytest.mark.parametrize("name", SHAPES)
def test_on_one_stream_nothing_is_ever_recorded(name: str, stream: Hashable, tmp_path: Path) -> None:
    for seed in range(3):
        runner = StreamRunner(SHAPES[name], str(tmp_path), [stream], Random(seed))
        run_on_streams(runner, runner.random, 150, prefetch=stream is None)  # prefetch has the default stream at first
        assert runner.ordered.num_events == runner.ordered.num_waits == 0


def test_a_sequence_goes_on_on_another_stream_after_the_work_of_the_first() -> None:
    memory = OrderedMemory()
    manager = make_manager(10, 0, block=2, memory=memory)
    kv = manager.create_kv_cache(())
    assert kv.resume("a")
    assert kv.resize(2)
    (slot,) = kv.page_indices(0)
    memory.write(0, 0, int(slot), "a")
    with pytest.raises(RaceError):
        memory.read(0, 0, int(slot), "b")
    kv.set_stream("b")
    memory.read(0, 0, int(slot), "b")
    kv.set_stream("b")
    assert memory.num_waits == 1
    kv.close()
    with pytest.raises(RuntimeError, match="set_stream: expected an ACTIVE sequence, got CLOSED"):
        kv.set_stream("a")


class CountingMemory(SimulatedMemory):
    """Knows how many of the events that it made are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: WeakSet[Event] = WeakSet()
        self.num_waits = 0

    def record(self, stream: Any) -> Any:
        event = Event()
        self.kept.add(event)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        self.num_waits += 1


def decode(kv: Any, num_tokens: int) -> None:
    for _ in range(num_tokens):
        end = kv.num_committed_tokens + 1
        assert kv.resize(end)
        kv.commit([7])


def test_no_decode_step_waits_for_the_prefill_of_another_sequence() -> None:
    memory = OrderedMemory()
    manager = make_manager(200, 100, block=2, interval=4, memory=memory)
    chatting = manager.create_kv_cache([7])
    assert chatting.resume("decode")
    long = manager.create_kv_cache([1] * 200)
    assert long.resume("prefill")
    for start in range(0, 200, 50):
        assert long.resize(start + 50)
        long.reserve_snapshots(long.snapshot_points(start + 50))
        memory.write(0, 0, int(long.page_indices(0)[-1]), "prefill")
        decode(chatting, 16)
        long.commit([1] * 50)
    assert memory.num_waits == 0
    long.close()
    chatting.close()


def test_a_reader_waits_for_the_chunk_that_it_reuses_and_not_for_later_ones() -> None:
    memory = OrderedMemory()
    manager = make_manager(200, 0, block=2, memory=memory)
    manager.create_kv_cache(()).resume("b")
    writer = manager.create_kv_cache(())
    assert writer.resume("a")
    for token in (1, 2):
        assert writer.resize(4 * token)
        for slot in writer.page_indices(0)[2 * token - 2 :]:
            memory.write(0, 0, int(slot), "a")
        writer.commit([token] * 4)
    shared = [int(slot) for slot in writer.page_indices(0)]
    reader = manager.create_kv_cache([1] * 4)
    assert reader.resume("b")
    assert [int(slot) for slot in reader.page_indices(0)] == shared[:2]
    for slot in shared[:2]:
        memory.read(0, 0, slot, "b")
    with pytest.raises(RaceError):
        memory.read(0, 0, shared[2], "b")
    assert memory.num_waits == 1


def test_readers_of_a_page_do_not_wait_for_each_other_and_who_takes_it_waits_for_all_of_them() -> None:
    memory = OrderedMemory()
    manager = make_manager(2, 0, block=2, memory=memory)
    for stream in "abcd":  # all are known from here on
        kv = manager.create_kv_cache(())
        assert kv.resume(stream)
        kv.close()
    writer = manager.create_kv_cache(())
    assert writer.resume("a")
    assert writer.resize(4)
    writer.commit([1] * 4)
    writer.close()
    for stream in "bcbc":
        kv = manager.create_kv_cache([1] * 4)
        assert kv.resume(stream)
        for slot in kv.page_indices(0):
            memory.read(0, 0, int(slot), stream)
        kv.close()
    assert memory.num_waits == 2  # b and c, for the commit
    assert "c" not in memory.clocks["b"]
    taker = manager.create_kv_cache(())
    assert taker.resume("d")
    assert memory.num_waits == 2
    assert taker.resize(2)
    assert memory.num_waits == 5  # for b, c, and a, which let go of it after its commit
    assert taker.resize(4)
    assert memory.num_waits == 5
    for slot in taker.page_indices(0):
        memory.write(0, 0, int(slot), "d")


def test_slots_that_nobody_used_are_taken_without_waiting() -> None:
    memory = OrderedMemory()
    manager = make_manager(8, 0, block=1, memory=memory)
    first = manager.create_kv_cache(())
    assert first.resume("a")
    assert first.resize(4)
    second = manager.create_kv_cache(())
    assert second.resume("b")
    assert second.resize(4)  # the other half
    assert memory.num_waits == 0
    first.resize(2)
    assert second.resize(5)
    assert memory.num_waits == 1


def test_a_copy_that_raises_is_waited_for_by_who_uses_its_slots_next() -> None:
    class Failing(OrderedMemory):
        fails = False

        def copy(self, moves: SlotMoves, stream: Any) -> None:
            super().copy(moves, stream)
            if self.fails:
                raise OSError("the device is gone")

    memory = Failing()
    manager = make_manager(0, 4, block=2, interval=2, memory=memory)
    for stream in "ab":
        assert manager.create_kv_cache(()).resume(stream)
    moves = SlotMoves(0, 0, [0], 0, [1])
    memory.fails = True
    with pytest.raises(OSError, match="gone"):
        manager.streams.copy(moves, "a")
    memory.fails = False
    manager.streams.copy(moves, "b")  # and no race


@pytest.mark.parametrize("num_states", [0, 20])
@pytest.mark.parametrize("num_streams", [3, 10_000])
def test_ten_thousand_readers_of_a_page_leave_a_handful_of_events(num_streams: int, num_states: int) -> None:
    memory = CountingMemory()
    manager = make_manager(100, num_states, block=2, interval=2, memory=memory)
    kv = manager.create_kv_cache(())
    assert kv.resume(0)
    assert kv.resize(8)
    if num_states:
        kv.reserve_snapshots([2, 4, 6, 8])
    kv.commit([1] * 8)
    kv.close()
    most = 0
    readers = []
    for reader in range(10_000):
        kv = manager.create_kv_cache([1] * 8)
        assert kv.resume(reader % num_streams)
        assert kv.num_committed_tokens == 8
        readers.append(kv)
        if len(readers) > 8:
            readers.pop(0).close()
        most = max(most, len(memory.kept))
    assert most <= 12
    assert memory.num_waits < 4 * 10_000
