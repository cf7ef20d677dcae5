"""Batches of slots to time copies with, and medians of what they take; for `benchmarks/` and `ssmcache doctor`."""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from ssmcache.memory.base import GPU_TIER, Memory, SlotMoves

Call = Callable[[], object]


class WrongBytesError(Exception):
    """What a copy was to move is not where it should be."""


class RandomMoves:
    """Fresh batches from one tier to another, or within one, at random places.

    Within a tier, slots below `2 * num_slots` are sources and destinations; else those below `num_slots`.
    """

    def __init__(self, source: int, destination: int, num_slots: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._tiers = source, destination
        self._count = num_slots
        self.last = self.next()

    def next(self) -> SlotMoves:
        source, destination = self._tiers
        sources: Any  # arrays, which a memory takes as well
        destinations: Any
        if source == destination:
            order = self._rng.permutation(2 * self._count)
            sources, destinations = order[: self._count].copy(), order[self._count :].copy()
        else:
            sources, destinations = self._rng.permutation(self._count), self._rng.permutation(self._count)
        self.last = SlotMoves(0, source, sources, destination, destinations)
        return self.last


def check_moved(memory: Memory, moves: SlotMoves, scratch: int) -> None:
    """About 16 slots of a batch that was just copied hold the same on both sides, of which one at least is the GPU.

    Slot `scratch` of the GPU is overwritten. Errors: WrongBytesError.
    """
    for index in range(0, len(moves.sources), max(1, len(moves.sources) // 16)):
        rows: list[Any] = []
        for tier, slot in (
            (moves.source_tier, int(moves.sources[index])),
            (moves.destination_tier, int(moves.destinations[index])),
        ):
            if tier != GPU_TIER:
                memory.copy(SlotMoves(0, tier, [slot], GPU_TIER, [scratch]), None)
                slot = scratch
            rows.append(memory.view(0)[slot])
        if not bool((rows[0] == rows[1]).all()):
            raise WrongBytesError(
                f"slot {moves.sources[index]} of tier {moves.source_tier} did not arrive in slot "
                f"{moves.destinations[index]} of tier {moves.destination_tier}"
            )


def wall_seconds(call: Call, clock: Callable[[], float]) -> float:
    """How long a call takes that ends when its work is done."""
    start = clock()
    call()
    return clock() - start


def medians(repeats: int, seconds_of: Callable[[Call], float], *calls: Call) -> list[float]:
    """Median of what `seconds_of` says of each call, taking turns, after two that do not count."""
    for call in calls:  # compiles, loads, first touches
        call()
        call()
    times = [[seconds_of(call) for call in calls] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]
