"""Admission `last` in the simulator: what the grid claims of it equals replays through the manager, and a sweep tells
the admissions apart.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import KVCacheManagerConfig
from ssmcache.models import load_model
from ssmcache_sim.errors import SettingsError, UserError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.grid import stack_distances
from ssmcache_sim.grid_cells import EXACT_LAST, GridCapacity, grid_capacity, grid_totals
from ssmcache_sim.grid_last import snapshots_keep_their_kv
from ssmcache_sim.hit_depth import last_hit_depths
from ssmcache_sim.phase_cells import phase_cells
from ssmcache_sim.plots import directory_figures
from ssmcache_sim.replay import replay
from ssmcache_sim.report import write_report
from ssmcache_sim.results import RunTimes
from ssmcache_sim.settings import build_config, make_settings, parse_admissions
from ssmcache_sim.sweep import PlannedCell, SweepSpec, plan_sweep, run_sweep
from ssmcache_sim.sweep_details import write_details
from ssmcache_sim.sweep_results import begin_sweep, finish_sweep, load_sweep
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
TinyConfig = Callable[..., KVCacheManagerConfig]
GIB = 1 << 30
TOKENS = (
    "tree_hit_tokens", "attention_hit_tokens", "usable_hit_tokens", "kv_ceiling_hit_tokens", "ceiling_hit_tokens",
    "lost_evicted_tokens", "lost_alignment_tokens", "lost_snapshot_tokens",
)  # fmt: skip
stretches = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 16)), min_size=1, max_size=4)
branching_prompts = st.lists(
    stretches.map(lambda parts: [token for token, length in parts for _ in range(length)]), min_size=1, max_size=30
)


def last(config: KVCacheManagerConfig) -> KVCacheManagerConfig:
    return replace(config, admission="last")


def claimed_equals_replay(trace: Trace, config: KVCacheManagerConfig) -> bool:
    """Whether the grid claims the cell; if so it has every token of the replay."""
    trace = trace.with_block(config.tokens_per_block)
    capacity = grid_capacity(trace, config)
    if isinstance(capacity, str):
        return False
    (by_grid,) = grid_totals(trace, [(config, capacity)])
    replayed = replay(trace, config)
    for name in TOKENS:
        assert getattr(by_grid, name) == getattr(replayed.totals, name), name
    depths = last_hit_depths(
        trace, stack_distances(trace, [config.tokens_per_block, config.ssm_reuse_interval]), config, capacity
    )
    assert depths.hit_tokens.tolist() == replayed.usable.tolist()
    return True


def test_cells_that_the_grid_claims_equal_their_replays(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    claims: list[bool] = []

    @settings(max_examples=300, deadline=None)
    @given(
        prompts=branching_prompts,
        factor=st.integers(1, 2),
        multiple=st.integers(1, 3),
        more_pages=st.integers(0, 60),
        num_states=st.integers(1, 10),
    )
    def check(prompts: list[list[int]], factor: int, multiple: int, more_pages: int, num_states: int) -> None:
        block = 2 * factor
        num_pages = max(map(len, prompts)) // block + 1 + more_pages
        config = tiny_config(block, num_pages=num_pages, interval=block * multiple, num_states=num_states)
        claims.append(claimed_equals_replay(trace_of(prompts, 2), last(config)))

    check()
    assert 0.2 < np.mean(claims) < 0.95, "some of both"


@settings(max_examples=100, deadline=None)
@given(prompts=branching_prompts, multiple=st.integers(1, 3), num_pages=st.integers(30, 80), states=st.integers(2, 9))
def test_both_ways_of_prefill_hit_the_same(
    trace_of: TraceOf, tiny_config: TinyConfig, prompts: list[list[int]], multiple: int, num_pages: int, states: int
) -> None:
    config = last(tiny_config(2, num_pages=num_pages, interval=2 * multiple, num_states=states))
    trace = trace_of(prompts, 2)
    reserved, chunked = (replay(trace, config, prefill=prefill) for prefill in ("reserved", "chunked"))
    assert reserved.usable.tolist() == chunked.usable.tolist()
    assert reserved.totals.snapshots == chunked.totals.snapshots


def test_a_snapshot_that_outlives_its_kv_is_the_case_that_is_not_claimed(
    trace_of: TraceOf, tiny_config: TinyConfig
) -> None:
    a, b = [0] * 8, [1] * 8
    trace = trace_of([a, b, [*a, 2], [*a, 2]], 2)
    # 4 blocks hold one of the two; by the grid's rules the snapshot of `a` outlives its KV and is there when it is back
    config = last(tiny_config(2, num_pages=5, interval=8, num_states=3))
    assert (
        grid_capacity(trace, config)
        == "last boundaries: a snapshot may lose its KV before its own turn, and goes with it"
    )
    assert not snapshots_keep_their_kv(trace, 8, 4, 2)
    assert snapshots_keep_their_kv(trace, 8, 8, 2)
    assert snapshots_keep_their_kv(trace, 8, 8, 1)
    assert claimed_equals_replay(trace, last(tiny_config(2, num_pages=9, interval=8, num_states=3)))


def test_a_pool_of_the_live_state_alone_is_replayed(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    trace = trace_of([[0] * 8] * 2, 2)
    config = last(tiny_config(2, num_pages=9, interval=4, num_states=1))
    assert grid_capacity(trace, config) == "no room for a snapshot beside the live state"
    assert replay(trace, config).totals.usable_hit_tokens == 0


@pytest.mark.shared
def test_few_snapshots_are_worth_more_at_last_boundaries_only_through_the_manager(
    conversation: Trace, tiny_config: TinyConfig
) -> None:
    """Published for 1,600 snapshots every 512 tokens: 5.1 % with every boundary kept, 32.4 % with the last one only."""
    config = tiny_config(512, num_pages=conversation.num_keys + 1, interval=512, num_states=1601)
    rates = [replay(conversation, each).totals.usable_token_hit_rate for each in (config, last(config))]
    assert [f"{rate:.1%}" for rate in rates] == ["5.1%", "32.4%"]
    assert claimed_equals_replay(conversation, last(config))


@pytest.mark.shared
def test_twenty_cells_of_the_conversation_trace_equal_their_replays_where_they_are_claimed(
    conversation: Trace, tiny_config: TinyConfig
) -> None:
    shapes = [(512, 512), (512, 2048), (1024, 1024), (1024, 4096), (2048, 4096)]
    pools = [(20_000, 100), (40_000, 300), (60_000, 1500), (200_000, 9000)]
    claims = [
        claimed_equals_replay(
            conversation, last(tiny_config(block, num_pages=pages, interval=interval, num_states=states))
        )
        for (block, interval), (pages, states) in product(shapes, pools)
    ]
    assert 10 <= sum(claims) <= 20


@pytest.mark.shared
def test_twenty_cells_of_conversations_with_sub_agents_equal_their_replays_where_they_are_claimed(
    shared_traces: Path, tiny_config: TinyConfig
) -> None:
    weka = read_trace(shared_traces / "weka_claude_code_small60.jsonl.xz")
    shapes = [(64, 512), (64, 4096), (128, 1024), (256, 512), (512, 2048)]
    pools = [(5000, 10), (20_000, 100), (100_000, 700), (400_000, 5000)]
    claims = [
        claimed_equals_replay(weka, last(tiny_config(block, num_pages=pages, interval=interval, num_states=states)))
        for (block, interval), (pages, states) in product(shapes, pools)
    ]
    assert 8 <= sum(claims) <= 20


# ---- phase ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(prompts=branching_prompts, num_pages=st.integers(40, 200), num_states=st.integers(2, 10))
def test_shifted_cells_equal_replays_of_shifted_prompts(
    trace_of: TraceOf, tiny_config: TinyConfig, prompts: list[list[int]], num_pages: int, num_states: int
) -> None:
    trace, interval = trace_of(prompts, 2), 6
    config = last(tiny_config(2, num_pages=num_pages, interval=interval, num_states=num_states))
    capacity = grid_capacity(trace, config)
    setting = make_settings(
        load_model("marconi-7b"), 2, gpu_memory_bytes=None, ssm_reuse_interval=interval, admission="last"
    )
    cell = PlannedCell(setting, config, Path("unused"), capacity if isinstance(capacity, GridCapacity) else None, "")
    for one in phase_cells(trace, [cell], lambda done: None):
        longer = [[7] * one.shift_tokens + prompt for prompt in prompts]
        usable = replay(trace_of(longer, 2), config).usable
        assert one.own_hit_tokens == int(np.maximum(usable - one.shift_tokens, 0).sum())


# ---- sweep ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(sample_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of both admissions."""
    path = tmp_path_factory.mktemp("admission") / "s"
    trace, model = read_trace(sample_path), load_model("nemotron-h-8b")
    spec = SweepSpec((512,), (1024, 4096), (160 * GIB, 320 * GIB, None), admissions=("every", "last"))
    plan = plan_sweep(spec, trace, model, path)
    manifest = begin_sweep(path, spec, trace, model)
    cells = run_sweep(trace, plan, 1, lambda done: None)
    write_details(path, spec, trace, model, list(zip(plan.cells, cells, strict=True)), None)
    finish_sweep(path, manifest, cells, plan.skipped, RunTimes("now", 1.0))
    return path


