"""The result directory of one replay: `manifest.json`, `summary.json`, `per_request.parquet`, `phase_ceilings.parquet`.

The same input gives the same bytes in the data files; when and how long is said in the manifest alone.
"""

import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmcache import __version__
from ssmcache.memory.bandwidths import DEFAULT_BANDWIDTHS, BandwidthProfile
from ssmcache_sim.accounting import ReplayResult
from ssmcache_sim.causes import snapshot_columns
from ssmcache_sim.directories import MANIFEST, TOOL, json_bytes, new_directory, read_manifest, write_file
from ssmcache_sim.errors import OutputError
from ssmcache_sim.payload_check import PayloadCheck
from ssmcache_sim.phase import PhaseCeilings
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


@dataclass(frozen=True, slots=True)
class RunTimes:
    """When a run began (ISO 8601) and how long it took. Measured by the caller: nothing here reads a clock."""

    started_at: str
    wall_seconds: float


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
        "trace": {
            "name": trace.label,
            "sha256": trace.sha256,
            "format": trace.format_name,
            "reading": trace.reading,
            "requests": trace.num_requests,
            "prompt_tokens": int(trace.prompt_tokens.sum()),
            "tokens_per_block": trace.tokens_per_block,
            "repairs": dict(trace.repairs),
            "broken_rows": trace.num_broken,
        },
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


def write_parquet(path: Path, columns: dict[str, Any]) -> None:
    """Writes columns (arrays or lists, None: missing) as one Parquet file. Errors: OutputError."""
    write_file(path, _parquet_bytes(columns))


def _parquet_bytes(columns: dict[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def frame_of(columns: dict[str, Any]) -> "pd.DataFrame":
    """Columns as `read_parquet` would give them after `write_parquet`, without a file."""
    import pandas as pd

    return pd.read_parquet(BytesIO(_parquet_bytes(columns)), dtype_backend="numpy_nullable")


def read_parquet(path: Path) -> "pd.DataFrame":
    """A Parquet file of ours as a data frame with nullable types. Errors: OutputError."""
    import pandas as pd

    try:
        return pd.read_parquet(path, dtype_backend="numpy_nullable")
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors or OSErrors
        raise OutputError(f"{path}: expected a Parquet file of {TOOL}: {' '.join(str(error).split())}") from error


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
    """Reads what `write_replay` wrote. Errors: OutputError."""
    import json

    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest.get("command") != REPLAY_COMMAND:
        raise OutputError(f"{directory}: expected the result of a replay, got one of {manifest.get('command')!r}")
    try:
        totals = ReplayTotals.from_json(json.loads((directory / SUMMARY).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{directory / SUMMARY}: expected the summary of a replay: {error}") from error
    (phase,) = phase_ceilings_of(read_parquet(directory / PHASE_CEILINGS))
    return ReplayRun(manifest, totals, read_parquet(directory / PER_REQUEST), phase)
