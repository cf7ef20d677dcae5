"""Many replays of one trace: every combination of intervals, block sizes and memory sizes, one process a cell.

Each finished cell is kept as a file of its own, under a name that follows from everything it depends on. So a sweep
that was interrupted, or that grows, replays only what is new.
"""

import hashlib
import json
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from multiprocessing.synchronize import Event
from pathlib import Path

from ssmcache import __version__
from ssmcache.config import Admission, KVCacheManagerConfig
from ssmcache.models import ModelSpec
from ssmcache_sim.directories import json_bytes, write_file
from ssmcache_sim.engines import Engine, Pools, check_pools, choose_engine
from ssmcache_sim.errors import UserError
from ssmcache_sim.formats import ReadOptions, read_trace
from ssmcache_sim.grid_cells import ArenaCapacity, GridCapacity, grid_totals
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import Prefill, ReplaySettings, build_config, make_settings
from ssmcache_sim.totals import ReplayTotals
from ssmcache_sim.trace import Trace

_CELLS = "cells"
_CELL_FORMAT = 3  # raised when a cell's file, or what a replay counts, changes


@dataclass(frozen=True, slots=True)
class SweepSpec:
    """What to vary, in lists, and what all cells share. See `ReplaySettings` for the meaning of each.

    `trace_path`, `trace_block` and `reading` say how other processes read the trace; without a path there are none.
    """

    trace_path: Path | None
    trace_block: int | None
    tokens_per_block: tuple[int, ...]
    ssm_reuse_intervals: tuple[int, ...]
    gpu_memory_bytes: tuple[int | None, ...]
    ssm_fraction: float | None = None
    kv_dtype: str | None = None
    state_dtype: str | None = None
    prefill: Prefill = "reserved"
    engine: Engine = "auto"
    reading: ReadOptions | None = None
    pools: Pools = "separate"
    host_memory_bytes: tuple[int, ...] = (0,)
    disk_memory_bytes: int = 0
    admissions: tuple[Admission, ...] = ("every",)


@dataclass(frozen=True, slots=True)
class SkippedCell:
    """A combination that no cache can have, or that serves nothing, and why."""

    settings: ReplaySettings
    reason: str


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """A cell: its settings, what the manager is told, the file that keeps the result of a replay, and who does it.

    `grid` is what the grid needs to know; None: the cell is replayed. `reason` says why, in plain words.
    """

    settings: ReplaySettings
    config: KVCacheManagerConfig
    path: Path
    grid: GridCapacity | ArenaCapacity | None
    reason: str


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """All cells in order of block, interval, admission, GPU memory (unlimited last), host memory; those finished
    already are marked.
    """

    cells: tuple[PlannedCell, ...]
    skipped: tuple[SkippedCell, ...]
    finished: dict[PlannedCell, ReplayTotals]


@dataclass(frozen=True, slots=True)
class SweptCell:
    """A finished cell."""

    settings: ReplaySettings
    totals: ReplayTotals
    engine: str
    reason: str
    pools: Pools

    def __repr__(self) -> str:
        return f"SweptCell({self.settings.in_words()}, {self.engine}: {self.totals!r})"


def plan_sweep(spec: SweepSpec, trace: Trace, model: ModelSpec, directory: Path) -> SweepPlan:
    """Checks every combination, and looks up which of them `directory` holds already.

    Errors: UserError for an arena with what only pools have, and with the first reason when no combination is possible.
    """
    has_lower_tiers = any(spec.host_memory_bytes) or spec.disk_memory_bytes > 0
    check_pools(spec.pools, spec.engine, spec.ssm_fraction, has_lower_tiers, spec.admissions)
    cells: list[PlannedCell] = []
    skipped: list[SkippedCell] = []
    in_block = cache(trace.with_block)  # many cells share a block size
    for settings in _combinations(spec, model):
        try:
            coarse = in_block(settings.tokens_per_block)
            config = build_config(model, settings)
            grid, reason = choose_engine(spec.pools, spec.engine, coarse, config)
        except UserError as error:
            skipped.append(SkippedCell(settings, str(error)))
        else:
            path = directory / _CELLS / f"{_cell_key(trace, config, settings)}.json"
            cells.append(PlannedCell(settings, config, path, grid, reason))
    if not cells:
        raise UserError(f"no combination of the sweep is possible; the first: {skipped[0].reason}")
    found = {cell: _read_cell(cell.path) for cell in cells if cell.grid is None}
    finished = {cell: totals for cell, totals in found.items() if totals is not None}
    return SweepPlan(tuple(cells), tuple(skipped), finished)


