"""`ssmcache sweep`: one trace and model, many settings."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
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
    TraceArgument,
    TraceBlockOption,
    interruptible,
    note_broken_rows,
    progress_bar,
    read_options,
)
from ssmcache_cli.tables import phase_table, sweep_table
from ssmcache_sim.engines import parse_engine, parse_pools
from ssmcache_sim.errors import UserError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.phase_cells import MAX_SHIFTS, num_shifted
from ssmcache_sim.ranges import parse_int_values, parse_size_values, parse_tier_size_values
from ssmcache_sim.settings import parse_admissions, parse_prefill
from ssmcache_sim.sizes import parse_tier_size
from ssmcache_sim.sweep import SkippedCell, SweepPlan, SweepSpec, plan_sweep, run_sweep
from ssmcache_sim.sweep_details import SweepPhases, find_phases, write_details
from ssmcache_sim.sweep_results import begin_sweep, finish_sweep
from ssmcache_sim.trace import Trace

_MAX_REASONS = 5


def sweep_command(
    trace: TraceArgument,
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
    quiet: QuietOption = False,
) -> None:
    """Replay a trace for every combination of block size, snapshot interval, admission and memory size of the tiers."""
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
    with interruptible("finished cells are kept; run the same command again to go on"):
        requests = read_trace(trace, trace_block, reading)
        note_broken_rows(requests)
        sweep = SweepSpec(
            trace_path=trace,
            trace_block=trace_block,
            reading=reading,
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
        plan = plan_sweep(sweep, requests, spec, out)
        manifest = begin_sweep(out, sweep, requests, spec)
        with progress_bar("sweep", len(plan.cells), shown=not quiet) as progress:
            cells = run_sweep(sweep, requests, plan, jobs or os.cpu_count() or 1, progress)
        phases = _phases(requests, plan, shown=not quiet) if phase else None
        write_details(out, sweep, requests, spec, list(zip(plan.cells, cells, strict=True)), phases)
        finish_sweep(out, manifest, cells, plan.skipped, stopwatch.times())
    _print_skipped(plan.skipped)
    if not quiet:
        sweep_table(
            f"{requests.label}, {spec.name}" + ("\none arena for KV and snapshots" if memory == "arena" else ""), cells
        )
        if phases is not None:
            phase_table(phases, cells)
        by_grid = sum(cell.engine == "grid" for cell in cells)
        finished = len(plan.finished)
        typer.echo(f"{len(cells)} cells, {by_grid} of them by the grid, {finished} finished before: {out}")


def _phases(requests: Trace, plan: SweepPlan, shown: bool) -> SweepPhases:
    with progress_bar("phases", num_shifted(requests, plan.cells), shown) as progress:
        return find_phases(requests, plan.cells, progress)


def _print_skipped(skipped: Sequence[SkippedCell]) -> None:
    reasons = Counter(cell.reason for cell in skipped)
    for reason, count in list(reasons.items())[:_MAX_REASONS]:
        print(f"skipped {count} of the combinations: {reason}", file=sys.stderr)
    if len(reasons) > _MAX_REASONS:
        print(f"and {len(reasons) - _MAX_REASONS} more reasons, see manifest.json", file=sys.stderr)
