"""The result directory of a sweep: `cells.parquet`, `manifest.json`, `cells/` with a file a finished replay."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssmcache.config import Admission
from ssmcache.models import ModelSpec
from ssmcache.units import plural
from ssmcache_sim.directories import MANIFEST, TOOL, json_bytes, open_directory, read_manifest, write_file
from ssmcache_sim.engines import Engine, Pools
from ssmcache_sim.errors import OutputError, UserError
from ssmcache_sim.parquet import Schema, plain_rows, read_parquet, write_parquet
from ssmcache_sim.results import RunTimes, TraceHead, errors_of, manifest_head, manifest_with_times
from ssmcache_sim.schemas import Positive, Share, decode, hints_of, shown
from ssmcache_sim.settings import Prefill, ReplaySettings
from ssmcache_sim.sweep import SkippedCell, SweepSpec, SweptCell, forget_passes
from ssmcache_sim.sweep_details import CELLS, SweepDetails, load_details
from ssmcache_sim.totals import ReplayTotals
from ssmcache_sim.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

SWEEP_COMMAND = "sweep"
_RATES = ("usable", "attention", "tree", "kv_ceiling", "ceiling")  # token_hit_rate
_CELLS_SCHEMA: Schema = {
    **{name: hint for name, hint in hints_of(ReplaySettings).items() if name != "disk_path"},
    "pools": Pools,
    "engine": Literal["grid", "replay"],
    "engine_reason": str,
    **hints_of(ReplayTotals, int),
    **{f"{name}_token_hit_rate": Share for name in _RATES},
    "usable_token_hit_rate_*": Share | None,
    **{f"{name}_*": int | None for name in ("usable_hit_tokens", "peak_bytes", "moved_slots", "moved_bytes")},
    "snapshots_*": int | None,
}
_VARIED = ("tokens_per_block", "ssm_reuse_interval", "admission", "gpu_memory_bytes", "host_memory_bytes")


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """What the manifest says of a `SweepSpec`."""

    model: str
    tokens_per_block: list[Positive]
    ssm_reuse_interval: list[Positive]
    admission: list[Admission]
    gpu_memory_bytes: list[Positive | None]
    host_memory_bytes: list[int]
    disk_memory_bytes: int
    ssm_fraction: Share | None
    kv_dtype: str | None
    state_dtype: str | None
    prefill: Prefill
    engine: Engine
    pools: Pools


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """What the manifest says of a combination that was left out."""

    tokens_per_block: int
    ssm_reuse_interval: int | None
    admission: Admission | None
    gpu_memory_bytes: int | None
    host_memory_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class SweepManifest:
    """The schema of a finished sweep's manifest."""

    tool: str
    command: str
    versions: dict[str, str]
    trace: TraceHead
    settings: SweepSettings
    skipped: list[SkippedRow]
    run: RunTimes

    def varied(self, has_ssm: bool) -> tuple[Sequence[Any], ...]:
        """The values there are of each of `_VARIED`."""
        of, none = self.settings, (None,)
        shapes = (of.ssm_reuse_interval, of.admission) if has_ssm else (none, none)
        return (of.tokens_per_block, *shapes, of.gpu_memory_bytes, of.host_memory_bytes)


def sweep_directories(traces: Sequence[Path], directory: Path) -> list[Path]:
    """Where the sweep of each trace goes: `directory` itself for one, a directory in it for each of several.

    Errors: UserError for two traces of one name; OutputError for several where the sweep of one is already.
    """
    if len(traces) == 1:
        return [directory]
    if (directory / MANIFEST).exists():
        raise OutputError(f"{directory}: expected a directory for several sweeps, got a result of {TOOL}")
    names = [trace.name.partition(".")[0] or trace.name for trace in traces]
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"traces: expected names that differ before their first dot, got {count} of {name!r}")
    return [directory / name for name in names]


