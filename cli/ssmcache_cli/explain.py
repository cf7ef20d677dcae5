"""`ssmcache explain`: why prefixes did not hit, in totals and request by request."""

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
    progress_bar,
    read_options,
)
from ssmcache_cli.explain_report import print_stories, print_totals
from ssmcache_cli.replay_inputs import Asked, read_inputs
from ssmcache_sim.errors import UserError
from ssmcache_sim.explain import explain, requests_of_session
from ssmcache_sim.remedies import variants_of

_DEFAULT_WORST = 3


def explain_command(
    trace: TraceArgument,
    model: ModelOption,
    request: Annotated[
        int | None, typer.Option(min=0, help="Tell of this request: its number in order of arrival, from 0.")
    ] = None,
    worst: Annotated[int | None, typer.Option(min=1, help="Tell of so many requests that lost the most.")] = None,
    session: Annotated[str | None, typer.Option(help="Tell of all requests of one session.", metavar="NAME")] = None,
    tokens_per_block: BlockOption = None,
    ssm_reuse_interval: IntervalOption = None,
    gpu_memory: GpuMemoryOption = "40GiB",
    host_memory: HostMemoryOption = "0",
    disk_memory: DiskMemoryOption = "0",
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
) -> None:
    """Why did prefixes not hit? Lost tokens by cause, and the stories of single requests."""
    if sum(option is not None for option in (request, worst, session)) > 1:
        raise UserError("explain: expected one of --request, --worst and --session, got several")
    asked = Asked(
        model, tokens_per_block, ssm_reuse_interval, gpu_memory, host_memory, disk_memory, None, ssm_fraction,
        kv_dtype, state_dtype, prefill, admission=admission,
    )  # fmt: skip
    reading = read_options(format_name, session_start, seed, tokenizer, skip_broken, outputs)
    with interruptible("nothing was written"):
        inputs = read_inputs(asked, trace, trace_block, reading, num_requests, shown=True)
        requests, settings, config = inputs.requests, inputs.settings, inputs.config
        chosen = None if session is None else requests_of_session(requests, session)
        if request is not None:
            chosen = [request]
        num_replays = 1 if chosen is not None else 2
        with progress_bar("explain", num_replays * requests.num_requests, shown=True) as progress:
            explanation = explain(
                requests,
                config,
                requests=chosen,
                worst=worst or _DEFAULT_WORST,
                variants=variants_of(inputs.spec, settings, requests),
                prefill=settings.prefill,
                progress=progress,
            )
    if request is None and worst is None and session is None:
        print_totals(requests.label, settings, explanation.result.totals)
    print_stories(explanation, config)
