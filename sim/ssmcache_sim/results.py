"""The result directory of one replay: `manifest.json`, `summary.json`, `per_request.parquet`, `phase_ceilings.parquet`.

The same input gives the same bytes in the data files; when and how long is said in the manifest alone.
"""

import platform
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from ssmcache import __version__
from ssmcache.memory.bandwidths import DEFAULT_BANDWIDTHS, BandwidthProfile
from ssmcache_sim.accounting import ReplayResult
from ssmcache_sim.causes import snapshot_columns
from ssmcache_sim.directories import MANIFEST, TOOL, json_bytes, new_directory, read_json, read_manifest, write_file
from ssmcache_sim.errors import OutputError
from ssmcache_sim.parquet import Schema, read_parquet, write_parquet
from ssmcache_sim.payload_check import PayloadCheck
from ssmcache_sim.phase import PhaseCeilings
from ssmcache_sim.schemas import Positive, Range, decode, hints_of, require_equal
from ssmcache_sim.settings import ReplaySettings
from ssmcache_sim.totals import ReplayTotals
from ssmcache_sim.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

SUMMARY = "summary.json"
PER_REQUEST = "per_request.parquet"
PHASE_CEILINGS = "phase_ceilings.parquet"
DECISIONS = "decisions.log.gz"  # of a replay on real memory
REPORT = "report.html"  # of a replay or a sweep
REPLAY_COMMAND = "replay"


# one sum in the totals, one column a request
_SUMMED = tuple(name for name in hints_of(ReplayTotals, int) if name.endswith("_tokens"))
_PER_REQUEST_SCHEMA: Schema = {
    "request": int,
    "arrival_ms": Annotated[float, Range(-1e18, 1e18)],
    "output_tokens": int,
    **dict.fromkeys(_SUMMED, int),
    "too_large": bool,
    "usable_hit_tokens_*": int,
    "used_bytes_*": int,
}
_PHASE_SCHEMA: Schema = {
    "period_tokens": Positive,
    "step_tokens": Positive,
    "shift_tokens": int,
    "prompt_tokens": Positive,
    "own_hit_tokens_low": int,
    "own_hit_tokens_high": int,
}


@dataclass(frozen=True, slots=True)
class RunTimes:
    """When a run began (ISO 8601) and how long it took. Measured by the caller: nothing here reads a clock."""

    started_at: str
    wall_seconds: float


@dataclass(frozen=True, slots=True)
class TraceHead:
    """What manifests say of a trace."""

    name: str
    sha256: str
    format: str
    reading: str
    requests: Positive
    prompt_tokens: Positive
    tokens_per_block: Positive
    repairs: dict[str, int]
    broken_rows: int


@dataclass(frozen=True, slots=True)
class ReplayManifest:
    """The schema of a replay's manifest; `bandwidths` is left out with the GPU alone."""

    tool: str
    command: str
    versions: dict[str, str]
    trace: TraceHead
    settings: ReplaySettings
    memory: str
    bandwidths: BandwidthProfile | None
    run: RunTimes


def replay_manifest(
    trace: Trace,
    settings: ReplaySettings,
    bandwidths: BandwidthProfile = DEFAULT_BANDWIDTHS,
    memory: str = "simulated",
) -> dict[str, Any]:
    """What a replay was made of; the same for the same input on the same machine."""
    manifest = {**manifest_head(REPLAY_COMMAND, trace), "settings": asdict(settings), "memory": memory}
    has_lower_tiers = settings.host_memory_bytes or settings.disk_memory_bytes
    return {**manifest, "bandwidths": asdict(bandwidths)} if has_lower_tiers else manifest


