import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from ssmcache_sim.sweep_results import load_sweep

RunHere = Callable[..., tuple[int, str, str]]
MODEL = ("--model", "nemotron-h-8b")
SMALL = (*MODEL, "--gpu-memory", "50GiB:200GiB:2,unlimited", "--ssm-reuse-interval", "512:2048:x2", "--jobs", "1")


def test_a_sweep_prints_the_best_of_each_memory_size_and_keeps_its_cells(
    run_here: RunHere, sample: str, tmp_path: Path
) -> None:
    command = ("sweep", sample, *SMALL, "--tokens-per-block", "512,1024", "--out", tmp_path / "s")
    command = (*command, "--engine", "replay")
    code, out, err = run_here(*command)
    assert code == 0
    assert err == (
        "skipped 3 of the combinations: ssm_reuse_interval: expected a multiple of tokens_per_block (1024), got 512\n"
    )
    rows = [line.split() for line in out.splitlines()]
    assert ["unlimited", "512", "512", "21.55%", "21.55%"] in rows
    assert ["unlimited", "0.00%", "0.00%", "0.00%", "0.00%"] in rows
    best = load_sweep(tmp_path / "s").cells.sort_values("usable_hit_tokens").groupby("gpu_memory_bytes").last().iloc[0]
    causes = ("lost_evicted_tokens", "lost_alignment_tokens", "lost_snapshot_evicted_tokens")
    assert ["50", "GiB", *(f"{best[cause] / best['prompt_tokens']:.2%}" for cause in causes), "0.00%"] in rows
    assert "15 cells, 0 of them by the grid, 0 finished before" in out
    assert len(load_sweep(tmp_path / "s").cells) == 15
    assert "15 cells, 0 of them by the grid, 15 finished before" in run_here(*command)[1]


def test_by_default_the_grid_makes_the_cells_with_the_same_hit_rates(
    run_here: RunHere, sample: str, tmp_path: Path
) -> None:
    command = ("sweep", sample, *SMALL, "--out", tmp_path / "grid")
    code, out, _ = run_here(*command)
    assert code == 0
    assert "9 cells, 9 of them by the grid, 0 finished before" in out
    run_here("sweep", sample, *SMALL, "--out", tmp_path / "replay", "--engine", "replay")
    grid, replay = (load_sweep(tmp_path / engine).cells for engine in ("grid", "replay"))
    columns = [name for name in grid if name.endswith(("tokens", "_rate"))]
    assert grid[columns].equals(replay[columns])


