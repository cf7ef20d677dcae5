"""The tables of `replay` and `sweep`, legible from 60 columns on."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ssmcache_sim.phase import PhaseSummary
from ssmcache_sim.phase_cells import PhaseCell
from ssmcache_sim.settings import ReplaySettings
from ssmcache_sim.sizes import format_size
from ssmcache_sim.sweep import SweptCell
from ssmcache_sim.sweep_details import SweepPhases
from ssmcache_sim.totals import ReplayTotals

_DEFINITION = (
    "usable: prompt tokens that a request skips (full blocks, at least one token is computed), of all prompt tokens"
)
_PHASE_DEFINITION = "of the trace's own prompt tokens, those in front not counted; ceiling: unlimited memory"
_SKIP_REASONS = {
    "crossed": "boundary inside a commit",
    "no_room": "no room",
    "not_admitted": "not admitted",
    "history": "history ahead of the commit",
}


def replay_table(trace_name: str, settings: ReplaySettings, totals: ReplayTotals, phase: PhaseSummary) -> None:
    """Prints everything that one replay counted, and a warning where the hit rate hangs on the phase."""
    interval = settings.ssm_reuse_interval
    shape = f"block {settings.tokens_per_block}" + (f", interval {interval}" if interval else ", no SSM layers")
    title = f"{trace_name}, {settings.model}\n{shape}, memory {format_size(settings.gpu_memory_bytes)}"
    table = Table(title=escape(title), caption=_DEFINITION, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    table.add_row("requests", f"{totals.requests:,}", "")
    table.add_row("  too large for the memory", f"{totals.too_large_requests:,}", "")
    table.add_row("prompt tokens", f"{totals.prompt_tokens:,}", "", end_section=True)
    table.add_row("[bold]usable token hit rate[/bold]", *_tokens(totals, totals.usable_hit_tokens, bold=True))
    table.add_row("  KV present (attention alone)", *_tokens(totals, totals.attention_hit_tokens))
    table.add_row("  prefix known (tree)", *_tokens(totals, totals.tree_hit_tokens))
    table.add_row("ceiling at this interval", *_tokens(totals, totals.ceiling_hit_tokens))
    table.add_row("KV ceiling (attention alone)", *_tokens(totals, totals.kv_ceiling_hit_tokens), end_section=True)
    table.add_row("ceiling if all prompts began later", "", "")
    table.add_row(f"  worst, by {phase.worst_shift_tokens:,} tokens", "", f"{phase.worst_rate:.2%}")
    table.add_row(f"  best, by {phase.best_shift_tokens:,} tokens", "", f"{phase.best_rate:.2%}", end_section=True)
    table.add_row("lost of the KV ceiling", "", "")
    table.add_row("  KV evicted", *_tokens(totals, totals.lost_evicted_tokens))
    table.add_row("  alignment to the interval", *_tokens(totals, totals.lost_alignment_tokens))
    table.add_row("  no snapshot", *_tokens(totals, totals.lost_snapshot_tokens), end_section=True)
    table.add_row("peak memory", format_size(totals.peak_bytes), "")
    for peak in totals.peaks:
        pool = "" if peak.pool_bytes is None else f"of {format_size(peak.pool_bytes)}"
        table.add_row(f"  {peak.kind} (layer group {peak.layer_group})", format_size(peak.peak_bytes), pool)
    if interval:
        _add_snapshots(table, totals)
    console = Console()
    console.print(table)
    if phase.hangs_on_phase:
        console.print(
            f"[bold]warning: the hit rate hangs on the phase of the prompt lengths.[/bold] With the same tokens in "
            f"front of every prompt, as from a longer system prompt, the ceiling ranges from {phase.worst_rate:.2%} "
            f"({phase.worst_shift_tokens:,} tokens more) to {phase.best_rate:.2%} ({phase.best_shift_tokens:,} more); "
            f"now {phase.now_rate:.2%}. `ssmcache sweep --phase` shows it for each interval and memory.",
            highlight=False,
        )


def phase_table(phases: SweepPhases, cells: Sequence[SweptCell]) -> None:
    """Prints the spread over the shifts: of the best cell of each memory size, and of the ceilings."""
    title = "hit rate if all prompts began later, by 0 tokens to a whole interval (in brackets: by how many)"
    table = Table(title=title, caption=_PHASE_DEFINITION, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for heading in ("memory", "block", "interval", "now", "worst", "best"):
        table.add_column(heading, justify="right")
    of_cell: dict[ReplaySettings, list[PhaseCell]] = {}
    for cell in phases.cells:
        of_cell.setdefault(cell.settings, []).append(cell)
    for size, best in _best_by_memory(cells).items():
        shifts = of_cell[best.settings]
        worst, top = (pick(shifts, key=lambda cell: cell.own_hit_rate) for pick in (min, max))
        shape = (str(best.settings.tokens_per_block), str(best.settings.ssm_reuse_interval or "-"))
        shown = (f"{cell.own_hit_rate:.2%} ({cell.shift_tokens:,})" for cell in (worst, top))
        table.add_row(format_size(size), *shape, f"{shifts[0].own_hit_rate:.2%}", *shown)
    table.add_section()
    summaries = [one.summary() for one in phases.ceilings]
    for summary in summaries:
        table.add_row(
            "ceiling",
            "",
            str(summary.period_tokens),
            f"{summary.now_rate:.2%}",
            f"{summary.worst_rate:.2%} ({summary.worst_shift_tokens:,})",
            f"{summary.best_rate:.2%} ({summary.best_shift_tokens:,})",
        )
    console = Console()
    console.print(table)
    if hanging := [str(summary.period_tokens) for summary in summaries if summary.hangs_on_phase]:
        where = f"at {', '.join(hanging)} tokens"
        console.print(f"[bold]warning: the hit rate hangs on the phase {where}.[/bold]", highlight=False)


def sweep_table(title: str, cells: Sequence[SweptCell]) -> None:
    """Prints the best cell of each memory size."""
    best = _best_by_memory(cells)
    table = Table(
        title=escape(f"{title}\nbest of each memory size"), caption=_DEFINITION, box=box.SIMPLE_HEAD, pad_edge=False
    )
    for heading in ("memory", "block", "interval", "usable hit rate", "ceiling"):
        table.add_column(heading, justify="right")
    for size, cell in best.items():
        totals, interval = cell.totals, cell.settings.ssm_reuse_interval
        rates = (totals.usable_token_hit_rate, totals.rate(totals.ceiling_hit_tokens))
        shape = (str(cell.settings.tokens_per_block), "-" if interval is None else str(interval))
        table.add_row(format_size(size), *shape, *(f"{rate:.2%}" for rate in rates))
    Console().print(table)


def _best_by_memory(cells: Sequence[SweptCell]) -> dict[int | None, SweptCell]:
    best: dict[int | None, SweptCell] = {}
    for cell in cells:
        size = cell.settings.gpu_memory_bytes
        if size not in best or cell.totals.usable_hit_tokens > best[size].totals.usable_hit_tokens:
            best[size] = cell
    return best


def _tokens(totals: ReplayTotals, tokens: int, bold: bool = False) -> tuple[str, str]:
    count, share = f"{tokens:,}", f"{totals.rate(tokens):.2%}"
    return (f"[bold]{count}[/bold]", f"[bold]{share}[/bold]") if bold else (count, share)


def _add_snapshots(table: Table, totals: ReplayTotals) -> None:
    counts = totals.snapshots
    assert counts is not None, "a replay counts snapshots"
    table.add_section()
    table.add_row("snapshots taken", f"{counts.taken:,}", "")
    table.add_row("  times used", f"{counts.reused:,}", "")
    table.add_row("  evicted", f"{counts.evicted:,}", "")
    table.add_row("  evicted unused", f"{counts.evicted_unused:,}", "")
    table.add_row("snapshots skipped", f"{sum(counts.skipped().values()):,}", "")
    for reason, count in counts.skipped().items():
        table.add_row(f"  {_SKIP_REASONS[reason]}", f"{count:,}", "")
