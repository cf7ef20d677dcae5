"""Every split of a memory against a replay through the manager, and against lists kept in order of use."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import AttentionLayerConfig, BufferConfig, GpuCacheTierConfig, KVCacheManagerConfig, SsmLayerConfig
from ssmcache.memory.bandwidths import BandwidthProfile
from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.cost import PrefillCost
from ssmcache_sim.device_profile import DeviceProfile
from ssmcache_sim.grid import stack_distances
from ssmcache_sim.grid_cells import grid_capacity
from ssmcache_sim.replay import replay
from ssmcache_sim.splits import Splits, possible_splits, split_totals, unlimited_totals
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
DEVICE = DeviceProfile("slow", 2e9, 0.5, BandwidthProfile(0.5e9), launch_seconds=7e-9, pass_tokens=5, pass_seconds=1e-6)
COST = PrefillCost(DEVICE, "chunked", 100, 10, attention_flops_per_pair=4, snapshot_bytes=50)
KV_BYTES, SLOT_BYTES = 3, 13  # of a token, and of a state
prompts_of_few_tokens = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=26), min_size=1, max_size=20)


def config(block: int, interval: int | None, memory_bytes: int, num_slots: int) -> KVCacheManagerConfig:
    attention = AttentionLayerConfig(0, (BufferConfig("key", block * KV_BYTES),))
    tiers = (GpuCacheTierConfig(memory_bytes),)
    if interval is None:
        return KVCacheManagerConfig(block, (attention,), tiers)
    state = SsmLayerConfig(1, (BufferConfig("ssm_state", SLOT_BYTES),))
    fraction = num_slots * SLOT_BYTES / memory_bytes
    return KVCacheManagerConfig(block, (attention, state), tiers, interval, ssm_fraction=fraction)


def splits_of(trace: Trace, block: int, step: int, memory_bytes: int, slot_bytes: int = SLOT_BYTES) -> Splits | int:
    longest = int(trace.prompt_tokens.max())
    return possible_splits(
        longest, step, memory_bytes, tokens_per_block=block, page_bytes=block * KV_BYTES, slot_bytes=slot_bytes
    )


def known_by_request(prompts: list[list[int]], block: int, step: int, pages: int, slots: int | None) -> list[int]:
    """Tokens up to the deepest boundary of each prompt that has its KV and its snapshot, from lists with the latest
    path in front; `slots` of None: no snapshots are needed.
    """
    kv: list[tuple[int, ...]] = []
    states: list[tuple[int, ...]] = []
    known = []
    for prompt in prompts:
        paths = [[tuple(prompt[:end]) for end in range(size, len(prompt) + 1, size)] for size in (block, step)]
        best = 0
        for boundary in paths[1]:
            here = boundary in kv[: pages - 1] and (slots is None or boundary in states[: slots - 1])
            best = len(boundary) if here else best
        known.append(best)
        kv = paths[0] + [each for each in kv if each not in paths[0]]
        states = paths[1] + [each for each in states if each not in paths[1]]
    return known


@settings(max_examples=60, deadline=None)
@given(
    prompts=prompts_of_few_tokens, factor=st.integers(1, 2), multiple=st.integers(1, 3), more_bytes=st.integers(0, 200)
)
def test_every_split_equals_a_replay_through_the_manager_and_lists_in_order_of_use(
    trace_of: TraceOf, prompts: list[list[int]], factor: int, multiple: int, more_bytes: int
) -> None:
    block, step = 2 * factor, 2 * factor * multiple
    trace = trace_of(prompts, 2)
    least = splits_of(trace, block, step, 1)
    assert isinstance(least, int)
    memory_bytes = least + more_bytes
    splits = splits_of(trace, block, step, memory_bytes)
    assert isinstance(splits, Splits)
    totals = split_totals(trace, stack_distances(trace, [block, step]), block, step, splits, COST)
    prompt_tokens = trace.prompt_tokens
    for index, num_slots in enumerate(range(splits.first, splits.last + 1)):
        cell = config(block, step, memory_bytes, num_slots)
        replayed = replay(trace, cell).totals
        assert replayed.snapshots is not None
        assert totals.hit_tokens[index] == replayed.usable_hit_tokens
        assert totals.snapshots_taken[index] == replayed.snapshots.taken
        known = known_by_request(prompts, block, step, splits.num_pages(num_slots), num_slots)
        expected = COST.plain_ns(prompt_tokens) - COST.reuse_ns(prompt_tokens, trace.prompt_tokens * 0 + known, step)
        assert totals.saved_ns[index] == expected.sum()


@settings(max_examples=60, deadline=None)
@given(prompts=prompts_of_few_tokens, factor=st.integers(1, 3), more_pages=st.integers(0, 12))
def test_without_ssm_layers_the_one_split_is_all_pages(
    trace_of: TraceOf, prompts: list[list[int]], factor: int, more_pages: int
) -> None:
    block = 2 * factor
    trace = trace_of(prompts, 2)
    memory_bytes = (max(map(len, prompts)) // block + 1 + more_pages) * block * KV_BYTES
    splits = splits_of(trace, block, block, memory_bytes, slot_bytes=0)
    assert isinstance(splits, Splits)
    assert splits.num_splits == 1
    cost = PrefillCost(DEVICE, "chunked", 100, 0, attention_flops_per_pair=4, snapshot_bytes=0)
    totals = split_totals(trace, stack_distances(trace, [block]), block, block, splits, cost)
    assert totals.hit_tokens.tolist() == [replay(trace, config(block, None, memory_bytes, 0)).totals.usable_hit_tokens]
    known = trace.prompt_tokens * 0 + known_by_request(prompts, block, block, splits.num_pages(0), None)
    expected = cost.plain_ns(trace.prompt_tokens) - cost.reuse_ns(trace.prompt_tokens, known, block)
    assert totals.saved_ns.tolist() == [expected.sum()]
    assert totals.snapshots_taken.tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(prompts=prompts_of_few_tokens, multiple=st.integers(1, 4))
def test_unlimited_memory_is_the_infinite_cache_and_the_last_word_of_a_large_one(
    trace_of: TraceOf, prompts: list[list[int]], multiple: int
) -> None:
    trace, step = trace_of(prompts, 2), 2 * multiple
    distances = stack_distances(trace, [2, step])
    hit_tokens, saved_ns = unlimited_totals(trace, distances, step, COST)
    assert hit_tokens == infinite_cache(trace, step).tokens.sum()
    splits = splits_of(trace, 2, step, 1_000_000)
    assert isinstance(splits, Splits)
    totals = split_totals(trace, distances, 2, step, splits, COST)
    middle = splits.num_splits // 2
    assert (totals.hit_tokens[middle], totals.saved_ns[middle]) == (hit_tokens, saved_ns)


@pytest.mark.parametrize(("block", "interval"), [(2, 2), (2, 6), (4, 8)])
@pytest.mark.parametrize("more_bytes", [0, 1, 17, 200])
def test_the_splits_are_those_that_the_grid_is_exact_for(
    trace_of: TraceOf, block: int, interval: int, more_bytes: int
) -> None:
    trace = trace_of([list(range(21)), [1, 2]], 2)
    least = splits_of(trace, block, interval, 1)
    assert isinstance(least, int)
    assert splits_of(trace, block, interval, least - 1) == least
    splits = splits_of(trace, block, interval, least + more_bytes)
    assert isinstance(splits, Splits)
    exact = [
        num_slots
        for num_slots in range(1, (least + more_bytes - 1) // SLOT_BYTES + 1)
        if least + more_bytes - num_slots * SLOT_BYTES >= block * KV_BYTES  # a manager needs a page
        and not isinstance(grid_capacity(trace, config(block, interval, least + more_bytes, num_slots)), str)
    ]
    assert exact == list(range(splits.first, splits.last + 1))
