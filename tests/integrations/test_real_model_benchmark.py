"""The benchmarks of real models run, on a tiny one, and measure what they say."""

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = (
    "--shape tiny --device cpu --reused 0,64 --new 8,40 --interval 32 --block 16 --system 64 --users 3 --turns 3 "
    "--question 20 --answer 6 --repeats 2 --calibrate-tokens 512"
)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a benchmark in this process; standard output and standard error."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run_script(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *arguments])
        importlib.import_module(name).main()
        return capsys.readouterr()

    return run_script


def test_it_reports_the_grid_the_scenarios_and_the_check(run, tmp_path):
    done = run("real_model", *SMALL.split(), "--gpu-memory", "8MiB", "--out", str(tmp_path / "report.json"))
    report = json.loads(done.out)
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
    assert "speed-up" in done.err


def test_too_little_memory_for_the_grid_is_an_error_of_one_line(run):
    with pytest.raises(SystemExit, match="--gpu-memory: expected room for a prompt of 41"):
        run("real_model", *SMALL.split(), "--gpu-memory", "1MiB", "--reused", "0,4096", "--calibrate-tokens", "0")


def test_a_state_from_inside_a_pass_is_that_of_a_pass_which_ends_there(run):
    arguments = "--shape tiny --device cpu --cases 64:90 --repeats 1 --gpu-memory 8MiB"
    done = run("scan_states", *arguments.split())
    (row,) = json.loads(done.out)["cases"]
    assert (row["windows_layers"], row["recurrent_layers"]) == (3, 3)
    assert row["windows_difference"] < 1e-5
    assert row["recurrent_difference"] < 1e-5
    assert row["logits_inside_uncut_difference"] < 1e-5
    assert min(row["uncut_p50_ms"], row["cut_p50_ms"], row["inside_p50_ms"]) > 0
