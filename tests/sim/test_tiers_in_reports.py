"""Phases, hit depths and the page of results with host and disk tiers."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import DiskCacheTierConfig, HostCacheTierConfig, KVCacheManagerConfig
from ssmcache.models import load_model
from ssmcache_sim.engines import choose_engine
from ssmcache_sim.formats import read_trace
from ssmcache_sim.grid import stack_distances
from ssmcache_sim.grid_cells import GridCapacity
from ssmcache_sim.hit_depth import hit_depths
from ssmcache_sim.phase import shifted
from ssmcache_sim.phase_cells import phase_cells
from ssmcache_sim.plots import plot_directory
from ssmcache_sim.replay import replay
from ssmcache_sim.report import report_page
from ssmcache_sim.results import RunTimes, replay_directory, replay_manifest, write_replay
from ssmcache_sim.settings import ReplaySettings, build_config, make_settings
from ssmcache_sim.sweep import PlannedCell, SweepSpec, plan_sweep, run_sweep
from ssmcache_sim.sweep_details import write_details
from ssmcache_sim.sweep_results import begin_sweep, finish_sweep
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
TinyConfig = Callable[..., KVCacheManagerConfig]
GIB = 1 << 30
TIMES = RunTimes("now", 1.0)
stretches = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 12)), min_size=1, max_size=4)
branching_prompts = st.lists(
    stretches.map(lambda parts: [token for token, length in parts for _ in range(length)]), min_size=1, max_size=20
)


@settings(max_examples=100, deadline=None)
@given(
    prompts=branching_prompts,
    more_pages=st.integers(0, 6),
    host_blocks=st.integers(1, 15),
    disk_blocks=st.integers(0, 9),
)
def test_phases_and_depths_of_the_grid_count_the_hits_of_all_tiers(
    trace_of: TraceOf,
    tiny_config: TinyConfig,
    prompts: list[list[int]],
    more_pages: int,
    host_blocks: int,
    disk_blocks: int,
) -> None:
    trace, block = trace_of(prompts, 2), 4
    largest = max(map(len, prompts)) // block + 1  # of the shifted prompts, too
    tiers = [HostCacheTierConfig((host_blocks + largest) * block)]
    tiers += [DiskCacheTierConfig(disk_blocks * block, "nowhere")] if disk_blocks else []
    config = tiny_config(block, num_pages=largest + more_pages + 1)
    config = replace(config, cache_tiers=(*config.cache_tiers, *tiers))
    capacity, _ = choose_engine("separate", "auto", trace.with_block(block), config)
    assert isinstance(capacity, GridCapacity)
    depths = hit_depths(stack_distances(trace, [block]), block, None, capacity)
    assert int(depths.hit_tokens.sum()) == replay(trace, config).totals.usable_hit_tokens
    cell = PlannedCell(
        ReplaySettings("tiny", block, None, None, None, "", "", "reserved"), config, Path(), capacity, ""
    )
    found = phase_cells(trace, [cell], lambda done: None)
    assert [each.engine for each in found] == ["grid", "grid"]
    for each in found:
        usable = replay(shifted(trace, each.shift_tokens), config).usable
        assert each.own_hit_tokens == sum(max(tokens - each.shift_tokens, 0) for tokens in usable.tolist())


def make_sweep(sample_path: Path, path: Path, model: str, **tiers: Any) -> Path:
    trace, spec = read_trace(sample_path), load_model(model)
    sweep = SweepSpec((512,), (2048,), (20 * GIB, 40 * GIB), **tiers)
    plan = plan_sweep(sweep, trace, spec, path)
    manifest = begin_sweep(path, sweep, trace, spec)
    cells = run_sweep(trace, plan, 1, lambda done: None)
    write_details(path, sweep, trace, spec, list(zip(plan.cells, cells, strict=True)), None)
    finish_sweep(path, manifest, cells, plan.skipped, TIMES)
    return path


@pytest.mark.parametrize("model", ["llama-3.1-8b", "marconi-7b"])
def test_the_page_names_the_tiers_of_each_cell_and_explores_those_of_the_gpu_alone(
    sample_path: Path, tmp_path: Path, model: str
) -> None:
    path = make_sweep(sample_path, tmp_path / "s", model, host_memory_bytes=(0, 100 * GIB))
    page = report_page(path)
    for size in ("20 GiB", "20 GiB, host 100 GiB", "40 GiB", "40 GiB, host 100 GiB"):
        assert page.count(f">{size}<") == 2  # best of each memory, and every cell
    (data,) = re.findall(r'<script type="application/json" id="cells">(.*?)</script>', page, re.DOTALL)
    rows = [tuple(row[:4]) for row in json.loads(data)["rows"]]
    assert len(set(rows)) == len(rows), "one cell for each model, block, interval and memory"
    assert "With the GPU alone, without host memory and disk." in page
    assert "hit_rate_by_tier_block_512.png" in [picture.name for picture in plot_directory(path)]


def test_the_page_of_a_sweep_without_a_cell_of_the_gpu_alone_has_no_empty_explorer(
    sample_path: Path, tmp_path: Path
) -> None:
    path = make_sweep(sample_path, tmp_path / "s", "marconi-7b", host_memory_bytes=(100 * GIB,))
    page = report_page(path)
    assert "No cells of the GPU alone" in page
    assert 'id="cells"' not in page


def test_the_page_of_a_replay_splits_hits_peaks_and_moves_by_tier(sample_path: Path, tmp_path: Path) -> None:
    trace, spec = read_trace(sample_path), load_model("nemotron-h-8b")
    setting = make_settings(spec, 512, ssm_reuse_interval=2048, gpu_memory_bytes=40 * GIB, host_memory_bytes=100 * GIB)
    result = replay(trace, build_config(spec, setting))
    with replay_directory(tmp_path / "run") as folder:
        write_replay(folder, result, replay_manifest(trace, setting), TIMES)
    page = report_page(tmp_path / "run")
    for tier in result.totals.tiers:
        assert f"of these, pages on: {tier.tier}" in page
        assert f">{tier.usable_hit_tokens:,}<" in page
    for words in ("host: attention (layer group 0)", "gpu to host: attention", "40 GiB, host 100 GiB"):
        assert words in page
