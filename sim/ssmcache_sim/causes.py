"""Every prompt token has one cause: it was skipped, it was lost for a reason, or there was nothing to skip.

For each request, with its prompt of L tokens in blocks of B tokens and an interval of P tokens between snapshots:

    L = usable + lost evicted + lost alignment + lost snapshot + never seen + last block

- *last block*: L - floor((L - 1) / B) * B, so 1 to B tokens: a last block that is not full has no identity, and the
  last token of a full one must be computed for its logits. No cache skips it.
- *never seen*: the other blocks that no earlier prompt began with. What is left is the KV ceiling.
- *lost evicted*: the KV ceiling less the KV that is there (all of what is there lies in front of all of what is not).
  In part *too large*: the request itself, or all requests before it with those blocks, did not fit into the memory
  even alone, and were served without the cache.
- *lost alignment*: the KV that is there beyond the last multiple of P within it: no snapshot is ever taken in there.
- *lost snapshot*: from the usable tokens on to that multiple, whole intervals. Each interval is blamed on the boundary
  at its end: had it had a snapshot, the request would have skipped the interval and all before it. What happened to a
  boundary last is its cause, one of `SNAPSHOT_CAUSES`.

Where KV and a snapshot are both gone, the KV is blamed: without it the snapshot is of no use.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from ssmcache_sim.ceilings import blocks_seen_before, countable_blocks
from ssmcache_sim.trace import BoolArray, Int64Array, Trace

# cause: in words, after "snapshot"
SNAPSHOT_CAUSE_WORDS = {
    "evicted": "evicted",
    "crossed": "not taken: inside a commit, no slot reserved",
    "no_room": "not taken: no room",
    "not_admitted": "not taken: not admitted",
    "history": "not taken: history ahead of the commit",
    "window": "there, but window KV evicted",
}
SNAPSHOT_CAUSES = tuple(SNAPSHOT_CAUSE_WORDS)

# each is the sum of the columns beside it, in every request and in the totals
_SUMS = {
    "prompt_tokens": ("kv_ceiling_hit_tokens", "never_seen_tokens", "last_block_tokens"),
    "kv_ceiling_hit_tokens": (
        "usable_hit_tokens",
        "lost_evicted_tokens",
        "lost_alignment_tokens",
        "lost_snapshot_tokens",
    ),
}
# each is at most the one beside it
_LIMITS = {
    "too_large_requests": "requests",
    "tree_hit_tokens": "prompt_tokens",
    "attention_hit_tokens": "prompt_tokens",
    "ceiling_hit_tokens": "kv_ceiling_hit_tokens",
    "lost_evicted_too_large_tokens": "lost_evicted_tokens",
}

_Values = TypeVar("_Values")


def snapshot_columns(by_cause: Iterable[_Values]) -> dict[str, _Values]:
    """What belongs to each of `SNAPSHOT_CAUSES`, under its published name."""
    return {f"lost_snapshot_{cause}_tokens": value for cause, value in zip(SNAPSHOT_CAUSES, by_cause, strict=True)}


def broken_promise(tokens: Mapping[str, Any]) -> str | None:
    """What does not hold of the figures of a replay, numbers or columns by name, as far as all of it is there."""
    for whole, parts in _SUMS.items():
        if {whole, *parts} <= set(tokens) and np.any(sum(tokens[part] for part in parts) != tokens[whole]):
            return f"{whole}: expected the sum of {', '.join(parts)}, got another number"
    of_cause = tuple(snapshot_columns(SNAPSHOT_CAUSES))
    if {*of_cause, "lost_snapshot_tokens"} <= set(tokens) and np.any(
        sum(tokens[part] for part in of_cause) > tokens["lost_snapshot_tokens"]
    ):
        return "lost_snapshot_tokens: expected no less than its parts by cause, got less"
    for part, whole in _LIMITS.items():
        if {part, whole} <= set(tokens) and np.any(tokens[part] > tokens[whole]):
            return f"{part}: expected at most {whole}, got more"
    return None


def last_block_tokens(trace: Trace, tokens_per_block: int) -> Int64Array:
    """[num_requests] tokens of each prompt that no cache skips, in blocks of that size."""
    return trace.prompt_tokens - countable_blocks(trace.prompt_tokens, tokens_per_block) * tokens_per_block


def lost_to_size(trace: Trace, too_large: BoolArray, attention: Int64Array, kv_ceiling: Int64Array) -> Int64Array:
    """[num_requests] tokens, of those whose KV is missing, that a request too large for the memory has cost.

    Args:
        too_large: [num_requests] which requests were served without the cache.
        attention, kv_ceiling: [num_requests] tokens with KV, and with unlimited memory.
    """
    if not too_large.any():
        return kv_ceiling - kv_ceiling
    block = trace.tokens_per_block
    # with unlimited memory, but for the requests that were kept out of it
    kept = blocks_seen_before(trace, ~too_large).clip(max=countable_blocks(trace.prompt_tokens, block)) * block
    kept[too_large] = 0
    lost: Int64Array = kv_ceiling - kept.clip(min=attention)
    return lost
