"""`ssmcache sweep`: one model, many settings, one trace or several."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ssmcache.models import load_model
from ssmcache_cli.console import (
    DiskMemoryOption,
    FormatOption,
    KvDtypeOption,
    ModelOption,
    OutputsOption,
    PrefillOption,
    QuietOption,
    SeedOption,
    SessionStartOption,
    SkipBrokenOption,
    SsmFractionOption,
    StateDtypeOption,
    Stopwatch,
    TokenizerOption,
    TraceBlockOption,
    interruptible,
    note_broken_rows,
    progress_bar,
    read_options,
    read_shown,
)
from ssmcache_cli.tables import phase_table, sweep_table
from ssmcache_sim.cluster import LOCAL, cluster_workers
from ssmcache_sim.engines import parse_engine, parse_pools
from ssmcache_sim.errors import UserError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.phase_cells import MAX_SHIFTS, num_shifted
from ssmcache_sim.ranges import parse_int_values, parse_size_values, parse_tier_size_values
from ssmcache_sim.settings import parse_admissions, parse_prefill
from ssmcache_sim.sizes import parse_tier_size
from ssmcache_sim.sweep import SkippedCell, SweepPlan, SweepSpec, SweptCell, plan_sweep, run_sweeps
from ssmcache_sim.sweep_details import SweepPhases, find_phases, write_details
from ssmcache_sim.sweep_results import begin_sweep, finish_sweep, sweep_directories
from ssmcache_sim.trace import Trace

_MAX_REASONS = 5


def sweep_command(
    traces: Annotated[
        list[Path],
        typer.Argument(
            help="Request traces, plain or compressed (gzip, xz, zstd). The results of several get a directory each "
            "in --out, named like the trace.",
            metavar="TRACE...",
            show_default=False,
        ),
    ],
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Directory for the results; finished cells in it are not run again.")],
    tokens_per_block: Annotated[
        str | None, typer.Option(help="Block sizes: 512,1024 or 512:4096:x2 (doubling). Default: the trace's own.")
    ] = None,
    ssm_reuse_interval: Annotated[
        str, typer.Option(help="Snapshot intervals: 512,2048 or 512:8192:x2 (doubling).")
    ] = "512:8192:x2",
    gpu_memory: Annotated[
        str, typer.Option(help="Memory sizes: 10GiB,40GiB,unlimited or 5GiB:80GiB:8 (8 sizes, log-spaced).")
    ] = "5GiB:80GiB:5",
    host_memory: Annotated[
        str,
        typer.Option(
            help="Sizes of host memory for what the GPU has no room for: 0,100GiB,200GiB or 40GiB:640GiB:5; 0: none."
        ),
    ] = "0",
    disk_memory: DiskMemoryOption = "0",
    admission: Annotated[
        str,
        typer.Option(
            help="Where snapshots are kept: `every` multiple of the interval, the `last` one within each prompt alone, "
            "or both: every,last."
        ),
    ] = "every",
    ssm_fraction: SsmFractionOption = None,
    kv_dtype: KvDtypeOption = None,
    state_dtype: StateDtypeOption = None,
    prefill: PrefillOption = "reserved",
    trace_block: TraceBlockOption = None,
    format_name: FormatOption = None,
    session_start: SessionStartOption = None,
    seed: SeedOption = None,
    tokenizer: TokenizerOption = None,
    skip_broken: SkipBrokenOption = False,
    outputs: OutputsOption = False,
    engine: Annotated[
        str,
        typer.Option(help="`auto`: all cells in one pass where that is exact, else a replay; `replay`: always replay."),
    ] = "auto",
    pools: Annotated[
        str,
        typer.Option(
            help="`separate`: a pool for KV and one for snapshots; `arena`: one budget of bytes for both, as an ideal."
        ),
    ] = "separate",
    phase: Annotated[
        bool,
        typer.Option(
            "--phase",
            help="Also with all prompts shifted by 0 to interval tokens, as by a longer system prompt: does the hit "
            f"rate hang on it? Up to {MAX_SHIFTS} shifts, each another pass or replay.",
        ),
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; by default one a CPU.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Run on Dask workers instead: the address of a scheduler (tcp://host:8786), or `local`: one of this "
            "machine. They need ssmcache, and no files: traces are sent to them. Extra `cluster`.",
            metavar="ADDRESS|local",
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Replay traces for every combination of block size, snapshot interval, admission and memory size of the tiers."""
    stopwatch = Stopwatch()
    blocks = None if tokens_per_block is None else parse_int_values(tokens_per_block, "--tokens-per-block")
    intervals = parse_int_values(ssm_reuse_interval, "--ssm-reuse-interval")
    sizes = parse_size_values(gpu_memory, "--gpu-memory")
    host_sizes = parse_tier_size_values(host_memory, "--host-memory")
    disk_bytes = parse_tier_size(disk_memory, "--disk-memory")
    admissions = parse_admissions(admission)
    how, by, memory = parse_prefill(prefill), parse_engine(engine), parse_pools(pools)
    if phase and memory == "arena":
        raise UserError("phase: expected separate pools, got an arena, whose prompts are not shifted")
    spec = load_model(model)
    reading = read_options(format_name, session_start, seed, tokenizer, skip_broken, outputs)
    hint = "finished cells are kept; run the same command again to go on"
    with interruptible(hint), _workers(cluster, jobs) as workers:
        sweeps = []
        for path, directory in zip(traces, sweep_directories(traces, out), strict=True):
            requests = read_shown(read_trace, path, trace_block, reading, shown=not quiet)
            note_broken_rows(requests)
            sweep = SweepSpec(
                tokens_per_block=blocks or (requests.tokens_per_block,),
                ssm_reuse_intervals=intervals,
                gpu_memory_bytes=sizes,
                ssm_fraction=ssm_fraction,
                kv_dtype=kv_dtype,
                state_dtype=state_dtype,
                prefill=how,
                engine=by,
                pools=memory,
                host_memory_bytes=host_sizes,
                disk_memory_bytes=disk_bytes,
                admissions=admissions,
            )
            sweeps.append(_Sweep(directory, sweep, requests, plan_sweep(sweep, requests, spec, directory)))
        manifests = [begin_sweep(each.directory, each.spec, each.trace, spec) for each in sweeps]
        with progress_bar("sweep", sum(len(each.plan.cells) for each in sweeps), shown=not quiet) as progress:
            cells = run_sweeps([(each.trace, each.plan) for each in sweeps], workers, progress)
        phases = [_phases(each, workers, shown=not quiet) if phase else None for each in sweeps]
        for each, manifest, swept, shifted in zip(sweeps, manifests, cells, phases, strict=True):
            planned = list(zip(each.plan.cells, swept, strict=True))
            write_details(each.directory, each.spec, each.trace, spec, planned, shifted)
            finish_sweep(each.directory, manifest, swept, each.plan.skipped, stopwatch.times())
    for each, swept, shifted in zip(sweeps, cells, phases, strict=True):
        _print_skipped(each.plan.skipped)
        if not quiet:
            _print_sweep(each, spec.name, swept, shifted)


