"""`ssmcache verify`: is what the simulator says true on real memory?"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ssmcache_cli.console import (
    AdmissionOption,
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
    TokenizerOption,
    TraceArgument,
    TraceBlockOption,
    interruptible,
    print_json,
    progress_bar,
    read_options,
)
from ssmcache_cli.replay_inputs import Asked, DiskPathOption, read_inputs
from ssmcache_cli.verify_table import verification_lines


def verify_command(
    trace: TraceArgument,
    model: ModelOption,
    memory: Annotated[
        str,
        typer.Option(
            help="`host`: NumPy buffers and files; `cuda` or `cuda:1`: a GPU, pinned memory and files.", metavar="NAME"
        ),
    ] = "host",
    tokens_per_block: BlockOption = None,
    ssm_reuse_interval: IntervalOption = None,
    gpu_memory: GpuMemoryOption = "2GiB",
    host_memory: HostMemoryOption = "0",
    disk_memory: DiskMemoryOption = "0",
    disk_path: DiskPathOption = None,
    ssm_fraction: SsmFractionOption = None,
    kv_dtype: KvDtypeOption = None,
    state_dtype: StateDtypeOption = None,
    prefill: PrefillOption = "reserved",
    admission: AdmissionOption = "every",
    num_requests: RequestsOption = None,
    trace_block: TraceBlockOption = None,
    format_name: FormatOption = None,
    session_start: SessionStartOption = None,
    seed: SeedOption = None,
    tokenizer: TokenizerOption = None,
    skip_broken: SkipBrokenOption = False,
    outputs: OutputsOption = False,
    log: Annotated[
        Path | None, typer.Option(help="Keep the decision log of the real memory here, compressed with gzip.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Replay a trace on real and on simulated memory: equal decisions, line for line, and every reused byte checked.

    Exit code 1 if a decision differs or a byte is wrong.
    """
    asked = Asked(
        model, tokens_per_block, ssm_reuse_interval, gpu_memory, host_memory, disk_memory, disk_path, ssm_fraction,
        kv_dtype, state_dtype, prefill, memory, admission=admission,
    )  # fmt: skip
    reading = read_options(format_name, session_start, seed, tokenizer, skip_broken, outputs)
    shown = not (quiet or as_json)
    from ssmcache_sim.real_memory import real_memory
    from ssmcache_sim.verify import verify

    with interruptible("nothing was verified"), real_memory(memory) as real:
        inputs = read_inputs(asked, trace, trace_block, reading, num_requests, shown)
        requests, settings = inputs.requests, inputs.settings
        with progress_bar("verify", 2 * requests.num_requests, shown) as progress:
            answer = verify(requests, inputs.config, real, prefill=settings.prefill, progress=progress, log=log)
        name = real.name
    if as_json:
        difference = None if answer.difference is None else asdict(answer.difference)
        print_json(
            {
                "passed": answer.passed,
                "memory": name,
                "decisions": answer.num_decisions,
                "difference": difference,
                "payload": asdict(answer.payload),
                "totals": answer.result.totals.to_json(),
                "settings": asdict(settings),
            }
        )
    elif not quiet:
        typer.echo(f"{requests.label}, {requests.num_requests:,} requests, {settings.model}, on {name}")
        typer.echo("\n".join(verification_lines(answer)))
    if not answer.passed:
        raise typer.Exit(1)
