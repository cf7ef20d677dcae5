"""`ssmcache replay`: one trace, one model, one setting."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ssmcache.models import load_model
from ssmcache_cli.console import (
    AdmissionOption,
    DiskMemoryOption,
    FormatOption,
    KvDtypeOption,
    ModelOption,
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
from ssmcache_cli.tables import replay_table
from ssmcache_sim.errors import SizeError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.replay import replay
from ssmcache_sim.results import manifest_with_times, replay_directory, replay_manifest, summary, write_replay
from ssmcache_sim.settings import build_config, make_settings, parse_admission, parse_prefill
from ssmcache_sim.sizes import parse_size, parse_tier_size


def replay_command(
    trace: TraceArgument,
    model: ModelOption,
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
    disk_path: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the disk tier, for the record: it goes into the manifest. A replay simulates its "
            "memory, so nothing is read or written there.",
            metavar="DIR",
        ),
    ] = None,
    ssm_fraction: SsmFractionOption = None,
    kv_dtype: KvDtypeOption = None,
    state_dtype: StateDtypeOption = None,
    admission: AdmissionOption = "every",
    prefill: PrefillOption = "reserved",
    trace_block: TraceBlockOption = None,
    format_name: FormatOption = None,
    session_start: SessionStartOption = None,
    seed: SeedOption = None,
    tokenizer: TokenizerOption = None,
    skip_broken: SkipBrokenOption = False,
    out: Annotated[Path | None, typer.Option(help="Write manifest, summary and one row a request here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Replay a trace through the cache: hit rates, where tokens were lost, and memory."""
    stopwatch = Stopwatch()
    memory_bytes, how, admitted = parse_size(gpu_memory), parse_prefill(prefill), parse_admission(admission)
    host_bytes, disk_bytes = (
        parse_tier_size(host_memory, "--host-memory"),
        parse_tier_size(disk_memory, "--disk-memory"),
    )
    if disk_path is not None and not disk_bytes:
        raise SizeError(f"--disk-path: expected --disk-memory beside it, got {str(disk_path)!r} alone")
    spec = load_model(model)
    reading = read_options(format_name, session_start, seed, tokenizer, skip_broken)
    with interruptible("nothing was written"), replay_directory(out) if out else nullcontext() as folder:
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
            disk_path=None if disk_path is None else str(disk_path),
            admission=admitted,
        )
        config = build_config(spec, settings)
        if disk_path is not None:
            print(f"--disk-path: the disk is simulated, nothing is read or written at {disk_path}", file=sys.stderr)
        with progress_bar("replay", requests.num_requests, shown=not (quiet or as_json)) as progress:
            result = replay(requests, config, prefill=how, progress=progress)
        manifest, times = replay_manifest(requests, settings), stopwatch.times()
        if folder is not None:
            write_replay(folder, result, manifest, times)
    if as_json:
        typer.echo(json.dumps(summary(result, manifest_with_times(manifest, times))))
    elif not quiet:
        replay_table(requests.label, settings, result.totals, result.phase.summary())
