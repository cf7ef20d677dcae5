"""Cells of a sweep at several phases: the same settings, the prompts shifted (see `phase.py`)."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from ssmcache_sim.errors import MemoryTooSmallError
from ssmcache_sim.executors import Call, run_calls
from ssmcache_sim.grid import StackDistances, attention_hits, hybrid_hits, stack_distances
from ssmcache_sim.grid_cells import GridCapacity, grid_capacity
from ssmcache_sim.grid_last import last_boundaries, last_usable
from ssmcache_sim.phase import shifted, shifts_of
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import ReplaySettings
from ssmcache_sim.sweep import PlannedCell
from ssmcache_sim.trace import Trace

MAX_SHIFTS = 16  # of one cell: each distinct one is a pass over the trace


@dataclass(frozen=True, slots=True)
class PhaseCell:
    """A cell at one shift. `own_hit_tokens` leaves out the tokens in front, as does its rate.

    `engine` says how it was made, as in `SweptCell`.
    """

    settings: ReplaySettings
    shift_tokens: int
    own_hit_tokens: int
    own_hit_rate: float
    engine: str


def period_of(settings: ReplaySettings) -> int:
    """Tokens after which the phase repeats: the interval; without SSM layers the block."""
    return settings.ssm_reuse_interval or settings.tokens_per_block


def num_shifted(trace: Trace, cells: Sequence[PlannedCell]) -> int:
    """How many (cell, shift) pairs `phase_cells` gives."""
    return sum(map(len, _shifts(trace, cells)))


def phase_cells(
    trace: Trace, cells: Sequence[PlannedCell], progress: Callable[[int], None], workers: int | Executor = 1
) -> tuple[PhaseCell, ...]:
    """Each cell at up to `MAX_SHIFTS` shifts over its period, in the order of the cells, then of the shifts.

    By the grid where the cell is the grid's and the longer prompts still fit, else by one replay a shift: all exact.

    Args:
        progress: called with the number of (cell, shift) pairs done.
        workers: a number of processes of this machine, or any executor (see `run_calls`).

    Cost: one pass over the trace for each distinct shift, and the replays.
    """
    shifts = _shifts(trace, cells)
    own_tokens = int(trace.prompt_tokens.sum())
    tasks: list[tuple[list[int], int]] = []  # indices of cells that one call makes, at a shift
    for shift in sorted({shift for of_cell in shifts for shift in of_cell}):
        here = [index for index in range(len(cells)) if shift in shifts[index]]
        by_grid = [index for index in here if cells[index].grid is not None]
        tasks += [([index], shift) for index in here if cells[index].grid is None]
        if by_grid:
            tasks.append((by_grid, shift))
    done: dict[tuple[int, int], tuple[int, str]] = {}  # (index of the cell, shift) -> own hit tokens, engine

    def finish(number: int, results: list[tuple[int, str]]) -> None:
        indices, shift = tasks[number]
        done.update({(index, shift): result for index, result in zip(indices, results, strict=True)})
        progress(len(done))

    what = f"a shift of {trace.name}"
    calls = [Call(what, _at_shift, trace, ([cells[index] for index in indices], shift)) for indices, shift in tasks]
    run_calls(workers, calls, finish)
    return tuple(
        PhaseCell(
            cell.settings, shift, done[index, shift][0], done[index, shift][0] / own_tokens, done[index, shift][1]
        )
        for index, cell in enumerate(cells)
        for shift in shifts[index]
    )


def _at_shift(trace: Trace, cells: Sequence[PlannedCell], shift: int) -> list[tuple[int, str]]:
    """(own hit tokens, engine) of each cell."""
    moved = shifted(trace, shift)
    in_block = cache(moved.with_block)  # many cells share a block size
    hits: dict[int, tuple[int, str]] = {}
    by_grid: list[tuple[int, GridCapacity]] = []
    for index, cell in enumerate(cells):
        capacity = grid_capacity(in_block(cell.settings.tokens_per_block), cell.config) if cell.grid else ""
        if isinstance(capacity, str):
            hits[index] = _replayed(moved, cell, shift), "replay"
        else:
            by_grid.append((index, capacity))
    for (index, _), own_hits in zip(by_grid, _by_grid(moved, cells, by_grid, shift), strict=True):
        hits[index] = own_hits, "grid"
    return [hits[index] for index in range(len(cells))]


def _shifts(trace: Trace, cells: Sequence[PlannedCell]) -> list[tuple[int, ...]]:
    return [shifts_of(period_of(cell.settings), trace.tokens_per_block, MAX_SHIFTS) for cell in cells]


def _replayed(moved: Trace, cell: PlannedCell, shift: int) -> int:
    try:
        usable = replay(moved, cell.config, prefill=cell.settings.prefill).usable
    except MemoryTooSmallError:  # the longer prompts fit no more, not even the shortest: nothing is cached
        return 0
    return int(np.maximum(usable - shift, 0).sum())


def _by_grid(
    moved: Trace, cells: Sequence[PlannedCell], by_grid: Sequence[tuple[int, GridCapacity]], shift: int
) -> list[int]:
    if not by_grid:
        return []
    configs = [cells[index].config for index, _ in by_grid]
    sizes = {config.tokens_per_block for config in configs}
    sizes |= {config.ssm_reuse_interval for config in configs if config.has_ssm}
    distances = stack_distances(moved, sizes)
    hits = []
    for config, (_, capacity) in zip(configs, by_grid, strict=True):
        if config.has_ssm and config.admission == "last":
            assert capacity.snapshots is not None
            found = last_boundaries(moved, config.ssm_reuse_interval)
            shape = (config.tokens_per_block, capacity.blocks, capacity.snapshots, moved.num_requests)
            hits.append(int(np.maximum(last_usable(distances, found, *shape) - shift, 0).sum()))
            continue
        interval = config.ssm_reuse_interval if config.has_ssm else None
        hits.append(_own_hits(distances, config.tokens_per_block, interval, capacity, shift))
    return hits


def _own_hits(distances: StackDistances, block: int, interval: int | None, capacity: GridCapacity, shift: int) -> int:
    """With a snapshot at every boundary, hits of a request grow from its start on: one that hits at all hits the tokens
    in front, which are not its own.

    A request hits at all where its first boundary is usable; the shift is shorter than that.
    """
    period = interval or block
    up_to_first = replace(distances, end=np.minimum(distances.end, period // distances.tokens_per_block))
    total, in_first = (_hits(part, block, interval, capacity) for part in (distances, up_to_first))
    return total - in_first // period * shift


def _hits(distances: StackDistances, block: int, interval: int | None, capacity: GridCapacity) -> int:
    if interval is None:
        return int(attention_hits(distances, block, [capacity.all_blocks])[0])
    assert capacity.snapshots is not None
    return int(hybrid_hits(distances, block, interval, [capacity.blocks], [capacity.snapshots])[0, 0])