@dataclass(frozen=True, slots=True, eq=False)
class _Sweep:
    """Of one trace."""

    directory: Path
    spec: SweepSpec
    trace: Trace
    plan: SweepPlan


@contextmanager
def _workers(cluster: str | None, jobs: int | None) -> Iterator[int | Executor]:
    num_processes = jobs or os.cpu_count() or 1
    if cluster is None:
        yield num_processes
        return
    if jobs is not None and cluster != LOCAL:
        raise UserError(f"jobs: expected none beside a cluster, which has workers of its own, got {jobs}")
    with cluster_workers(cluster, num_processes) as workers:
        yield workers


def _phases(sweep: _Sweep, workers: int | Executor, shown: bool) -> SweepPhases:
    cells = sweep.plan.cells
    with progress_bar("phases", num_shifted(sweep.trace, cells), shown) as progress:
        return find_phases(sweep.trace, cells, progress, workers)


def _print_sweep(sweep: _Sweep, model: str, cells: Sequence[SweptCell], phases: SweepPhases | None) -> None:
    arena = "\none arena for KV and snapshots" if sweep.spec.pools == "arena" else ""
    sweep_table(f"{sweep.trace.label}, {model}{arena}", cells)
    if phases is not None:
        phase_table(phases, cells)
    by_grid = sum(cell.engine == "grid" for cell in cells)
    finished = len(sweep.plan.finished)
    typer.echo(f"{len(cells)} cells, {by_grid} of them by the grid, {finished} finished before: {sweep.directory}")


def _print_skipped(skipped: Sequence[SkippedCell]) -> None:
    reasons = Counter(cell.reason for cell in skipped)
    for reason, count in list(reasons.items())[:_MAX_REASONS]:
        print(f"skipped {count} of the combinations: {reason}", file=sys.stderr)
    if len(reasons) > _MAX_REASONS:
        print(f"and {len(reasons) - _MAX_REASONS} more reasons, see manifest.json", file=sys.stderr)
