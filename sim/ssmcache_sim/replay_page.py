"""What a report says of one replay."""

from ssmcache_sim.causes import SNAPSHOT_CAUSE_WORDS
from ssmcache_sim.page_parts import Markup, number, percent, section, table, term, text, warning
from ssmcache_sim.phase import PhaseSummary
from ssmcache_sim.results import ReplayRun
from ssmcache_sim.sizes import format_size
from ssmcache_sim.totals import ReplayTotals


def replay_body(run: ReplayRun) -> Markup:
    """Headline numbers, where the tokens went, memory and snapshots, phase."""
    totals, settings = run.totals, run.manifest["settings"]
    lower = {"host": settings["host_memory_bytes"], "disk": settings["disk_memory_bytes"]}
    tiers = "".join(f", {name} {format_size(size)}" for name, size in lower.items() if size)
    memory = f"{format_size(settings['gpu_memory_bytes'])}{tiers}"
    interval = settings["ssm_reuse_interval"]
    shape = f"block {settings['tokens_per_block']}, " + (f"interval {interval}" if interval else "no SSM layers")
    usable = number(
        term("usable", "usable token hit rate"), percent(totals.usable_token_hit_rate), f"{shape}, memory {memory}"
    )
    ceiling = number(term("ceiling", "ceiling"), percent(totals.rate(totals.ceiling_hit_tokens)), "unlimited memory")
    kv_ceiling = number(
        term("kv-ceiling", "KV ceiling"), percent(totals.rate(totals.kv_ceiling_hit_tokens)), "attention alone"
    )
    too_large = number("too large for the memory", f"{totals.too_large_requests:,}", "requests, in every rate")
    return (
        f'<div class="numbers">{usable}{ceiling}{kv_ceiling}{too_large}</div>'
        + section("Where the prompt tokens went", _tokens(totals))
        + section("Phase", phase_text(run.phase.summary()))
        + section("Memory and snapshots", _memory(totals) + _moved(totals) + _snapshots(totals))
    )


def phase_text(phase: PhaseSummary) -> Markup:
    """The ceiling's spread in words, as a warning where the hit rate hangs on it."""
    said = (
        f"With the same tokens in front of every prompt, as from a longer system prompt, the "
        f"{term('ceiling', 'ceiling')} ranges from {percent(phase.worst_rate)} ({phase.worst_shift_tokens:,} tokens "
        f"more) to {percent(phase.best_rate)} ({phase.best_shift_tokens:,} more); now it is {percent(phase.now_rate)}."
    )
    if phase.hangs_on_phase:
        return warning(f"The hit rate hangs on the {term('phase', 'phase')} of the prompt lengths. {said}")
    return f"<p>The hit rate does not hang on the {term('phase', 'phase')} of the prompt lengths. {said}</p>"


def _tokens(totals: ReplayTotals) -> Markup:
    by_cause = zip(SNAPSHOT_CAUSE_WORDS.values(), totals.lost_snapshot_by_cause, strict=True)
    too_large = totals.lost_evicted_too_large_tokens
    rows = (
        (term("usable", "usable hit"), totals.usable_hit_tokens),
        *((text(f"of these, pages on: {tier.tier}"), tier.usable_hit_tokens) for tier in totals.tiers),
        (term("attention", "KV present"), totals.attention_hit_tokens),
        (term("tree", "prefix known"), totals.tree_hit_tokens),
        (term("ceiling", "ceiling at this interval"), totals.ceiling_hit_tokens),
        (term("kv-ceiling", "KV ceiling"), totals.kv_ceiling_hit_tokens),
        (term("evicted", "lost: KV evicted"), totals.lost_evicted_tokens),
        *([(text("of these, requests too large"), too_large)] if too_large else []),
        (term("alignment", "lost: alignment to the interval"), totals.lost_alignment_tokens),
        (term("snapshot", "lost: no snapshot"), totals.lost_snapshot_tokens),
        *((text(f"of these, snapshot {words}"), tokens) for words, tokens in by_cause if tokens),
        (term("never-seen", "never seen before"), totals.never_seen_tokens),
        (term("last-block", "last block of each prompt"), totals.last_block_tokens),
        ("all prompt tokens", totals.prompt_tokens),
    )
    shown = [(name, f"{count:,}", percent(totals.rate(count))) for name, count in rows]
    caption = "Usable hit and the three losses sum up to the KV ceiling, with the last two to all prompt tokens"
    return table(caption, ("", "tokens", "share"), shown)


def _memory(totals: ReplayTotals) -> Markup:
    by_tier = [(f"{tier.tier}: ", tier.peaks) for tier in totals.tiers] or [("", totals.peaks)]
    rows = [
        (
            text(f"{name}{peak.kind} (layer group {peak.layer_group})"),
            format_size(peak.peak_bytes),
            format_size(peak.pool_bytes),
        )
        for name, peaks in by_tier
        for peak in peaks
    ]
    return table("Most memory in use at once, and the memory there is", ("pool", "peak", "size"), rows)


def _moved(totals: ReplayTotals) -> Markup:
    """What went between the tiers, or nothing with the GPU alone."""
    rows = [
        (
            text(f"{each.source_tier} to {each.tier}: {each.kind}"),
            f"{each.num_slots:,}",
            format_size(each.num_bytes),
            f"{each.seconds:,.1f} s",
        )
        for each in totals.moved or ()
    ]
    headings = ("", "slots", "bytes", "copies take")
    return table("Moved between tiers, or copied within the GPU", headings, rows) if rows else ""


def _snapshots(totals: ReplayTotals) -> Markup:
    counts = totals.snapshots
    if counts is None or not (counts.taken or sum(counts.skipped().values())):
        return ""
    rows = [
        (term("snapshots", "taken"), f"{counts.taken:,}"),
        ("times used", f"{counts.reused:,}"),
        ("evicted", f"{counts.evicted:,}"),
        ("evicted unused", f"{counts.evicted_unused:,}"),
        *((text(f"skipped: {reason.replace('_', ' ')}"), f"{count:,}") for reason, count in counts.skipped().items()),
    ]
    return table("Snapshots", ("", "count"), rows)