def begin_sweep(directory: Path, spec: SweepSpec, trace: Trace, model: ModelSpec) -> dict[str, Any]:
    """Marks `directory` as a sweep's before the long work, and gives the manifest so far.

    Errors: OutputError if it cannot be written or holds something else.
    """
    open_directory(directory, SWEEP_COMMAND)
    manifest = sweep_manifest(spec, trace, model)
    write_file(directory / MANIFEST, json_bytes(manifest))
    return manifest


def sweep_manifest(spec: SweepSpec, trace: Trace, model: ModelSpec) -> dict[str, Any]:
    """What a sweep is made of, before it is known which cells are possible."""
    return {
        **manifest_head(SWEEP_COMMAND, trace),
        "settings": asdict(
            SweepSettings(
                model=model.name,
                tokens_per_block=sorted(spec.tokens_per_block),
                ssm_reuse_interval=sorted(spec.ssm_reuse_intervals),
                admission=list(spec.admissions),
                gpu_memory_bytes=list(spec.gpu_memory_bytes),
                host_memory_bytes=sorted(spec.host_memory_bytes),
                disk_memory_bytes=spec.disk_memory_bytes,
                ssm_fraction=spec.ssm_fraction,
                kv_dtype=spec.kv_dtype,
                state_dtype=spec.state_dtype,
                prefill=spec.prefill,
                engine=spec.engine,
                pools=spec.pools,
            )
        ),
    }


def with_skipped(manifest: dict[str, Any], skipped: Sequence[SkippedCell]) -> dict[str, Any]:
    """The manifest with the combinations that were left out, and why."""
    reasons = [{**{name: getattr(cell.settings, name) for name in _VARIED}, "reason": cell.reason} for cell in skipped]
    return {**manifest, "skipped": reasons}


def finish_sweep(
    directory: Path,
    manifest: dict[str, Any],
    cells: Sequence[SweptCell],
    skipped: Sequence[SkippedCell],
    times: RunTimes,
) -> None:
    """Writes `cells.parquet`, one row a cell in the order given, and the whole manifest. Errors: OutputError."""
    write_parquet(directory / CELLS, cell_columns(cells))
    write_file(directory / MANIFEST, json_bytes(manifest_with_times(with_skipped(manifest, skipped), times)))
    forget_passes(directory)


def cell_columns(cells: Sequence[SweptCell]) -> dict[str, list[Any]]:
    """One entry a cell for each column of any of them; None where a cell has none."""
    rows = [cell_row(cell) for cell in cells]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def cell_row(cell: SweptCell) -> dict[str, Any]:
    """A cell's settings and totals as one flat row; a missing size of the GPU means unlimited, one of 0 no such tier.

    With several tiers there are hits, peaks and moves of each; a sweep has no disk with a path.
    """
    settings = asdict(cell.settings)
    del settings["disk_path"]
    published = cell.totals.to_json()
    del published["tiers"], published["moved"]
    snapshots = published.pop("snapshots") or {}
    skipped = snapshots.pop("skipped", {})
    del published["layer_groups"]
    return {
        **settings,
        "pools": cell.pools,
        "engine": cell.engine,
        "engine_reason": cell.reason,
        **{f"peak_bytes_{kind}": value for kind, value in published.pop("peak_bytes").items()},
        **published,
        **_tier_columns(cell.totals),
        **{f"snapshots_{name}": value for name, value in snapshots.items()},
        **{f"snapshots_skipped_{reason}": value for reason, value in skipped.items()},
    }


def _tier_columns(totals: ReplayTotals) -> dict[str, int | float]:
    """Of a cell with several tiers; what a grid does not count is left out."""
    columns: dict[str, int | float] = {}
    names = [tier.tier for tier in totals.tiers]
    for tier in totals.tiers:
        columns[f"usable_hit_tokens_{tier.tier}"] = tier.usable_hit_tokens
        columns[f"usable_token_hit_rate_{tier.tier}"] = totals.rate(tier.usable_hit_tokens)
        if tier.peaks:
            columns[f"peak_bytes_{tier.tier}"] = sum(peak.peak_bytes for peak in tier.peaks)
    if totals.moved is not None:
        for source, target in product(names, names):
            if source == target != names[0]:
                continue  # copies are made on the GPU alone
            moved = [each for each in totals.moved if (each.source_tier, each.tier) == (source, target)]
            columns[f"moved_slots_{source}_to_{target}"] = sum(each.num_slots for each in moved)
            columns[f"moved_bytes_{source}_to_{target}"] = sum(each.num_bytes for each in moved)
    return columns


