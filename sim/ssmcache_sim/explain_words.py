"""The story of a request in plain words. Every sentence is true of the request that it is about."""

from ssmcache.config import KVCacheManagerConfig
from ssmcache.layout import LayerGroupKind
from ssmcache.units import format_size, format_size_up
from ssmcache_sim.explain import Explanation, LostPart, RequestStory
from ssmcache_sim.remedies import Remedy
from ssmcache_sim.settings import slot_bytes_of

_MS_PER_SECOND, _MS_PER_MINUTE, _MS_PER_HOUR = 1_000, 60_000, 3_600_000
_SKIPPED = {
    "crossed": "passed there inside one commit, without a slot reserved for it",
    "no_room": "found no room for it beside the snapshots of its own prompt",
    "history": "had computed beyond it before its tokens were committed",
}


def heading(story: RequestStory, explanation: Explanation) -> str:
    """Which request it is."""
    trace = explanation.result.trace
    session = f", turn {story.turn} of session {story.session}" if story.session is not None else ""
    after = _duration(story.arrival_ms - float(trace.arrival_ms[0]))
    return f"Request {story.request:,} (of 0 to {trace.num_requests - 1:,}){session}, {after} after the first"


def paragraphs(story: RequestStory, explanation: Explanation, config: KVCacheManagerConfig) -> list[str]:
    """What became of it, what it shared and with whom."""
    lost = story.kv_ceiling_tokens - story.usable_tokens
    prompt = "1 prompt token" if story.prompt_tokens == 1 else f"{story.prompt_tokens:,} prompt tokens"
    counts = (
        f"{prompt}: {story.usable_tokens:,} skipped, {lost:,} lost, {story.never_seen_tokens:,} never seen before, "
        f"{story.last_block_tokens:,} in the last block."
    )
    return [counts, _shared(story, explanation, config)]


def _shared(story: RequestStory, explanation: Explanation, config: KVCacheManagerConfig) -> str:
    if story.shared_with is None:
        if not story.never_seen_tokens:
            return "It has no block but its last one, which no cache skips."
        return f"No earlier prompt begins with its first block of {config.tokens_per_block:,} tokens."
    arrival_ms = explanation.result.trace.arrival_ms
    ago = _duration(story.arrival_ms - float(arrival_ms[story.shared_with]))
    num_before = story.request - story.shared_with
    requests = "the request before it" if num_before == 1 else f"{num_before:,} requests before it"
    same = "nothing of that was lost." if not story.parts else "not all of that was skipped:"
    return (
        f"Its first {story.kv_ceiling_tokens:,} tokens are those of request {story.shared_with:,}, {requests}, "
        f"{ago} earlier; {same}"
    )


def lost_words(part: LostPart, story: RequestStory, explanation: Explanation, config: KVCacheManagerConfig) -> str:
    """Why one part of a prompt was not skipped."""
    which = f"Tokens {part.start_token:,} to {part.end_token:,} ({part.num_tokens:,}):"
    return f"{which} {_why(part, story, explanation, config)}"


def _why(part: LostPart, story: RequestStory, explanation: Explanation, config: KVCacheManagerConfig) -> str:
    interval = config.ssm_reuse_interval
    if part.cause == "too_large":
        if story.too_large:
            return "the request does not fit into the memory, even alone, and was served without the cache."
        return "no earlier request that fits into the memory had them; the others were served without the cache."
    there = "their KV was there, but " if config.has_attention else ""
    if part.cause == "alignment":
        if not part.start_token:
            return f"{there}they are less than one snapshot interval ({interval:,} tokens)."
        return (
            f"{there}no snapshot is ever taken within an interval ({interval:,} tokens), and they end before the next."
        )
    if part.cause == "kv_evicted":
        return _kv_evicted(part, explanation, config)
    where = f"at token {part.end_token:,}"
    if part.num_tokens > interval:
        where = f"at the ends of these {part.num_tokens // interval:,} intervals"
    if part.cause == "snapshot_window":
        return (
            f"there is a snapshot {where}, but KV of a sliding window before it was evicted: no memory was left for it."
        )
    return f"{there}{_snapshot(part, where, explanation, config)}"


