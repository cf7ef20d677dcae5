"""A batch of slot moves as arrays, checked against the rules of `SlotMoves`."""

from struct import pack
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ssmcache.memory.base import MovedSlots, SlotMoves

SlotArray: TypeAlias = npt.NDArray[np.int64]


def _expect(condition: bool, moves: SlotMoves, message: str) -> None:
    # not `assert`: a broken batch is wrong bytes, so the check must also run under -O
    if not condition:
        raise AssertionError(
            f"batch of pool {moves.pool}, tier {moves.source_tier} to {moves.destination_tier}: {message}"
        )


def _as_array(slots: MovedSlots) -> SlotArray:
    if isinstance(slots, list | tuple):  # less than half the time that NumPy takes to look at so many objects
        return np.frombuffer(pack(f"{len(slots)}q", *slots), dtype=np.int64)
    return np.asarray(slots, dtype=np.int64)


class BatchCheck:
    """Checks batches against the rules of `SlotMoves`, for one memory. Calls come from one thread at a time.

    Memory: 4 bytes for each slot of the largest pool that it has seen as a destination.
    """

    def __init__(self) -> None:
        # the position in a batch that was last written for a slot; what other batches left is never looked at
        self._position = np.empty(0, dtype=np.int32)
        self._count_up = np.empty(0, dtype=np.int32)

    def slots(self, moves: SlotMoves, num_source_slots: int, num_destination_slots: int) -> tuple[SlotArray, SlotArray]:
        """Sources and destinations of a batch, [n] each, in pools of so many slots; lent like the batch's own.

        Cost: O(n), whatever the size of the pools.

        Errors: AssertionError for a batch that breaks the rules of `SlotMoves`, or leaves its pools.
        """
        sources = _as_array(moves.sources)
        destinations = _as_array(moves.destinations)
        count = sources.size
        if count != destinations.size:
            _expect(False, moves, f"{count} sources, {destinations.size} destinations")
        if count == 0:
            return sources, destinations
        if count == 1:  # a state, most of the time: no arrays
            _check_one(moves, int(sources[0]), num_source_slots, int(destinations[0]), num_destination_slots)
            return sources, destinations
        _check_range(moves, "source", sources, num_source_slots)
        _check_range(moves, "destination", destinations, num_destination_slots)
        if count > self._count_up.size:
            self._count_up = np.arange(count, dtype=np.int32)
        if num_destination_slots > self._position.size:
            self._position = np.zeros(num_destination_slots, dtype=np.int32)
        expected = self._count_up[:count]
        self._position[destinations] = expected
        if moves.source_tier == moves.destination_tier:
            self._position[sources] = -1
        # a place that was written twice is not what it was
        if (self._position.take(destinations) != expected).any():
            is_twice = np.unique(destinations).size < count
            _expect(False, moves, "a destination comes twice" if is_twice else "a destination is a source as well")
        return sources, destinations


def _check_range(moves: SlotMoves, what: str, slots: SlotArray, limit: int) -> None:
    # one look at each slot: negative ones are huge without their sign
    if int(slots.view(np.uint64).max()) >= limit:
        _expect(False, moves, f"{what} slots {slots.min()}..{slots.max()} in a pool of {limit}")


def _check_one(moves: SlotMoves, source: int, num_source_slots: int, into: int, num_destination_slots: int) -> None:
    for what, slot, limit in (("source", source, num_source_slots), ("destination", into, num_destination_slots)):
        if not 0 <= slot < limit:
            _expect(False, moves, f"{what} slots {slot}..{slot} in a pool of {limit}")
    if moves.source_tier == moves.destination_tier and source == into:
        _expect(False, moves, "a destination is a source as well")
