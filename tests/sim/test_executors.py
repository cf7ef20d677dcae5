import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from worker_calls import add, die, wait_at_gate

from ssmcache.models import load_model
from ssmcache_sim.errors import WorkersError
from ssmcache_sim.executors import MAX_LOST, Call, LocalProcesses, Workers, run_calls
from ssmcache_sim.formats import read_trace
from ssmcache_sim.phase_cells import phase_cells
from ssmcache_sim.sweep import SweepPlan, SweepSpec, plan_sweep, run_sweep, run_sweeps
from ssmcache_sim.trace import Trace

GIB = 1 << 30
HYBRID = load_model("marconi-7b")
SUMS = [Call(f"sum {number}", add, 100, (number,)) for number in range(5)]


class LazyExecutor(Executor):
    """Begins nothing until it has all calls, and then runs the last one first; the first runs of some are lost."""

    def __init__(self, num_calls: int, num_lost: int = 0) -> None:
        self._missing, self._num_lost = num_calls, num_lost
        self._calls: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.append((future, lambda: fn(*args, **kwargs)))
        self._missing -= 1
        while self._missing <= 0 and self._calls:
            waiting, call = self._calls.pop()
            if self._num_lost:
                self._num_lost -= 1
                waiting.set_exception(BrokenExecutor("a worker died"))
            else:
                waiting.set_result(call())
        return future


def results_of(workers: int | Executor, calls: list[Call] = SUMS) -> dict[int, Any]:
    results: dict[int, Any] = {}

    def finish(index: int, result: Any) -> None:
        assert index not in results, "a call ends once"
        results[index] = result

    run_calls(workers, calls, finish)
    return results


def spawning_pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: 1,
        lambda: 2,
        lambda: LocalProcesses(2),
        lambda: ThreadPoolExecutor(3),
        spawning_pool,
        lambda: LazyExecutor(5),
        lambda: LazyExecutor(5, num_lost=4),
    ],
    ids=["here", "processes", "local", "threads", "pool", "lazy", "faulty"],
)
def test_every_call_ends_once_with_its_result(make: Callable[[], int | Executor]) -> None:
    workers = make()
    assert results_of(workers) == {number: 100 + number for number in range(5)}
    if isinstance(workers, Executor):
        assert results_of(workers, SUMS[:2]) == {0: 100, 1: 101}, "it stays open"
        workers.shutdown()


def test_a_call_that_only_loses_workers_is_named_in_the_end() -> None:
    with pytest.raises(WorkersError, match=rf"expected sum 0 to end, got {MAX_LOST} workers that died with it under"):
        results_of(LazyExecutor(1, num_lost=99), SUMS[:1])


def test_an_executor_that_is_shut_down_is_one_line() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(WorkersError, match="workers: cannot start sum 0: cannot schedule new futures after shutdown"):
        results_of(pool)


class Silent(Workers):
    """Takes a call and never says anything again; after a while it is known to be lost."""

    num_asked = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return Future()

    def require(self) -> None:
        self.num_asked += 1
        if self.num_asked == 3:
            raise WorkersError("lost")


def test_workers_that_are_lost_without_a_word_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmcache_sim.executors.ALIVE_SECONDS", 0.01)
    with pytest.raises(WorkersError, match=r"^lost$"):
        results_of(Silent())