@dataclass(frozen=True, slots=True, eq=False)
class SweepRun:
    """A sweep as data frames, one row a cell: its directory read back, or `runs.sweep_run`."""

    manifest: dict[str, Any]
    cells: "pd.DataFrame"
    details: SweepDetails

    def best(self) -> "pd.DataFrame":
        """The cell with the most usable hits of each GPU and host memory size, the first of equal ones, by
        size; unlimited last.
        """
        sizes = ["gpu_memory_bytes", "host_memory_bytes"]
        order = self.cells.sort_values("usable_hit_tokens", ascending=False, kind="stable")
        return order.drop_duplicates(sizes).sort_values(sizes)

    def __repr__(self) -> str:
        engines = ", ".join(f"{count:,} by {name}" for name, count in self.cells["engine"].value_counts().items())
        head = f"SweepRun({self.manifest['trace']['name']}, {self.manifest['settings']['model']}: "
        rates = self.cells["usable_token_hit_rate"]
        span = f"usable token hit rate {rates.min():.2%} to {rates.max():.2%}"
        skipped = len(self.manifest["skipped"])
        left_out = f", {skipped:,} impossible combinations left out" if skipped else ""
        return f"{head}{plural(len(self.cells), 'cell')}, {engines}{left_out})\n  {span}"


def load_sweep(directory: str | Path) -> SweepRun:
    """Reads what a finished sweep wrote, and checks all of it. Errors: OutputError."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest.get("command") != SWEEP_COMMAND:
        raise OutputError(f"{directory}: expected the result of a sweep, got one of {manifest.get('command')!r:.40}")
    if "run" not in manifest:  # written at the end
        raise OutputError(f"{directory}: expected a finished sweep, got an interrupted one: run it again to go on")
    with errors_of(directory / MANIFEST, "the manifest of a sweep"):
        head: SweepManifest = decode(SweepManifest, manifest, "manifest")
    cells = read_parquet(directory / CELLS, _CELLS_SCHEMA)
    with errors_of(directory / CELLS, "the cells of a sweep"):
        _check_cells(cells, head)
    return SweepRun(manifest, cells, load_details(directory, cells))


def _check_cells(cells: "pd.DataFrame", head: SweepManifest) -> None:
    """Errors: ValueError where the cells are not those that the manifest speaks of."""
    with_ssm = cells["ssm_reuse_interval"].notna()
    has_ssm = bool(with_ssm.any())
    if has_ssm != bool(with_ssm.all()) or (cells["admission"].notna() != with_ssm).any():
        raise ValueError("column ssm_reuse_interval: expected one in all rows, with an admission, or in none")
    varied = head.varied(has_ssm)
    num_cells = prod(map(len, varied)) - len(head.skipped)
    if len(cells) != num_cells:
        raise ValueError(f"expected {num_cells} rows, as the manifest says, got {len(cells)}")
    settings, trace = head.settings, head.trace
    allowed: dict[str, Sequence[Any]] = {
        **dict(zip(_VARIED, varied, strict=True)),
        "model": [settings.model],
        "disk_memory_bytes": [settings.disk_memory_bytes],
        "pools": [settings.pools],
        "requests": [trace.requests],
        "prompt_tokens": [trace.prompt_tokens],
    }
    for name, values in allowed.items():
        for found in plain_rows(cells, [name]) - {(value,) for value in values}:
            raise ValueError(f"column {name}: expected what the manifest names, got {shown(found[0])}")
    skipped = {tuple(getattr(row, name) for name in _VARIED) for row in head.skipped}
    if plain_rows(cells, _VARIED) != set(product(*varied)) - skipped:  # no more of them than there are rows
        raise ValueError("expected each combination of the manifest, got some of them twice")
