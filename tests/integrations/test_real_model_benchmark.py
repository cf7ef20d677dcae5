"""The benchmarks of real models run, on a tiny one, and measure what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

ROOT = Path(__file__).parents[2]
SMALL = (
    "--shape tiny --device cpu --reused 0,64 --new 8,40 --interval 32 --block 16 --system 64 --users 3 --turns 3 "
    "--question 20 --answer 6 --repeats 2"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script("real_model.py", *SMALL.split(), *arguments)


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def test_it_reports_the_grid_the_scenarios_and_the_check(tmp_path):
    done = run("--gpu-memory", "8MiB", "--out", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "report.json").read_text())
    cases = [(row["reused"], row["new"], row["kind"]) for row in report["grid"]]
    assert cases == [(reused, new, kind) for reused in (0, 64) for new in (8, 40) for kind in ("hit", "miss")]
    for row in report["grid"]:
        assert len(row["ms"]) == 2
        assert 0 < row["p50_ms"] <= row["p95_ms"] == pytest.approx(max(row["ms"]), rel=0.1)
        assert (row["manager_ms"] > 0) == (row["kind"] == "hit")
        assert row["manager_share"] < 1
        assert (row["gathered_bytes"] > 0) == (row["kind"] == "hit" and row["reused"] > 0)
    assert report["check"]["failures"] == []
    assert report["check"]["placement_error"] == 0
    assert report["shared_prompt"]["reused_tokens"] == [0, 64, 64]
    assert report["conversation"]["reused_tokens"] == [0, 64, 96]
    assert report["shared_prompt"]["same_first_tokens"]
    assert "speed-up" in done.stderr


def test_too_little_memory_for_the_grid_is_an_error_of_one_line():
    done = run("--gpu-memory", "1MiB", "--reused", "0,4096")
    assert done.returncode == 1
    assert "--gpu-memory: expected room for a prompt of 41" in done.stderr


def test_a_state_from_inside_a_pass_is_that_of_a_pass_which_ends_there():
    done = run_script(
        "scan_states.py", "--shape", "tiny", "--device", "cpu", "--cases", "64:90", "--repeats", "1",
        "--gpu-memory", "8MiB",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["cases"]
    assert (row["windows_layers"], row["recurrent_layers"]) == (3, 3)
    assert row["windows_difference"] < 1e-5
    assert row["recurrent_difference"] < 1e-5
    assert row["logits_inside_uncut_difference"] < 1e-5
    assert min(row["uncut_p50_ms"], row["cut_p50_ms"], row["inside_p50_ms"]) > 0
