"""Runs without files show what the commands write, and the package's public names load nothing that is not used."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import ssmcache_sim
from ssmcache.models import load_model
from ssmcache_cli.main import app
from ssmcache_sim import (
    Question,
    UserError,
    load_run,
    load_sweep,
    make_settings,
    parse_size,
    read_trace,
    recommend_run,
    replay_run,
    sweep_run,
)
from ssmcache_sim.parquet import read_parquet
from ssmcache_sim.plots import rendered, replay_figures, sweep_figures, trace_figure
from ssmcache_sim.trace import Trace

GIB = 1 << 30
MODEL = "nemotron-h-8b"


@pytest.fixture(scope="module")
def trace(sample_path: Path) -> Trace:
    return read_trace(sample_path)


@pytest.fixture(scope="module")
def command(sample_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs a command on the sample; the directory that it wrote."""

    def run(name: str, *options: str) -> Path:
        out = tmp_path_factory.mktemp("out") / "result"
        arguments = [name, str(sample_path), "--model", MODEL, "--out", str(out), "--quiet", *options]
        app(arguments, standalone_mode=False)
        return out

    return run


def same_frames(left: Any, right: Any) -> None:
    pd.testing.assert_frame_equal(left, right, check_exact=True)


def without_times(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name != "run"}


def pictures(figures: Any) -> dict[str, bytes]:
    return {name: rendered(figure, "svg") for name, figure in figures}


@pytest.mark.parametrize("tiers", [{}, {"host_memory_bytes": 100 * GIB, "disk_memory_bytes": 500 * GIB}])
def test_a_replay_in_memory_is_what_the_command_writes(
    trace: Trace, command: Callable[..., Path], tiers: dict[str, int]
) -> None:
    options = ["--host-memory", "100GiB", "--disk-memory", "500GiB"] if tiers else []
    written = load_run(command("replay", "--gpu-memory", "40GiB", "--ssm-reuse-interval", "2048", *options))
    settings = make_settings(load_model(MODEL), 512, gpu_memory_bytes=40 * GIB, ssm_reuse_interval=2048, **tiers)
    run = replay_run(trace, load_model(MODEL), settings)
    assert run.settings == settings == written.settings
    assert (run.manifest, run.totals) == (without_times(written.manifest), written.totals)
    same_frames(run.per_request, written.per_request)
    assert pictures(replay_figures(run)) == pictures(replay_figures(written))


def test_a_sweep_in_memory_is_what_the_command_writes_but_for_the_explorer(
    trace: Trace, command: Callable[..., Path]
) -> None:
    # 300 is no multiple of the block, 8 GiB is too little for the grid: a cell is left out, another is replayed
    options = ["--ssm-reuse-interval", "300,2048,4096", "--gpu-memory", "8GiB,80GiB,unlimited", "--phase"]
    written = load_sweep(command("sweep", *options))
    sizes = (8 * GIB, 80 * GIB, None)
    run = sweep_run(trace, load_model(MODEL), ssm_reuse_intervals=(300, 2048, 4096), gpu_memory_bytes=sizes, phase=True)
    assert {*run.cells["engine"]} == {"grid", "replay"}
    assert run.manifest == without_times(written.manifest)
    assert len(run.manifest["skipped"]) == 3
    same_frames(run.cells, written.cells)
    for name in ("planes", "splits", "hit_depths", "phases"):
        same_frames(getattr(run.details, name), getattr(written.details, name))
    assert run.details.explorer is None
    assert pictures(sweep_figures(run)) == pictures(sweep_figures(written))


def test_a_recommendation_in_memory_is_what_the_command_writes(trace: Trace, command: Callable[..., Path]) -> None:
    written = command("recommend", "--gpu-memory", "320GiB")
    run = recommend_run(trace, load_model(MODEL), Question(gpu_memory_bytes=320 * GIB))
    same_frames(run.choices, read_parquet(written / "settings.parquet"))
    for _, alike in run.choices.groupby(run.choices["known_by"] == "estimate"):  # estimates come after what is exact
        assert alike["saved_share"].is_monotonic_decreasing
    assert run.choices["ssm_reuse_interval"].iloc[0] == run.answer.best.settings.ssm_reuse_interval
    assert len(run.cases) == len(run.answer.certainty.cases)


def test_the_best_cells_are_the_best_of_each_memory_size(trace: Trace) -> None:
    sizes = (None, 320 * GIB, 80 * GIB)
    run = sweep_run(trace, load_model(MODEL), ssm_reuse_intervals=(512, 2048, 8192), gpu_memory_bytes=sizes)
    cells = run.cells.fillna({"gpu_memory_bytes": -1})
    best = run.best().fillna({"gpu_memory_bytes": -1})
    assert best["gpu_memory_bytes"].tolist() == [80 * GIB, 320 * GIB, -1]
    for size, hits in zip(best["gpu_memory_bytes"], best["usable_hit_tokens"], strict=True):
        assert hits == cells.loc[cells["gpu_memory_bytes"] == size, "usable_hit_tokens"].max()


def test_a_sweep_of_nothing_possible_says_why(trace: Trace) -> None:
    with pytest.raises(UserError, match="multiple of tokens_per_block"):
        sweep_run(trace, load_model(MODEL), ssm_reuse_intervals=(300,), gpu_memory_bytes=(80 * GIB,))


def test_a_notebook_shows_a_figure_as_a_picture_always_the_same(trace: Trace) -> None:
    from IPython.core.formatters import PNGFormatter

    first, second = (PNGFormatter()(trace_figure(trace)) for _ in range(2))
    assert first == second
    assert first.startswith(b"\x89PNG")


def test_every_public_name_is_there_and_no_other() -> None:
    for name in ssmcache_sim.__all__:
        assert getattr(ssmcache_sim, name).__name__ == name
        assert name in dir(ssmcache_sim)
    assert sorted(ssmcache_sim._MODULE_OF) == ssmcache_sim.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ssmcache_sim.nothing


def test_the_package_imports_nothing_before_it_is_used() -> None:
    code = (
        "import sys, ssmcache_sim; dir(ssmcache_sim)\n"
        "print([name for name in sys.modules if name.startswith('ssmcache_sim.')])\n"
        "ssmcache_sim.sweep_run, ssmcache_sim.recommend_run, ssmcache_sim.load_run\n"
        "print([name for name in ('pandas', 'matplotlib', 'pyarrow', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "[]"]
    assert parse_size("1GiB") == GIB