def test_an_arena_is_named_in_the_table(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    code, out, _ = run_here("sweep", sample, *SMALL, "--pools", "arena", "--out", tmp_path / "s")
    assert code == 0
    assert "one arena for KV and snapshots" in out
    assert "9 cells, 9 of them by the grid, 0 finished before" in out


def test_sizes_of_host_memory_are_swept_and_shown(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    sizes = ("--gpu-memory", "20GiB,40GiB", "--host-memory", "100GiB,0", "--disk-memory", "50GiB", "--jobs", "1")
    command = ("sweep", sample, "--model", "llama-3.1-8b", *sizes, "--out", tmp_path / "s")
    code, out, err = run_here(*command)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["GPU", "host", "block", "interval", "usable", "hit", "rate", "ceiling"] in rows
    shown = [row[:4] for row in rows if row[:2] in (["20", "GiB"], ["40", "GiB"])]
    assert len(shown) == 8  # in the table of hit rates and in that of losses
    assert shown[:4] == [
        ["20", "GiB", "-", "512"],
        ["20", "GiB", "100", "GiB"],
        ["40", "GiB", "-", "512"],
        ["40", "GiB", "100", "GiB"],
    ]
    assert "4 cells, 4 of them by the grid" in out
    cells = load_sweep(tmp_path / "s").cells
    by_tier = cells[[f"usable_hit_tokens_{tier}" for tier in ("gpu", "host", "disk")]].fillna(0)
    assert by_tier.sum(axis=1).tolist() == cells["usable_hit_tokens"].tolist()


def test_quiet_prints_nothing(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    assert run_here("sweep", sample, *SMALL, "--out", tmp_path / "s", "--quiet") == (0, "", "")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "cells.parquet",
        "explorer.parquet",
        "hit_depths.parquet",
        "manifest.json",
        "planes.parquet",
        "splits.parquet",
    ]


def test_phase_shows_the_spread_of_the_best_cells_and_of_the_ceilings(
    run_here: RunHere, sample: str, tmp_path: Path
) -> None:
    code, out, err = run_here("sweep", sample, *SMALL, "--out", tmp_path / "s", "--phase")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    phases, run = pd.read_parquet(tmp_path / "s" / "phases.parquet"), load_sweep(tmp_path / "s")
    for period in (512, 1024, 2048):
        (row,) = (row for row in rows if row[:2] == ["ceiling", str(period)])
        unlimited = phases[(phases["ssm_reuse_interval"] == period) & phases["gpu_memory_bytes"].isna()]
        assert row[2] == f"{unlimited['own_hit_rate'].iloc[0]:.2%}"
        assert float(row[5][:-1]) >= round(100 * unlimited["own_hit_rate"].max(), 2)
    best = run.cells.loc[run.cells[run.cells["gpu_memory_bytes"] == 200 << 30]["usable_token_hit_rate"].idxmax()]
    shown = ["200", "GiB", "512", str(best["ssm_reuse_interval"]), f"{best['usable_token_hit_rate']:.2%}"]
    assert shown in [row[:5] for row in rows]
    assert "warning" not in out


def test_phase_warns_of_the_intervals_that_hang_on_it(run_here: RunHere, tmp_path: Path) -> None:
    """A shared start of 100 tokens, one too few for an interval of 101."""
    ids = [[*range(100), *range(1000 * user, 1000 * user + 20)] for user in range(1, 9)]
    rows = [{"timestamp": 0, "input_length": 120, "output_length": 1, "hash_ids": row} for row in ids]
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    options = ("--trace-block", "1", "--ssm-reuse-interval", "10,101", "--gpu-memory", "80GiB", "--phase")
    code, out, _ = run_here("sweep", path, *MODEL, *options, "--out", tmp_path / "s")
    assert code == 0
    assert "warning: the hit rate hangs on the phase at 101 tokens." in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory", "5GiB:80GiB"], "--gpu-memory: expected a list (10GiB,40GiB) or a range (5GiB:80GiB:8), got "),
        (
            ["--ssm-reuse-interval", "512:1024:2"],
            "--ssm-reuse-interval: expected a list (512,1024) or a range (512:8192",
        ),
        (["--tokens-per-block", "0"], "--tokens-per-block: expected a positive integer, got '0'"),
        (["--ssm-reuse-interval", "700"], "no combination of the sweep is possible; the first: ssm_reuse_interval: "),
        (["--pools", "one"], "pools: expected separate or arena, got 'one'"),
        (
            ["--pools", "arena", "--engine", "replay"],
            "engine: expected auto for an arena, which no manager can replay, ",
        ),
        (["--host-memory", "0,unlimited"], "--host-memory: expected a size such as 40GiB, 1.5TB, 512MB, a number of "),
        (["--host-memory", "9GiB:1GiB:3"], "--host-memory: expected a rising range of 2 or more sizes such as 5GiB:8"),
        (["--host-memory", "1KiB"], "no combination of the sweep is possible; the first: host memory too small: "),
        (["--disk-memory", "1GiB,2GiB"], "--disk-memory: expected a size such as 40GiB, 1.5TB, 512MB, a number of by"),
        (["--gpu-memory", "1MiB"], "no combination of the sweep is possible; the first: memory too small for every "),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_1(
    run_here: RunHere, sample: str, tmp_path: Path, options: list[str], message: str
) -> None:
    code, out, err = run_here("sweep", sample, *SMALL, "--out", tmp_path / "s", *options)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_something_else_is_refused(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, err = run_here("sweep", sample, *SMALL, "--out", tmp_path)
    assert (code, err) == (
        1,
        f"error: {tmp_path}: expected a result directory of ssmcache, got no readable manifest.json\n",
    )


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
@pytest.mark.parametrize("where", [(), ("--cluster", "local")])
def test_ctrl_c_keeps_finished_cells_and_says_how_to_go_on(sample: str, tmp_path: Path, where: tuple[str, ...]) -> None:
    options = ("--gpu-memory", "50GiB:200GiB:200", "--engine", "replay", "--jobs", "2", "--out", str(tmp_path / "s"))
    command = [sys.executable, "-m", "ssmcache_cli", "sweep", sample, *MODEL, *options, *where]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    cells = tmp_path / "s" / "cells"
    deadline = time.monotonic() + 60
    while not (cells.is_dir() and any(cells.glob("*.json"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the command and its workers
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted: finished cells are kept; run the same command again to go on\n"
    assert 0 < len(list(cells.glob("*.json"))) < 1000
    assert not (tmp_path / "s" / "cells.parquet").exists()


def test_both_admissions_are_swept_and_the_better_one_is_named(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    command = ("sweep", sample, "--model", "nemotron-h-8b", "--ssm-reuse-interval", "512", "--gpu-memory", "320GiB")
    code, out, _ = run_here(*command, "--ssm-fraction", "0.4", "--admission", "every,last", "--out", tmp_path / "s")
    assert code == 0
    assert "512 last" in out
    assert "2 cells" in out
    cells = pd.read_parquet(tmp_path / "s" / "cells.parquet")
    assert cells["admission"].tolist() == ["every", "last"]
