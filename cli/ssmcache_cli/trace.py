"""`ssmcache trace`: what a trace is like, a faster form of it, and synthetic ones."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ssmcache_cli.console import (
    FormatOption,
    OutputsOption,
    SeedOption,
    SessionStartOption,
    SkipBrokenOption,
    TokenizerOption,
    TraceArgument,
    TraceBlockOption,
    interruptible,
    note_broken_rows,
    print_json,
    read_options,
    read_shown,
)
from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats import read_requests, read_trace
from ssmcache_sim.ranges import parse_int_values
from ssmcache_sim.trace import LengthTrace, Trace

trace_app = typer.Typer(no_args_is_help=True, help="Look at a trace, convert it, or generate one.")


@trace_app.command("info")
def info_command(
    trace: TraceArgument,
    ssm_reuse_interval: Annotated[
        str, typer.Option(help="Intervals to show ceilings at: 512,2048 or 512:8192:x2; multiples of the block count.")
    ] = "512:8192:x2",
    tokens_per_block: Annotated[
        int | None,
        typer.Option(help="Block size of the ceilings: a multiple of the trace's own, which is the default."),
    ] = None,
    trace_block: TraceBlockOption = None,
    format_name: FormatOption = None,
    session_start: SessionStartOption = None,
    seed: SeedOption = None,
    tokenizer: TokenizerOption = None,
    skip_broken: SkipBrokenOption = False,
    outputs: OutputsOption = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG) here.", metavar="FILE.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Show lengths, arrivals, turns, and what unlimited memory would hit."""
    from ssmcache_sim.trace_info import describe

    intervals = parse_int_values(ssm_reuse_interval, "--ssm-reuse-interval")
    reading = read_options(format_name, session_start, seed, tokenizer, skip_broken, outputs)
    if plot is not None and plot.suffix.lower() != ".png":
        raise TraceError(f"--plot: expected the name of a .png file, got {plot.name!r}")
    with interruptible("nothing was written"):
        requests: Trace | LengthTrace
        if tokens_per_block is None:
            requests = read_shown(read_requests, trace, trace_block, reading, shown=not as_json)
        else:
            requests = read_shown(read_trace, trace, trace_block, reading, shown=not as_json)
            requests = requests.with_block(tokens_per_block)
        info = describe(requests, intervals)
        if plot is not None:
            from ssmcache_sim.directories import write_file
            from ssmcache_sim.plots import rendered, trace_figure

            write_file(plot, rendered(trace_figure(requests), "png"))
    if as_json:
        print_json(info.to_json())
        return
    from ssmcache_cli.trace_table import print_info

    print_info(info)


@trace_app.command("convert")
def convert_command(
    trace: TraceArgument,
    out: Annotated[Path, typer.Argument(help="The file to write; its name ends in .npz.")],
    trace_block: TraceBlockOption = None,
    format_name: FormatOption = None,
    session_start: SessionStartOption = None,
    seed: SeedOption = None,
    tokenizer: TokenizerOption = None,
    skip_broken: SkipBrokenOption = False,
    outputs: OutputsOption = False,
) -> None:
    """Write a trace as arrays, which every command reads in a fraction of the time.

    The result stands for the trace as it was read: with these options, and as long as the original does not change.
    """
    from ssmcache_sim.formats.binary import SUFFIX, write_binary

    if out.suffix != SUFFIX:
        raise TraceError(f"converted trace: expected a name that ends in {SUFFIX}, got {out.name!r}")
    reading = read_options(format_name, session_start, seed, tokenizer, skip_broken, outputs)
    with interruptible("nothing was written"):
        requests = read_shown(read_trace, trace, trace_block, reading, shown=True)
        note_broken_rows(requests)
        write_binary(requests, out)
    typer.echo(f"{out}: {requests.num_requests:,} requests, blocks of {requests.tokens_per_block} tokens")


@trace_app.command("generate")
def generate_command(
    kind: Annotated[str, typer.Argument(help="shared-prefix, chat, agent or branching.")],
    out: Annotated[Path, typer.Argument(help="The file to write: mooncake rows with session fields (JSON lines).")],
    num_sessions: Annotated[int | None, typer.Option(help="Conversations.")] = None,
    request_rate: Annotated[float | None, typer.Option(help="Sessions that start in a second, on average.")] = None,
    session_turns_mean: Annotated[float | None, typer.Option(help="Turns of a session.")] = None,
    session_turn_delay_mean: Annotated[float | None, typer.Option(help="Seconds from a turn to the next.")] = None,
    input_tokens_mean: Annotated[float | None, typer.Option(help="New prompt tokens of a turn.")] = None,
    output_tokens_mean: Annotated[float | None, typer.Option(help="Tokens of an answer.")] = None,
    num_system_prompts: Annotated[int | None, typer.Option(help="Different system prompts.")] = None,
    system_prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of each.")] = None,
    branches: Annotated[int | None, typer.Option(help="Requests of a turn, all from the same context.")] = None,
    tokens_per_block: Annotated[int | None, typer.Option(help="Tokens that one id stands for.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and options give the same bytes.")] = 0,
) -> None:
    """Write a synthetic trace: shared system prompts, chats of many turns, coding agents, or branching.

    Options that are not given have the values of the kind: see docs/traces.md.
    """
    from ssmcache_sim.directories import write_file
    from ssmcache_sim.generate import PRESETS, generate_lines, parse_kind

    changes = {
        "num_sessions": num_sessions,
        "request_rate": request_rate,
        "session_turns_mean": session_turns_mean,
        "session_turn_delay_mean": session_turn_delay_mean,
        "input_tokens_mean": input_tokens_mean,
        "output_tokens_mean": output_tokens_mean,
        "num_system_prompts": num_system_prompts,
        "system_prompt_tokens": system_prompt_tokens,
        "branches": branches,
        "tokens_per_block": tokens_per_block,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    settings = replace(PRESETS[parse_kind(kind)], **given)  # type: ignore[arg-type]  # each by its own option
    with interruptible("nothing was written"):
        lines = list(generate_lines(settings, seed))
        write_file(out, b"".join(lines))
    typer.echo(f"{out}: {len(lines):,} requests of {settings.num_sessions:,} sessions")
