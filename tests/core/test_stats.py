"""Counts: transfers are what the memory saw, usage is what lies there, and what goes is counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from payload import BYTES, Request, Runner, Shape, run_at_random

from ssmcache import SimulatedMemory
from ssmcache.events import EventKind
from ssmcache.memory.base import SlotMoves

SLOT = 2 * BYTES
SHAPES = {
    "full, 1 tier": Shape(slots=(10,)),
    "full, 3 tiers": Shape(slots=(6, 5, 7)),
    "hybrid, 1 tier": Shape(ssm=True, slots=(9,)),
    "hybrid, 2 tiers": Shape(ssm=True, slots=(7, 6)),
    "hybrid, 3 tiers": Shape(ssm=True, slots=(6, 4, 6)),
    "SSM alone, 2 tiers": Shape(ssm=True, full=False, slots=(4, 5)),
    "windows, 2 tiers": Shape(windows=((4, 2), (7, 0)), slots=(10, 8)),
    "a window alone, 2 tiers": Shape(full=False, windows=((4, 2),), slots=(9, 8)),
    "window and SSM, 3 tiers": Shape(windows=((5, 3),), ssm=True, slots=(8, 4, 5)),
    "all in one pool, 3 tiers": Shape(windows=((4, 2),), ssm=True, slots=(8, 4, 5), shared=True),
}


class Counting(SimulatedMemory):
    """Counts slots by layer group, source and destination tier."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: Counter[tuple[int, int, int]] = Counter()

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        self.slots[moves.pool, moves.source_tier, moves.destination_tier] += len(moves.sources)
        super().copy(moves, stream)


class Blind(Runner):
    """Makes the calls of a runner on a memory without bytes."""

    def check_pages(self, request: Request, end: int) -> None: ...
    def check_state(self, request: Request, end: int) -> None: ...
    def write_pages(self, request: Request, start: int, end: int) -> None: ...
    def write_state(self, request: Request, slot: int, end: int) -> None: ...


def check_transfers(runner: Runner, memory: Counting) -> None:
    manager, stats = runner.manager, runner.manager.stats()
    names, num_tiers = manager.tier_names, len(manager.tier_names)
    told = {(t.layer_group, names.index(t.source_tier), names.index(t.tier)): t for t in stats.transfers}
    by_pool: Counter[tuple[int, int, int]] = Counter()
    for (group, *ends), transfer in told.items():
        by_pool[manager.groups[group].pool, *ends] += transfer.num_slots
    assert by_pool == {key: count for key, count in memory.slots.items() if count}
    for source in range(num_tiers):
        for target in range(num_tiers):
            there = [t for (_, *ends), t in told.items() if ends == [source, target]]
            seen = memory.copied(source, target)
            assert sum(transfer.num_bytes for transfer in there) == seen.num_bytes
            assert sum(transfer.num_slots for transfer in there) == seen.num_slots
            for transfer in there:
                size = runner.manager.groups[transfer.layer_group].slot_bytes
                assert transfer.num_bytes == transfer.num_slots * size
    assert len(stats.usable_tokens_by_tier) == num_tiers
    assert sum(stats.usable_tokens_by_tier) == stats.usable_tokens
    assert stats.usable_tokens <= stats.attention_tokens <= stats.tree_tokens <= stats.lookup_tokens


def check_usage(runner: Runner) -> None:
    """Against a walk over everything that owns a slot."""
    manager = runner.manager
    cached: Counter[tuple[int, int]] = Counter()
    private: Counter[int] = Counter()
    for run in manager.store.all_runs():
        if run.pages is not None:
            cached[manager.page_group, run.pages.tier] += len(run.pages.slots)
        for item in run.items:
            cached[item.store.layer_group, item.tier] += len(item.slots)
    for kv in manager.open_sequences:
        private[manager.page_group] += len(kv.own_pages)
        if kv.states is not None:
            private[manager.state_group] += len(kv.states.slots())
        for window in kv.windows:
            private[window.store.layer_group] += len(window.own)
        for segment in [] if kv.parked is None else kv.parked.contents():
            group = segment.store.layer_group if hasattr(segment, "store") else manager.page_group
            cached[group, segment.tier] += len(segment.slots)
    usage = manager.memory_usage()
    assert len(usage.tiers) == len(manager.tier_names)
    for tier, groups in enumerate(usage.tiers):
        assert [group.layer_group for group in groups] == list(range(len(manager.groups)))
        for group, layer_group in zip(groups, manager.groups, strict=True):
            index = group.layer_group
            assert (group.tier, group.kind) == (manager.tier_names[tier], layer_group.kind.value)
            assert group.cached_slots == cached[index, tier]
            assert group.used_slots == cached[index, tier] + (private[index] if tier == 0 else 0)
            assert group.num_slots == manager.pools[index][tier].capacity
            assert group.used_slots <= group.peak_slots <= group.num_slots
            assert group.slot_bytes == layer_group.slot_bytes
    assert usage.used_bytes == sum(group.used_slots * group.slot_bytes for group in usage.groups)


