"""Every long command: Ctrl-C, a reader that goes away, a disk without room, and the same bytes each time."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunHere = Callable[..., tuple[int, str, str]]
FilesOf = Callable[[Path], dict[str, bytes]]
MODEL = ("--model", "nemotron-h-8b")
CELLS = ("--gpu-memory", "15GiB,200GiB", "--ssm-reuse-interval", "512,1024")
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and limits")


def commands(sample: str, folder: Path) -> dict[str, tuple[object, ...]]:
    """Every command that takes long, writing into `folder`; plot and report need the sweep."""
    return {
        "replay": ("replay", sample, *MODEL, "--out", folder / "replay"),
        "sweep": ("sweep", sample, *MODEL, *CELLS, "--out", folder / "sweep"),
        "recommend": ("recommend", sample, *MODEL, "--gpu-memory", "320GiB", "--out", folder / "recommend"),
        "info": ("trace", "info", sample, "--plot", folder / "info.png"),
        "convert": ("trace", "convert", sample, folder / "trace.npz"),
        "generate": ("trace", "generate", "chat", folder / "chat.jsonl"),
        "plot": ("plot", folder / "sweep"),
        "report": ("report", folder / "sweep"),
    }


@pytest.fixture(scope="module")
def finished(sample: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what all commands write."""
    folder = tmp_path_factory.mktemp("finished")
    for command in commands(sample, folder).values():
        subprocess.run([sys.executable, "-m", "ssmcache_cli", *map(str, command)], check=True, capture_output=True)
    return folder


# name, where the signal comes, what is left
INTERRUPTS = [
    ("replay", "ssmcache_cli.replay_inputs.read_trace", []),
    ("replay", "ssmcache_sim.replay.infinite_cache", []),
    ("replay", "ssmcache_cli.replay.write_replay", []),
    ("recommend", "ssmcache_cli.recommend.recommend", []),
    ("info", "ssmcache_sim.trace_info.describe", []),
    ("convert", "ssmcache_cli.trace.read_trace", []),
    ("generate", "ssmcache_sim.directories.write_file", []),
    ("sweep", "ssmcache_cli.sweep.read_trace", []),
    ("sweep", "ssmcache_cli.sweep.write_details", ["sweep"]),
]


