"""One manager, several threads: calls one after the other, and nothing is ever half done."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from threading import Barrier, Event, Thread, current_thread
from typing import Any

import pytest
from managers import make_manager
from payload import Runner, Shape, random_text

from ssmcache import HostMemory, KVCacheStatus, SimulatedMemory
from ssmcache.memory.base import SlotMoves

SHAPES = {
    "full, 2 tiers": Shape(slots=(24, 16)),
    "hybrid, 1 tier": Shape(ssm=True, slots=(24,)),
    "window and SSM, 3 tiers": Shape(windows=((5, 3),), ssm=True, slots=(24, 8, 9)),
    "windows, 2 tiers": Shape(windows=((4, 2), (7, 0)), slots=(24, 12)),
}


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class OneAtATime(HostMemory):
    """Notices when two threads are in it at the same time."""

    busy: Thread | None = None
    num_copies = 0

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        assert self.busy is None, "two threads in one memory"
        self.busy = current_thread()
        time.sleep(0)  # let others try
        super().copy(moves, stream)
        assert self.busy is current_thread()
        self.busy = None
        self.num_copies += 1


def hammer(runner: Runner, random: Random, known: list[list[int]], num_steps: int) -> None:
    """One thread's sequences; it checks what it reads after each call."""
    for _ in range(num_steps):
        active = [r for r in runner.requests if r.kv.status is KVCacheStatus.ACTIVE]
        suspended = [r for r in runner.requests if r.kv.status is KVCacheStatus.SUSPENDED]
        action = random.random()
        if action < 0.25 and len(runner.requests) < 3:
            runner.create(random_text(random, known, 12))
        elif action < 0.45 and suspended:
            runner.resume(random.choice(suspended))
        elif action < 0.7 and active:
            request = random.choice(active)
            left = len(request.tokens) - request.computed
            if left > 0:
                runner.compute(request, request.computed + random.randint(1, left), random.random() < 0.5)
        elif action < 0.78 and active:
            runner.suspend(random.choice(active))
        elif action < 0.82 and suspended:
            random.choice(suspended).kv.prefetch(random.randrange(len(runner.manager.quotas)))
        elif action < 0.86:
            match = runner.manager.probe_reuse(random_text(random, known, 12))
            assert match.usable_tokens <= match.attention_tokens <= match.tree_tokens
        elif action < 0.9:
            stats = runner.manager.stats()
            assert sum(stats.usable_tokens_by_tier) == stats.usable_tokens
            for groups in runner.manager.memory_usage().tiers:
                assert all(group.cached_slots <= group.used_slots <= (group.num_slots or 0) for group in groups)
        elif runner.requests:
            runner.close(random.choice(runner.requests))


@pytest.mark.parametrize("name", SHAPES)
def test_threads_at_work_leave_no_error_no_leak_and_no_wrong_byte(name: str, switching: None, tmp_path: Path) -> None:
    memory = OneAtATime()
    first = Runner(SHAPES[name], str(tmp_path), memory=memory, event_buffer_size=50)
    runners = [first]
    for _ in range(3):
        runners.append(copy.copy(first))
        runners[-1].requests = []
    known: list[list[int]] = [[0, 1, 0, 1, 0, 1]]
    errors: list[BaseException] = []
    done = Event()

    def guarded(call: Any, *args: Any) -> None:
        try:
            call(*args)
        except BaseException as error:
            errors.append(error)

    def check() -> None:
        while not done.is_set():
            first.manager.check()
            ids = [event.id for event in first.manager.take_events()]
            assert ids == list(range(ids[0], ids[0] + len(ids))) if ids else True

    threads = [
        Thread(target=guarded, args=(hammer, runner, Random(seed), known, 250)) for seed, runner in enumerate(runners)
    ]
    checking = Thread(target=guarded, args=(check,))
    for thread in (*threads, checking):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    checking.join()
    if errors:
        raise errors[0]
    assert memory.num_copies > 20
    assert sum(runner.num_checked for runner in runners) > 400
    for runner in runners[1:]:
        for request in list(runner.requests):
            runner.close(request)
    first.finish()


