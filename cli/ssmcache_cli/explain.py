"""`ssmcache explain`: why prefixes did not hit, in totals and request by request."""

from typing import Annotated

import typer

from ssmcache.models import load_model
from ssmcache_cli.console import (
    DiskMemoryOption,
    FormatOption,
    KvDtypeOption,
    ModelOption,
    PrefillOption,
    SeedOption,
    SessionStartOption,
    SkipBrokenOption,
    SsmFractionOption,
    StateDtypeOption,
    TokenizerOption,
    TraceArgument,
    TraceBlockOption,
    interruptible,
    note_broken_rows,
    progress_bar,
    read_options,
)
from ssmcache_cli.explain_report import print_stories, print_totals
from ssmcache_sim.errors import UserError
from ssmcache_sim.explain import explain, requests_of_session
from ssmcache_sim.formats import read_trace
from ssmcache_sim.remedies import variants_of
from ssmcache_sim.settings import build_config, make_settings, parse_prefill
from ssmcache_sim.sizes import parse_size, parse_tier_size

_DEFAULT_WORST = 3


def explain_command(
    trace: TraceArgument,
    model: ModelOption,
    request: Annotated[
        int | None, typer.Option(min=0, help="Tell of this request: its number in order of arrival, from 0.")
    ] = None,
    worst: Annotated[int | None, typer.Option(min=1, help="Tell of so many requests that lost the most.")] = None,
    session: Annotated[str | None, typer.Option(help="Tell of all requests of one session.", metavar="NAME")] = None,
    tokens_per_block: Annotated[
        int | None, typer.Option(help="Block size: a multiple of the trace's own, which is the default.")
    ] = None,
    ssm_reuse_interval: Annotated[
        int | None, typer.Option(help="Tokens between snapshots: a multiple of the block; by default 512 or the block.")
    ] = None,
    gpu_memory: Annotated[str, typer.Option(help="Memory of the cache: 40GiB, 1.5TB, unlimited.")] = "40GiB",
    host_memory: Annotated[
        str, typer.Option(help="Host memory for what the GPU has no room for: 200GiB, or 0 for none.")
    ] = "0",
    disk_memory: DiskMemoryOption = "0",
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
) -> None:
    """Why did prefixes not hit? Lost tokens by cause, and the stories of single requests."""
    if sum(option is not None for option in (request, worst, session)) > 1:
        raise UserError("explain: expected one of --request, --worst and --session, got several")
    how, spec = parse_prefill(prefill), load_model(model)
    memory_bytes = parse_size(gpu_memory)
    host_bytes = parse_tier_size(host_memory, "--host-memory")
    disk_bytes = parse_tier_size(disk_memory, "--disk-memory")
    reading = read_options(format_name, session_start, seed, tokenizer, skip_broken)
    with interruptible("nothing was written"):
        requests = read_trace(trace, trace_block, reading)
        note_broken_rows(requests)
        settings = make_settings(
            spec,
            requests.tokens_per_block if tokens_per_block is None else tokens_per_block,
            gpu_memory_bytes=memory_bytes,
            ssm_reuse_interval=ssm_reuse_interval,
            ssm_fraction=ssm_fraction,
            kv_dtype=kv_dtype,
            state_dtype=state_dtype,
            prefill=how,
            host_memory_bytes=host_bytes,
            disk_memory_bytes=disk_bytes,
        )
        config = build_config(spec, settings)
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
                variants=variants_of(spec, settings, requests),
                prefill=how,
                progress=progress,
            )
    if request is None and worst is None and session is None:
        print_totals(requests.label, settings, explanation.result.totals)
    print_stories(explanation, config)