def test_errors_of_a_call_come_out_and_end_the_others() -> None:
    calls = [Call("a sum", add, None, (1,)), *SUMS]
    for workers in (1, 2):
        with pytest.raises(TypeError):
            results_of(workers, calls)


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_a_process_that_dies_in_the_middle_of_a_call_is_replaced(tmp_path: Path) -> None:
    def kill_one() -> None:
        while not (running := list(tmp_path.glob("running-*"))):
            time.sleep(0.02)
        os.kill(int(running[0].name.partition("-")[2]), 9)
        (tmp_path / "open").touch()

    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_one)
        results = results_of(2, [Call("a wait", wait_at_gate, 7, (tmp_path,)), *SUMS])
        killed.result()
    assert results == {0: 7, **{number + 1: 100 + number for number in range(5)}}


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_a_call_that_kills_every_process_ends_the_run_after_all_others_ended(tmp_path: Path) -> None:
    results: dict[int, Any] = {}
    calls = [Call("a killer", die, 1, (tmp_path,)), *SUMS]
    with pytest.raises(WorkersError, match="expected a killer to end, got 3 workers that died with it under way"):
        run_calls(2, calls, results.__setitem__)
    assert results == {number + 1: 100 + number for number in range(5)}
    assert len(list(tmp_path.glob("died-*"))) <= 2 * MAX_LOST


@pytest.fixture(scope="module")
def trace(sample_path: Path) -> Trace:
    return read_trace(sample_path)


def plan_of(trace: Trace, folder: Path) -> SweepPlan:
    """Cells of both engines."""
    spec = SweepSpec((512, 1024), (1024,), (5 * GIB, 10 * GIB, None))
    folder.mkdir()
    return plan_sweep(spec, trace, HYBRID, folder)


@pytest.mark.parametrize("make", [lambda: ThreadPoolExecutor(2), spawning_pool, lambda: LazyExecutor(2, num_lost=2)])
def test_a_sweep_on_any_executor_gives_the_bytes_of_one_here(
    trace: Trace, tmp_path: Path, make: Callable[[], Executor]
) -> None:
    here = plan_of(trace, tmp_path / "here")
    expected, phases = run_sweep(trace, here, 1, lambda done: None), phase_cells(trace, here.cells, lambda done: None)
    assert {cell.engine for cell in expected} == {"grid", "replay"}
    with make() as executor:
        plan = plan_of(trace, tmp_path / "there")
        assert run_sweep(trace, plan, executor, lambda done: None) == expected
        assert phase_cells(trace, plan.cells, lambda done: None, executor) == phases
    kept = [{path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.json")} for name in ("here", "there")]
    assert kept[0] == kept[1]
    assert len(kept[0]) == sum(cell.engine == "replay" for cell in expected)


def test_several_traces_are_swept_side_by_side(trace: Trace, tmp_path: Path) -> None:
    other = trace.with_block(1024)
    plans = [
        plan_of(trace, tmp_path / "a"),
        plan_sweep(SweepSpec((1024,), (1024,), (5 * GIB, None)), other, HYBRID, tmp_path / "a"),
    ]
    told: list[int] = []
    together = run_sweeps(list(zip((trace, other), plans, strict=True)), 2, told.append)
    assert (told[0], told[-1]) == (0, sum(len(plan.cells) for plan in plans))
    assert told == sorted(told)
    assert together == [
        run_sweep(of, plan, 1, lambda done: None) for of, plan in zip((trace, other), plans, strict=True)
    ]


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
@pytest.mark.parametrize("make", [lambda: 2, lambda: ThreadPoolExecutor(2)], ids=["processes", "threads"])
def test_ctrl_c_keeps_what_is_under_way_wherever_it_comes(tmp_path: Path, make: Callable[[], int | Executor]) -> None:
    """Also inside a finalizer or a callback, where an exception would be swallowed."""
    results: dict[int, Any] = {}

    def finish(index: int, result: Any) -> None:
        results[index] = result
        if len(results) == 1:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            (tmp_path / "open").touch()

    calls = [SUMS[0], Call("a wait", wait_at_gate, 7, (tmp_path,)), *(Call("a sleep", time.sleep, 0.5, ()),) * 40]
    workers = make()
    with pytest.raises(KeyboardInterrupt):
        run_calls(workers, calls, finish)
    assert (results[0], results[1]) == (100, 7)
    assert len(results) < len(calls) // 2, "what has not begun is dropped; threads may have begun a few more by then"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if isinstance(workers, Executor):
        workers.shutdown()
