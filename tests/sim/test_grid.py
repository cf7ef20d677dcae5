"""The one-pass grid against the real manager, one replay a cell, and against a list kept in order of use."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import KVCacheManagerConfig
from ssmcache_sim.formats import read_trace
from ssmcache_sim.grid import UNLIMITED, attention_hits, hybrid_hits, stack_distances
from ssmcache_sim.grid_cells import grid_capacity, grid_totals
from ssmcache_sim.replay import replay
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
TinyConfig = Callable[..., KVCacheManagerConfig]
# stretches of equal tokens: long shared prefixes that part anywhere
stretches = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 16)), min_size=1, max_size=4)
branching_prompts = st.lists(
    stretches.map(lambda parts: [token for token, length in parts for _ in range(length)]), min_size=1, max_size=30
)


def stacks(prompts: list[list[int]], size: int) -> list[list[int]]:
    """Stack distance of each full block of each prompt, from a plain list with the latest block in front."""
    order: list[tuple[int, ...]] = []
    distances = []
    for prompt in prompts:
        path = [tuple(prompt[:end]) for end in range(size, len(prompt) + 1, size)]
        distances.append([order.index(block) + 1 if block in order else UNLIMITED + 1 for block in path])
        order = path + [block for block in order if block not in path]
    return distances


@settings(max_examples=300, deadline=None)
@given(prompts=branching_prompts, factor=st.integers(1, 3), multiple=st.integers(1, 4))
def test_every_cell_equals_a_list_kept_in_order_of_use(
    trace_of: TraceOf, prompts: list[list[int]], factor: int, multiple: int
) -> None:
    block, interval = 2 * factor, 2 * factor * multiple
    distances = stack_distances(trace_of(prompts, 2), [block, interval])
    capacities, snapshot_capacities = [*range(1, 30), 60, UNLIMITED], [*range(12), 30, UNLIMITED]
    kv, states = stacks(prompts, block), stacks(prompts, interval)
    expected_kv = [
        sum(
            block
            for request, prompt in zip(kv, prompts, strict=True)
            for index, distance in enumerate(request)
            if distance <= capacity and (index + 1) * block < len(prompt)
        )
        for capacity in capacities
    ]
    assert attention_hits(distances, block, capacities).tolist() == expected_kv
    expected = [
        [
            sum(
                interval
                for blocks, snapshots, prompt in zip(kv, states, prompts, strict=True)
                for index, distance in enumerate(snapshots)
                if distance <= num_snapshots
                and blocks[(index + 1) * multiple - 1] <= capacity
                and (index + 1) * interval < len(prompt)
            )
            for num_snapshots in snapshot_capacities
        ]
        for capacity in capacities
    ]
    assert hybrid_hits(distances, block, interval, capacities, snapshot_capacities).tolist() == expected


@settings(max_examples=250, deadline=None)
@given(
    prompts=branching_prompts,
    multiple=st.integers(1, 4),
    more_pages=st.integers(0, 40),
    more_states=st.integers(0, 20),
)
def test_every_cell_equals_a_replay_through_the_manager(
    trace_of: TraceOf,
    tiny_config: TinyConfig,
    prompts: list[list[int]],
    multiple: int,
    more_pages: int,
    more_states: int,
) -> None:
    trace, interval = trace_of(prompts, 2), 2 * multiple
    longest = max(map(len, prompts))
    num_pages, num_states = longest // 2 + 1 + more_pages, longest // interval + 1 + more_states
    distances = stack_distances(trace, [2, interval])
    attention = replay(trace, tiny_config(2, num_pages=num_pages))
    assert attention_hits(distances, 2, [num_pages - 1]).tolist() == [attention.totals.usable_hit_tokens]
    config = tiny_config(2, num_pages=num_pages, interval=interval, num_states=num_states)
    hybrid = replay(trace, config).totals
    plane = hybrid_hits(distances, 2, interval, [num_pages - 1], [num_states - 1, UNLIMITED])
    assert plane[0, 0] == hybrid.usable_hit_tokens
    assert plane[0, 1] == hybrid.attention_hit_tokens - hybrid.lost_alignment_tokens


@pytest.mark.shared
def test_acceptance_figures_of_the_conversation_trace(conversation: Trace) -> None:
    capacities = [1_000_000, 10_000_000]
    for trace, attention, hybrid in (
        (conversation, [8_091_136, 43_093_504], [1_900_544, 37_467_136]),
        (conversation.expanded(32), [7_991_440, 42_516_208], [1_880_064, 37_332_992]),
    ):
        block = trace.tokens_per_block
        distances = stack_distances(trace, [block, 1024])
        blocks, snapshots = ([capacity // size for capacity in capacities] for size in (block, 1024))
        assert attention_hits(distances, block, blocks).tolist() == attention
        plane = hybrid_hits(distances, block, 1024, blocks, snapshots)
        assert np.diag(plane).tolist() == hybrid


def assert_cells_equal_their_replays(
    trace: Trace, tiny_config: TinyConfig, shapes: list[tuple[int, int]], pools: list[tuple[int, int]]
) -> None:
    """All (block, interval) shapes with all (pages, states) pools."""
    configs = [
        tiny_config(block, num_pages=num_pages, interval=interval, num_states=num_states)
        for (block, interval), (num_pages, num_states) in product(shapes, pools)
    ]
    capacities = [grid_capacity(trace.with_block(config.tokens_per_block), config) for config in configs]
    cells = [
        (one, capacity) for one, capacity in zip(configs, capacities, strict=True) if not isinstance(capacity, str)
    ]
    assert len(cells) == len(configs), capacities
    for (config, _), cell in zip(cells, grid_totals(trace, cells), strict=True):
        expected = replace(replay(trace, config).totals, snapshots=None, peaks=())
        assert cell == expected, (config.tokens_per_block, config.ssm_reuse_interval, config.cache_tiers)


@pytest.mark.shared
def test_twenty_cells_of_the_conversation_trace_equal_their_replays(
    conversation: Trace, tiny_config: TinyConfig
) -> None:
    shapes = [(512, 512), (512, 2048), (1024, 1024), (1024, 4096), (2048, 4096)]
    pools = [(1000, 400), (3000, 1500), (20_000, 300), (40_000, 9000)]
    assert_cells_equal_their_replays(conversation, tiny_config, shapes, pools)


@pytest.mark.shared
def test_twenty_cells_of_conversations_with_sub_agents_equal_their_replays(
    shared_traces: Path, tiny_config: TinyConfig
) -> None:
    weka = read_trace(shared_traces / "weka_claude_code_small60.jsonl.xz")
    shapes = [(64, 512), (64, 4096), (128, 1024), (256, 512), (512, 2048)]
    pools = [(5000, 650), (8000, 1500), (20_000, 700), (100_000, 5000)]
    assert_cells_equal_their_replays(weka, tiny_config, shapes, pools)