def test_a_sweep_has_a_cell_for_each_admission_and_says_who_made_it_and_why(swept: Path) -> None:
    run = load_sweep(swept)
    cells = run.cells
    assert run.manifest["settings"]["admission"] == ["every", "last"]
    assert cells["admission"].tolist() == (["every"] * 3 + ["last"] * 3) * 2
    unlimited = cells[cells["gpu_memory_bytes"].isna() & (cells["admission"] == "last")]
    assert set(unlimited["engine"]) == {"grid"}
    assert set(unlimited["engine_reason"]) == {EXACT_LAST}
    # unlimited memory does not give what was never kept
    assert (unlimited["usable_hit_tokens"] < unlimited["ceiling_hit_tokens"]).all()
    others = cells[cells["admission"] == "last"]
    for reason in others[others["engine"] == "replay"]["engine_reason"]:
        assert reason == "last boundaries: a snapshot may lose its KV before its own turn, and goes with it"


def test_every_cell_of_a_sweep_of_both_admissions_equals_its_replay(swept: Path, sample_path: Path) -> None:
    trace, model = read_trace(sample_path), load_model("nemotron-h-8b")
    cells = load_sweep(swept).cells
    sizes = [int(size) or None for size in cells["gpu_memory_bytes"].fillna(0)]
    for row, size in zip(cells.to_dict("records"), sizes, strict=True):
        setting = make_settings(
            model,
            512,
            gpu_memory_bytes=size,
            ssm_reuse_interval=int(row["ssm_reuse_interval"]),
            admission=row["admission"],
        )
        totals = replay(trace, build_config(model, setting)).totals
        assert totals.usable_hit_tokens == row["usable_hit_tokens"]
        assert totals.lost_snapshot_tokens == row["lost_snapshot_tokens"]


