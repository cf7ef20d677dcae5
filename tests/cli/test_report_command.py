from collections.abc import Callable
from pathlib import Path

import pytest

RunHere = Callable[..., tuple[int, str, str]]
MODEL = ("--model", "nemotron-h-8b")


@pytest.fixture
def run_path(run_here: RunHere, sample: str, tmp_path: Path) -> Path:
    run_here("replay", sample, *MODEL, "--out", tmp_path / "run", "--quiet")
    return tmp_path / "run"


def test_report_prints_the_page_that_it_wrote(run_here: RunHere, run_path: Path, tmp_path: Path) -> None:
    assert run_here("report", run_path) == (0, f"{run_path / 'report.html'}\n", "")
    other = tmp_path / "other.html"
    assert run_here("report", run_path, "--output", other) == (0, f"{other}\n", "")
    assert other.read_bytes() == (run_path / "report.html").read_bytes()


def test_a_directory_with_a_report_is_still_one_to_be_replaced(run_here: RunHere, run_path: Path, sample: str) -> None:
    run_here("report", run_path)
    assert run_here("replay", sample, *MODEL, "--out", run_path, "--quiet") == (0, "", "")
    assert not (run_path / "report.html").exists()


def test_what_is_no_result_is_one_line_and_exit_code_1(run_here: RunHere, tmp_path: Path) -> None:
    code, out, err = run_here("report", tmp_path)
    assert (code, out) == (1, "")
    assert err == f"error: {tmp_path}: expected a result directory of ssmcache, got no readable manifest.json\n"
    assert list(tmp_path.iterdir()) == []
