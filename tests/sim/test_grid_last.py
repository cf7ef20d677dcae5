"""Admission `last` of the grid against lists of blocks and of snapshots kept in order of use."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache_sim.grid import UNLIMITED, hybrid_hits, stack_distances
from ssmcache_sim.grid_last import last_boundaries, last_hits
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
# stretches of equal tokens: long shared prefixes that part anywhere
stretches = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 16)), min_size=1, max_size=4)
branching_prompts = st.lists(
    stretches.map(lambda parts: [token for token, length in parts for _ in range(length)]), min_size=1, max_size=30
)


@dataclass
class Cache:
    """Blocks and snapshots in pools of their own, the latest used in front; a snapshot may be there without its KV."""

    block: int
    interval: int
    num_blocks: int
    num_snapshots: int
    blocks: list[Hashable] = field(default_factory=list)
    snapshots: list[Hashable] = field(default_factory=list)

    def serve(self, prompt: Sequence[int]) -> int:
        """Tokens skipped."""
        path = [tuple(prompt[:end]) for end in range(self.block, len(prompt) + 1, self.block)]
        present = 0
        while present < len(path) and path[present] in self.blocks:
            present += 1
        reachable = min(present * self.block, len(prompt) - 1)
        usable = 0
        for end in range(self.interval, reachable + 1, self.interval):
            if tuple(prompt[:end]) in self.snapshots:
                usable = end
        self.blocks = (path + [block for block in self.blocks if block not in path])[: self.num_blocks]
        if last := len(prompt) // self.interval * self.interval:
            own = tuple(prompt[:last])
            assert usable < last or own in self.snapshots, "the state at the last boundary is passed or there"
            self.snapshots = [own, *(other for other in self.snapshots if other != own)][: self.num_snapshots]
        return usable


@settings(max_examples=300, deadline=None)
@given(
    prompts=branching_prompts,
    factor=st.integers(1, 3),
    multiple=st.integers(1, 3),
    more_blocks=st.lists(st.integers(0, 30), min_size=1, max_size=3, unique=True).map(sorted),
    snapshots=st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True).map(sorted),
)
def test_every_cell_equals_a_cache_of_only_the_last_boundary_of_each_request(
    trace_of: TraceOf,
    prompts: list[list[int]],
    factor: int,
    multiple: int,
    more_blocks: list[int],
    snapshots: list[int],
) -> None:
    block, interval = 2 * factor, 2 * factor * multiple
    capacities = [max(map(len, prompts)) // block + more for more in more_blocks]
    trace = trace_of(prompts, 2)
    plane = last_hits(stack_distances(trace, [block]), last_boundaries(trace, interval), block, capacities, snapshots)
    for row, num_blocks in enumerate(capacities):
        for column, num_snapshots in enumerate(snapshots):
            cache = Cache(block, interval, num_blocks, num_snapshots)
            assert plane[row, column] == sum(map(cache.serve, prompts)), (num_blocks, num_snapshots)


def test_a_snapshot_outlives_its_kv_and_is_usable_when_the_kv_is_back(trace_of: TraceOf) -> None:
    a, b = [0] * 8, [1] * 8
    prompts = [a, b, [*a, 2], [*a, 2]]  # the third brings the KV of `a` back, and its own last boundary is that of `a`
    trace = trace_of(prompts, 2)
    plane = last_hits(stack_distances(trace, [2]), last_boundaries(trace, 8), 2, [4, 8], [1, 2])
    # 4 blocks: only the fourth request; 8 blocks: the third too, if 2 snapshots keep that of `a`
    assert plane.tolist() == [[8, 8], [8, 16]]


def test_prompts_below_one_interval_leave_no_snapshot(trace_of: TraceOf) -> None:
    trace = trace_of([[0, 1, 2]] * 3, 2)
    found = last_boundaries(trace, 8)
    assert found.boundary.size == 0
    assert last_hits(stack_distances(trace, [2]), found, 2, [4], [4]).tolist() == [[0]]


@pytest.mark.shared
def test_few_snapshots_are_worth_more_at_last_boundaries_only(conversation: Trace) -> None:
    """Published for 1,600 snapshots every 512 tokens: 5.1 % with every boundary kept, 32.4 % with the last one only."""
    distances = stack_distances(conversation, [512])
    last = last_hits(distances, last_boundaries(conversation, 512), 512, [UNLIMITED], [1600])
    every = hybrid_hits(distances, 512, 512, [UNLIMITED], [1600])
    rates = np.array([every[0, 0], last[0, 0]]) / conversation.prompt_tokens.sum()
    assert [f"{rate:.1%}" for rate in rates] == ["5.1%", "32.4%"]