def test_clears_while_other_threads_are_at_work_leave_no_error_no_leak_and_no_wrong_byte(
    switching: None, tmp_path: Path
) -> None:
    first = Runner(SHAPES["window and SSM, 3 tiers"], str(tmp_path))
    second = copy.copy(first)
    second.requests = []
    errors: list[BaseException] = []
    done = Event()

    def work(runner: Runner, seed: int) -> None:
        try:
            hammer(runner, Random(seed), [[0, 1, 0, 1]], 250)
        except BaseException as error:
            errors.append(error)

    def clear() -> None:
        try:
            while not done.is_set():
                first.manager.clear_reusable_blocks()
                first.manager.check()
        except BaseException as error:
            errors.append(error)

    workers = [Thread(target=work, args=(runner, seed)) for seed, runner in enumerate((first, second))]
    clearing = Thread(target=clear)
    for thread in (*workers, clearing):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    clearing.join()
    if errors:
        raise errors[0]
    for request in list(second.requests):
        second.close(request)
    first.finish()


class Slow(SimulatedMemory):
    """Stays in a copy until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.go_on = Event(), Event()

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        self.started.set()
        assert self.go_on.wait(10)
        super().copy(moves, stream)


@pytest.mark.parametrize("call", ["probe_reuse", "stats", "memory_usage", "check", "create_kv_cache"])
def test_calls_wait_while_another_thread_is_in_a_copy(call: str) -> None:
    memory = Slow()
    manager = make_manager(10, 5, block=1, interval=1, memory=memory)
    kv = manager.create_kv_cache(())
    assert kv.resume()
    assert kv.resize(3)
    done = Event()

    def other() -> None:
        found = getattr(manager, call)(*([[7, 7]] if call == "probe_reuse" else []))
        if call == "probe_reuse":
            assert found.usable_tokens == 2, "a commit that was half done"
        if call == "stats":
            assert found.snapshots_taken == 1
        done.set()

    committing = Thread(target=kv.commit, args=([7, 7],))
    committing.start()
    assert memory.started.wait(10)
    asking = Thread(target=other)
    asking.start()
    assert not done.wait(0.1)
    memory.go_on.set()
    committing.join()
    asking.join()
    assert done.is_set()


def test_a_callback_may_ask_the_manager_that_asks_it() -> None:
    manager = make_manager(10, 0, block=1)
    kv = manager.create_kv_cache([1, 2], priority=lambda group, block: manager.probe_reuse([1]).usable_tokens + 50)
    assert kv.resume()
    assert kv.resize(2)
    kv.commit([1, 2])
    kv.close()
    manager.check()


def test_shutdown_is_refused_while_sequences_are_open_with_their_number() -> None:
    manager = make_manager(10, 5, block=1, interval=1)
    sequences = [manager.create_kv_cache([n]) for n in range(3)]
    assert sequences[0].resume()
    assert sequences[0].resize(1)
    sequences[0].commit([0])
    for num_open in (3, 2, 1):
        with pytest.raises(RuntimeError, match=rf"^shutdown: expected no open sequence, got {num_open}$"):
            manager.shutdown()
        manager.check()
        sequences.pop().close()
    assert manager.probe_reuse([0]).usable_tokens == 1
    manager.clear_reusable_blocks()
    assert manager.probe_reuse([0]).usable_tokens == 0
    manager.shutdown()
    manager.shutdown()
    with pytest.raises(RuntimeError, match="create_kv_cache: expected an open manager, got one after shutdown"):
        manager.create_kv_cache(())


def test_one_of_many_threads_that_shut_a_manager_down_does_so() -> None:
    memory = SimulatedMemory()
    manager = make_manager(10, 5, memory=memory)
    barrier, errors = Barrier(8), []

    def shut_down() -> None:
        barrier.wait()
        try:
            manager.shutdown()
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=shut_down) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert memory.bytes_in_use == 0