def resize_at_random(runner: Runner, random: Random) -> None:
    manager = runner.manager
    if not manager.num_active and random.random() < 0.3:
        tier = random.randrange(len(manager.quotas))
        quota = sum(group.slot_bytes for group in manager.groups) * random.randint(1, runner.shape.slots[tier] + 3)
        _ = manager.adjust() if random.random() < 0.5 else manager.resize_tier(tier, quota)


def after_each_check(runner: Runner, call: Callable[[], None]) -> None:
    """Do something more whenever the invariants are checked, which is after each call."""
    check = runner.manager.check

    def check_and_call() -> None:
        check()
        call()

    runner.manager.check = check_and_call  # type: ignore[method-assign]


def run_and_count(shape: Shape, path: str, random: Random) -> Counter[tuple[int, int, int]]:
    memory = Counting()
    runner = Blind(shape, path, memory=memory)

    def compare() -> None:
        check_transfers(runner, memory)
        check_usage(runner)
        resize_at_random(runner, random)

    after_each_check(runner, compare)
    run_at_random(runner, random, 120)
    return memory.slots


@pytest.mark.parametrize("name", SHAPES)
def test_transfers_are_what_the_memory_saw_and_usage_is_what_lies_there(name: str, tmp_path: Path) -> None:
    seen = {key for seed in range(16) for key in run_and_count(SHAPES[name], str(tmp_path), Random(seed))}
    directions = {key[1:] for key in seen}
    num_tiers = len(SHAPES[name].slots)
    assert directions >= {(tier, tier + 1) for tier in range(num_tiers - 1)}
    assert directions >= {(tier, 0) for tier in range(1, num_tiers)}


def run_and_compare_evictions(shape: Shape, path: str, random: Random) -> Counter[str]:
    """Slots removed from the cache by kind of layer group, compared with the counts all the time."""
    runner = Blind(shape, path, memory=SimulatedMemory(), event_buffer_size=10**6)
    manager = runner.manager
    removed: Counter[str] = Counter()
    taken_over: list[int] = []  # a snapshot that became a live state has not gone
    if manager.store.snapshots is not None:
        take_over = manager.store.snapshots.take_over

        def counted(*args: Any) -> None:
            taken_over.append(args[2])
            take_over(*args)

        manager.store.snapshots.take_over = counted  # type: ignore[method-assign]

    def compare() -> None:
        for event in manager.take_events():
            if event.kind is EventKind.REMOVED:
                removed[manager.groups[event.layer_group].kind.value] += len(event.digests)
        stats = manager.stats()
        if manager.store.roots or manager.open_sequences:  # clearing at the end is no eviction
            assert stats.pages_evicted == removed["attention"]
            assert stats.window_pages_evicted == removed["window"]
            assert stats.snapshots_evicted == removed["ssm"] - len(taken_over)

    after_each_check(runner, compare)
    run_at_random(runner, random, 150)
    return removed


@pytest.mark.parametrize("name", SHAPES)
def test_what_the_last_tier_loses_for_want_of_room_is_counted_slot_by_slot(name: str, tmp_path: Path) -> None:
    shape = replace(SHAPES[name], partly=False)  # partial blocks have no events
    total: Counter[str] = Counter()
    for seed in range(10):
        total += run_and_compare_evictions(shape, str(tmp_path), Random(seed))
    kinds = {"attention": shape.full, "window": bool(shape.windows), "ssm": shape.ssm}
    assert set(total) == {kind for kind, is_there in kinds.items() if is_there}


def test_clearing_is_no_eviction() -> None:
    runner = Blind(Shape(windows=((4, 2),), ssm=True, slots=(20,)), memory=SimulatedMemory())
    request = runner.create([1] * 9)
    assert runner.resume(request)
    assert runner.compute(request, 8, True)
    runner.close(request)
    before = runner.manager.stats()
    runner.manager.clear_reusable_blocks()
    assert runner.manager.stats() == before
    assert before.snapshots_taken == 2


def test_a_moved_snapshot_is_still_known_as_used_or_unused() -> None:
    for reused in (False, True):
        runner = Runner(Shape(block=1, ssm=True, interval=1, slots=(12,)))
        manager = runner.manager
        for n in range(5):  # the last one lies in the last slot
            request = runner.create([n] * 2)
            assert runner.resume(request)
            assert runner.compute(request, 1, False)
            runner.close(request)
        if reused:
            request = runner.create([4, 4])
            assert runner.resume(request)
            runner.close(request)
        slots = {slot for run in manager.store.all_runs() for item in run.items for slot in item.slots}
        assert manager.resize_tier(0, 2 * sum(group.slot_bytes for group in manager.groups))
        manager.check()
        left = {slot for run in manager.store.all_runs() for item in run.items for slot in item.slots}
        assert left <= {0, 1}
        assert max(slots) > 1
        before = manager.stats()
        assert before.snapshots_evicted == before.snapshots_evicted_unused == 3
        other = runner.create([9] * 2)
        assert runner.resume(other)
        assert runner.compute(other, 2, True)
        runner.close(other)
        stats = manager.stats()
        assert stats.snapshots_evicted == 5
        assert stats.snapshots_evicted_unused == 5 - reused
        runner.finish()
