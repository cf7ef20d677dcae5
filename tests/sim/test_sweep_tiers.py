"""Sweeps over sizes of host memory: by the grid where it is exact, else by replay."""

from dataclasses import replace
from pathlib import Path

import pytest

from ssmcache.models import load_model
from ssmcache_sim.errors import UserError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.grid_cells import EXACT
from ssmcache_sim.replay import replay
from ssmcache_sim.results import RunTimes
from ssmcache_sim.settings import build_config
from ssmcache_sim.sweep import SweepPlan, SweepSpec, SweptCell, plan_sweep, run_sweep
from ssmcache_sim.sweep_results import begin_sweep, finish_sweep, load_sweep
from ssmcache_sim.totals import ReplayTotals
from ssmcache_sim.trace import Trace

GIB = 1 << 30
TIMES = RunTimes("now", 1.0)
DENSE, HYBRID = load_model("llama-3.1-8b"), load_model("marconi-7b")
HOST_SIZES = (0, 200 * GIB, 1 * GIB, 20 * GIB)


@pytest.fixture(scope="module")
def trace(sample_path: Path) -> Trace:
    return read_trace(sample_path)


@pytest.fixture
def spec(sample_path: Path) -> SweepSpec:
    return SweepSpec((512,), (2048,), (None, 40 * GIB, 20 * GIB), host_memory_bytes=HOST_SIZES)


def run(
    spec: SweepSpec, trace: Trace, path: Path, model: str = "llama-3.1-8b"
) -> tuple[SweepPlan, tuple[SweptCell, ...]]:
    plan = plan_sweep(spec, trace, load_model(model), path)
    manifest = begin_sweep(path, spec, trace, load_model(model))
    cells = run_sweep(trace, plan, 1, lambda done: None)
    finish_sweep(path, manifest, cells, plan.skipped, TIMES)
    return plan, cells


def sums(totals: ReplayTotals) -> tuple[dict[str, object], list[tuple[str, int]]]:
    tokens = {name: value for name, value in totals.to_json().items() if name.endswith(("tokens", "requests", "rate"))}
    return tokens, [(tier.tier, tier.usable_hit_tokens) for tier in totals.tiers]


@pytest.mark.parametrize("disk_bytes", [0, 300 * GIB])
def test_the_grid_counts_the_tokens_of_each_tier_as_the_replay_does(
    spec: SweepSpec, trace: Trace, tmp_path: Path, disk_bytes: int
) -> None:
    spec = replace(spec, disk_memory_bytes=disk_bytes, gpu_memory_bytes=(40 * GIB, 20 * GIB))
    _, cells = run(spec, trace, tmp_path / "s")
    names = ("gpu", "host", "disk") if disk_bytes else ("gpu", "host")
    for cell in cells:
        replayed = replay(trace, build_config(DENSE, cell.settings)).totals
        assert sums(cell.totals) == sums(replayed), cell.settings
        if cell.settings.host_memory_bytes and cell.engine == "grid":
            assert tuple(tier.tier for tier in cell.totals.tiers) == names
            assert (cell.totals.moved, cell.totals.peaks) == (None, ())
    # also with 1 GiB of host memory: its 16 pages are fewer than the largest request pushes out, the rest goes on
    assert {(cell.engine, cell.reason) for cell in cells} == {("grid", EXACT)}


def test_cells_come_by_gpu_then_by_host_and_say_what_cannot_be(spec: SweepSpec, trace: Trace, tmp_path: Path) -> None:
    plan, _ = run(spec, trace, tmp_path / "s")
    run_read = load_sweep(tmp_path / "s")
    sizes = run_read.cells[["gpu_memory_bytes", "host_memory_bytes"]].fillna(-1).to_numpy().tolist()
    in_order = [[gpu * GIB, host * GIB] for gpu in (20, 40) for host in (0, 1, 20, 200)]
    assert sizes == [*in_order, [-1, 0]]
    assert {cell.settings.host_memory_bytes for cell in plan.skipped} == {GIB, 20 * GIB, 200 * GIB}
    assert all(cell.reason.startswith("host memory: expected none below unlimited") for cell in plan.skipped)
    assert run_read.manifest["skipped"][0]["host_memory_bytes"] == GIB
    assert run_read.manifest["settings"]["host_memory_bytes"] == sorted(HOST_SIZES)


