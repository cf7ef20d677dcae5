"""`ssmcache recommend`: the best settings for a trace, a model and a memory."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ssmcache.models import load_model
from ssmcache_cli.console import (
    BandwidthProfileOption,
    DiskMemoryOption,
    FormatOption,
    KvDtypeOption,
    ModelOption,
    OutputsOption,
    QuietOption,
    SeedOption,
    SessionStartOption,
    SkipBrokenOption,
    StateDtypeOption,
    Stopwatch,
    TokenizerOption,
    TraceArgument,
    TraceBlockOption,
    interruptible,
    note_broken_rows,
    print_json,
    progress_bar,
    read_machine,
    read_options,
    read_shown,
)
from ssmcache_cli.recommend_report import print_report
from ssmcache_sim.candidates import Question
from ssmcache_sim.device_profile import H100, calibrated, with_copies_of
from ssmcache_sim.errors import SizeError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.ranges import parse_int_values
from ssmcache_sim.recommend import recommend
from ssmcache_sim.recommend_results import (
    recommend_directory,
    recommend_manifest,
    recommendation_json,
    write_recommendation,
)
from ssmcache_sim.results import manifest_with_times
from ssmcache_sim.settings import parse_admissions, parse_prefill
from ssmcache_sim.sizes import parse_size, parse_tier_size


def recommend_command(
    trace: TraceArgument,
    model: ModelOption,
    gpu_memory: Annotated[str, typer.Option(help="Memory of the cache, to be split: 40GiB, 1.5TB.")] = "40GiB",
    host_memory: Annotated[str, typer.Option(help="Host memory below the GPU: 200GiB, or 0 for none.")] = "0",
    disk_memory: DiskMemoryOption = "0",
    tokens_per_block: Annotated[
        str | None,
        typer.Option(help="Block sizes to choose from: 512,1024 or 16:1024:x2. Default: the trace's own, up to 1,024."),
    ] = None,
    ssm_reuse_interval: Annotated[
        str | None,
        typer.Option(help="Intervals to choose from. Default: 1, 2, 3, 4, 6, 8, 12 .. blocks of the trace."),
    ] = None,
    admission: Annotated[
        str,
        typer.Option(
            help="Where snapshots may be kept: `every` multiple of the interval, the `last` one within each prompt "
            "alone, or one of both: every,last."
        ),
    ] = "every,last",
    replays: Annotated[
        int, typer.Option(min=1, help="At most so many replays where the one-pass grid is not exact.")
    ] = 24,
    kv_dtype: KvDtypeOption = None,
    state_dtype: StateDtypeOption = None,
    prefill: Annotated[
        str,
        typer.Option(
            help="What snapshots cost: `chunked` (passes are cut at the interval, states copied) or `reserved` (the "
            "kernel writes them while it passes)."
        ),
    ] = "chunked",
    billion_parameters: Annotated[
        float | None,
        typer.Option(help="Parameters that a token passes through; by default what the vendor says.", min=1e-3),
    ] = None,
    bandwidth_profile: BandwidthProfileOption = None,
    trace_block: TraceBlockOption = None,
    format_name: FormatOption = None,
    session_start: SessionStartOption = None,
    seed: SeedOption = None,
    tokenizer: TokenizerOption = None,
    skip_broken: SkipBrokenOption = False,
    outputs: OutputsOption = False,
    out: Annotated[
        Path | None, typer.Option(help="Write manifest, recommendation and one row an interval and block size here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Find the interval, block size, admission and split of the memory that save most prefill time.

    It says how sure that is, what the runner-up costs, and what unlimited memory would give.
    """
    stopwatch = Stopwatch()
    memory_bytes = parse_size(gpu_memory)
    if memory_bytes is None:
        raise SizeError(f"--gpu-memory: expected a size to split, such as 40GiB, got {gpu_memory!r}")
    spec = load_model(model)
    machine = None if bandwidth_profile is None else read_machine(bandwidth_profile)
    calibration = None if machine is None else machine.calibration
    if calibration is not None and calibration.model != spec.name:
        note = f"calibrated with {calibration.model}, which is not used for {spec.name}"
        print(f"{bandwidth_profile}: {note}", file=sys.stderr)
        calibration = None
    device = H100 if machine is None else with_copies_of(H100, machine)
    question = Question(
        gpu_memory_bytes=memory_bytes,
        tokens_per_block=_int_values(tokens_per_block, "--tokens-per-block"),
        ssm_reuse_intervals=_int_values(ssm_reuse_interval, "--ssm-reuse-interval"),
        kv_dtype=kv_dtype,
        state_dtype=state_dtype,
        prefill=parse_prefill(prefill),
        device=device if calibration is None else calibrated(device, calibration),
        billion_parameters=billion_parameters or (None if calibration is None else calibration.num_parameters / 1e9),
        host_memory_bytes=parse_tier_size(host_memory, "--host-memory"),
        disk_memory_bytes=parse_tier_size(disk_memory, "--disk-memory"),
        admissions=parse_admissions(admission),
        num_replays=replays,
    )
    reading = read_options(format_name, session_start, seed, tokenizer, skip_broken, outputs)
    shown = not (quiet or as_json)
    with interruptible("nothing was written"), recommend_directory(out) if out else nullcontext() as folder:
        requests = read_shown(read_trace, trace, trace_block, reading, shown)
        note_broken_rows(requests)
        with progress_bar("recommend", 100, shown=shown) as progress:
            answer = recommend(requests, spec, question, progress=progress)
        manifest, times = recommend_manifest(requests, spec.name, question), stopwatch.times()
        if folder is not None:
            write_recommendation(folder, answer, manifest, times)
    if as_json:
        print_json(recommendation_json(answer, manifest_with_times(manifest, times)))
    elif not quiet:
        given = {
            "--model": model,
            "--gpu-memory": gpu_memory,
            "--host-memory": host_memory if question.host_memory_bytes else None,
            "--disk-memory": disk_memory if question.disk_memory_bytes else None,
            "--kv-dtype": kv_dtype,
            "--state-dtype": state_dtype,
            "--trace-block": trace_block,
            "--format": format_name,
            "--session-start": session_start,
            "--seed": seed,
            "--tokenizer": tokenizer,
        }
        words = [str(word) for option, value in given.items() if value is not None for word in (option, value)]
        flags = [*["--skip-broken"] * skip_broken, *["--outputs"] * outputs]
        print_report(requests.label, spec.name, answer, [str(trace), *words, *flags])


def _int_values(text: str | None, what: str) -> tuple[int, ...] | None:
    return None if text is None else parse_int_values(text, what)
