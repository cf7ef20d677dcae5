"""What a cache of unlimited memory would hit: the ceilings that every replay is measured against."""

from dataclasses import dataclass

import numpy as np

from ssmcache_sim.scratch import spans
from ssmcache_sim.trace import BoolArray, Int64Array, Trace


@dataclass(frozen=True, slots=True, eq=False)
class Ceilings:
    """[num_requests] tokens each: hits with unlimited memory for attention alone, and at an interval of snapshots."""

    kv_tokens: Int64Array
    tokens: Int64Array


def infinite_cache(trace: Trace, ssm_reuse_interval: int | None) -> Ceilings:
    """Hits of an infinite cache into which every earlier path was put: prompts, and outputs where the trace has them.

    With m leading full blocks seen in an earlier request, B tokens a block and L prompt tokens, attention hits
    min(m, floor((L - 1) / B)) * B tokens: full blocks only, and at least one token is left to compute. With SSM layers
    that is rounded down to the interval; `ssm_reuse_interval=None` means a model without them.

    Cost: one write for each block, then O(requests * log(blocks of a request)).
    """
    block = trace.tokens_per_block
    kv_tokens = np.minimum(blocks_seen_before(trace), countable_blocks(trace.prompt_tokens, block)) * block
    if ssm_reuse_interval is None:
        return Ceilings(kv_tokens, kv_tokens)
    return Ceilings(kv_tokens, kv_tokens // ssm_reuse_interval * ssm_reuse_interval)


def countable_blocks(prompt_tokens: Int64Array, tokens_per_block: int) -> Int64Array:
    """[num_requests] blocks of each prompt that may hit: full ones, and at least one token is left to compute."""
    blocks: Int64Array = np.maximum(prompt_tokens - 1, 0) // tokens_per_block
    return blocks


def blocks_seen_before(trace: Trace, put: BoolArray | None = None) -> Int64Array:
    """[num_requests] leading full blocks of each prompt whose key comes first in an earlier path. Cost: as that of
    `infinite_cache`.

    Args:
        put: [num_requests] which paths count as earlier ones; None: all.
    """
    return _seen_before(trace, trace.prompt_tokens // trace.tokens_per_block, put)


def path_blocks_seen_before(trace: Trace) -> Int64Array:
    """As `blocks_seen_before`, of each path."""
    return _seen_before(trace, np.diff(trace.offsets), None)


def _seen_before(trace: Trace, num_blocks: Int64Array, put: BoolArray | None) -> Int64Array:
    """[num_requests] how many of the first `num_blocks` of each path come first in an earlier one.

    Args:
        put: [num_requests] which prompts count as earlier ones; None: all.

    Keys are unique per prefix: all blocks before one that was seen were seen. So a binary search finds the first new
    block, for all requests at once.
    """
    first_place = np.full(trace.num_keys, trace.block_keys.size, dtype=np.int64)
    # Of several values for one index the last one stays: written back to front, that is the first place of a key.
    for begin, end in reversed(spans(trace.block_keys.size)):
        places = np.arange(begin, end, dtype=np.int64)
        if put is not None:
            places = places[put[np.searchsorted(trace.offsets, places, side="right") - 1]]
        first_place[trace.block_keys[places[::-1]]] = places[::-1]
    starts = trace.offsets[:-1]
    low, high = np.zeros_like(starts), num_blocks.copy()  # the answer lies in low..high
    while (open_requests := np.flatnonzero(low < high)).size:
        start = starts[open_requests]
        middle = (low[open_requests] + high[open_requests]) // 2
        seen = first_place[trace.block_keys[start + middle]] < start
        low[open_requests[seen]] = middle[seen] + 1
        high[open_requests[~seen]] = middle[~seen]
    return low
