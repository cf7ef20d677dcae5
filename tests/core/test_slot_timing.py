"""What is timed, against clocks that are made up, and against memories that lie."""

from collections.abc import Callable, Iterator
from itertools import accumulate, count, repeat

import numpy as np
import pytest

from ssmcache.config import GpuCacheTierConfig, HostCacheTierConfig
from ssmcache.memory.base import SlotMoves
from ssmcache.memory.host import HostMemory
from ssmcache.memory.slot_timing import RandomMoves, WrongBytesError, check_moved, medians, wall_seconds

GPU, HOST = 0, 1


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that is so much later at each look."""
    times: Iterator[float] = accumulate(repeat(seconds))
    return lambda: next(times)


def test_wall_seconds_are_between_a_look_before_and_a_look_after() -> None:
    looks: list[str] = []
    clock = ticking(2.5)

    def look() -> float:
        looks.append("look")
        return clock()

    assert wall_seconds(lambda: looks.append("call"), look) == 2.5
    assert looks == ["look", "call", "look"]


def test_calls_take_turns_after_two_that_do_not_count_and_the_median_is_taken() -> None:
    calls: list[str] = []
    times = {"a": iter([9.0, 1.0, 2.0]), "b": iter([5.0, 50.0, 500.0])}

    def seconds_of(call: Callable[[], object]) -> float:
        call()
        return next(times[calls[-1]])

    assert medians(3, seconds_of, lambda: calls.append("a"), lambda: calls.append("b")) == [2.0, 50.0]
    assert "".join(calls) == "aabb" + "ab" * 3


def test_batches_follow_the_rules_and_differ() -> None:
    for source, destination in ((GPU, GPU), (GPU, HOST), (HOST, GPU)):
        moves = RandomMoves(source, destination, 50)
        batches = [moves.next() for _ in range(3)]
        assert moves.last is batches[-1]
        for batch in batches:
            assert (batch.source_tier, batch.destination_tier) == (source, destination)
            sources, destinations = set(batch.sources), set(batch.destinations)
            assert len(sources) == len(destinations) == 50
            if source == destination:
                assert sources | destinations == set(range(100))
            else:
                assert sources == destinations == set(range(50))
        assert len({tuple(batch.sources) for batch in batches}) == 3


class Forgetful(HostMemory):
    """Does not move the last slot of the nth batch."""

    def __init__(self, bad_batch: int) -> None:
        super().__init__()
        self._numbers, self._bad_batch = count(), bad_batch

    def copy(self, moves: SlotMoves, stream: object) -> None:
        if next(self._numbers) == self._bad_batch:
            moves = moves._replace(sources=moves.sources[:-1], destinations=moves.destinations[:-1])
        super().copy(moves, stream)


@pytest.mark.parametrize(("source", "destination"), [(GPU, GPU), (GPU, HOST), (HOST, GPU)])
@pytest.mark.parametrize("bad_batch", [0, 99])
def test_a_slot_that_does_not_arrive_is_found(source: int, destination: int, bad_batch: int) -> None:
    memory = Forgetful(bad_batch)
    memory.open([GpuCacheTierConfig(1), HostCacheTierConfig(1)], [64])
    memory.resize(GPU, [17])
    memory.resize(HOST, [16])
    memory.view(0)[...] = np.random.default_rng(0).integers(0, 256, (17, 64), dtype=np.uint8)
    moves = RandomMoves(source, destination, 8).next()  # all of a batch of so few are looked at
    memory.copy(moves, None)
    if bad_batch == 0:
        what = f"slot {moves.sources[-1]} of tier {source} did not arrive in slot {moves.destinations[-1]} of tier "
        with pytest.raises(WrongBytesError, match=what):
            check_moved(memory, moves, scratch=16)
    else:
        check_moved(memory, moves, scratch=16)
