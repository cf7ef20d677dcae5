"""What a sweep leaves for pictures and the report besides its cells: files that each have one kind of row.

| file | a row | missing |
|---|---|---|
| `planes.parquet` | sizes of both pools, of a block and an interval: usable hits | shapes that the grid cannot do |
| `splits.parquet` | a memory, divided: usable hits; `ssm_fraction` missing: as the sweep's own cell | the same |
| `hit_depths.parquet` | a cell and a percentage of the requests: the hit depth they do not exceed | replayed cells |
| `explorer.parquet` | a cell of any model at more memory sizes | what the grid cannot do |
| `phases.parquet` | a cell at one shift of all prompts | unless `sweep --phase` |
| `phase_ceilings.parquet` | a period and a shift: bounds of the hits of unlimited memory | unless `sweep --phase` |

A file without rows is not written. Planes, splits and explorer are of admission `every` alone. All are made from the
trace alone: the same input gives the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ssmcache.models import ModelSpec
from ssmcache_sim.errors import OutputError
from ssmcache_sim.explorer import explorer_cells
from ssmcache_sim.grid import StackDistances, stack_distances
from ssmcache_sim.grid_cells import GridCapacity
from ssmcache_sim.hit_depth import PERCENTS, hit_depths, last_hit_depths
from ssmcache_sim.parquet import Schema, frame_of, plain_rows, read_parquet, write_parquet
from ssmcache_sim.phase import PhaseCeilings, phase_ceilings
from ssmcache_sim.phase_cells import PhaseCell, period_of, phase_cells
from ssmcache_sim.plane import memory_steps, split_plane, splits, used_bytes
from ssmcache_sim.results import (
    PHASE_CEILINGS,
    phase_ceilings_columns,
    phase_ceilings_of,
    read_phase_ceilings,
)
from ssmcache_sim.schemas import Positive, Range, Share, hints_of
from ssmcache_sim.settings import ReplaySettings
from ssmcache_sim.sweep import PlannedCell, SweepSpec, SweptCell
from ssmcache_sim.totals import ReplayTotals
from ssmcache_sim.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

CELLS = "cells.parquet"
PLANES = "planes.parquet"
SPLITS = "splits.parquet"
HIT_DEPTHS = "hit_depths.parquet"
EXPLORER = "explorer.parquet"
PHASES = "phases.parquet"
DETAIL_FILES = (PLANES, SPLITS, HIT_DEPTHS, EXPLORER, PHASES, PHASE_CEILINGS)
_NUM_SPLIT_SIZES = 16
_SHAPE = ("tokens_per_block", "ssm_reuse_interval")
_VARIED = (*_SHAPE, "admission", "gpu_memory_bytes", "host_memory_bytes", "disk_memory_bytes")
_VARIED_SCHEMA: Schema = {name: hints_of(ReplaySettings)[name] for name in _VARIED}
_EXPLORED_TOKENS = (
    "prompt_tokens",
    "usable_hit_tokens",
    "ceiling_hit_tokens",
    "kv_ceiling_hit_tokens",
    "lost_evicted_tokens",
    "lost_alignment_tokens",
    "lost_snapshot_tokens",
)
_PLANES_SCHEMA: Schema = {
    "tokens_per_block": Positive,
    "ssm_reuse_interval": Positive,
    "kv_bytes": Positive,
    "ssm_bytes": Positive,
    "usable_token_hit_rate": Share,
}
_SCHEMAS: dict[str, Schema] = {
    PLANES: _PLANES_SCHEMA,
    SPLITS: {**_PLANES_SCHEMA, "gpu_memory_bytes": Positive, "ssm_fraction": Share | None},
    HIT_DEPTHS: {
        **_VARIED_SCHEMA,
        "percent_of_requests": Annotated[int, Range(0, 100)],
        "usable_hit_tokens": int,
        "share_of_prompt": Share,
    },
    EXPLORER: {"model": str, **_VARIED_SCHEMA, **{name: hints_of(ReplayTotals)[name] for name in _EXPLORED_TOKENS}},
    PHASES: {
        **_VARIED_SCHEMA,
        "shift_tokens": int,
        "own_hit_tokens": int,
        "own_hit_rate": Share,
        "engine": Literal["grid", "replay"],
    },
}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SweepPhases:
    """What `sweep --phase` found: the cells at each shift, and the ceilings by period."""

    cells: tuple[PhaseCell, ...]
    ceilings: tuple[PhaseCeilings, ...]


def find_phases(
    trace: Trace, cells: Sequence[PlannedCell], progress: Callable[[int], None], workers: int | Executor = 1
) -> SweepPhases:
    """The cells at shifts over their periods; `progress` and `workers` as in `phase_cells`."""
    periods = sorted({period_of(cell.settings) for cell in cells})
    ceilings = tuple(phase_ceilings(trace, period) for period in periods)
    return SweepPhases(phase_cells(trace, cells, progress, workers), ceilings)


def write_details(
    directory: Path,
    spec: SweepSpec,
    trace: Trace,
    model: ModelSpec,
    cells: Sequence[tuple[PlannedCell, SweptCell]],
    phases: SweepPhases | None,
) -> None:
    """Writes the files into a sweep's directory, and removes those of an earlier sweep that have no rows now.

    Cost: that of `detail_columns`, and one pass more over the trace for the explorer. Errors: OutputError.
    """
    files = detail_columns(trace, cells, phases)
    # with the GPU alone, also where the sweep has other tiers
    explorer = explorer_cells(spec, trace, model) if _by_grid(cells) else []
    files[EXPLORER] = _columns([_explorer_row(*cell) for cell in explorer])
    for name, columns in files.items():
        _write_or_remove(directory / name, columns)


def detail_columns(
    trace: Trace, cells: Sequence[tuple[PlannedCell, SweptCell]], phases: SweepPhases | None
) -> dict[str, dict[str, Any]]:
    """The columns of each file but the explorer's; no columns for one without rows.

    An arena has no plane, no split and no depths. Cost: one pass over the trace where the grid did any other cells.
    """
    rows: dict[str, list[Row]] = {name: [] for name in (PLANES, SPLITS, HIT_DEPTHS, PHASES)}
    by_grid = _by_grid(cells)
    if by_grid:
        periods = {planned.settings.ssm_reuse_interval or 0 for planned, _ in by_grid} - {0}
        distances = stack_distances(trace, periods | {planned.settings.tokens_per_block for planned, _ in by_grid})
        rows[HIT_DEPTHS] = [row for planned, _ in by_grid for row in _depth_rows(trace, distances, planned)]
    if every := [cell for cell in by_grid if cell[0].settings.admission != "last"]:
        for shape in _by_shape(every):
            planes, divided = _plane_rows(trace, distances, shape)
            rows[PLANES] += planes
            rows[SPLITS] += divided
    if phases is not None:
        rows[PHASES] = [_phase_row(cell) for cell in phases.cells]
    files: dict[str, dict[str, Any]] = {name: _columns(of_file) for name, of_file in rows.items()}
    files[PHASE_CEILINGS] = phase_ceilings_columns(phases.ceilings if phases else ())
    return files


def _by_grid(cells: Sequence[tuple[PlannedCell, SweptCell]]) -> list[tuple[PlannedCell, SweptCell]]:
    """Those with pools of their own."""
    return [(planned, swept) for planned, swept in cells if isinstance(planned.grid, GridCapacity)]


@dataclass(frozen=True, slots=True, eq=False)
class SweepDetails:
    """The files as data frames; None or empty for one without rows."""

    planes: "pd.DataFrame | None"
    splits: "pd.DataFrame | None"
    hit_depths: "pd.DataFrame | None"
    explorer: "pd.DataFrame | None"
    phases: "pd.DataFrame | None"
    phase_ceilings: tuple[PhaseCeilings, ...]


def load_details(directory: Path, cells: "pd.DataFrame") -> SweepDetails:
    """Reads what `write_details` wrote of these cells. Errors: OutputError for a file that fits no schema, or them."""
    paths = {name: directory / name for name in _SCHEMAS if (directory / name).exists()}
    frames = {name: read_parquet(path, _SCHEMAS[name]) for name, path in paths.items()}
    for name, frame in frames.items():
        key = _VARIED if name in (HIT_DEPTHS, PHASES) else ("tokens_per_block",) if name == EXPLORER else _SHAPE
        found, there = plain_rows(frame, key), plain_rows(cells, key)
        if found - there or (name == PHASES and there - found):
            raise OutputError(f"{paths[name]}: expected the {', '.join(key)} of {CELLS}, got others")
    ceilings: tuple[PhaseCeilings, ...] = ()
    if PHASES in frames or (directory / PHASE_CEILINGS).exists():
        periods = {interval or block for block, interval in plain_rows(cells, _SHAPE)}
        ceilings = read_phase_ceilings(directory / PHASE_CEILINGS, periods, int(cells["prompt_tokens"].iloc[0]))
    return _details(frames, ceilings)


def details_of(files: Mapping[str, dict[str, Any]]) -> SweepDetails:
    """What `load_details` would read of the columns of `detail_columns`."""
    frames = {name: frame_of(columns) for name, columns in files.items() if columns}
    ceilings = frames.get(PHASE_CEILINGS)
    return _details(frames, () if ceilings is None else phase_ceilings_of(ceilings))


def _details(frames: "dict[str, pd.DataFrame]", ceilings: tuple[PhaseCeilings, ...]) -> SweepDetails:
    return SweepDetails(
        planes=frames.get(PLANES),
        splits=frames.get(SPLITS),
        hit_depths=frames.get(HIT_DEPTHS),
        explorer=frames.get(EXPLORER),
        phases=frames.get(PHASES),
        phase_ceilings=ceilings,
    )


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def _write_or_remove(path: Path, columns: dict[str, Any]) -> None:
    if columns:
        write_parquet(path, columns)
    else:
        path.unlink(missing_ok=True)


def _by_shape(cells: Sequence[tuple[PlannedCell, SweptCell]]) -> list[list[tuple[PlannedCell, SweptCell]]]:
    """Cells with attention and SSM layers, by block and interval."""
    shapes: dict[tuple[int, int], list[tuple[PlannedCell, SweptCell]]] = {}
    for planned, swept in cells:
        interval = planned.settings.ssm_reuse_interval
        if interval is not None:
            shapes.setdefault((planned.settings.tokens_per_block, interval), []).append((planned, swept))
    return list(shapes.values())


def _plane_rows(
    trace: Trace, distances: StackDistances, shape: Sequence[tuple[PlannedCell, SweptCell]]
) -> tuple[list[Row], list[Row]]:
    """Rows of the plane and of the splits; none where the sweep has unlimited memory alone."""
    planned = shape[0][0]
    sizes = [cell.settings.gpu_memory_bytes for cell, _ in shape]
    finite = [size for size in sizes if size is not None]
    plane = split_plane(trace, distances, planned.config, max(finite)) if finite else None
    if plane is None:
        return [], []
    head = {
        "tokens_per_block": planned.settings.tokens_per_block,
        "ssm_reuse_interval": planned.settings.ssm_reuse_interval,
    }
    prompt_tokens = max(int(trace.prompt_tokens.sum()), 1)
    planes = [
        {**head, "kv_bytes": kv_bytes, "ssm_bytes": ssm_bytes, "usable_token_hit_rate": hits / prompt_tokens}
        for kv_bytes, of_kv in zip(plane.kv_bytes.tolist(), plane.hit_tokens.tolist(), strict=True)
        for ssm_bytes, hits in zip(plane.ssm_bytes.tolist(), of_kv, strict=True)
    ]
    found = splits(trace, distances, planned.config, memory_steps(finite, _NUM_SPLIT_SIZES))
    tried: list[tuple[int, float | None, int, int, int]] = [astuple(split) for split in found]
    for cell, swept in shape:
        size = cell.settings.gpu_memory_bytes
        if size is not None:
            tried.append((size, None, *used_bytes(cell.config), swept.totals.usable_hit_tokens))
    names = ("gpu_memory_bytes", "ssm_fraction", "kv_bytes", "ssm_bytes")
    divided = [
        {**head, **dict(zip(names, split, strict=True)), "usable_token_hit_rate": hits / prompt_tokens}
        for *split, hits in tried
    ]
    return planes, divided


def _depth_rows(trace: Trace, distances: StackDistances, planned: PlannedCell) -> list[Row]:
    assert isinstance(planned.grid, GridCapacity)
    settings = planned.settings
    if settings.admission == "last":
        depths = last_hit_depths(trace, distances, planned.config, planned.grid)
    else:
        depths = hit_depths(distances, settings.tokens_per_block, settings.ssm_reuse_interval, planned.grid)
    tokens, shares = depths.quantiles(trace.num_requests)
    return [
        {**_varied(settings), "percent_of_requests": percent, "usable_hit_tokens": depth, "share_of_prompt": share}
        for percent, depth, share in zip(PERCENTS, tokens.tolist(), shares.tolist(), strict=True)
    ]


def _varied(settings: ReplaySettings) -> Row:
    return {name: getattr(settings, name) for name in _VARIED}


def _explorer_row(settings: ReplaySettings, totals: ReplayTotals) -> Row:
    return {"model": settings.model, **_varied(settings), **{name: getattr(totals, name) for name in _EXPLORED_TOKENS}}


def _phase_row(cell: PhaseCell) -> Row:
    return {
        **_varied(cell.settings),
        "shift_tokens": cell.shift_tokens,
        "own_hit_tokens": cell.own_hit_tokens,
        "own_hit_rate": cell.own_hit_rate,
        "engine": cell.engine,
    }
