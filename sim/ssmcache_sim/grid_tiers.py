"""Which tier the KV that hits lies on, from the distances of the one-pass grid.

Tiers are exclusive: a page lies on one of them, and what a tier has no room for goes one tier down, the oldest first,
or is dropped at the last. A request brings all pages of its path to the warmest tier. Then the warmest tier has the
most recent blocks, each further tier those after them: what hits on the n-th tier has a distance between the sums of
the capacities of the tiers above it and of itself.

Exact under the default recency (path touch, deepest first) where sizes are fixed, victims go strictly by that recency,
KV beyond a missing snapshot is adopted, and the warmest tier holds the largest request. Capacities are stacks: a GPU
pool of N pages is a stack of N - 1, since a request takes one page beyond what it leaves; lower tiers have all of
theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ssmcache_sim.grid import UNLIMITED, StackDistances, attention_hits


@dataclass(frozen=True, slots=True)
class TierHits:
    """Hit tokens of attention, in full blocks.

    Attributes:
        blocks: capacity of each tier, from the warmest on.
        hit_tokens: by the tier where the block lay when its request came.
        lost_evicted_tokens: what unlimited memory would hit besides.
    """

    blocks: tuple[int, ...]
    hit_tokens: tuple[int, ...]
    lost_evicted_tokens: int


def tier_hits(distances: StackDistances, tokens_per_block: int, blocks: Sequence[int]) -> TierHits:
    """Hits by tier of all requests.

    For a hybrid model these are the pages there are, usable or not: a request adopts and brings up all of them. What is
    usable depends on the sums of the tiers alone: `hybrid_hits` with the sums of blocks and of snapshots.

    Args:
        blocks: capacity of each tier in blocks, GPU, host, disk, as many as there are; `UNLIMITED` for no limit.

    Cost: O(segments * tiers).
    """
    depths = [min(depth, UNLIMITED) for depth in accumulate(blocks)]
    *hits, ceiling = attention_hits(distances, tokens_per_block, [*depths, UNLIMITED]).tolist()
    by_tier = np.diff(hits, prepend=0).tolist()
    return TierHits(tuple(blocks), tuple(by_tier), ceiling - hits[-1])
