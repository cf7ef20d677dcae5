"""Many replays of a trace: every combination of intervals, block sizes and memory sizes, on any executor.

What a replay or a pass over the trace gives is kept as a file of its own, under a name that follows from everything it
depends on. So a sweep that was interrupted, or that grows, does only what is new. Passes are kept until the sweep is
finished: each takes as long as any other, and `cells.parquet` has what they gave.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

from ssmcache import __version__
from ssmcache.config import Admission, KVCacheManagerConfig
from ssmcache.models import ModelSpec
from ssmcache_sim.directories import json_bytes, make_directory, read_json, write_file, writing
from ssmcache_sim.engines import Engine, Pools, check_pools, choose_engine
from ssmcache_sim.errors import UserError
from ssmcache_sim.executors import Call, run_calls
from ssmcache_sim.grid_cells import ArenaCapacity, GridCapacity, grid_totals
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import Prefill, ReplaySettings, build_config, make_settings
from ssmcache_sim.totals import ReplayTotals
from ssmcache_sim.trace import Trace

_CELLS = "cells"
_PASS = ".pass"  # until the sweep is done: a file of all cells that one pass gives
_CELL_FORMAT = 4  # raised when a cell's file, or what a replay counts, changes


@dataclass(frozen=True, slots=True)
class SweepSpec:
    """What to vary, in lists, and what all cells share. See `ReplaySettings` for the meaning of each."""

    tokens_per_block: tuple[int, ...]
    ssm_reuse_intervals: tuple[int, ...]
    gpu_memory_bytes: tuple[int | None, ...]
    ssm_fraction: float | None = None
    kv_dtype: str | None = None
    state_dtype: str | None = None
    prefill: Prefill = "reserved"
    engine: Engine = "auto"
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
    """A cell: its settings, what the manager is told, the file that keeps its result, and who does it. Cells of one
    pass share a file.

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
    pools: Pools


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
    names = "".join(f"{cell.path.name}{cell.grid!r}" for cell in cells if cell.grid is not None)
    of_pass = directory / _CELLS / f"{_digest(names)}{_PASS}"
    planned = tuple(cell if cell.grid is None else replace(cell, path=of_pass) for cell in cells)
    finished: dict[PlannedCell, ReplayTotals] = {}
    for path, of_file in _by_file(planned).items():
        totals = _read_cells(path, trace, len(of_file))
        finished |= dict(zip(of_file, totals, strict=False))  # none where there is no such file
    return SweepPlan(planned, tuple(skipped), finished, spec.pools)


def run_sweep(
    trace: Trace, plan: SweepPlan, workers: int | Executor, progress: Callable[[int], None]
) -> tuple[SweptCell, ...]:
    """The cells of one plan. See `run_sweeps`."""
    return run_sweeps([(trace, plan)], workers, progress)[0]


def run_sweeps(
    sweeps: Sequence[tuple[Trace, SweepPlan]], workers: int | Executor, progress: Callable[[int], None]
) -> list[tuple[SweptCell, ...]]:
    """All cells of all plans, in their order: those of a trace's grid by one pass, the others by a replay each, unless
    they are finished already. Passes and replays of all traces run side by side.

    Args:
        workers: a number of processes of this machine, or any executor (see `run_calls`).
        progress: called with the number of finished cells, those found included, at first and after each call.

    Finished cells are kept as they come; a KeyboardInterrupt keeps also those that are under way on this machine.
    Errors: OutputError where a cell cannot be written; WorkersError.
    """
    totals = [dict(plan.finished) for _, plan in sweeps]
    tasks = [(index, task) for index, (trace, plan) in enumerate(sweeps) for task in _tasks(trace, plan)]

    def finish(number: int, results: list[ReplayTotals]) -> None:
        index, (cells, _) = tasks[number]
        write_file(cells[0].path, json_bytes({"cells": [each.to_json() for each in results]}))
        totals[index].update(zip(cells, results, strict=True))
        progress(sum(map(len, totals)))

    for directory in {cells[0].path.parent for _, (cells, _) in tasks}:
        make_directory(directory)
    progress(sum(map(len, totals)))
    run_calls(workers, [call for _, (_, call) in tasks], finish)
    return [_swept(plan, of_plan) for (_, plan), of_plan in zip(sweeps, totals, strict=True)]


def _tasks(trace: Trace, plan: SweepPlan) -> list[tuple[list[PlannedCell], Call]]:
    """Cells that are not finished, and the call that gives their totals: one for the grid, one for each replay."""
    tasks = []
    for cells in _by_file([cell for cell in plan.cells if cell not in plan.finished]).values():
        first = cells[0]
        if first.grid is None:
            call = Call(f"a replay of {trace.name}", _replay_totals, trace, (first.config, first.settings.prefill))
        else:
            arguments = [(cell.config, cell.grid) for cell in cells]
            call = Call(f"the grid of {trace.name}", grid_totals, trace, (arguments,))
        tasks.append((cells, call))
    return sorted(tasks, key=lambda task: task[0][0].grid is None)


def _by_file(cells: Sequence[PlannedCell]) -> dict[Path, list[PlannedCell]]:
    files: dict[Path, list[PlannedCell]] = {}
    for cell in dict.fromkeys(cells):  # a size that was given twice is one cell
        files.setdefault(cell.path, []).append(cell)
    return files


def forget_passes(directory: Path) -> None:
    """Removes what passes of a sweep's directory gave. Errors: OutputError."""
    folder = directory / _CELLS
    with writing(folder):
        for path in folder.glob(f"*{_PASS}"):
            path.unlink()
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def _replay_totals(trace: Trace, config: KVCacheManagerConfig, prefill: Prefill) -> list[ReplayTotals]:
    return [replay(trace, config, prefill=prefill).totals]


def _swept(plan: SweepPlan, totals: dict[PlannedCell, ReplayTotals]) -> tuple[SweptCell, ...]:
    return tuple(
        SweptCell(cell.settings, totals[cell], "replay" if cell.grid is None else "grid", cell.reason, plan.pools)
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
    return _digest(repr(parts))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read_cells(path: Path, trace: Trace, count: int) -> list[ReplayTotals]:
    """The finished cells of a file; none where it is missing or somebody damaged it: then they are made again."""
    try:
        kept = read_json(path)
        cells = [ReplayTotals.from_json(each) for each in kept["cells"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    same = {(trace.num_requests, int(trace.prompt_tokens.sum()))}
    return cells if len(cells) == count and {(each.requests, each.prompt_tokens) for each in cells} == same else []
