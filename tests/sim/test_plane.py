"""Planes, splits, depths and the explorer's cells against replays through the manager."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import GpuCacheTierConfig, KVCacheManagerConfig
from ssmcache.models import load_model, preset_names
from ssmcache_sim.explorer import explorer_cells
from ssmcache_sim.formats import read_trace
from ssmcache_sim.grid import stack_distances
from ssmcache_sim.grid_cells import GridCapacity, grid_capacity
from ssmcache_sim.hit_depth import PERCENTS, HitDepths, hit_depths
from ssmcache_sim.plane import FRACTIONS, NUM_SIZES, memory_steps, split_plane, splits, used_bytes
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import build_config, make_settings
from ssmcache_sim.sweep import SweepSpec
from ssmcache_sim.trace import Trace

GIB = 1 << 30
TraceOf = Callable[..., Trace]
TinyConfig = Callable[..., KVCacheManagerConfig]
# prompts that part and come back often, so that pools as small as the largest of them must evict
prompts_of_few_paths = st.lists(
    st.builds(
        lambda path, length: ([9] * 5 + [path % 3] * 6 + [path] * 15)[:length], st.integers(0, 8), st.integers(3, 26)
    ),
    min_size=1,
    max_size=30,
)

places = st.tuples(st.integers(0, NUM_SIZES - 1), st.integers(0, NUM_SIZES - 1))


@settings(max_examples=60, deadline=None)
@given(prompts=prompts_of_few_paths, multiple=st.integers(1, 3), data=st.data())
def test_a_point_of_the_plane_is_a_replay_with_that_many_pages_and_states(
    trace_of: TraceOf, tiny_config: TinyConfig, prompts: list[list[int]], multiple: int, data: st.DataObject
) -> None:
    trace, interval, unit = trace_of(prompts, 2), 2 * multiple, 30
    config = tiny_config(2, num_pages=unit, interval=interval, num_states=unit)  # pages and states of the same bytes
    slot_bytes = 2 * unit
    plane = split_plane(trace, stack_distances(trace, [2, interval]), config, 40 * slot_bytes)
    assert plane is not None
    assert plane.hit_tokens.shape == (NUM_SIZES, NUM_SIZES)
    longest = max(map(len, prompts))
    assert (plane.kv_bytes[0], plane.kv_bytes[-1]) == ((longest // 2 + 1) * slot_bytes, 40 * slot_bytes)
    assert (plane.ssm_bytes[0], plane.ssm_bytes[-1]) == ((longest // interval + 1) * slot_bytes, 40 * slot_bytes)
    for row, column in ((0, NUM_SIZES - 1), (NUM_SIZES - 1, 0), *data.draw(st.lists(places, max_size=3))):
        num_pages, num_states = int(plane.kv_bytes[row]) // slot_bytes, int(plane.ssm_bytes[column]) // slot_bytes
        expected = replay(trace, tiny_config(2, num_pages=num_pages, interval=interval, num_states=num_states))
        assert plane.hit_tokens[row, column] == expected.totals.usable_hit_tokens


def test_no_plane_where_the_largest_request_fits_into_no_pool(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    trace = trace_of([[1] * 20], 2)
    config = tiny_config(2, num_pages=30, interval=2, num_states=30)
    distances = stack_distances(trace, [2])
    assert split_plane(trace, distances, config, 11 * 60) is None
    assert split_plane(trace, distances, config, 12 * 60) is not None


def test_each_split_is_the_replay_of_that_memory_and_fraction(sample_path: Path) -> None:
    trace, spec = read_trace(sample_path), load_model("nemotron-h-8b")
    config = build_config(spec, make_settings(spec, 512, ssm_reuse_interval=2048, gpu_memory_bytes=100 * GIB))
    found = splits(trace, stack_distances(trace, [512, 2048]), config, [60 * GIB, 150 * GIB])
    assert {split.memory_bytes for split in found} == {60 * GIB, 150 * GIB}
    assert len({split.hit_tokens for split in found}) > 20
    for split in found[::13]:
        tiers = (GpuCacheTierConfig(split.memory_bytes),)
        divided = replace(config, cache_tiers=tiers, ssm_fraction=split.ssm_fraction)
        assert replay(trace, divided).totals.usable_hit_tokens == split.hit_tokens
        assert used_bytes(divided) == (split.kv_bytes, split.ssm_bytes)
        assert split.kv_bytes + split.ssm_bytes <= split.memory_bytes
    left_out = set(FRACTIONS) - {split.ssm_fraction for split in found if split.memory_bytes == 60 * GIB}
    for fraction in left_out:
        divided = replace(config, cache_tiers=(GpuCacheTierConfig(60 * GIB),), ssm_fraction=fraction)
        assert isinstance(grid_capacity(trace, divided), str)


def test_memory_steps_keep_the_sizes_given_and_fill_the_range() -> None:
    assert memory_steps([100, 10_000, 700], 3) == [100, 700, 1000, 10_000]
    assert memory_steps([64], 24) == [64]


@settings(max_examples=150, deadline=None)
@given(
    prompts=prompts_of_few_paths,
    factor=st.integers(1, 3),
    multiple=st.integers(0, 3),
    more_pages=st.sampled_from([0, 1, 2, 3, 5, 30]),
    more_states=st.sampled_from([0, 1, 2, 3, 30]),
)
def test_hit_depths_are_those_of_a_replay(
    trace_of: TraceOf,
    tiny_config: TinyConfig,
    prompts: list[list[int]],
    factor: int,
    multiple: int,
    more_pages: int,
    more_states: int,
) -> None:
    trace, block = trace_of(prompts, 2), 2 * factor
    interval = block * multiple or None
    longest = max(map(len, prompts))
    num_pages, num_states = longest // block + 1 + more_pages, longest // (interval or 1) + 1 + more_states
    config = tiny_config(block, num_pages=num_pages, interval=interval, num_states=num_states)
    usable = replay(trace, config).usable
    capacity = GridCapacity(num_pages - 1, None if interval is None else num_states - 1)
    depths = hit_depths(stack_distances(trace, {block, interval or block}), block, interval, capacity)
    pairs = sorted(zip(depths.hit_tokens.tolist(), depths.prompt_tokens.tolist(), strict=True))
    expected = sorted(zip(usable.tolist(), map(len, prompts), strict=True))
    assert [pair for pair in pairs if pair[0]] == [pair for pair in expected if pair[0]]
    assert len(pairs) <= len(prompts)
    tokens, shares = depths.quantiles(len(prompts))
    ordered = np.sort(usable)
    for percent, depth in zip(PERCENTS, tokens.tolist(), strict=True):
        assert (ordered <= depth).mean() * 100 >= percent - 1e-9
        assert depth in ordered
    assert shares[-1] == max(hits / length for hits, length in zip(usable.tolist(), map(len, prompts), strict=True))


def test_depths_of_nothing_found_are_zeros() -> None:
    none = np.zeros(0, dtype=np.int64)
    tokens, shares = HitDepths(none, none).quantiles(3)
    assert not tokens.any()
    assert not shares.any()


def test_the_explorer_has_every_preset_that_the_grid_can_do_and_its_cells_are_replays(sample_path: Path) -> None:
    trace, spec = read_trace(sample_path), load_model("qwen3-next-80b-a3b")
    sweep = SweepSpec((512, 1024), (1024, 2048), (60 * GIB, 240 * GIB, None))
    cells = explorer_cells(sweep, trace, spec)
    models = list(dict.fromkeys(setting.model for setting, _ in cells))
    assert models[0] == spec.name
    assert set(preset_names()) - set(models) == {"mamba2-2.7b"}  # no attention: must be replayed
    sizes = sorted({setting.gpu_memory_bytes or 0 for setting, _ in cells})
    assert {0, 60 * GIB, 240 * GIB} <= set(sizes)
    assert len(sizes) == 25
    for setting, totals in cells[:: len(cells) // 9]:
        replayed = replay(trace, build_config(load_model(setting.model), setting)).totals
        assert replace(totals, snapshots=replayed.snapshots, peaks=replayed.peaks) == replayed


def test_explorer_without_possible_cells_is_empty(sample_path: Path) -> None:
    trace, spec = read_trace(sample_path), load_model("nemotron-h-8b")
    assert explorer_cells(SweepSpec((512,), (512,), (1 << 20,)), trace, spec) == []
