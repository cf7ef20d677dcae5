"""The table of `ssmcache trace info`, legible from 80 columns on."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ssmcache_sim.trace_info import PERCENTS, Ceiling, Distribution, SharedBlocks, SharedOutputs, TraceInfo

_SHOWN_PERCENTS = (0, 25, 50, 75, 90, 99, 100)


def print_info(info: TraceInfo) -> None:
    """Prints everything that is known of a trace."""
    console = Console(highlight=False)
    console.print(f"[bold]{escape(info.name)}[/bold] ({info.format})")
    console.print(_facts(info))
    console.print(_distributions(info))
    console.print("prompt, output and hit depth in tokens; gap: seconds to the next request\n")
    if info.shared is None:
        console.print("Lengths only: what prompts share is not recorded, so no hit rates.")
    else:
        shared = info.shared
        only = "" if shared.outputs is None else ", prompts only"
        console.print(
            f"Hits with unlimited memory, in blocks of {shared.tokens_per_block} tokens, "
            f"{_share_new(shared)} of them new;\n{shared.requests_without_hit:,} requests hit nothing{only}"
        )
        console.print(_ceilings(shared))
        if shared.outputs is not None:
            console.print(_about_outputs(info, shared.outputs))


def _facts(info: TraceInfo) -> Table:
    facts = Table.grid(padding=(0, 2))
    sessions = "not recorded" if info.sessions is None else f"{info.sessions:,}"
    facts.add_row("requests", f"{info.requests:,}")
    facts.add_row("sessions", sessions)
    facts.add_row("prompt tokens", f"{info.prompt_tokens:,}")
    facts.add_row("output tokens", f"{info.output_tokens:,}")
    rate = f", {info.requests / info.span_seconds:,.2f} requests a second" if info.span_seconds else ""
    facts.add_row("span", f"{info.span_seconds:,.1f} s{rate}")
    if info.block_origin:
        facts.add_row("block", info.block_origin)
    if info.reading:
        facts.add_row("read with", escape(info.reading))
    for what, count in info.repairs:
        facts.add_row("repaired", f"{count:,} {what}")
    if info.broken_rows:
        facts.add_row("left out", f"{info.broken_rows:,} broken rows")
    return facts


def _distributions(info: TraceInfo) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    headings = {0: "min", 50: "median", 100: "max"}
    for percent in _SHOWN_PERCENTS:
        table.add_column(headings.get(percent, f"{percent} %"), justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    rows: tuple[tuple[str, Distribution | None, int], ...] = (
        ("prompt", info.prompt_length, 0),
        ("output", info.output_length, 0),
        ("gap", info.interarrival_seconds, 3),
        ("turns", info.turns, 0),
        ("hit depth", info.shared.hit_depth_tokens if info.shared else None, 0),
    )
    for name, values, decimals in rows:
        if values is not None:
            table.add_row(name, *_cells(values, decimals))
    return table


def _cells(values: Distribution, decimals: int) -> list[str]:
    shown = [values.at_percents[PERCENTS.index(percent)] for percent in _SHOWN_PERCENTS]
    mean_decimals = decimals if decimals or values.mean >= 1000 else 1
    return [_number(value, decimals) for value in shown] + [_number(values.mean, mean_decimals)]


def _number(value: float, decimals: int) -> str:
    # a long gap needs no milliseconds, and has no room for them
    return f"{value:,.{0 if value >= 1000 else decimals}f}"


def _share_new(shared: SharedBlocks) -> str:
    return f"{shared.distinct_full_blocks / max(shared.full_blocks, 1):.2%}"


def _ceilings(shared: SharedBlocks) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("snapshots every")
    table.add_column("prompt tokens" if shared.outputs is None else "prompts only", justify="right")
    table.add_column("share", justify="right")
    if shared.outputs is not None:
        table.add_column("with outputs", justify="right")
        table.add_column("share", justify="right")
    for index, ceiling in enumerate(shared.ceilings):
        interval = ceiling.ssm_reuse_interval
        name = "attention alone" if interval is None else f"{interval:,} tokens"
        cells = _hits(ceiling) if shared.outputs is None else _hits(ceiling) + _hits(shared.outputs.ceilings[index])
        table.add_row(name, *cells)
    return table


def _hits(ceiling: Ceiling) -> tuple[str, str]:
    return f"{ceiling.hit_tokens:,}", f"{ceiling.hit_rate:.2%}"


def _about_outputs(info: TraceInfo, outputs: SharedOutputs) -> str:
    share = outputs.known_tokens / max(info.output_tokens, 1)
    return (
        f"With outputs: what requests generate stays for reuse too. The outputs of {outputs.known_requests:,} requests "
        f"are known, {share:.2%} of all output tokens; the others take memory and are never hit."
    )
