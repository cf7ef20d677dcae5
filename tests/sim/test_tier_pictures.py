"""Pictures of sweeps and replays with host and disk tiers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssmcache.models import load_model
from ssmcache_sim.formats import read_trace
from ssmcache_sim.plots import plot_directory, replay_figures, sweep_figures
from ssmcache_sim.replay import replay
from ssmcache_sim.results import RunTimes, load_run, replay_directory, replay_manifest, write_replay
from ssmcache_sim.settings import build_config, make_settings
from ssmcache_sim.sweep import SweepSpec, plan_sweep, run_sweep
from ssmcache_sim.sweep_results import SweepRun, begin_sweep, finish_sweep, load_sweep

GIB = 1 << 30
TIMES = RunTimes("now", 1.0)


def make_sweep(sample_path: Path, path: Path, model: str, **tiers: Any) -> SweepRun:
    trace, spec = read_trace(sample_path), load_model(model)
    sweep = SweepSpec((512,), (2048,), (20 * GIB, 40 * GIB), **tiers)
    plan = plan_sweep(sweep, trace, spec, path)
    manifest = begin_sweep(path, sweep, trace, spec)
    finish_sweep(path, manifest, run_sweep(trace, plan, 1, lambda done: None), plan.skipped, TIMES)
    return load_sweep(path)


@pytest.fixture(scope="module")
def swept(sample_path: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepRun:
    path = tmp_path_factory.mktemp("plots") / "sweep"
    return make_sweep(
        sample_path, path, "llama-3.1-8b", host_memory_bytes=(0, 50 * GIB, 200 * GIB), disk_memory_bytes=100 * GIB
    )


def test_the_bars_are_the_hit_rates_by_tier_and_end_at_the_whole_rate(swept: SweepRun) -> None:
    figure = dict(sweep_figures(swept))["hit_rate_by_tier_block_512"]
    assert "by tier against host memory" in figure.get_suptitle()
    for axes, gpu_gib in zip(figure.axes, (20, 40), strict=True):
        assert axes.get_title() == f"GPU {gpu_gib} GiB, no SSM layers"
        assert axes.get_xlabel() == "host memory (GiB)"
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["none", "50", "200"]
        cells = swept.cells[swept.cells["gpu_memory_bytes"] == gpu_gib * GIB].sort_values("host_memory_bytes")
        for bars, tier in zip(axes.containers, ("gpu", "host", "disk"), strict=True):
            rates = cells[f"usable_token_hit_rate_{tier}"].fillna(0).tolist()
            assert [bar.get_height() for bar in bars] == pytest.approx(rates)
        tops = [bar.get_y() + bar.get_height() for bar in axes.containers[-1]]
        assert tops == pytest.approx(cells["usable_token_hit_rate"].tolist())
        assert axes.containers[1][2].get_height() > 0
        assert [line.get_ydata()[0] for line in axes.lines] == [cells["ceiling_token_hit_rate"].iloc[0]]


def test_cells_of_the_gpu_alone_are_all_gpu_and_a_hybrid_has_two_ceilings(sample_path: Path, tmp_path: Path) -> None:
    run = make_sweep(sample_path, tmp_path / "s", "marconi-7b", host_memory_bytes=(0, 100 * GIB))
    axes = dict(sweep_figures(run))["hit_rate_by_tier_block_512"].axes[1]
    assert axes.get_title() == "GPU 40 GiB, interval 2048"
    gpu, host = axes.containers
    alone, with_host = run.cells.iloc[2], run.cells.iloc[3]
    assert (gpu[0].get_height(), host[0].get_height()) == (alone["usable_token_hit_rate"], 0)
    assert host[1].get_height() == with_host["usable_token_hit_rate_host"] > 0
    ceilings = [alone["ceiling_token_hit_rate"], alone["kv_ceiling_token_hit_rate"]]
    assert [line.get_ydata()[0] for line in axes.lines] == ceilings


def test_pictures_against_gpu_memory_are_those_at_the_most_host_memory_and_say_so(swept: SweepRun) -> None:
    figure = dict(sweep_figures(swept))["hit_rate_block_512"]
    assert "llama-3.1-8b, host 200 GiB, disk 100 GiB" in figure.get_suptitle()
    most = swept.cells[swept.cells["host_memory_bytes"] == 200 * GIB]
    assert list(figure.axes[0].lines[0].get_ydata()) == most["usable_token_hit_rate"].tolist()


def test_without_other_tiers_nothing_is_drawn_by_tier(sample_path: Path, tmp_path: Path) -> None:
    run = make_sweep(sample_path, tmp_path / "s", "llama-3.1-8b")
    assert not [name for name, _ in sweep_figures(run) if "tier" in name]


def test_the_same_sweep_gives_the_same_pictures(sample_path: Path, tmp_path: Path) -> None:
    make_sweep(sample_path, tmp_path / "s", "llama-3.1-8b", disk_memory_bytes=100 * GIB)
    written = plot_directory(tmp_path / "s")
    assert "hit_rate_by_tier_block_512.png" in [path.name for path in written]
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in plot_directory(tmp_path / "s")] == first


def test_a_replay_s_hits_are_drawn_by_tier(sample_path: Path, tmp_path: Path) -> None:
    trace, spec = read_trace(sample_path), load_model("nemotron-h-8b")
    setting = make_settings(spec, 512, ssm_reuse_interval=2048, gpu_memory_bytes=40 * GIB, host_memory_bytes=200 * GIB)
    with replay_directory(tmp_path / "run") as folder:
        write_replay(folder, replay(trace, build_config(spec, setting)), replay_manifest(trace, setting), TIMES)
    run = load_run(tmp_path / "run")
    figures = dict(replay_figures(run))
    assert "GPU memory of the cache over time" in figures["memory_over_time"].get_suptitle()
    lost = figures["lost_tokens_over_time"]
    assert "GPU 40 GiB, host 200 GiB" in lost.get_suptitle()
    bars = {container.get_label().partition(" (")[0]: container for container in lost.axes[0].containers}
    heights = [
        sum(bar.get_height() for bar in bars[f"hit: pages {where}"]) for where in ("on the GPU", "in host memory")
    ]
    assert heights == pytest.approx([tier.usable_hit_tokens / 1e6 for tier in run.totals.tiers])
    assert np.all(np.array(heights) > 0)
