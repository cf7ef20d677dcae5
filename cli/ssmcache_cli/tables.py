"""The tables of `replay` and `sweep`, legible from 60 columns on."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ssmcache_sim.settings import ReplaySettings
from ssmcache_sim.sizes import format_size
from ssmcache_sim.sweep import SweptCell
from ssmcache_sim.totals import LayerGroupPeak, ReplayTotals

_DEFINITION = (
    "usable: prompt tokens that a request skips (full blocks, at least one token is computed), of all prompt tokens"
)
_SKIP_REASONS = {
    "crossed": "boundary inside a commit",
    "no_room": "no room",
    "not_admitted": "not admitted",
    "history": "history ahead of the commit",
}
_TIERS = {"gpu": "GPU", "host": "host", "disk": "disk"}


def replay_table(trace_name: str, settings: ReplaySettings, totals: ReplayTotals) -> None:
    """Prints everything that one replay counted."""
    interval = settings.ssm_reuse_interval
    shape = f"block {settings.tokens_per_block}" + (f", interval {interval}" if interval else ", no SSM layers")
    title = f"{trace_name}, {settings.model}\n{shape}, {_memory(settings)}"
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
    table.add_row("lost of the KV ceiling", "", "")
    table.add_row("  KV evicted", *_tokens(totals, totals.lost_evicted_tokens))
    table.add_row("  alignment to the interval", *_tokens(totals, totals.lost_alignment_tokens))
    table.add_row("  no snapshot", *_tokens(totals, totals.lost_snapshot_tokens), end_section=True)
    _add_peaks(table, "peak memory" if not totals.tiers else "peak GPU memory", totals.peaks)
    for tier in totals.tiers[1:]:
        _add_peaks(table, f"peak {_TIERS[tier.tier]} memory", tier.peaks)
    if totals.tiers:
        _add_moved(table, totals)
    if interval:
        _add_snapshots(table, totals)
    Console().print(table)


def _memory(settings: ReplaySettings) -> str:
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
    for each in totals.moved:
        is_copy = each.source_tier == each.tier
        where = "within the GPU" if is_copy else f"{_TIERS[each.source_tier]} to {_TIERS[each.tier]}"
        num_slots, num_bytes = sums.get(what := f"{where}, {each.kind}", (0, 0))
        sums[what] = num_slots + each.num_slots, num_bytes + each.num_bytes
    table.add_section()
    table.add_row("moved or copied", "slots", "bytes")
    for what, (num_slots, num_bytes) in sums.items():
        table.add_row(f"  {what}", f"{num_slots:,}", format_size(num_bytes))


def sweep_table(title: str, cells: Sequence[SweptCell]) -> None:
    """Prints the best cell of each memory size."""
    best: dict[tuple[int | None, int], SweptCell] = {}
    for cell in cells:
        sizes = cell.settings.gpu_memory_bytes, cell.settings.host_memory_bytes
        if sizes not in best or cell.totals.usable_hit_tokens > best[sizes].totals.usable_hit_tokens:
            best[sizes] = cell
    table = Table(
        title=escape(f"{title}\nbest of each memory size"), caption=_DEFINITION, box=box.SIMPLE_HEAD, pad_edge=False
    )
    memory = ("GPU", "host") if any(host_size for _, host_size in best) else ("memory",)
    for heading in (*memory, "block", "interval", "usable hit rate", "ceiling"):
        table.add_column(heading, justify="right")
    for (gpu_size, host_size), cell in best.items():
        totals, interval = cell.totals, cell.settings.ssm_reuse_interval
        rates = (totals.usable_token_hit_rate, totals.rate(totals.ceiling_hit_tokens))
        shape = (str(cell.settings.tokens_per_block), "-" if interval is None else str(interval))
        shown = (format_size(gpu_size), format_size(host_size) if host_size else "-")[: len(memory)]
        table.add_row(*shown, *shape, *(f"{rate:.2%}" for rate in rates))
    Console().print(table)


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