def manifest_head(command: str, trace: Trace) -> dict[str, Any]:
    """The part of a manifest that all commands share: versions and the trace."""
    return {
        "tool": TOOL,
        "command": command,
        "versions": {"ssmcache": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "trace": asdict(
            TraceHead(
                name=trace.label,
                sha256=trace.sha256,
                format=trace.format_name,
                reading=trace.reading,
                requests=trace.num_requests,
                prompt_tokens=int(trace.prompt_tokens.sum()),
                tokens_per_block=trace.tokens_per_block,
                repairs=dict(trace.repairs),
                broken_rows=trace.num_broken,
            )
        ),
    }


def manifest_with_times(manifest: dict[str, Any], times: RunTimes) -> dict[str, Any]:
    """The whole manifest; nothing but this part of it differs from run to run."""
    return {**manifest, "run": asdict(times)}


def summary(result: ReplayResult, manifest: dict[str, Any], payload: PayloadCheck | None = None) -> dict[str, Any]:
    """The object that `--json` prints and `summary.json` holds."""
    checked = {} if payload is None else {"payload": asdict(payload)}
    return {**result.totals.to_json(), "phase": asdict(result.phase.summary()), **checked, "manifest": manifest}


def replay_directory(path: Path) -> AbstractContextManager[Path]:
    """A folder for `write_replay` that becomes `path` at the end of the block. Errors: OutputError, see there."""
    return new_directory(path, REPLAY_COMMAND, frozenset({SUMMARY, PER_REQUEST, PHASE_CEILINGS, DECISIONS, REPORT}))


def write_replay(
    folder: Path,
    result: ReplayResult,
    manifest: dict[str, Any],
    times: RunTimes,
    payload: PayloadCheck | None = None,
) -> None:
    """Writes the four files into `folder`. Errors: OutputError."""
    write_parquet(folder / PER_REQUEST, per_request_columns(result))
    write_parquet(folder / PHASE_CEILINGS, phase_ceilings_columns([result.phase]))
    write_file(folder / SUMMARY, json_bytes(summary(result, manifest, payload)))
    write_file(folder / MANIFEST, json_bytes(manifest_with_times(manifest, times)))


def per_request_columns(result: ReplayResult) -> dict[str, np.ndarray[Any, Any]]:
    """One entry a request for each column, units in the names. Memory is what was in use on the GPU after the request.

    With several tiers the usable hits are split by them, too.
    """
    trace = result.trace
    by_tier = {
        f"usable_hit_tokens_{tier.tier}": tokens
        for tier, tokens in zip(result.totals.tiers, result.usable_by_tier, strict=False)  # none with the GPU alone
    }
    used = {
        f"used_bytes_{peak.kind}_{peak.layer_group}": used_bytes
        for peak, used_bytes in zip(result.totals.peaks, result.used_bytes, strict=True)
    }
    return {
        "request": np.arange(trace.num_requests, dtype=np.int64),
        "arrival_ms": trace.arrival_ms,
        "prompt_tokens": trace.prompt_tokens,
        "output_tokens": trace.output_tokens,
        "tree_hit_tokens": result.tree,
        "attention_hit_tokens": result.attention,
        "usable_hit_tokens": result.usable,
        **by_tier,
        "kv_ceiling_hit_tokens": result.kv_ceiling,
        "ceiling_hit_tokens": result.ceiling,
        "lost_evicted_tokens": result.lost_evicted,
        "lost_alignment_tokens": result.lost_alignment,
        "lost_snapshot_tokens": result.lost_snapshot,
        "lost_evicted_too_large_tokens": result.lost_to_size,
        **snapshot_columns(result.lost_snapshot_by),
        "never_seen_tokens": result.never_seen,
        "last_block_tokens": result.last_block,
        "too_large": result.too_large,
        **used,
    }


def phase_ceilings_columns(ceilings: Sequence[PhaseCeilings]) -> dict[str, np.ndarray[Any, Any]]:
    """One entry a shift for each column, one period after the other; no columns for no ceilings."""
    parts = [
        {
            "period_tokens": np.full(one.period_tokens, one.period_tokens, dtype=np.int64),
            "step_tokens": np.full(one.period_tokens, one.step_tokens, dtype=np.int64),
            "shift_tokens": np.arange(one.period_tokens, dtype=np.int64),
            "prompt_tokens": np.full(one.period_tokens, one.prompt_tokens, dtype=np.int64),
            "own_hit_tokens_low": one.low,
            "own_hit_tokens_high": one.high,
        }
        for one in ceilings
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def phase_ceilings_of(frame: "pd.DataFrame") -> tuple[PhaseCeilings, ...]:
    """The reverse of `phase_ceilings_columns`."""
    columns = {str(name): frame[name].to_numpy(dtype=np.int64) for name in frame}
    ceilings = []
    for period in np.unique(columns["period_tokens"]).tolist():
        rows = {name: values[columns["period_tokens"] == period] for name, values in columns.items()}
        step_tokens, prompt_tokens = int(rows["step_tokens"][0]), int(rows["prompt_tokens"][0])
        low, high = rows["own_hit_tokens_low"], rows["own_hit_tokens_high"]
        ceilings.append(PhaseCeilings(period, step_tokens, prompt_tokens, low, high))
    return tuple(ceilings)


@dataclass(frozen=True, slots=True, eq=False)
class ReplayRun:
    """A replay with its requests as a data frame: a result directory read back, or `runs.replay_run`."""

    manifest: dict[str, Any]
    totals: ReplayTotals
    per_request: "pd.DataFrame"
    phase: PhaseCeilings

    @property
    def settings(self) -> ReplaySettings:
        return ReplaySettings(**self.manifest["settings"])

    def __repr__(self) -> str:
        return f"ReplayRun({self.manifest['trace']['name']}, {self.settings.in_words()})\n  {self.totals!r}"


def load_run(directory: str | Path) -> ReplayRun:
    """Reads what `write_replay` wrote, and checks all of it. Errors: OutputError."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest.get("command") != REPLAY_COMMAND:
        raise OutputError(f"{directory}: expected the result of a replay, got one of {manifest.get('command')!r:.40}")
    with errors_of(directory / MANIFEST, "the manifest of a replay"):
        head: ReplayManifest = decode(ReplayManifest, {"bandwidths": None, **manifest}, "manifest")
    period = head.settings.ssm_reuse_interval or head.settings.tokens_per_block
    (phase,) = read_phase_ceilings(directory / PHASE_CEILINGS, [period], head.trace.prompt_tokens)
    with errors_of(directory / SUMMARY, "the summary of a replay"):
        published = read_json(directory / SUMMARY)
        totals = ReplayTotals.from_json(published)
        of_run = {name: value for name, value in manifest.items() if name != "run"}
        counts = {name: getattr(head.trace, name) for name in ("requests", "prompt_tokens")}
        require_equal({**counts, "phase": asdict(phase.summary()), "manifest": of_run}, published, "summary")
    per_request = read_parquet(directory / PER_REQUEST, _PER_REQUEST_SCHEMA, totals.requests)
    with errors_of(directory / PER_REQUEST, "the requests of a replay"):
        _check_requests(per_request, totals)
    return ReplayRun(manifest, totals, per_request, phase)


def _check_requests(per_request: "pd.DataFrame", totals: ReplayTotals) -> None:
    """Errors: ValueError where the requests are not in order, or not those of the totals."""
    if (per_request["request"].to_numpy() != np.arange(totals.requests)).any():
        raise ValueError("column request: expected numbers from 0 on")
    if (np.diff(per_request["arrival_ms"].to_numpy(dtype=np.float64)) < 0).any():
        raise ValueError("column arrival_ms: expected times that do not fall")
    sums = {name: getattr(totals, name) for name in _SUMMED}
    sums |= {f"usable_hit_tokens_{tier.tier}": tier.usable_hit_tokens for tier in totals.tiers}
    for name, total in {**sums, "too_large": totals.too_large_requests}.items():
        if name not in per_request or int(per_request[name].sum()) != total:
            raise ValueError(f"column {name}: expected values that sum up to {total} of the summary")
    for peak in totals.peaks:
        name = f"used_bytes_{peak.kind}_{peak.layer_group}"
        if name not in per_request or per_request[name].max() > peak.peak_bytes:
            raise ValueError(f"column {name}: expected values up to the peak in the summary, {peak.peak_bytes}")


def read_phase_ceilings(path: Path, periods: Collection[int], prompt_tokens: int) -> tuple[PhaseCeilings, ...]:
    """Reads what `phase_ceilings_columns` gave, of these periods and so many prompt tokens. Errors: OutputError."""
    frame = read_parquet(path, _PHASE_SCHEMA, sum(periods))
    rising = sorted(periods)
    columns = {str(name): frame[name].to_numpy(dtype=np.int64) for name in frame}
    expected = {
        "period_tokens": np.repeat(rising, rising),
        "shift_tokens": np.concatenate([np.arange(period) for period in rising]),
        "prompt_tokens": np.full(len(frame), prompt_tokens),
        "step_tokens": np.full(len(frame), columns["step_tokens"][0]),
        "own_hit_tokens_high": columns["own_hit_tokens_high"].clip(columns["own_hit_tokens_low"], prompt_tokens),
    }
    for name, values in expected.items():
        if (columns[name] != values).any():
            raise OutputError(f"{path}: column {name}: expected those of periods of {rising} tokens, got others")
    return phase_ceilings_of(frame)


@contextmanager
def errors_of(path: Path, what: str) -> Iterator[None]:
    """What cannot be read inside, or fits no schema, is an OutputError that names the file."""
    try:
        yield
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{path}: expected {what}: {said}") from error
