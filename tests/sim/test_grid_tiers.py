"""Hits by tier against tiers that are kept block by block."""

from collections.abc import Callable, Hashable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache_sim.grid import UNLIMITED, attention_hits, stack_distances
from ssmcache_sim.grid_tiers import tier_hits
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
# stretches of equal tokens: long shared prefixes that part anywhere
stretches = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 16)), min_size=1, max_size=4)
branching_prompts = st.lists(
    stretches.map(lambda parts: [token for token, length in parts for _ in range(length)]), min_size=1, max_size=30
)


class Tiers:
    """Exclusive tiers, each a list with the latest used block in front."""

    def __init__(self, capacities: Sequence[int]) -> None:
        self.capacities = capacities
        self.blocks: list[list[Hashable]] = [[] for _ in capacities]

    def tier_of(self, node: Hashable) -> int | None:
        return next((tier for tier, blocks in enumerate(self.blocks) if node in blocks), None)

    def serve(self, nodes: Sequence[Hashable]) -> list[int]:
        """Tiers of the leading blocks that are there; then the whole path is on the first tier, the top in front."""
        found = []
        for node in nodes:
            tier = self.tier_of(node)
            if tier is None:
                break
            found.append(tier)
        for node in reversed(nodes):
            tier = self.tier_of(node)
            if tier is not None:
                self.blocks[tier].remove(node)
            self.blocks[0].insert(0, node)
        for tier, capacity in enumerate(self.capacities):
            while len(self.blocks[tier]) > capacity:
                victim = self.blocks[tier].pop()
                if tier + 1 < len(self.blocks):
                    self.blocks[tier + 1].insert(0, victim)
        return found


@settings(max_examples=300, deadline=None)
@given(
    prompts=branching_prompts,
    factor=st.integers(1, 3),
    more_blocks=st.integers(0, 10),
    lower=st.lists(st.integers(0, 15), max_size=3),
)
def test_hits_by_tier_equal_tiers_that_move_single_blocks(
    trace_of: TraceOf, prompts: list[list[int]], factor: int, more_blocks: int, lower: list[int]
) -> None:
    block = 2 * factor
    capacities = [max(map(len, prompts)) // block + more_blocks, *lower]
    tiers = Tiers(capacities)
    expected = [0] * len(capacities)
    for prompt in prompts:
        found = tiers.serve([tuple(prompt[:end]) for end in range(block, len(prompt) + 1, block)])
        for index, tier in enumerate(found):
            expected[tier] += block * ((index + 1) * block < len(prompt))
    distances = stack_distances(trace_of(prompts, 2), [block])
    hits = tier_hits(distances, block, capacities)
    assert (hits.blocks, hits.hit_tokens) == (tuple(capacities), tuple(expected))
    assert sum(expected) + hits.lost_evicted_tokens == attention_hits(distances, block, [UNLIMITED])[0]


@pytest.mark.shared
def test_tiers_of_the_conversation_trace_sum_up_to_one_tier_of_all_their_blocks(conversation: Trace) -> None:
    distances = stack_distances(conversation, [512])
    hits = tier_hits(distances, 512, [1953, 7812, 9766])
    assert hits.hit_tokens[0] == 8_091_136  # 1 M tokens: a figure published for one tier
    assert sum(hits.hit_tokens) == 43_093_504  # 10 M tokens
    assert sum(hits.hit_tokens) + hits.lost_evicted_tokens == 54_063_104


def test_tiers_without_a_limit_hit_everything(trace_of: TraceOf) -> None:
    distances = stack_distances(trace_of([[0, 1, 2, 3, 4]] * 3, 2), [2])
    assert tier_hits(distances, 2, [UNLIMITED] * 3).hit_tokens == (8, 0, 0)
