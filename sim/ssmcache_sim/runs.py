"""Replays, sweeps and recommendations as data frames, without files: for notebooks.

Each gives what the command of the same name writes with `--out` and what is read back of that, made by the same
functions. Everything runs in this process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ssmcache.models import ModelSpec
from ssmcache_sim.candidates import Question
from ssmcache_sim.engines import Engine, Pools
from ssmcache_sim.parquet import frame_of
from ssmcache_sim.recommend import Recommendation, recommend
from ssmcache_sim.recommend_results import case_columns, recommend_manifest, settings_columns
from ssmcache_sim.replay import replay
from ssmcache_sim.results import ReplayRun, per_request_columns, replay_manifest
from ssmcache_sim.settings import ReplaySettings, build_config
from ssmcache_sim.sweep import SweepSpec, plan_sweep, run_sweep
from ssmcache_sim.sweep_details import detail_columns, details_of, find_phases
from ssmcache_sim.sweep_results import SweepRun, cell_columns, sweep_manifest, with_skipped
from ssmcache_sim.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int], None]


def _nobody(done: int) -> None:
    pass


def replay_run(trace: Trace, model: ModelSpec, settings: ReplaySettings, progress: Progress = _nobody) -> ReplayRun:
    """One replay, with a row a request.

    Args:
        progress: called now and then with the number of requests served.

    Errors: SettingsError, TraceError, MemoryTooSmallError: see `build_config` and `replay`.
    """
    result = replay(trace, build_config(model, settings), prefill=settings.prefill, progress=progress)
    per_request = frame_of(per_request_columns(result))
    return ReplayRun(replay_manifest(trace, settings), result.totals, per_request, result.phase)


def sweep_run(
    trace: Trace,
    model: ModelSpec,
    *,
    ssm_reuse_intervals: Sequence[int],
    gpu_memory_bytes: Sequence[int | None],
    tokens_per_block: Sequence[int] | None = None,
    host_memory_bytes: Sequence[int] = (0,),
    disk_memory_bytes: int = 0,
    ssm_fraction: float | None = None,
    kv_dtype: str | None = None,
    state_dtype: str | None = None,
    engine: Engine = "auto",
    pools: Pools = "separate",
    phase: bool = False,
    progress: Progress = _nobody,
) -> SweepRun:
    """Every combination, with a row a cell, and all details but the explorer of the report.

    Args:
        tokens_per_block: None: the trace's own.
        phase: also at up to 16 shifts of all prompts.
        progress: called with the number of cells done, and then of shifted cells.
        Others as in `ReplaySettings` and `SweepSpec`.

    Errors: UserError where no combination is possible; impossible ones are left out, see `SweepRun.manifest`.
    """
    spec = SweepSpec(
        tokens_per_block=tuple(tokens_per_block or (trace.tokens_per_block,)),
        ssm_reuse_intervals=tuple(ssm_reuse_intervals),
        gpu_memory_bytes=tuple(gpu_memory_bytes),
        ssm_fraction=ssm_fraction,
        kv_dtype=kv_dtype,
        state_dtype=state_dtype,
        engine=engine,
        pools=pools,
        host_memory_bytes=tuple(host_memory_bytes),
        disk_memory_bytes=disk_memory_bytes,
    )
    with TemporaryDirectory() as folder:  # replayed cells leave files
        plan = plan_sweep(spec, trace, model, Path(folder))
        cells = run_sweep(trace, plan, 1, progress)
    phases = find_phases(trace, plan.cells, progress) if phase else None
    details = details_of(detail_columns(trace, list(zip(plan.cells, cells, strict=True)), phases))
    manifest = with_skipped(sweep_manifest(spec, trace, model), plan.skipped)
    return SweepRun(manifest, frame_of(cell_columns(cells)), details)


@dataclass(frozen=True, slots=True, eq=False)
class RecommendRun:
    """A recommendation as data frames: one row a block size and interval, best first, and one row a repetition of the
    choice on parts of the trace or with other costs.
    """

    manifest: dict[str, Any]
    answer: Recommendation
    choices: "pd.DataFrame"
    cases: "pd.DataFrame"

    def __repr__(self) -> str:
        return f"RecommendRun({self.manifest['trace']['name']})\n{self.answer!r}"


def recommend_run(trace: Trace, model: ModelSpec, question: Question, progress: Progress = _nobody) -> RecommendRun:
    """The best settings for a trace, a model and a memory.

    Args:
        progress: called now and then with the percentage done.

    Errors: as `recommend`.
    """
    answer = recommend(trace, model, question, progress=progress)
    choices, cases = frame_of(settings_columns(answer)), frame_of(case_columns(answer))
    return RecommendRun(recommend_manifest(trace, model.name, question), answer, choices, cases)
