"""A batch of slot moves as arrays, checked against the rules of `SlotMoves`."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ssmcache.memory.base import SlotMoves

SlotArray: TypeAlias = npt.NDArray[np.int64]


def _expect(condition: bool, moves: SlotMoves, message: str) -> None:
    # not `assert`: a broken batch is wrong bytes, so the check must also run under -O
    if not condition:
        raise AssertionError(
            f"batch of layer group {moves.layer_group}, tier {moves.source_tier} to {moves.destination_tier}: {message}"
        )


def checked_slots(moves: SlotMoves, num_source_slots: int, num_destination_slots: int) -> tuple[SlotArray, SlotArray]:
    """Sources and destinations of a batch, [n] each, in pools of so many slots. Cost: O(n log n).

    Errors: AssertionError for a batch that breaks the rules of `SlotMoves`, or leaves its pools.
    """
    sources = np.asarray(moves.sources, dtype=np.int64)
    destinations = np.asarray(moves.destinations, dtype=np.int64)
    count = sources.size
    _expect(count == destinations.size, moves, f"{count} sources, {destinations.size} destinations")
    if count == 0:
        return sources, destinations
    for what, slots, limit in (
        ("source", sources, num_source_slots),
        ("destination", destinations, num_destination_slots),
    ):
        low, high = int(slots.min()), int(slots.max())
        _expect(low >= 0 and high < limit, moves, f"{what} slots {low}..{high} in a pool of {limit}")
    _expect(np.unique(destinations).size == count, moves, "a destination comes twice")
    if moves.source_tier == moves.destination_tier:
        _expect(not np.isin(destinations, sources).any(), moves, "a destination is a source as well")
    return sources, destinations
