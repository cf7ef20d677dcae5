"""`ssmcache replay`: one trace, one model, one setting."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ssmcache_cli.console import (
    AdmissionOption,
    BandwidthProfileOption,
    BlockOption,
    DiskMemoryOption,
    FormatOption,
    GpuMemoryOption,
    HostMemoryOption,
    IntervalOption,
    KvDtypeOption,
    ModelOption,
    OutputsOption,
    PrefillOption,
    QuietOption,
    RequestsOption,
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
    print_json,
    progress_bar,
    read_options,
)
from ssmcache_cli.replay_inputs import SIMULATED, Asked, DiskPathOption, ReplayInputs, read_inputs
from ssmcache_cli.tables import replay_table
from ssmcache_cli.verify_table import payload_lines
from ssmcache_sim.accounting import ReplayResult
from ssmcache_sim.errors import SettingsError
from ssmcache_sim.payload_check import PayloadCheck
from ssmcache_sim.replay import replay
from ssmcache_sim.results import (
    DECISIONS,
    manifest_with_times,
    replay_directory,
    replay_manifest,
    summary,
    write_replay,
)


def replay_command(
    trace: TraceArgument,
    model: ModelOption,
    tokens_per_block: BlockOption = None,
    ssm_reuse_interval: IntervalOption = None,
    gpu_memory: GpuMemoryOption = "40GiB",
    host_memory: HostMemoryOption = "0",
    disk_memory: DiskMemoryOption = "0",
    disk_path: DiskPathOption = None,
    bandwidth_profile: BandwidthProfileOption = None,
    ssm_fraction: SsmFractionOption = None,
    kv_dtype: KvDtypeOption = None,
    state_dtype: StateDtypeOption = None,
    admission: AdmissionOption = "every",
    prefill: PrefillOption = "reserved",
    memory: Annotated[
        str,
        typer.Option(
            help="`simulated`: no bytes; `host`: NumPy buffers and files; `cuda` or `cuda:1`: a GPU, pinned memory and "
            "files. Real memory also writes the decision log.",
            metavar="NAME",
        ),
    ] = SIMULATED,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="On real memory: write a payload into every page and state, and check all that is reused."
        ),
    ] = False,
    num_requests: RequestsOption = None,
    trace_block: TraceBlockOption = None,
    format_name: FormatOption = None,
    session_start: SessionStartOption = None,
    seed: SeedOption = None,
    tokenizer: TokenizerOption = None,
    skip_broken: SkipBrokenOption = False,
    outputs: OutputsOption = False,
    out: Annotated[Path | None, typer.Option(help="Write manifest, summary and one row a request here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Replay a trace through the cache: hit rates, where tokens were lost, and memory."""
    stopwatch = Stopwatch()
    if verify and memory == SIMULATED:
        raise SettingsError("--verify: expected --memory host or cuda beside it, got simulated memory, without bytes")
    asked = Asked(
        model, tokens_per_block, ssm_reuse_interval, gpu_memory, host_memory, disk_memory, disk_path, ssm_fraction,
        kv_dtype, state_dtype, prefill, memory, bandwidth_profile, admission,
    )  # fmt: skip
    reading = read_options(format_name, session_start, seed, tokenizer, skip_broken, outputs)
    shown = not (quiet or as_json)
    with interruptible("nothing was written"), replay_directory(out) if out else nullcontext() as folder:
        inputs = read_inputs(asked, trace, trace_block, reading, num_requests, shown)
        log = None if folder is None else folder / DECISIONS
        result, payload = _replay(inputs, memory, verify, log, shown=shown)
        manifest, times = (
            replay_manifest(inputs.requests, inputs.settings, inputs.bandwidths, memory),
            stopwatch.times(),
        )
        if folder is not None:
            write_replay(folder, result, manifest, times, payload)
    if as_json:
        print_json(summary(result, manifest_with_times(manifest, times), payload))
    elif not quiet:
        replay_table(inputs.requests.label, inputs.settings, result.totals, result.phase.summary())
        if payload is not None:
            typer.echo("\n".join(payload_lines(payload)))
    if payload is not None and not payload.passed:
        raise typer.Exit(1)


def _replay(
    inputs: ReplayInputs, memory: str, verify: bool, log: Path | None, shown: bool
) -> tuple[ReplayResult, PayloadCheck | None]:
    trace, config, prefill = inputs.requests, inputs.config, inputs.settings.prefill
    with progress_bar("replay", trace.num_requests, shown) as progress:
        if memory == SIMULATED:
            return replay(trace, config, prefill=prefill, bandwidths=inputs.bandwidths, progress=progress), None
        from ssmcache_sim.real_memory import real_memory, replay_on

        with real_memory(memory) as real:
            return replay_on(
                real, trace, config, prefill=prefill, bandwidths=inputs.bandwidths, progress=progress, payload=verify,
                log=log,
            )  # fmt: skip