def run_sweep(
    spec: SweepSpec, trace: Trace, plan: SweepPlan, jobs: int, progress: Callable[[int], None]
) -> tuple[SweptCell, ...]:
    """All cells in the plan's order: those of the grid by one pass, the others replayed in `jobs` processes unless they
    are finished already.

    Args:
        jobs: more than one only where the spec has the path of the trace.
        progress: called with the number of finished cells, those found included, at first and after each cell.

    A KeyboardInterrupt ends it after the cells that are running; they and all before are kept.
    Errors: OutputError where a cell cannot be written.
    """
    totals = dict(plan.finished)
    by_grid = [(cell, cell.grid) for cell in plan.cells if cell.grid is not None]
    if by_grid:
        cells_totals = grid_totals(trace, [(cell.config, capacity) for cell, capacity in by_grid])
        totals.update(zip((cell for cell, _ in by_grid), cells_totals, strict=True))
    todo = [cell for cell in plan.cells if cell not in totals]

    def finish(cell: PlannedCell, cell_totals: ReplayTotals) -> None:
        totals[cell] = cell_totals
        progress(len(totals))

    progress(len(totals))
    if todo:
        todo[0].path.parent.mkdir(exist_ok=True)
    if jobs == 1:
        for cell in todo:
            finish(cell, _run_cell(trace, cell))
    else:
        _run_in_pool(spec, trace, todo, jobs, finish)
    return tuple(
        SweptCell(cell.settings, totals[cell], "replay" if cell.grid is None else "grid", cell.reason, spec.pools)
        for cell in plan.cells
    )


def _combinations(spec: SweepSpec, model: ModelSpec) -> Iterator[ReplaySettings]:
    blocks = sorted(spec.tokens_per_block)
    # without SSM layers interval and admission change nothing: one cell for all of them
    intervals = sorted(spec.ssm_reuse_intervals) if model.num_ssm_layers else [None]
    admissions = spec.admissions if model.num_ssm_layers else spec.admissions[:1]
    sizes = sorted(spec.gpu_memory_bytes, key=lambda size: (size is None, size or 0))
    host_sizes = sorted(spec.host_memory_bytes)
    for block, interval, admission, size, host_size in product(blocks, intervals, admissions, sizes, host_sizes):
        yield make_settings(
            model,
            block,
            ssm_reuse_interval=interval,
            gpu_memory_bytes=size,
            ssm_fraction=spec.ssm_fraction,
            kv_dtype=spec.kv_dtype,
            state_dtype=spec.state_dtype,
            prefill=spec.prefill,
            host_memory_bytes=host_size,
            disk_memory_bytes=spec.disk_memory_bytes,
            admission=admission,
        )


def _cell_key(trace: Trace, config: KVCacheManagerConfig, settings: ReplaySettings) -> str:
    """Names everything that a cell's result depends on: of the config all fields of all layers and tiers."""
    told = (settings.prefill, asdict(config))
    parts = (_CELL_FORMAT, __version__, trace.sha256, trace.reading, trace.tokens_per_block, *told)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _read_cell(path: Path) -> ReplayTotals | None:
    """A finished cell; None where it is missing or somebody damaged it: then it is replayed."""
    try:
        return ReplayTotals.from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _run_cell(trace: Trace, cell: PlannedCell) -> ReplayTotals:
    totals = replay(trace, cell.config, prefill=cell.settings.prefill).totals
    write_file(cell.path, json_bytes(totals.to_json()))
    return totals


def _run_in_pool(
    spec: SweepSpec,
    trace: Trace,
    todo: Sequence[PlannedCell],
    jobs: int,
    finish: Callable[[PlannedCell, ReplayTotals], None],
) -> None:
    assert spec.trace_path is not None, "other processes have to read the trace"
    context = multiprocessing.get_context("spawn")  # the same everywhere, and safe beside threads
    stop = context.Event()
    initial = (spec.trace_path, spec.trace_block, spec.reading, trace.sha256, stop)
    with ProcessPoolExecutor(max(1, min(jobs, len(todo))), context, _start_worker, initial) as pool:
        with _deaf_to_interrupts():
            futures = {pool.submit(_work, cell): cell for cell in todo}
        try:
            for future in as_completed(futures):
                totals = future.result()
                assert totals is not None, "a worker stopped without being told to"
                finish(futures[future], totals)
        except BaseException:
            stop.set()  # some cells are queued beyond the reach of a cancellation
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside never see a Ctrl-C, not even while they start; here it comes at the end of the block."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(slots=True)
class _Worker:
    """What one worker process keeps between cells."""

    trace: Trace
    stop: Event


_worker: _Worker | None = None


def _start_worker(
    trace_path: Path, trace_block: int | None, reading: ReadOptions | None, sha256: str, stop: Event
) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; a cell under way is finished and kept
    trace = read_trace(trace_path, trace_block, reading)
    if trace.sha256 != sha256:
        raise RuntimeError(f"{trace_path} changed during the sweep")
    _worker = _Worker(trace, stop)


def _work(cell: PlannedCell) -> ReplayTotals | None:
    """One cell; None when the sweep was stopped before it began."""
    assert _worker is not None
    return None if _worker.stop.is_set() else _run_cell(_worker.trace, cell)
