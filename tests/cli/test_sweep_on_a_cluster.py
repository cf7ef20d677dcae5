"""Sweeps on real schedulers and worker processes of this machine, which are killed while they work."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from ssmcache.models import load_model
from ssmcache_sim import cluster
from ssmcache_sim.cluster import cluster_workers
from ssmcache_sim.errors import WorkersError
from ssmcache_sim.executors import Call, run_calls
from ssmcache_sim.formats import read_trace
from ssmcache_sim.sweep import SweepPlan, SweepSpec, plan_sweep, run_sweep
from ssmcache_sim.sweep_results import begin_sweep

RunHere = Callable[..., tuple[int, str, str]]
FilesOf = Callable[[Path], dict[str, bytes]]
OPTIONS = ("--model", "nemotron-h-8b", "--ssm-reuse-interval", "512:2048:x2", "--gpu-memory", "10GiB,15GiB,200GiB")

# Replays wait at a gate: so it is certain that a worker is in the middle of a cell when it is killed.
GATE = """
import os, time
from pathlib import Path
import ssmcache_sim.replay, ssmcache_sim.sweep

def gated(*args, **kwargs):
    gate = Path(os.environ["GATE"])
    (gate / f"running-{os.getpid()}").touch()
    while not (gate / "open").exists():
        time.sleep(0.02)
    return ssmcache_sim.replay.replay(*args, **kwargs)

ssmcache_sim.sweep.replay = gated
"""


class Cluster:
    """A scheduler on 127.0.0.1 and workers, each a process, whose replays wait until the gate is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        (folder / "gate.py").write_text(GATE)
        file = folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--port", "0", "--scheduler-file", str(file))
        wait_until(lambda: file.exists() and file.read_text().endswith("}"))
        self.address: str = json.loads(file.read_text())["address"]

    def start_worker(self) -> None:
        self._start("worker", self.address, "--nthreads", "1", "--no-nanny", "--preload", str(self.folder / "gate.py"))

    def running(self) -> list[int]:
        """Processes that have begun a replay, dead ones included."""
        return sorted(int(path.name.partition("-")[2]) for path in self.folder.glob("running-*"))

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def open_gate(self) -> None:
        (self.folder / "open").touch()

    def kill(self, pid: int) -> None:
        (process,) = (process for process in self.processes if process.pid == pid)
        process.kill()
        process.wait()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _start(self, what: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *arguments, "--host", "127.0.0.1"]
        environment = {"GATE": str(self.folder), "DASK_TEMPORARY_DIRECTORY": str(self.folder)}
        log = (self.folder / "log").open("ab")
        process = subprocess.Popen(
            [*command, "--no-dashboard"], stdout=log, stderr=log, env={**os.environ, **environment}
        )
        self.processes.append(process)
        return process


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "waited for 30 s"
        time.sleep(0.02)


@pytest.fixture
def two_workers(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "cluster").mkdir()
    with ExitStack() as stack:
        started = Cluster(tmp_path / "cluster")
        stack.callback(started.close)
        started.start_worker()
        started.start_worker()
        wait_until(lambda: started.log().count("Registered to:") == 2)
        yield started


@pytest.fixture
def plan(sample: str, tmp_path: Path) -> SweepPlan:
    """Four replays."""
    spec = SweepSpec((512,), (512, 1024), (50 << 30, None), engine="replay")
    trace, model = read_trace(sample), load_model("nemotron-h-8b")
    begin_sweep(tmp_path / "s", spec, trace, model)
    return plan_sweep(spec, trace, model, tmp_path / "s")


def test_a_worker_killed_in_the_middle_of_a_cell_changes_no_byte(
    run_here: RunHere, files_of: FilesOf, sample: str, tmp_path: Path, two_workers: Cluster
) -> None:
    def kill_one() -> int:
        wait_until(lambda: len(two_workers.running()) == 2)
        victim = two_workers.running()[0]
        two_workers.kill(victim)
        two_workers.open_gate()
        return victim

    assert run_here("sweep", sample, *OPTIONS, "--quiet", "--jobs", 1, "--out", tmp_path / "here") == (0, "", "")
    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_one)
        swept = run_here(
            "sweep", sample, *OPTIONS, "--quiet", "--cluster", two_workers.address, "--out", tmp_path / "there"
        )
        victim = killed.result()
    assert swept == (0, "", "")
    files = files_of(tmp_path / "here")
    assert files_of(tmp_path / "there") == files
    assert sum(name.startswith("cells/") for name in files) >= 4, "replays, beside the cells of the grid"
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)


def test_a_trace_that_went_with_all_workers_is_sent_to_the_next(
    sample: str, plan: SweepPlan, two_workers: Cluster
) -> None:
    def kill_both() -> None:
        wait_until(lambda: len(two_workers.running()) == 2)
        for pid in two_workers.running():
            two_workers.kill(pid)
        two_workers.start_worker()
        two_workers.open_gate()

    trace, told = read_trace(sample), list[int]()
    with ThreadPoolExecutor(1) as beside, cluster_workers(two_workers.address, 1) as workers:
        killed = beside.submit(kill_both)
        cells = run_sweep(trace, plan, workers, told.append)
        killed.result()
    assert cells == run_sweep(trace, plan, 1, lambda done: None)
    assert told == [0, 1, 2, 3, 4]


