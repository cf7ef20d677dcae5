"""Outputs in replays and in the grid: against an engine that decodes token by token, and lists in order of use."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import (
    AttentionLayerConfig,
    BufferConfig,
    DiskCacheTierConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    KVCacheManager,
    KVCacheManagerConfig,
    SimulatedMemory,
    SsmLayerConfig,
)
from ssmcache.memory.bandwidths import BandwidthProfile
from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.cost import PrefillCost
from ssmcache_sim.device_profile import DeviceProfile
from ssmcache_sim.errors import MemoryTooSmallError
from ssmcache_sim.formats import ReadOptions, read_trace
from ssmcache_sim.grid import UNLIMITED, attention_hits, hybrid_hits, stack_distances
from ssmcache_sim.grid_arena import arena_hits
from ssmcache_sim.grid_cells import GridCapacity, grid_capacity, grid_totals
from ssmcache_sim.grid_last import last_boundaries, last_hits
from ssmcache_sim.hit_depth import hit_depths
from ssmcache_sim.measured import estimate
from ssmcache_sim.phase import shifted
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import Prefill
from ssmcache_sim.splits import Splits, possible_splits, split_totals, unlimited_totals
from ssmcache_sim.trace import Trace

Pairs = list[tuple[list[int], list[int]]]
WithOutputs = Callable[[Pairs, int], Trace]
TinyConfig = Callable[..., KVCacheManagerConfig]
BLOCK = 2


@st.composite
def conversations(draw: st.DrawFn, answered_anew: bool = False) -> Pairs:
    """Requests that go on from an earlier one, with its output or a part of it, that repeat one, or begin anew.
    `answered_anew`: no two outputs begin with the same token.
    """
    stretches = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 12)), max_size=3).map(
        lambda parts: [token for token, length in parts for _ in range(length)]
    )
    pairs: Pairs = []
    for _ in range(draw(st.integers(1, 25))):
        prompt: list[int] = []
        if pairs:
            prompt, output = draw(st.sampled_from(pairs))
            match draw(st.integers(0, 5)):
                case 0:
                    prompt = []
                case 1:  # the same again, answer and all
                    pairs.append((prompt, [len(pairs) + 9, *output[1:]] if answered_anew else output))
                    continue
                case 2:
                    prompt = (prompt + output)[: draw(st.integers(0, 40))]
                case _:
                    prompt = prompt + output
        prompt = (prompt + draw(stretches))[:90] or [0]
        pairs.append((prompt, [*[len(pairs) + 9] * answered_anew, *draw(stretches)]))
    return pairs


def token_by_token(trace: Trace, config: KVCacheManagerConfig, prefill: str) -> tuple[list[int], list[list[int]]]:
    """Usable tokens of each request, and slots in use after it by layer group, of an engine that has room for one more
    token at each step, and offers a block as soon as it is full.
    """
    manager = KVCacheManager(config, memory=SimulatedMemory())
    block = trace.tokens_per_block
    usable, used = [], []
    for index, path in enumerate(trace.paths()):
        num_prompt = int(trace.prompt_tokens[index])
        kv = manager.create_kv_cache(path[: num_prompt - 1])
        assert kv.resume()
        assert kv.resize(num_prompt + 1)
        usable.append(kv.num_committed_tokens // block * block)
        if config.has_ssm and prefill == "reserved":
            kv.reserve_snapshots(kv.snapshot_points(num_prompt))
        for end in kv.snapshot_points(num_prompt) if prefill == "chunked" else ():
            kv.commit(path[kv.num_committed_tokens : end])
        kv.commit(path[kv.num_committed_tokens : num_prompt])
        for end in range(num_prompt + 1, path.stop + 1):
            assert kv.resize(end)
            kv.commit(path[end - 1 : end])
        assert kv.resize(path.stop + 1)
        kv.close()
        used.append([manager.used_slots(group) for group in range(len(manager.layer_grouping))])
    manager.check()
    return usable, [list(slots) for slots in zip(*used, strict=True)]


def with_lower_tiers(config: KVCacheManagerConfig, host_pages: int, disk_pages: int) -> KVCacheManagerConfig:
    """Of attention alone; 0: no such tier."""
    page_bytes = config.layers[0].buffers[0].size
    host = (HostCacheTierConfig(host_pages * page_bytes),) if host_pages else ()
    disk = (DiskCacheTierConfig(disk_pages * page_bytes, "simulated"),) if disk_pages else ()
    return replace(config, cache_tiers=(*config.cache_tiers, *host, *disk))


def windowed(num_pages: int, interval: int | None) -> KVCacheManagerConfig:
    """Full attention and a sliding window, pages of equal size; with SSM layers where there is an interval."""
    buffers = (BufferConfig("key", 8),)
    layers: tuple[AttentionLayerConfig | SsmLayerConfig, ...] = (
        AttentionLayerConfig(0, buffers),
        AttentionLayerConfig(1, buffers, sliding_window_size=5),
    )
    if interval is not None:
        layers += (SsmLayerConfig(2, (BufferConfig("ssm_state", 8),)),)
    return KVCacheManagerConfig(BLOCK, layers, (GpuCacheTierConfig(8 * num_pages * len(layers)),), interval or BLOCK)


def assert_as_token_by_token(trace: Trace, config: KVCacheManagerConfig) -> None:
    for prefill in get_args(Prefill):
        usable, used = token_by_token(trace, config, prefill)
        result = replay(trace, config, prefill=prefill)
        assert result.usable.tolist() == usable
        assert (result.usable <= result.ceiling).all()
        slot_bytes = [layer.buffers[0].size for layer in config.layers]
        assert (result.used_bytes // np.array(slot_bytes)[:, np.newaxis]).tolist() == used


@settings(max_examples=100, deadline=None)
@given(
    pairs=conversations(),
    multiple=st.integers(1, 4),
    more_pages=st.integers(0, 40),
    more_states=st.integers(0, 15),
    host_pages=st.integers(0, 12),
    disk_pages=st.integers(0, 12),
)
def test_a_replay_does_what_an_engine_does_token_by_token(
    trace_with_outputs: WithOutputs,
    tiny_config: TinyConfig,
    pairs: Pairs,
    multiple: int,
    more_pages: int,
    more_states: int,
    host_pages: int,
    disk_pages: int,
) -> None:
    trace, interval = trace_with_outputs(pairs, BLOCK), BLOCK * multiple
    num_pages = trace.longest_path // BLOCK + 1 + more_pages
    num_states = trace.longest_path // interval + 1 + more_states
    attention = tiny_config(BLOCK, num_pages=num_pages)
    assert_as_token_by_token(trace, attention)
    assert_as_token_by_token(trace, with_lower_tiers(attention, host_pages, disk_pages))
    hybrid = tiny_config(BLOCK, num_pages=num_pages, interval=interval, num_states=num_states)
    assert_as_token_by_token(trace, hybrid)
    few_states = tiny_config(BLOCK, num_pages=num_pages, interval=interval, num_states=1 + more_states)
    assert_as_token_by_token(trace, few_states)


@settings(max_examples=60, deadline=None)
@given(pairs=conversations(), more_pages=st.integers(0, 30), multiple=st.none() | st.integers(1, 4))
def test_windowed_layers_decode_block_by_block(
    trace_with_outputs: WithOutputs, pairs: Pairs, more_pages: int, multiple: int | None
) -> None:
    trace = trace_with_outputs(pairs, BLOCK)
    num_pages = trace.longest_path // BLOCK + 4 + more_pages
    config = windowed(num_pages, None if multiple is None else BLOCK * multiple)
    assert_as_token_by_token(trace, config)


def runs(first: int, *lengths: int) -> list[int]:
    """Stretches of ones and zeros in turn."""
    return [token for index, length in enumerate(lengths) for token in [(first + index) % 2] * length]


def test_window_pages_go_stale_while_a_request_decodes(trace_with_outputs: WithOutputs) -> None:
    # pages for a whole output at once push out one page more than those taken one by one: found by search
    pairs: Pairs = [
        *[(runs(1, 6, 4), runs(1, 6, 2))] * 3,
        (runs(1, 6, 4, 1, 10), runs(0, 8, 11)),
        (runs(1, 6, 4, 6, 2, 12), runs(0, 19)),
        (runs(1, 10), runs(0, 13)),
        (runs(1, 6, 4, 1, 18, 11, 11), []),
        (runs(1, 10, 13), runs(0, 6)),
        (runs(1, 10, 13), []),
    ]
    assert_as_token_by_token(trace_with_outputs(pairs, BLOCK), windowed(29, 4))


@settings(max_examples=100, deadline=None)
@given(
    pairs=conversations(),
    multiple=st.integers(1, 4),
    more_pages=st.integers(0, 40),
    more_states=st.integers(0, 15),
    host_pages=st.integers(1, 12),
    disk_pages=st.integers(0, 12),
)
def test_every_cell_of_the_grid_equals_a_replay(
    trace_with_outputs: WithOutputs,
    tiny_config: TinyConfig,
    pairs: Pairs,
    multiple: int,
    more_pages: int,
    more_states: int,
    host_pages: int,
    disk_pages: int,
) -> None:
    trace, interval = trace_with_outputs(pairs, BLOCK), BLOCK * multiple
    num_pages = trace.longest_path // BLOCK + 1 + more_pages
    num_states = trace.longest_path // interval + 1 + more_states
    attention = tiny_config(BLOCK, num_pages=num_pages)
    tiers = with_lower_tiers(attention, host_pages, disk_pages)
    hybrid = tiny_config(BLOCK, num_pages=num_pages, interval=interval, num_states=num_states)
    configs = [attention, tiers, hybrid]
    capacities = [grid_capacity(trace, config) for config in configs]
    cells = [(config, one) for config, one in zip(configs, capacities, strict=True) if isinstance(one, GridCapacity)]
    assert len(cells) == len(configs)
    distances = stack_distances(trace, [BLOCK, interval])
    for (config, capacity), totals in zip(cells, grid_totals(trace, cells), strict=True):
        result = replay(trace, config)
        replayed = result.totals
        assert replace(totals, peaks=(), tiers=(), moved=(), snapshots=None) == replace(
            replayed, tree_hit_tokens=totals.tree_hit_tokens, peaks=(), tiers=(), moved=(), snapshots=None
        )
        assert [tier.usable_hit_tokens for tier in totals.tiers] == [tier.usable_hit_tokens for tier in replayed.tiers]
        depths = hit_depths(distances, BLOCK, interval if config.has_ssm else None, capacity)
        assert sorted(depths.hit_tokens[depths.hit_tokens > 0]) == sorted(result.usable[result.usable > 0])


@settings(max_examples=80, deadline=None)
@given(pairs=conversations(), factor=st.integers(1, 3), multiple=st.integers(1, 3))
def test_every_cell_equals_lists_in_order_of_use(
    trace_with_outputs: WithOutputs, pairs: Pairs, factor: int, multiple: int
) -> None:
    block, interval = BLOCK * factor, BLOCK * factor * multiple
    trace = trace_with_outputs(pairs, BLOCK)
    distances, found = stack_distances(trace, [block, interval]), last_boundaries(trace, interval)
    longest = trace.longest_path
    capacities = [longest // block + more for more in (0, 1, 5, 20)] + [UNLIMITED]
    snapshots = [longest // interval + 1 + more for more in (0, 1, 4)] + [UNLIMITED]

    def expected(only_last: bool) -> list[list[int]]:
        sizes = (block, interval)
        return [[in_order_of_use(pairs, *sizes, kv, states, only_last) for states in snapshots] for kv in capacities]

    assert hybrid_hits(distances, block, interval, capacities, snapshots).tolist() == expected(only_last=False)
    assert last_hits(distances, found, block, capacities, snapshots).tolist() == expected(only_last=True)
    budgets = [8 * (longest // block + more) for more in (1, 3, 9, 40)]
    arena = arena_hits(distances, block, interval, 3, 5, budgets)
    assert arena.usable.tolist() == [arena_in_order_of_use(pairs, block, interval, budget) for budget in budgets]


def test_cells_of_last_boundaries_that_the_grid_claims_equal_their_replays(
    trace_with_outputs: WithOutputs, tiny_config: TinyConfig
) -> None:
    claims: list[str] = []

    @settings(max_examples=300, deadline=None)
    @given(
        pairs=st.booleans().flatmap(conversations),
        multiple=st.integers(1, 3),
        more_pages=st.integers(0, 100),
        num_states=st.integers(2, 9),
    )
    def check(pairs: Pairs, multiple: int, more_pages: int, num_states: int) -> None:
        trace, interval = trace_with_outputs(pairs, BLOCK), BLOCK * multiple
        num_pages = trace.longest_path // BLOCK + 1 + more_pages
        config = tiny_config(BLOCK, num_pages=num_pages, interval=interval, num_states=num_states)
        config = replace(config, admission="last")
        capacity = grid_capacity(trace, config)
        claims.append(capacity if isinstance(capacity, str) else "")
        if isinstance(capacity, str):
            return
        (totals,) = grid_totals(trace, [(config, capacity)])
        result = replay(trace, config)
        ignored = {"peaks": (), "tiers": (), "moved": (), "snapshots": None}
        assert replace(totals, **ignored) == replace(result.totals, **ignored)
        distances, found = stack_distances(trace, [BLOCK, interval]), last_boundaries(trace, interval)
        estimated = estimate(trace, distances, config, found, (1, 1))
        assert estimated.start_tokens.tolist() == result.usable.tolist()
        assert result.totals.snapshots is not None
        assert estimated.snapshots_taken == result.totals.snapshots.taken

    check()
    reasons = {reason: claims.count(reason) for reason in set(claims)}
    assert reasons[""] > 20
    assert len(reasons) == 4, reasons


def test_an_output_that_comes_to_a_boundary_of_an_earlier_request_is_the_case_that_is_not_claimed(
    trace_with_outputs: WithOutputs, tiny_config: TinyConfig
) -> None:
    pairs: Pairs = [([3] * 5, []), ([1], [2] * 12), ([4] * 5, []), ([1], [2] * 12), ([3] * 5, [])]
    trace = trace_with_outputs(pairs, BLOCK)
    # 12 is there when the same answer is decoded again; 4 and 8, which are not, take a slot in turn until then
    config = replace(tiny_config(BLOCK, num_pages=60, interval=4, num_states=4), admission="last")
    assert grid_capacity(trace, config) == "last boundaries: an output comes to a boundary that an earlier request kept"
    assert replay(trace, config).usable.tolist() == [0] * 5
    assert in_order_of_use(pairs, BLOCK, 4, 59, 3, only_last=True) == 4
    new = trace_with_outputs(pairs[:3], BLOCK)
    assert isinstance(grid_capacity(new, config), GridCapacity)
    one_snapshot = replace(tiny_config(BLOCK, num_pages=60, interval=4, num_states=2), admission="last")
    expected = "no room for the snapshots of a prompt and its output beside the live state"
    assert grid_capacity(new, one_snapshot) == expected


def in_order_of_use(pairs: Pairs, block: int, interval: int, blocks: int, states: int, only_last: bool) -> int:
    """Usable tokens of all requests, from lists of blocks and of snapshots with the latest ones in front."""
    kept_blocks: list[tuple[int, ...]] = []
    kept_states: list[tuple[int, ...]] = []
    total = 0
    for prompt, output in pairs:
        path = prompt + output[:-1]
        has = 0
        while has + block < len(prompt) and tuple(path[: has + block]) in kept_blocks:
            has += block
        ends = [end for end in range(interval, has + 1, interval) if tuple(path[:end]) in kept_states]
        total += max(ends, default=0)
        new = [tuple(path[:end]) for end in range(block, len(path) + 1, block)]
        kept_blocks = (new + [one for one in kept_blocks if one not in new])[:blocks]
        new = [tuple(path[:end]) for end in range(interval, len(path) + 1, interval)]
        if only_last:  # of the prompt in front of that of its output
            new = list(dict.fromkeys(new[: len(prompt) // interval][-1:] + new[-1:]))
        kept_states = (new + [one for one in kept_states if one not in new])[:states]
    return total


def arena_in_order_of_use(pairs: Pairs, block: int, interval: int, budget: int) -> int:
    """The same of one list of pages of 3 bytes and snapshots of 5, the snapshot behind the page of its block."""
    kept: list[tuple[int, tuple[int, ...]]] = []
    total = 0
    for prompt, output in pairs:
        path = prompt + output[:-1]
        usable = 0
        for end in range(interval, len(prompt), interval):
            if (5, tuple(path[:end])) in kept and (3, tuple(path[:end])) in kept:
                usable = end
        total += usable
        new = []
        for end in range(block, len(path) + 1, block):
            new.append((3, tuple(path[:end])))
            if end % interval == 0:
                new.append((5, tuple(path[:end])))
        kept = new + [one for one in kept if one not in new]
        used = np.cumsum([size for size, _ in kept])
        kept = kept[: int(np.searchsorted(used, budget, side="right"))]
    return total


DEVICE = DeviceProfile("slow", 2e9, 0.5, BandwidthProfile(0.5e9), launch_seconds=7e-9, pass_tokens=5, pass_seconds=1e-6)
COST = PrefillCost(DEVICE, "chunked", 100, 10, attention_flops_per_pair=4, snapshot_bytes=50)


@settings(max_examples=60, deadline=None)
@given(pairs=conversations(), multiple=st.integers(1, 3), more_bytes=st.integers(0, 150))
def test_every_split_equals_a_replay_and_saves_the_prefill_of_prompts_alone(
    trace_with_outputs: WithOutputs, pairs: Pairs, multiple: int, more_bytes: int
) -> None:
    trace, step = trace_with_outputs(pairs, BLOCK), BLOCK * multiple
    kv_bytes, slot_bytes = 6, 13

    def split(memory_bytes: int) -> Splits | int:
        sizes = {"tokens_per_block": BLOCK, "page_bytes": kv_bytes, "slot_bytes": slot_bytes}
        return possible_splits(trace.longest_path, step, memory_bytes, **sizes)

    least = split(1)
    assert isinstance(least, int)
    splits = split(least + more_bytes)
    assert isinstance(splits, Splits)
    distances = stack_distances(trace, [BLOCK, step])
    totals = split_totals(trace, distances, BLOCK, step, splits, COST)
    layers = (
        AttentionLayerConfig(0, (BufferConfig("key", kv_bytes),)),
        SsmLayerConfig(1, (BufferConfig("ssm_state", slot_bytes),)),
    )
    for index, num_slots in enumerate(range(splits.first, splits.last + 1)):
        tier = GpuCacheTierConfig(splits.memory_bytes)
        fraction = num_slots * slot_bytes / splits.memory_bytes
        result = replay(trace, KVCacheManagerConfig(BLOCK, layers, (tier,), step, ssm_fraction=fraction))
        assert result.totals.snapshots is not None
        assert totals.hit_tokens[index] == result.totals.usable_hit_tokens
        assert totals.snapshots_taken[index] == result.totals.snapshots.taken
    hit_tokens, saved_ns = unlimited_totals(trace, distances, step, COST)
    ceiling = infinite_cache(trace, step).tokens
    assert hit_tokens == ceiling.sum()
    # a prompt whose very end is a boundary that is known takes no snapshot there, though its last token is computed
    prompts = trace.prompt_tokens
    known = np.array(known_boundaries(pairs, step), dtype=np.int64)
    expected = COST.plain_ns(prompts) - COST.reuse_ns(prompts, known, step)
    assert saved_ns == expected.sum()
    huge = split(1_000_000)
    assert isinstance(huge, Splits)
    middle = split_totals(trace, distances, BLOCK, step, huge, COST).saved_ns[huge.num_splits // 2]
    assert middle == saved_ns


def known_boundaries(pairs: Pairs, step: int) -> list[int]:
    """By request the deepest multiple of the step within its prompt that an earlier path has."""
    left: set[tuple[int, ...]] = set()
    known = []
    for prompt, output in pairs:
        path = prompt + output[:-1]
        known.append(max((end for end in range(step, len(prompt) + 1, step) if tuple(path[:end]) in left), default=0))
        left |= {tuple(path[:end]) for end in range(step, len(path) + 1, step)}
    return known


@settings(max_examples=60, deadline=None)
@given(pairs=conversations(), shift=st.integers(1, 5))
def test_a_shift_puts_tokens_in_front_of_prompts_and_their_outputs(
    trace_with_outputs: WithOutputs, pairs: Pairs, shift: int
) -> None:
    in_front = [([7] * (BLOCK * shift) + prompt, output) for prompt, output in pairs]
    moved, expected = shifted(trace_with_outputs(pairs, BLOCK), BLOCK * shift), trace_with_outputs(in_front, BLOCK)
    assert np.array_equal(moved.path_tokens, expected.path_tokens)
    assert np.array_equal(infinite_cache(moved, 4).tokens, infinite_cache(expected, 4).tokens)


def test_a_request_is_too_large_where_its_output_does_not_fit(
    trace_with_outputs: WithOutputs, tiny_config: TinyConfig
) -> None:
    trace = trace_with_outputs([([0] * 6, [1] * 2), ([0] * 6, [1] * 20), ([0] * 6 + [1] * 4, [])], BLOCK)
    result = replay(trace, tiny_config(BLOCK, num_pages=8))
    assert result.too_large.tolist() == [False, True, False]
    assert result.usable.tolist() == [0, 0, 6]
    assert result.kv_ceiling.tolist() == [0, 4, 8]
    too_small = "the largest request (25 tokens) does not fit into the KV pool"
    assert grid_capacity(trace, tiny_config(BLOCK, num_pages=12)) == too_small
    assert isinstance(grid_capacity(trace, tiny_config(BLOCK, num_pages=13)), GridCapacity)
    with pytest.raises(MemoryTooSmallError, match="for the shortest request"):
        replay(trace_with_outputs([([0] * 2, [1] * 20)], BLOCK), tiny_config(BLOCK, num_pages=8))


def test_outputs_that_nobody_goes_on_from_take_memory(trace_with_outputs: WithOutputs, tiny_config: TinyConfig) -> None:
    pairs: Pairs = [([0] * 8, [1] * 9), ([2] * 8, [3] * 9), ([0] * 9, [])]
    enough, short = (tiny_config(BLOCK, num_pages=number) for number in (17, 16))
    trace = trace_with_outputs(pairs, BLOCK)
    assert replay(trace, enough).usable.tolist() == [0, 0, 8]
    assert replay(trace, short).usable.tolist() == [0, 0, 8]  # the output goes first, from its end
    assert replay(trace, tiny_config(BLOCK, num_pages=12)).usable.tolist() == [0, 0, 6]
    assert replay(trace.without_outputs(), tiny_config(BLOCK, num_pages=12)).usable.tolist() == [0, 0, 8]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "outputs_add_tokens"),
    [
        ("sharegpt_derived_blk16.jsonl.xz", 609_888),
        ("exgentic_tau2_retail_blk16.jsonl.xz", None),
        ("weka_claude_code_small60.jsonl.xz", None),
        ("llmservingsim_sharegpt_llama31_tokens.jsonl.xz", None),
    ],
)
def test_cells_of_real_traces_equal_their_replays(
    shared_traces: Path, tiny_config: TinyConfig, name: str, outputs_add_tokens: int | None
) -> None:
    trace = read_trace(shared_traces / name, options=ReadOptions(outputs=True))
    block = trace.tokens_per_block
    ceiling = infinite_cache(trace, None).kv_tokens
    added = ceiling - infinite_cache(trace.without_outputs(), None).kv_tokens
    assert (added >= 0).all()
    assert outputs_add_tokens in (None, added.sum())
    longest = trace.longest_path
    shapes = [(block, 8 * block), (2 * block, 16 * block), (4 * block, 4 * block)]
    distances = stack_distances(trace, {size for shape in shapes for size in shape})
    for size, interval in shapes:
        for share in (1, 4):
            num_pages, num_states = share * (longest // size + 1), share * (longest // interval + 1)
            config = tiny_config(size, num_pages=num_pages, interval=interval, num_states=num_states)
            totals = replay(trace, config).totals
            plane = hybrid_hits(distances, size, interval, [num_pages - 1], [num_states - 1])
            assert plane.tolist() == [[totals.usable_hit_tokens]], (size, interval, share)
            assert attention_hits(distances, size, [num_pages - 1]).tolist() == [totals.attention_hit_tokens]
    unlimited = replay(trace, tiny_config(block, num_pages=None, interval=8 * block, num_states=0))
    assert np.array_equal(unlimited.usable, infinite_cache(trace, 8 * block).tokens)
    assert np.array_equal(unlimited.attention, ceiling)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("capacity", "prompts_only", "with_outputs"), [(10_000_000, "27.8%", "27.3%"), (None, "35.0%", "35.0%")]
)
def test_decoding_leaves_the_last_boundaries_of_prompts(
    shared_traces: Path,
    tiny_config: TinyConfig,
    capacity: int | None,
    prompts_only: str,
    with_outputs: str,
) -> None:
    """The conversation trace names no sessions, so nobody looks up what is decoded: it costs the memory that it takes,
    and no prompt its snapshot.
    """
    trace = read_trace(shared_traces / "mooncake_conversation.jsonl.gz", options=ReadOptions(outputs=True))
    slots = trace.num_keys if capacity is None else capacity // 512
    config = replace(tiny_config(512, num_pages=slots + 1, interval=512, num_states=slots + 1), admission="last")
    totals = [replay(each, config).totals for each in (trace.without_outputs(), trace)]
    assert [f"{each.usable_token_hit_rate:.1%}" for each in totals] == [prompts_only, with_outputs]
    grid = grid_capacity(trace, config)
    if isinstance(grid, GridCapacity):
        (by_grid,) = grid_totals(trace, [(config, grid)])
        assert by_grid.lost_snapshot_by_cause == totals[1].lost_snapshot_by_cause
        assert by_grid.usable_hit_tokens == totals[1].usable_hit_tokens
    assert isinstance(grid, GridCapacity) == (capacity is None)
