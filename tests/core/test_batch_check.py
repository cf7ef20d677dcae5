"""Batches of moves against their rules, by sets, with one checker for all batches of a memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmcache.memory.base import SlotMoves
from ssmcache.memory.batches import BatchCheck

SLOTS = st.lists(st.integers(-1, 9), max_size=6)
BATCHES = st.lists(st.tuples(SLOTS, SLOTS, st.sampled_from([0, 1]), st.integers(1, 9), st.integers(1, 9)), max_size=8)


def breaks_a_rule(sources: list[int], destinations: list[int], is_same: bool, limits: tuple[int, int]) -> bool:
    if len(sources) != len(destinations):
        return True
    if not all(0 <= slot < limits[0] for slot in sources) or not all(0 <= slot < limits[1] for slot in destinations):
        return True
    return len(set(destinations)) < len(destinations) or (is_same and not set(sources).isdisjoint(destinations))


@given(BATCHES)
def test_batches_that_break_a_rule_are_refused_and_others_are_not(
    batches: list[tuple[list[int], list[int], int, int, int]],
) -> None:
    check = BatchCheck()
    for sources, destinations, destination_tier, num_sources, num_destinations in batches:
        moves = SlotMoves(0, 0, sources, destination_tier, destinations)
        is_same = destination_tier == 0
        limits = num_sources, num_sources if is_same else num_destinations
        if breaks_a_rule(sources, destinations, is_same, limits):
            with pytest.raises(AssertionError, match=r"^batch of pool 0, tier 0 to [01]: "):
                check.slots(moves, *limits)
        else:
            assert [slots.tolist() for slots in check.slots(moves, *limits)] == [sources, destinations]


@pytest.mark.parametrize("tier", [0, 1])
def test_one_wrong_move_among_thousands_is_found(tier: int) -> None:
    check, rng = BatchCheck(), np.random.default_rng(0)
    for _ in range(20):
        sources, destinations = rng.permutation(10_000).reshape(2, -1)
        check.slots(SlotMoves(3, 0, sources, tier, destinations), 10_000, 10_000)
        one, other = rng.choice(5000, 2, replace=False)
        twice, read = destinations.copy(), destinations.copy()
        twice[one], read[one] = destinations[other], sources[other]
        with pytest.raises(AssertionError, match="a destination comes twice"):
            check.slots(SlotMoves(3, 0, sources, tier, twice), 10_000, 10_000)
        if tier == 0:
            with pytest.raises(AssertionError, match="a destination is a source as well"):
                check.slots(SlotMoves(3, 0, sources, tier, read), 10_000, 10_000)
        else:
            check.slots(SlotMoves(3, 0, sources, tier, read), 10_000, 10_000)
