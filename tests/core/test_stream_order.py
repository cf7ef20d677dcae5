"""Sequences on several streams: whatever the manager moves and hands on, every access of a slot is ordered after those
that it depends on. The oracle is a race detector (ordered_memory.py), so no GPU and no timing is needed.
"""

import random
from pathlib import Path

import pytest
from ordered_memory import ExactMemory, ExactRunner, OrderedMemory, OrderedRunner
from payload import Request, Shape, run_at_random

SHAPES = {
    "attention": Shape(),
    "attention and states": Shape(ssm=True),
    "windows": Shape(full=False, windows=((5, 0), (3, 2)), partly=False),
    "three tiers": Shape(ssm=True, slots=(10, 8, 8)),
    "all kinds, three tiers": Shape(windows=((5, 2),), ssm=True, slots=(12, 8, 8), partly=False),
    "one tier": Shape(ssm=True, slots=(14,)),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


@each_shape
@pytest.mark.parametrize("num_streams", [1, 2, 3])
def test_no_sequence_touches_a_slot_before_others_are_done_with_it(
    shape: Shape, num_streams: int, tmp_path: Path
) -> None:
    num_checked = 0
    for seed in range(8):
        runner = OrderedRunner(shape, tmp_path, num_streams)
        run_at_random(runner, random.Random(seed), 150)
        num_checked += runner.memory.num_checked
    assert num_checked > 1000


@each_shape
def test_taking_out_the_waits_shows(shape: Shape, tmp_path: Path) -> None:
    class Hasty(OrderedMemory):
        def wait(self, stream: object, event: object) -> None:
            pass

    def run() -> None:
        for seed in range(8):
            run_at_random(OrderedRunner(shape, tmp_path, 2, Hasty()), random.Random(seed), 150)

    with pytest.raises(AssertionError, match="has not waited for"):
        run()


@each_shape
def test_changing_sizes_between_calls_is_ordered_too(shape: Shape, tmp_path: Path) -> None:
    for seed in range(8):
        rng = random.Random(seed)
        runner = OrderedRunner(shape, tmp_path, 3)
        run_with_changes(runner, rng)


@each_shape
@pytest.mark.parametrize("num_streams", [2, 3, 6])
def test_a_stream_comes_after_what_it_has_to_and_no_more(shape: Shape, num_streams: int, tmp_path: Path) -> None:
    num_joined = 0
    for seed in range(4):
        rng = random.Random(seed)
        runner = ExactRunner(shape, tmp_path, num_streams, rng)
        run_at_random(runner, rng, 120)
        num_joined += runner.memory.num_joined
        runner = ExactRunner(shape, tmp_path, num_streams, rng)
        run_with_changes(runner, rng)
        num_joined += runner.memory.num_joined
    assert num_joined > 100


def run_with_changes(runner: OrderedRunner, rng: random.Random) -> None:
    """Prompts from a small set, a few sequences suspended at a time, and sizes that change while none is ACTIVE."""
    manager = runner.manager
    quotas = list(manager.quotas)
    texts = [[rng.randint(0, 1) for _ in range(12)] for _ in range(3)]
    waiting = []
    for _ in range(25):
        request = runner.create(rng.choice(texts)[: rng.randint(4, 12)])
        if runner.resume(request) and runner.compute(request, len(request.tokens), rng.random() < 0.5):
            pass
        if request.kv.status.name == "ACTIVE" and len(waiting) < 2 and rng.random() < 0.4:
            runner.suspend(request)
            waiting.append(request)
        else:
            runner.close(request)
        if rng.random() < 0.4:
            tier = rng.randrange(len(quotas))
            quota = quotas[tier]
            assert quota is not None
            runner.change_sizes(tier, int(quota * rng.uniform(0.6, 1.2)))
        if rng.random() < 0.2:
            runner.change_sizes(0, None)
        if waiting and rng.random() < 0.5:
            request = waiting.pop()
            runner.resume(request)
            runner.close(request)
        manager.check()
    runner.finish()


def test_the_race_detector_tells_ordered_accesses_from_others() -> None:
    memory = OrderedMemory()
    place = (0, 0, 1)
    memory.access("a", [place], writes=True)
    with pytest.raises(AssertionError, match="stream b reads"):
        memory.access("b", [place], writes=False)
    event = memory.record("a")
    memory.access("a", [(0, 0, 2)], writes=True)
    memory.wait("b", event)
    memory.access("b", [place], writes=False)
    with pytest.raises(AssertionError, match="stream b reads"):
        memory.access("b", [(0, 0, 2)], writes=False)
    with pytest.raises(AssertionError, match="stream a writes"):
        memory.access("a", [place], writes=True)
    memory.wait("c", memory.record("b"))  # and so for a, by way of b
    memory.access("c", [place], writes=True)


def test_the_race_detector_tells_waits_that_are_needed_from_others(tmp_path: Path) -> None:
    def runner() -> tuple[ExactMemory, Request, Request]:
        found = ExactRunner(Shape(), tmp_path, 2, random.Random(0))
        one, other = found.create([1, 2, 3]), found.create([5, 6, 7])
        assert one.kv.resume(0)
        assert other.kv.resume(1)
        assert one.kv.resize(2)
        return found.memory, one, other

    memory, _, other = runner()
    memory.wait(1, memory.record(0))
    with pytest.raises(AssertionError, match="stream 1 comes after"):
        other.kv.resize(2)
    memory, _, other = runner()
    event = memory.record(0)
    memory.wait(1, event)
    with pytest.raises(AssertionError, match=r"stream 1 waits for .* though it comes after it anyway"):
        memory.wait(1, event)
    memory, one, other = runner()
    one.kv.close()
    memory.wait = lambda stream, event: None  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=r"stream 1 comes after .* and not after"):
        other.kv.resize(2)
