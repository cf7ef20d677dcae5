from collections.abc import Callable
from pathlib import Path

RunHere = Callable[..., tuple[int, str, str]]


def test_plot_prints_what_it_drew(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    run_here("replay", sample, "--model", "nemotron-h-8b", "--out", tmp_path / "run", "--quiet")
    code, out, err = run_here("plot", tmp_path / "run")
    assert (code, err) == (0, "")
    drawn = [Path(line) for line in out.splitlines()]
    assert {path.name for path in drawn} >= {"memory_over_time.png", "lost_tokens_over_time.svg"}
    assert all(path.stat().st_size > 0 for path in drawn)


def test_what_is_no_result_is_one_line_and_exit_code_1(run_here: RunHere, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        code, out, err = run_here("plot", path)
        assert (code, out) == (1, "")
        assert err == f"error: {path}: expected a result directory of ssmcache, got no readable manifest.json\n"
