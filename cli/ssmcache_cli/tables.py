"""The tables of `replay` and `sweep`, legible from 60 columns on."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ssmcache_sim.causes import SNAPSHOT_CAUSE_WORDS
from ssmcache_sim.phase import PhaseSummary
from ssmcache_sim.phase_cells import PhaseCell
from ssmcache_sim.settings import ReplaySettings
from ssmcache_sim.sizes import format_size
from ssmcache_sim.sweep import SweptCell
from ssmcache_sim.sweep_details import SweepPhases
from ssmcache_sim.totals import LayerGroupPeak, ReplayTotals

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
_TIERS = {"gpu": "GPU", "host": "host", "disk": "disk"}


def replay_table(trace_name: str, settings: ReplaySettings, totals: ReplayTotals, phase: PhaseSummary) -> None:
    """Prints everything that one replay counted, and a warning where the hit rate hangs on the phase."""
    interval = settings.ssm_reuse_interval
    shape = f"block {settings.tokens_per_block}" + (f", interval {interval}" if interval else ", no SSM layers")
    if settings.admission == "last":
        shape += ", last boundary only"
    title = f"{trace_name}, {settings.model}\n{shape}, {memory_words(settings)}"
    table = Table(title=escape(title), caption=_DEFINITION, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    table.add_row("requests", f"{totals.requests:,}", "")
    table.add_row("  too large for the memory", f"{totals.too_large_requests:,}", "")
    table.add_row("prompt tokens", f"{totals.prompt_tokens:,}", "", end_section=True)
    table.add_row("[bold]usable token hit rate[/bold]", *_tokens(totals, totals.usable_hit_tokens, bold=True))
    for tier in totals.tiers:
        table.add_row(f"  from {_TIERS[tier.tier]} memory", *_tokens(totals, tier.usable_hit_tokens))
    table.add_row("  KV present (attention alone)", *_tokens(totals, totals.attention_hit_tokens))
    table.add_row("  prefix known (tree)", *_tokens(totals, totals.tree_hit_tokens))
    table.add_row("ceiling at this interval", *_tokens(totals, totals.ceiling_hit_tokens))
    table.add_row("KV ceiling (attention alone)", *_tokens(totals, totals.kv_ceiling_hit_tokens), end_section=True)
    table.add_row("ceiling if all prompts began later", "", "")
    table.add_row(f"  worst, by {phase.worst_shift_tokens:,} tokens", "", f"{phase.worst_rate:.2%}")
    table.add_row(f"  best, by {phase.best_shift_tokens:,} tokens", "", f"{phase.best_rate:.2%}", end_section=True)
    add_causes(table, totals)
    _add_peaks(table, "peak memory" if not totals.tiers else "peak GPU memory", totals.peaks)
    for tier in totals.tiers[1:]:
        _add_peaks(table, f"peak {_TIERS[tier.tier]} memory", tier.peaks)
    if totals.tiers:
        _add_moved(table, totals)
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


def add_causes(table: Table, totals: ReplayTotals) -> None:
    """Rows of what became of the prompt tokens that no request skipped; parts of a cause only where there are any."""
    table.add_row("lost of the KV ceiling", *_tokens(totals, totals.kv_ceiling_hit_tokens - totals.usable_hit_tokens))
    table.add_row("  KV evicted", *_tokens(totals, totals.lost_evicted_tokens))
    if totals.lost_evicted_too_large_tokens:
        table.add_row("    by requests too large", *_tokens(totals, totals.lost_evicted_too_large_tokens))
    table.add_row("  alignment to the interval", *_tokens(totals, totals.lost_alignment_tokens))
    table.add_row("  no snapshot", *_tokens(totals, totals.lost_snapshot_tokens))
    for words, tokens in zip(SNAPSHOT_CAUSE_WORDS.values(), totals.lost_snapshot_by_cause, strict=True):
        if tokens:
            table.add_row(f"    {words}", *_tokens(totals, tokens))
    table.add_section()
    table.add_row("never seen before", *_tokens(totals, totals.never_seen_tokens))
    table.add_row("last block of each prompt", *_tokens(totals, totals.last_block_tokens), end_section=True)


def phase_table(phases: SweepPhases, cells: Sequence[SweptCell]) -> None:
    """Prints the spread over the shifts: of the best cell of each memory size, and of the ceilings."""
    title = "hit rate if all prompts began later, by 0 tokens to a whole interval (in brackets: by how many)"
    table = Table(title=title, caption=_PHASE_DEFINITION, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    best_of = _best_by_memory(cells)
    for heading in (*_memory_headings(best_of), "block", "interval", "now", "worst", "best"):
        table.add_column(heading, justify="right")
    of_cell: dict[ReplaySettings, list[PhaseCell]] = {}
    for cell in phases.cells:
        of_cell.setdefault(cell.settings, []).append(cell)
    for sizes, best in best_of.items():
        shifts = of_cell[best.settings]
        worst, top = (pick(shifts, key=lambda cell: cell.own_hit_rate) for pick in (min, max))
        shape = _shape(best.settings)
        shown = (f"{cell.own_hit_rate:.2%} ({cell.shift_tokens:,})" for cell in (worst, top))
        table.add_row(*_sizes(sizes, best_of), *shape, f"{shifts[0].own_hit_rate:.2%}", *shown)
    table.add_section()
    summaries = [one.summary() for one in phases.ceilings]
    for summary in summaries:
        table.add_row(
            "ceiling",
            *[""] * len(_memory_headings(best_of)),  # under host memory, if any, and block
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


def memory_words(settings: ReplaySettings) -> str:
    """The memory of each tier there is."""
    lower = {"host": settings.host_memory_bytes, "disk": settings.disk_memory_bytes}
    shown = [f"{name} {format_size(size)}" for name, size in lower.items() if size]
    gpu = format_size(settings.gpu_memory_bytes)
    return ", ".join([f"GPU {gpu}", *shown]) if shown else f"memory {gpu}"


def _add_peaks(table: Table, what: str, peaks: Sequence[LayerGroupPeak]) -> None:
    table.add_row(what, format_size(sum(peak.peak_bytes for peak in peaks)), "")
    for peak in peaks:
        pool = "" if peak.pool_bytes is None else f"of {format_size(peak.pool_bytes)}"
        table.add_row(f"  {peak.kind} (layer group {peak.layer_group})", format_size(peak.peak_bytes), pool)


def _add_moved(table: Table, totals: ReplayTotals) -> None:
    assert totals.moved is not None, "a replay counts moves"
    sums: dict[str, tuple[int, int]] = {}
    seconds: dict[str, float] = {}
    for each in totals.moved:
        is_copy = each.source_tier == each.tier
        where = "within the GPU" if is_copy else f"{_TIERS[each.source_tier]} to {_TIERS[each.tier]}"
        num_slots, num_bytes = sums.get(what := f"{where}, {each.kind}", (0, 0))
        sums[what] = num_slots + each.num_slots, num_bytes + each.num_bytes
        seconds[where] = seconds.get(where, 0.0) + each.seconds
    table.add_section()
    table.add_row("moved or copied", "slots", "bytes")
    for what, (num_slots, num_bytes) in sums.items():
        table.add_row(f"  {what}", f"{num_slots:,}", format_size(num_bytes))
    table.add_section()
    table.add_row("time of these copies", "", "seconds")
    for where, duration in seconds.items():
        table.add_row(f"  {where}", "", f"{duration:,.1f}")


def sweep_table(title: str, cells: Sequence[SweptCell]) -> None:
    """Prints the best cell of each memory size, and what it lost."""
    best = _best_by_memory(cells)
    table = Table(
        title=escape(f"{title}\nbest of each memory size"), caption=_DEFINITION, box=box.SIMPLE_HEAD, pad_edge=False
    )
    for heading in (*_memory_headings(best), "block", "interval", "usable hit rate", "ceiling"):
        table.add_column(heading, justify="right")
    for sizes, cell in best.items():
        totals = cell.totals
        rates = (totals.usable_token_hit_rate, totals.rate(totals.ceiling_hit_tokens))
        table.add_row(*_sizes(sizes, best), *_shape(cell.settings), *(f"{rate:.2%}" for rate in rates))
    console = Console()
    console.print(table)
    console.print(_losses_table(best))


def _losses_table(best: "dict[_Sizes, SweptCell]") -> Table:
    """Shares of all prompt tokens that the best cells lost, by cause."""
    table = Table(title="lost by these, of all prompt tokens", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (*_memory_headings(best), "KV\nevicted", "align-\nment", "snapshot\nevicted", "not\ntaken"):
        table.add_column(heading, justify="right")
    for sizes, cell in best.items():
        totals = cell.totals
        evicted = totals.lost_snapshot_evicted_tokens
        not_taken = totals.lost_snapshot_tokens - evicted - totals.lost_snapshot_window_tokens
        lost = (totals.lost_evicted_tokens, totals.lost_alignment_tokens, evicted, not_taken)
        table.add_row(*_sizes(sizes, best), *(f"{totals.rate(tokens):.2%}" for tokens in lost))
    return table


_Sizes = tuple[int | None, int]  # of the GPU, and of the host


def _best_by_memory(cells: Sequence[SweptCell]) -> dict[_Sizes, SweptCell]:
    best: dict[_Sizes, SweptCell] = {}
    for cell in cells:
        sizes = cell.settings.gpu_memory_bytes, cell.settings.host_memory_bytes
        if sizes not in best or cell.totals.usable_hit_tokens > best[sizes].totals.usable_hit_tokens:
            best[sizes] = cell
    return best


def _memory_headings(best: dict[_Sizes, SweptCell]) -> tuple[str, ...]:
    return ("GPU", "host") if any(host_size for _, host_size in best) else ("memory",)


def _sizes(sizes: _Sizes, best: dict[_Sizes, SweptCell]) -> tuple[str, ...]:
    """Under `_memory_headings`."""
    gpu_size, host_size = sizes
    return (format_size(gpu_size), format_size(host_size) if host_size else "-")[: len(_memory_headings(best))]


def _shape(settings: ReplaySettings) -> tuple[str, str]:
    """Block and interval; with the admission, unless it is every boundary."""
    interval = str(settings.ssm_reuse_interval or "-")
    return str(settings.tokens_per_block), f"{interval} last" if settings.admission == "last" else interval


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
