"""The causes of lost tokens against what a look at the whole cache after each request shows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from cache_watch import branching_prompts, expected_causes, windowed
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import (
    BufferConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    KVCache,
    KVCacheManagerConfig,
    SsmLayerConfig,
)
from ssmcache_sim.accounting import ReplayResult
from ssmcache_sim.causes import SNAPSHOT_CAUSES
from ssmcache_sim.errors import MemoryTooSmallError
from ssmcache_sim.fates import BoundaryFates
from ssmcache_sim.grid_cells import GridCapacity, grid_capacity, grid_totals
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import Prefill
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
TinyConfig = Callable[..., KVCacheManagerConfig]
Prompts = list[list[int]]
BLOCK, INTERVAL = 2, 4


def check_sums(result: ReplayResult) -> None:
    """Every prompt token has one cause."""
    lost = result.lost_evicted + result.lost_alignment + result.lost_snapshot
    assert np.array_equal(result.usable + lost + result.never_seen + result.last_block, result.trace.prompt_tokens)
    assert np.array_equal(result.lost_snapshot_by.sum(axis=0), result.lost_snapshot)
    assert (result.lost_to_size <= result.lost_evicted).all()
    parts = (result.lost_to_size, result.never_seen, result.last_block, *result.lost_snapshot_by)
    assert all((part >= 0).all() for part in parts)
    assert (result.last_block <= result.trace.tokens_per_block).all()
    totals = result.totals
    assert totals.lost_snapshot_by_cause == tuple(result.lost_snapshot_by.sum(axis=1).tolist())
    assert totals.lost_evicted_too_large_tokens == result.lost_to_size.sum()
    assert totals.never_seen_tokens == result.never_seen.sum()
    assert totals.last_block_tokens == result.last_block.sum()


def check(
    trace: Trace, config: KVCacheManagerConfig, prefill: Prefill = "reserved", marks_all: bool = False
) -> ReplayResult:
    """Replays, and compares. `marks_all`: also with everything marked, which must change nothing."""
    result = replay(trace, config, prefill=prefill)
    if marks_all:
        result = replay(trace, config, prefill=prefill, fates=partial(_all_marked, config))
    check_sums(result)
    expected = expected_causes(result.trace, config, prefill, result)
    assert result.lost_snapshot_by.tolist() == expected.tolist()
    return result


def _all_marked(config: KVCacheManagerConfig, trace: Trace, kv_ceiling: Any) -> BoundaryFates:
    return BoundaryFates(trace, config, kv_ceiling, marks_all=True)


@settings(max_examples=150, deadline=None)
@given(
    prompts=branching_prompts,
    more_pages=st.integers(0, 20),
    num_states=st.integers(2, 7),
    prefill=st.sampled_from(["reserved", "chunked"]),
    marks_all=st.booleans(),
)
def test_causes_of_small_pools_are_what_happened_last(
    trace_of: TraceOf,
    tiny_config: TinyConfig,
    prompts: Prompts,
    more_pages: int,
    num_states: int,
    prefill: Prefill,
    marks_all: bool,
) -> None:
    num_pages = max(map(len, prompts)) // BLOCK + 1 + more_pages
    config = tiny_config(BLOCK, num_pages=num_pages, interval=INTERVAL, num_states=num_states)
    check(trace_of(prompts, BLOCK), config, prefill, marks_all)


@settings(max_examples=60, deadline=None)
@given(prompts=branching_prompts, host_slots=st.integers(1, 12), num_states=st.integers(2, 5))
def test_a_snapshot_that_moved_to_host_memory_is_not_evicted(
    trace_of: TraceOf, tiny_config: TinyConfig, prompts: Prompts, host_slots: int, num_states: int
) -> None:
    num_pages = max(map(len, prompts)) // BLOCK + 2
    config = tiny_config(BLOCK, num_pages=num_pages, interval=INTERVAL, num_states=num_states)
    slot_bytes = sum(layer.buffers[0].size for layer in config.layers)
    tiers = (*config.cache_tiers, HostCacheTierConfig(host_slots * slot_bytes))
    check(trace_of(prompts, BLOCK), replace(config, cache_tiers=tiers))


@settings(max_examples=60, deadline=None)
@given(prompts=branching_prompts, num_states=st.integers(1, 6))
def test_without_attention_layers_the_same_causes_are_told(
    trace_of: TraceOf, prompts: Prompts, num_states: int
) -> None:
    layers = (SsmLayerConfig(0, (BufferConfig("ssm_state", 8),)),)
    check(
        trace_of(prompts, BLOCK), KVCacheManagerConfig(BLOCK, layers, (GpuCacheTierConfig(8 * num_states),), INTERVAL)
    )


@settings(max_examples=100, deadline=None)
@given(prompts=branching_prompts, num_windows=st.integers(8, 16), num_states=st.integers(3, 8))
def test_with_a_window_a_snapshot_may_be_there_and_of_no_use(
    trace_of: TraceOf, prompts: Prompts, num_windows: int, num_states: int
) -> None:
    with suppress(MemoryTooSmallError):
        check(trace_of(prompts, BLOCK), windowed(num_windows, num_states))


def test_the_window_before_a_snapshot_is_blamed_where_it_alone_is_gone(trace_of: TraceOf) -> None:
    zeros_and_ones = [
        (13, 1),
        (5, 3),
        (3, 3),
        (6, 4),
        (12, 1),
        (10, 1),
        (11, 3),
        (8, 1),
        (2, 5),
        (7, 3),
        (13, 3),
        (11, 2),
    ]
    prompts = [[0] * zeros + [1] * ones for zeros, ones in zeros_and_ones]
    lost = check(trace_of(prompts, BLOCK), windowed(8, 6)).lost_snapshot_by
    assert lost[SNAPSHOT_CAUSES.index("window")].sum() > 0


# -- hand-made traces: one cause each ----------------------------------------------------------------------------------


def causes_of(result: ReplayResult, request: int) -> dict[str, int]:
    by_cause = dict(zip(SNAPSHOT_CAUSES, result.lost_snapshot_by[:, request].tolist(), strict=True))
    return {cause: tokens for cause, tokens in by_cause.items() if tokens}


A, OTHER = [0] * 9, [1] * 9  # blocks of 2, boundaries at 4 and 8, one token more


def test_a_snapshot_that_made_way_is_evicted_and_the_deepest_goes_first(
    trace_of: TraceOf, tiny_config: TinyConfig
) -> None:
    config = tiny_config(BLOCK, num_pages=20, interval=INTERVAL, num_states=4)
    result = check(trace_of([A, OTHER, A], BLOCK), config)
    # three of the four snapshots fit beside a live state
    assert causes_of(result, 2) == {"evicted": 4}
    assert (result.usable[2], result.attention[2], result.last_block[2]) == (4, 8, 1)


def test_no_room_for_more_than_the_shallowest_boundary(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    config = tiny_config(BLOCK, num_pages=20, interval=INTERVAL, num_states=2)
    result = check(trace_of([A, A], BLOCK), config)
    assert causes_of(result, 1) == {"no_room": 4}
    assert result.usable[1] == 4


def test_a_boundary_evicted_and_then_skipped_is_blamed_on_the_skip(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    config = tiny_config(BLOCK, num_pages=40, interval=INTERVAL, num_states=3)
    long = [0] * 13
    # two snapshots fit; after OTHER none of A's is left, then the long prompt has room for its first two alone
    result = check(trace_of([A, OTHER, long, long], BLOCK), config)
    assert causes_of(result, 2) == {"evicted": 8}
    assert causes_of(result, 3) == {"no_room": 4}


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


def test_a_boundary_inside_a_commit_without_a_reservation_is_crossed(
    trace_of: TraceOf, tiny_config: TinyConfig
) -> None:
    config = tiny_config(BLOCK, num_pages=20, interval=INTERVAL, num_states=9)
    with patched(KVCache, "reserve_snapshots", lambda self, points: {}):
        result = check(trace_of([A, A], BLOCK), config)
    assert causes_of(result, 1) == {"crossed": 8}
    assert result.usable[1] == 0


def test_a_boundary_skipped_and_then_taken_is_evicted_and_not_skipped(
    trace_of: TraceOf, tiny_config: TinyConfig
) -> None:
    reserve = KVCache.reserve_snapshots

    def all_but_the_first(self: KVCache, points: range) -> dict[int, int]:
        return {} if self.manager.stats().lookups == 1 else reserve(self, points)

    config = tiny_config(BLOCK, num_pages=20, interval=INTERVAL, num_states=3)
    with patched(KVCache, "reserve_snapshots", all_but_the_first):
        result = check(trace_of([A, A, OTHER, A], BLOCK), config)
    assert causes_of(result, 1) == {"crossed": 8}
    assert causes_of(result, 3) == {"evicted": 8}


def test_with_history_ahead_of_the_commit_no_state_is_taken(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    config = tiny_config(BLOCK, num_pages=20, interval=INTERVAL, num_states=9)
    resize = KVCache.resize
    ahead = lambda self, capacity: resize(self, capacity, capacity - 1)  # noqa: E731
    with patched(KVCache, "resize", ahead):
        result = check(trace_of([A, A], BLOCK), config, "chunked")
    assert causes_of(result, 1) == {"history": 8}


def test_a_boundary_that_the_admission_did_not_want_is_not_admitted(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    config = replace(tiny_config(BLOCK, num_pages=20, interval=INTERVAL, num_states=9), admission="last")
    result = check(trace_of([[0] * 14, A], BLOCK), config)
    assert causes_of(result, 1) == {"not_admitted": 8}


@given(prompts=branching_prompts, num_states=st.integers(2, 9), more_pages=st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_causes_of_last_boundaries_are_the_same_by_the_grid(
    trace_of: TraceOf, tiny_config: TinyConfig, prompts: Prompts, num_states: int, more_pages: int
) -> None:
    trace = trace_of(prompts, BLOCK)
    num_pages = trace.longest_path // BLOCK + 1 + more_pages
    config = tiny_config(BLOCK, num_pages=num_pages, interval=INTERVAL, num_states=num_states)
    config = replace(config, admission="last")
    capacity = grid_capacity(trace, config)
    result = check(trace, config)
    if isinstance(capacity, GridCapacity):
        (by_grid,) = grid_totals(trace, [(config, capacity)])
        assert by_grid.lost_snapshot_by_cause == result.totals.lost_snapshot_by_cause


def test_evicted_kv_is_blamed_where_the_snapshot_went_with_it(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    config = tiny_config(BLOCK, num_pages=7, interval=INTERVAL, num_states=9)
    result = check(trace_of([A, OTHER, A], BLOCK), config)
    # six blocks are kept: all of OTHER's four, and two of A's, which have their snapshot at 4
    assert (result.usable[2], result.lost_evicted[2], result.lost_snapshot[2]) == (4, 4, 0)


def test_kv_beyond_the_last_boundary_with_kv_is_lost_to_the_interval(
    trace_of: TraceOf, tiny_config: TinyConfig
) -> None:
    config = tiny_config(BLOCK, num_pages=20, interval=INTERVAL, num_states=9)
    result = check(trace_of([[0] * 7, [0] * 7], BLOCK), config)
    assert (result.usable[1], result.lost_alignment[1], result.last_block[1], result.never_seen[1]) == (4, 2, 1, 0)


def test_the_last_token_of_a_full_block_costs_the_block(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    config = tiny_config(BLOCK, num_pages=20, interval=INTERVAL, num_states=9)
    result = check(trace_of([[0] * 8, [0] * 8, [0] * 4 + [1] * 6], BLOCK), config)
    assert result.last_block.tolist() == [2, 2, 2]
    assert result.never_seen.tolist() == [6, 0, 4]
    assert result.usable.tolist() == [0, 4, 4]


def test_what_requests_too_large_have_cost_is_told_apart(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    long, short = [0] * 40, [0] * 9
    result = replay(trace_of([short, long, long, short, [0] * 13], 4), tiny_config(4, num_pages=4))
    check_sums(result)
    assert result.too_large.tolist() == [False, True, True, False, False]
    # the third block of the last prompt was in prompts that were too large alone
    assert result.lost_to_size.tolist() == [0, 8, 36, 0, 4]
    assert result.lost_evicted.tolist() == [0, 8, 36, 0, 4]


@settings(max_examples=100, deadline=None)
@given(prompts=branching_prompts, num_pages=st.integers(2, 9))
def test_lost_to_size_is_what_no_served_prompt_had(
    trace_of: TraceOf, tiny_config: TinyConfig, prompts: Prompts, num_pages: int
) -> None:
    if all(len(prompt) + 1 > num_pages * BLOCK for prompt in prompts):
        return
    result = replay(trace_of(prompts, BLOCK), tiny_config(BLOCK, num_pages=num_pages))
    check_sums(result)
    for request, prompt in enumerate(prompts):
        blocks = range(int(result.attention[request]), int(result.kv_ceiling[request]), BLOCK)
        served = [before for before, large in zip(prompts[:request], result.too_large, strict=False) if not large]
        never_kept = [
            start
            for start in blocks
            if result.too_large[request] or not any(one[: start + 2] == prompt[: start + 2] for one in served)
        ]
        assert result.lost_to_size[request] == BLOCK * len(never_kept)


@settings(max_examples=100, deadline=None)
@given(
    prompts=branching_prompts,
    factor=st.integers(1, 3),
    multiple=st.integers(1, 4),
    more_pages=st.integers(0, 40),
    more_states=st.integers(0, 20),
)
def test_the_grid_splits_the_tokens_of_a_cell_as_its_replay_does(
    trace_of: TraceOf,
    tiny_config: TinyConfig,
    prompts: Prompts,
    factor: int,
    multiple: int,
    more_pages: int,
    more_states: int,
) -> None:
    trace, longest, block = trace_of(prompts, BLOCK), max(map(len, prompts)), BLOCK * factor
    interval, num_pages = block * multiple, longest // block + 1 + more_pages
    hybrid = tiny_config(
        block, num_pages=num_pages, interval=interval, num_states=longest // interval + 1 + more_states
    )
    attention = tiny_config(block, num_pages=num_pages)
    for config in (hybrid, attention):
        capacity = grid_capacity(trace.with_block(block), config)
        assert isinstance(capacity, GridCapacity)
        (cell,) = grid_totals(trace, [(config, capacity)])
        assert cell == replace(replay(trace, config).totals, snapshots=None, peaks=())