def _kv_evicted(part: LostPart, explanation: Explanation, config: KVCacheManagerConfig) -> str:
    if part.last_ended is None:
        return "KV of a sliding window that is needed there was evicted: no memory was left for it."
    assert part.last_used_by is not None, "KV that nobody computed was evicted"
    block = config.tokens_per_block
    said = (
        f"their KV, last used as a whole by request {part.last_used_by:,}, was evicted {_during(part)}: the memory for "
        f"KV was full."
    )
    if part.distance is None or explanation.capacity_blocks is None:
        return said
    page_bytes = slot_bytes_of(config, LayerGroupKind.ATTENTION)
    needed, room = part.distance, explanation.capacity_blocks
    return (
        f"{said} With all that was used since, it took {needed * block:,} tokens of KV "
        f"({format_size(needed * page_bytes)}) to keep it; there is room for {room * block:,} "
        f"({format_size(room * page_bytes)})."
    )


def _snapshot(part: LostPart, where: str, explanation: Explanation, config: KVCacheManagerConfig) -> str:
    cause = part.cause.removeprefix("snapshot_")
    many = part.num_tokens > config.ssm_reuse_interval
    if cause == "not_admitted" and part.first_taken is None:
        return f"nobody asked for a snapshot {where}."
    if cause not in ("evicted", "not_admitted"):
        first, last = part.first_ended, part.last_ended
        who = f"request {first:,}" if first == last else f"requests {first:,} to {last:,}"
        return f"there is no snapshot {where}: {who} {_SKIPPED[cause]}."
    snapshots, were = ("snapshots", "were") if many else ("snapshot", "was")
    taken = _requests(part.first_taken, part.last_taken)
    if cause == "not_admitted":
        return f"the {snapshots} {where}, taken during {taken}, {were} given up for a later one of the same request."
    said = (
        f"the {snapshots} {where}, taken during {taken}, {were} evicted {_during(part)}: the memory for "
        f"states was full."
    )
    if part.distance is None or explanation.capacity_snapshots is None:
        return said
    state_bytes = slot_bytes_of(config, LayerGroupKind.SSM)
    needed, room = part.distance, explanation.capacity_snapshots
    return (
        f"{said} With all that were used since, it took {needed:,} snapshots ({format_size(needed * state_bytes)}) to "
        f"keep {'them' if many else 'it'}; there is room for {room:,} ({format_size(room * state_bytes)})."
    )


def remedy_words(remedy: Remedy, config: KVCacheManagerConfig) -> str:
    """One setting with which the request would have skipped more."""
    skipped = f"it would have skipped {remedy.usable_tokens:,} tokens."
    if remedy.setting == "gpu_memory_bytes":
        now = format_size(config.cache_tiers[0].quota)
        if remedy.engine == "replay":
            return f"With GPU memory of {format_size(remedy.value)}, now {now}, {skipped}"
        alone = " alone" if len(config.cache_tiers) > 1 else ""
        why = "" if remedy.is_least else " (which holds the largest request, too)"
        return f"With GPU memory{alone} of {format_size_up(remedy.value)} or more{why}, now {now}, {skipped}"
    if remedy.setting == "ssm_reuse_interval":
        now = f"{config.ssm_reuse_interval:,}"
        return f"With a snapshot interval of {remedy.value:,}, now {now}, at the same memory, {skipped}"
    return f"With blocks of {remedy.value:,} tokens, now {config.tokens_per_block:,}, at the same memory, {skipped}"


def closing_words(story: RequestStory, explanation: Explanation) -> str:
    """What is to be said of the settings named, or where none is; empty for nothing."""
    if not story.parts:
        return ""
    said = "" if story.remedies else "None of the other settings that were tried would have let it skip more."
    if explanation.why_replayed and story.usable_tokens < story.ceiling_tokens:
        reason = f"The least memory that keeps it cannot be told: {explanation.why_replayed}. A few were replayed."
        return f"{said} {reason}".strip()
    return said


def _during(part: LostPart) -> str:
    return f"during {_requests(part.first_ended, part.last_ended)}"


def _requests(first: int | None, last: int | None) -> str:
    return f"request {first:,}" if first == last else f"requests {first:,} to {last:,}"


def _duration(ms: float) -> str:
    for unit_ms, unit in ((_MS_PER_HOUR, "h"), (_MS_PER_MINUTE, "min"), (_MS_PER_SECOND, "s")):
        if ms >= unit_ms:
            return f"{ms / unit_ms:.1f} {unit}"
    return f"{ms:.0f} ms"
