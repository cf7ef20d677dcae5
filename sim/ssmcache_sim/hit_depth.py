"""How deep into its prompt each request hits, for a cell of the grid."""

from dataclasses import dataclass

import numpy as np

from ssmcache import KVCacheManagerConfig
from ssmcache_sim.grid import StackDistances
from ssmcache_sim.grid_cells import GridCapacity
from ssmcache_sim.grid_last import last_boundaries, last_usable
from ssmcache_sim.trace import Float64Array, Int64Array, Trace

PERCENTS = tuple(range(0, 101, 2))


@dataclass(frozen=True, slots=True, eq=False)
class HitDepths:
    """[num_requests_found] usable hit tokens, and the lengths of their prompts, of the requests of which anything was
    seen before, in order of arrival. All other requests hit nothing.
    """

    hit_tokens: Int64Array
    prompt_tokens: Int64Array

    def quantiles(self, num_requests: int) -> tuple[Int64Array, Float64Array]:
        """[len(PERCENTS)] hit tokens, and shares of the prompt, that so many percent of all requests do not exceed."""
        none = np.zeros(num_requests - self.hit_tokens.size, dtype=np.int64)
        tokens = np.concatenate((none, self.hit_tokens))
        shares = np.concatenate((none, self.hit_tokens / self.prompt_tokens))
        levels = np.array(PERCENTS) / 100
        by_tokens, by_share = (np.quantile(values, levels, method="inverted_cdf") for values in (tokens, shares))
        return by_tokens.astype(np.int64), by_share


def hit_depths(
    distances: StackDistances, tokens_per_block: int, ssm_reuse_interval: int | None, capacity: GridCapacity
) -> HitDepths:
    """What each request hits at one capacity; their sum is that of `attention_hits` or `hybrid_hits`.

    Both distances of a segment's n-th boundary grow by a fixed number, so what fits is found by a division.

    Cost: O(segments).
    """
    native = distances.tokens_per_block
    block_factor, period = tokens_per_block // native, ssm_reuse_interval or tokens_per_block
    factor = period // native
    first = distances.start // factor
    count = np.minimum(distances.end // factor, distances.limit // period) - first
    # blocks of later touches, and the segment's own up to the boundary before its first one; each boundary from there
    # on adds the blocks of one period
    blocks_later = distances.later_of(tokens_per_block)
    blocks_later = blocks_later + first * factor // block_factor - distances.start // block_factor
    fits = (capacity.all_blocks - blocks_later) // (factor // block_factor)
    if ssm_reuse_interval is not None:
        assert capacity.snapshots is not None
        fits = np.minimum(fits, capacity.snapshots - distances.later_of(ssm_reuse_interval))
    # a path is followed from its first block on: each request found begins with the segment that starts there
    begins = np.flatnonzero(distances.start == 0)
    if not begins.size:
        return HitDepths(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    hits = np.add.reduceat(np.clip(fits, 0, np.maximum(count, 0)), begins) * period
    return HitDepths(hits, distances.limit[begins] + 1)


def last_hit_depths(
    trace: Trace, distances: StackDistances, config: KVCacheManagerConfig, capacity: GridCapacity
) -> HitDepths:
    """The same, of all requests, where each keeps its own last boundary only. Cost: one pass over the trace."""
    assert capacity.snapshots is not None
    found = last_boundaries(trace, config.ssm_reuse_interval)
    shape = (config.tokens_per_block, capacity.blocks, capacity.snapshots, trace.num_requests)
    return HitDepths(last_usable(distances, found, *shape), trace.prompt_tokens)