def test_a_hybrid_with_tiers_is_replayed_and_says_why(spec: SweepSpec, trace: Trace, tmp_path: Path) -> None:
    spec = replace(spec, gpu_memory_bytes=(40 * GIB,), host_memory_bytes=(0, 100 * GIB))
    plan, cells = run(spec, trace, tmp_path / "s", "marconi-7b")
    assert [cell.engine for cell in cells] == ["grid", "replay"]
    assert cells[1].reason.startswith("snapshots are read on the tier where they lie")
    assert cells[1].totals == replay(trace, build_config(HYBRID, cells[1].settings)).totals
    assert len(plan_sweep(spec, trace, HYBRID, tmp_path / "s").finished) == 1
    # another size of host memory, or a disk, is another cell
    for other in (replace(spec, host_memory_bytes=(50 * GIB,)), replace(spec, disk_memory_bytes=GIB)):
        assert not plan_sweep(other, trace, HYBRID, tmp_path / "s").finished
    assert not plan.finished


def test_the_rows_have_hits_peaks_and_moves_by_tier_only_where_there_are_tiers(
    spec: SweepSpec, trace: Trace, tmp_path: Path
) -> None:
    spec = replace(spec, gpu_memory_bytes=(40 * GIB,), host_memory_bytes=(0, 100 * GIB), engine="replay")
    _, (alone, cell) = run(spec, trace, tmp_path / "s", "marconi-7b")
    frame = load_sweep(tmp_path / "s").cells
    by_tier = frame[["usable_hit_tokens_gpu", "usable_hit_tokens_host"]]
    assert by_tier.iloc[0].isna().all()
    assert by_tier.iloc[1].sum() == frame["usable_hit_tokens"].iloc[1]
    moved = cell.totals.moved
    assert moved
    down = [each for each in moved if (each.source_tier, each.tier) == ("gpu", "host")]
    assert frame["moved_bytes_gpu_to_host"].iloc[1] == sum(each.num_bytes for each in down) > 0
    assert frame["moved_slots_gpu_to_host"].iloc[1] == sum(each.num_slots for each in down)
    assert "moved_slots_host_to_host" not in frame
    assert frame["peak_bytes_host"].iloc[1] == sum(peak.peak_bytes for peak in cell.totals.tiers[1].peaks)
    run(replace(spec, host_memory_bytes=(0,)), trace, tmp_path / "alone", "marconi-7b")
    without = load_sweep(tmp_path / "alone").cells
    assert not [name for name in without if name.startswith("moved_") or name.endswith(("_gpu", "_host"))]
    assert alone.totals.tiers == ()


def test_the_same_sweep_gives_the_same_bytes(spec: SweepSpec, trace: Trace, tmp_path: Path) -> None:
    spec = replace(spec, gpu_memory_bytes=(40 * GIB,), host_memory_bytes=(0, 100 * GIB), disk_memory_bytes=100 * GIB)
    for name in "ab":
        run(spec, trace, tmp_path / name, "marconi-7b")
    assert (tmp_path / "a" / "cells.parquet").read_bytes() == (tmp_path / "b" / "cells.parquet").read_bytes()


def test_a_host_without_room_for_a_slot_is_skipped_or_where_nothing_else_is_left_an_error(
    spec: SweepSpec, trace: Trace, tmp_path: Path
) -> None:
    plan = plan_sweep(replace(spec, host_memory_bytes=(1, 20 * GIB)), trace, DENSE, tmp_path)
    assert {cell.reason.partition(":")[0] for cell in plan.skipped} == {"host memory too small", "host memory"}
    spec = replace(spec, gpu_memory_bytes=(20 * GIB,), host_memory_bytes=(1,))
    with pytest.raises(UserError, match="no combination of the sweep is possible; the first: host memory too small: "):
        plan_sweep(spec, trace, DENSE, tmp_path)


@pytest.mark.parametrize("tiers", [{"host_memory_bytes": (0, GIB)}, {"disk_memory_bytes": GIB}])
def test_an_arena_is_one_tier(spec: SweepSpec, trace: Trace, tmp_path: Path, tiers: dict[str, object]) -> None:
    spec = replace(spec, **{"pools": "arena", "host_memory_bytes": (0,), **tiers})
    with pytest.raises(UserError, match="host and disk memory: expected none for an arena"):
        plan_sweep(spec, trace, HYBRID, tmp_path)