@posix
@pytest.mark.parametrize(("name", "where", "left"), INTERRUPTS, ids=[f"{name} in {at}" for name, at, _ in INTERRUPTS])
def test_ctrl_c_is_one_line_with_what_is_left(
    run_here: RunHere,
    sample: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    where: str,
    left: list[str],
) -> None:
    monkeypatch.setattr(where, lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    code, out, err = run_here(*commands(sample, tmp_path)[name])
    assert (code, out) == (130, "")
    assert err.startswith("interrupted: ")
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == left


@posix
@pytest.mark.parametrize(
    ("name", "where"), [("plot", "ssmcache_sim.plots.rendered"), ("report", "ssmcache_sim.report.write_file")]
)
def test_ctrl_c_while_drawing_leaves_the_results(
    run_here: RunHere, sample: str, finished: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    monkeypatch.setattr(where, lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    code, out, err = run_here(*commands(sample, finished)[name])
    assert (code, out, err.count("\n")) == (130, "", 1)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@posix
def test_ctrl_c_in_a_sweep_keeps_its_cells_and_the_next_run_goes_on(
    run_here: RunHere, files_of: FilesOf, sample: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = commands(sample, tmp_path)["sweep"]
    with monkeypatch.context() as patch:
        patch.setattr("ssmcache_cli.sweep.write_details", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
        code, _, err = run_here(*command, "--jobs", 1)
    assert (code, err) == (130, "interrupted: finished cells are kept; run the same command again to go on\n")
    code, out, _ = run_here(*command, "--jobs", 2)
    assert code == 0
    assert "4 cells, 2 of them by the grid, 4 finished before" in out
    swept = {
        name: content for name, content in files_of(finished / "sweep").items() if "/" not in name or "cells/" in name
    }
    swept.pop("report.html")
    assert files_of(tmp_path / "sweep") == swept


@posix
def test_ctrl_c_in_the_explorer_keeps_the_cells_of_the_grid_and_the_next_run_makes_none_again(
    run_here: RunHere, files_of: FilesOf, sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("sweep", sample, *MODEL, "--gpu-memory", "200GiB,unlimited", "--ssm-reuse-interval", "512", "--jobs", 1)
    assert run_here(*command, "--out", tmp_path / "at_once")[0] == 0
    command = (*command, "--out", tmp_path / "sweep")
    with monkeypatch.context() as patch:
        patch.setattr("ssmcache_sim.sweep_details.explorer_cells", lambda *args: signal.raise_signal(signal.SIGINT))
        code, _, err = run_here(*command)
    assert (code, err) == (130, "interrupted: finished cells are kept; run the same command again to go on\n")
    (kept,) = (tmp_path / "sweep" / "cells").iterdir()
    assert len(json.loads(kept.read_bytes())["cells"]) == 2
    with monkeypatch.context() as patch:
        patch.setattr("ssmcache_sim.sweep.grid_totals", None)  # whoever calls it fails
        code, out, _ = run_here(*command)
    assert code == 0
    assert "2 cells, 2 of them by the grid, 2 finished before" in out
    assert files_of(tmp_path / "sweep") == files_of(tmp_path / "at_once")
    assert not (tmp_path / "sweep" / "cells").exists()


@posix
def test_ctrl_c_while_the_table_is_shown_is_silent_about_it(
    run_here: RunHere, sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssmcache_cli.replay.replay_table", lambda *args: signal.raise_signal(signal.SIGINT))
    code, out, err = run_here("replay", sample, *MODEL)
    assert (code, out) == (130, "")
    assert "Traceback" not in err


@posix
@pytest.mark.parametrize("name", ["replay", "sweep", "recommend", "info", "convert", "generate", "plot", "report"])
def test_a_reader_that_went_away_is_no_traceback(sample: str, finished: Path, tmp_path: Path, name: str) -> None:
    folder = finished if name in ("plot", "report") else tmp_path
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "ssmcache_cli", *map(str, commands(sample, folder)[name])]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(writing)
    assert result.stderr == ""


def with_files_up_to(num_bytes: int) -> Callable[[], None]:
    """For a new process: a larger file fails to be written, as on a full disk."""

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return limit


@posix
@pytest.mark.parametrize("name", ["replay", "sweep", "recommend", "info", "convert", "generate", "plot", "report"])
def test_a_disk_without_room_is_one_line_and_leaves_no_part_of_a_file(
    sample: str, finished: Path, tmp_path: Path, name: str
) -> None:
    folder = finished if name in ("plot", "report") else tmp_path
    before = {path for path in folder.rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "ssmcache_cli", *map(str, commands(sample, folder)[name])]
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": 60}
    result = subprocess.run(command, preexec_fn=with_files_up_to(1500), **options)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.endswith("cannot write here: File too large\n")
    assert result.stderr.count("\n") == 1
    written = {path for path in folder.rglob("*") if path.is_file()} - before
    assert bool(written) == (name == "sweep"), "finished cells and the manifest, which are small"
    for path in written:
        assert json.loads(path.read_bytes())


@pytest.mark.parametrize("name", ["replay", "sweep", "recommend", "info", "convert", "generate"])
def test_where_nothing_can_be_written_is_one_line(run_here: RunHere, sample: str, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("not a directory")
    code, out, err = run_here(*commands(sample, tmp_path / "file")[name])
    assert (code, out) == (1, "")
    assert "cannot write here: Not a directory" in err
    assert err.count("\n") == 1


def test_two_runs_leave_the_same_bytes(
    run_here: RunHere, files_of: FilesOf, sample: str, finished: Path, tmp_path: Path
) -> None:
    for command in commands(sample, tmp_path).values():
        assert run_here(*command)[0] == 0
    first, second = files_of(finished), files_of(tmp_path)
    assert first.keys() == second.keys()
    # the page shows the times of the manifest
    assert [name for name in first if first[name] != second[name] and not name.endswith("report.html")] == []


def test_several_traces_get_a_directory_each_as_if_swept_alone(
    run_here: RunHere, files_of: FilesOf, sample: str, finished: Path, tmp_path: Path
) -> None:
    sweep = ("sweep", sample, finished / "chat.jsonl", *MODEL, *CELLS, "--quiet", "--tokens-per-block", 512)
    code, out, _ = run_here(*sweep, "--jobs", 2, "--out", tmp_path / "both")
    assert (code, out) == (0, "")
    names = {"mooncake_conversation_1000": sample, "chat": finished / "chat.jsonl"}
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == sorted(names)
    for name, path in names.items():
        alone = ("sweep", path, *sweep[3:], "--jobs", 1, "--out", tmp_path / name)
        assert run_here(*alone)[0] == 0
        assert files_of(tmp_path / name) == files_of(tmp_path / "both" / name)


def test_several_traces_of_one_name_or_in_a_sweep_s_place_are_refused(
    run_here: RunHere, sample: str, finished: Path, tmp_path: Path
) -> None:
    code, _, err = run_here("sweep", sample, sample, *MODEL, "--out", tmp_path / "s")
    expected = "names that differ before their first dot, got 2 of 'mooncake_conversation_1000'"
    assert (code, err) == (1, f"error: traces: expected {expected}\n")
    code, _, err = run_here("sweep", sample, finished / "chat.jsonl", *MODEL, "--out", finished / "sweep")
    assert code == 1
    assert err.endswith("expected a directory for several sweeps, got a result of ssmcache\n")
    assert list(tmp_path.iterdir()) == []