def test_a_lost_scheduler_is_one_line_and_finished_cells_are_kept(
    run_here: RunHere, sample: str, tmp_path: Path, two_workers: Cluster
) -> None:
    out = tmp_path / "s"
    options = ("--model", "nemotron-h-8b", "--engine", "replay", "--gpu-memory", "50GiB:200GiB:300", "--quiet")

    def kill_scheduler() -> None:
        wait_until(lambda: len(list(out.glob("cells/*.json"))) > 1)
        two_workers.kill(two_workers.scheduler.pid)

    two_workers.open_gate()
    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_scheduler)
        code, shown, err = run_here("sweep", sample, *options, "--cluster", two_workers.address, "--out", out)
        killed.result()
    assert (code, shown) == (1, "")
    assert err == f"error: cluster: lost the scheduler at {two_workers.address}\n"
    assert len(list(out.glob("cells/*.json"))) > 1


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_gives_up_the_cells_under_way_at_once_and_keeps_the_others(
    sample: str, tmp_path: Path, two_workers: Cluster
) -> None:
    out = tmp_path / "s"
    command = [sys.executable, "-m", "ssmcache_cli", "sweep", sample, "--model", "nemotron-h-8b", "--out", str(out)]
    command += ["--engine", "replay", "--gpu-memory", "50GiB,unlimited", "--cluster", two_workers.address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(two_workers.running()) == 2)  # and they stay in the middle of it
    process.send_signal(signal.SIGINT)
    shown, err = process.communicate(timeout=30)
    assert (process.returncode, shown) == (130, "")
    assert err == "interrupted: finished cells are kept; run the same command again to go on\n"
    assert list(out.glob("cells/*.json")) == []


def test_workers_of_another_version_are_refused(
    run_here: RunHere, sample: str, tmp_path: Path, two_workers: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "__version__", "9.9")
    command = ("sweep", sample, *OPTIONS, "--cluster", two_workers.address, "--out", tmp_path / "s")
    code, _, err = run_here(*command)
    assert code == 1
    assert err.startswith("error: cluster: expected ssmcache 9.9 on every worker, got 0.1.0 on tcp://127.0.0.1:")
    assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()
    # one that comes after the check
    monkeypatch.setattr(cluster._ClusterWorkers, "check", lambda self: None)
    with (
        cluster_workers(two_workers.address, 1) as workers,
        pytest.raises(
            WorkersError, match=r"expected ssmcache 9\.9 on every worker, got 0\.1\.0 on one that came later"
        ),
    ):
        run_calls(workers, [Call("a sum", max, 1, (2,))], lambda index, result: None)


def test_a_scheduler_without_workers_is_not_waited_for_without_end(
    run_here: RunHere, sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_WORKER_SECONDS", 1)
    alone = Cluster(tmp_path)
    try:
        code, _, err = run_here("sweep", sample, *OPTIONS, "--cluster", alone.address, "--out", tmp_path / "s")
    finally:
        alone.close()
    assert (code, err) == (
        1,
        f"error: cluster: expected a worker of the scheduler at {alone.address}, got none in 1 s\n",
    )
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "foo://host:1"])
def test_a_scheduler_that_is_not_there_is_one_line(
    run_here: RunHere, sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(cluster, "_SCHEDULER_SECONDS", 1)
    code, out, err = run_here("sweep", sample, *OPTIONS, "--cluster", address, "--out", tmp_path / "s")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: cluster: expected a Dask scheduler at {address!r}, got: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_without_the_extra_the_error_names_it(
    run_here: RunHere, sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    code, _, err = run_here("sweep", sample, *OPTIONS, "--cluster", "local", "--out", tmp_path / "s")
    assert (code, err) == (1, "error: cluster: expected Dask (pip install 'ssmcache[cluster]'), got none\n")


def test_jobs_belong_to_this_machine(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    command = ("sweep", sample, *OPTIONS, "--cluster", "tcp://127.0.0.1:1", "--jobs", 2, "--out", tmp_path / "s")
    code, _, err = run_here(*command)
    assert (code, err) == (1, "error: jobs: expected none beside a cluster, which has workers of its own, got 2\n")


def test_a_local_cluster_gives_the_same_bytes_and_leaves_no_process(
    run_here: RunHere, files_of: FilesOf, sample: str, tmp_path: Path
) -> None:
    for name, where in (("here", ("--jobs", 1)), ("there", ("--jobs", 2, "--cluster", "local"))):
        command = ("sweep", sample, *OPTIONS, "--phase", "--quiet", *where, "--out", tmp_path / name)
        assert run_here(*command) == (0, "", "")
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")