def test_pictures_show_one_admission_each_and_say_which(swept: Path) -> None:
    figures = dict(directory_figures(swept))
    names = {"heat_map", "hit_rate_block_512", "lost_tokens_block_512", "hit_depth_block_512"}
    assert names | {f"{name}_last" for name in names} <= figures.keys()
    assert "split_plane_block_512_last" not in figures
    for name, figure in figures.items():
        title = figure.get_suptitle()
        assert ("last boundary of each request only" in title) == name.endswith("_last")
    cells = load_sweep(swept).cells
    for admission, suffix in (("every", ""), ("last", "_last")):
        (axes,) = figures[f"hit_rate_block_512{suffix}"].axes
        drawn = {rate for line in axes.lines for rate in line.get_ydata() if line.get_marker() == "o"}
        shown = cells[(cells["admission"] == admission) & cells["gpu_memory_bytes"].notna()]
        assert drawn == set(shown["usable_token_hit_rate"])


def test_the_report_names_the_admission_and_explores_every_boundary_alone(swept: Path) -> None:
    page = write_report(swept).read_text()
    assert "4096, last boundary only" in page
    data = json.loads(page.partition('<script type="application/json" id="cells">')[2].partition("</script>")[0])
    every = load_sweep(swept).cells.query("admission == 'every'")
    of_model = [row for row in data["rows"] if row[:4] == ["nemotron-h-8b", 512, 4096, 320 * GIB]]
    wanted = every[(every["ssm_reuse_interval"] == 4096) & (every["gpu_memory_bytes"] == 320 * GIB)]
    assert [row[data["columns"].index("usable")] for row in of_model] == wanted["usable_hit_tokens"].tolist()


def test_without_ssm_layers_there_is_no_admission(sample_path: Path, tmp_path: Path) -> None:
    spec = SweepSpec((512,), (512,), (40 * GIB,), admissions=("every", "last"))
    plan = plan_sweep(spec, read_trace(sample_path), load_model("llama-3.1-8b"), tmp_path)
    assert [cell.settings.admission for cell in plan.cells] == [None]


def test_an_arena_keeps_every_boundary(sample_path: Path, tmp_path: Path) -> None:
    spec = SweepSpec((512,), (512,), (None,), pools="arena", admissions=("every", "last"))
    with pytest.raises(UserError, match="admission: expected every for an arena, got every, last"):
        plan_sweep(spec, read_trace(sample_path), load_model("marconi-7b"), tmp_path)


def test_lists_of_admissions_are_read_in_one_order() -> None:
    assert parse_admissions("last, every,last") == ("every", "last")
    with pytest.raises(SettingsError, match="admission: expected every or last, got ''"):
        parse_admissions("every,")
