"""Hit tokens of one byte budget for KV pages and snapshots together, from the distances of the one-pass grid.

An *arena* is one piece of memory without pools: a page or a snapshot of any model may take any bytes of it. No real
memory of equal slots can be that; it is what a perfect split between the pools, found anew at each moment, would give.

The rules: one order of use over pages and snapshots. A touch covers the whole path, deepest first: in one block the
snapshot is older than the page, and the page is older than all of the block above. What is oldest goes, one page or
snapshot at a time, until the new one fits. So the arena holds the most recent pages and snapshots whose bytes sum up to
at most the budget, for every budget at once: a boundary with the KV distance K and the snapshot distance S is usable
where K * page_bytes + S * snapshot_bytes <= budget.

Exact under these rules where every boundary gets a snapshot, sizes are fixed, KV beyond the missing snapshot is
adopted, requests come one at a time, and the budget holds the largest request: `arena_capacity` of `grid_cells.py` says
so for a cell. The budget is without the page and the live state that a running request takes beyond what it leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssmcache_sim.grid import StackDistances, boundary_runs
from ssmcache_sim.trace import Int64Array


@dataclass(frozen=True, slots=True, eq=False)
class ArenaHits:
    """Tokens of all requests, each [num_budgets].

    Attributes:
        attention: KV is there, in full blocks.
        aligned: the same down to a boundary in each request: what the KV there would be worth with all snapshots.
        usable: KV and snapshot are there.
    """

    attention: Int64Array
    aligned: Int64Array
    usable: Int64Array


def arena_hits(
    distances: StackDistances,
    tokens_per_block: int,
    ssm_reuse_interval: int,
    page_bytes: int,
    snapshot_bytes: int,
    budgets: Sequence[int],
) -> ArenaHits:
    """Hits of a model with such pages and snapshots, for each budget in bytes.

    Args:
        page_bytes: KV of one block, of all layers together; positive.
        snapshot_bytes: one state of all SSM layers; not negative.

    Cost: O(segments * budgets), whatever their lengths: in a segment the bytes grow evenly from boundary to boundary.
    """
    boundaries = boundary_runs(distances, tokens_per_block, ssm_reuse_interval)
    between = boundaries.blocks_each * page_bytes + snapshot_bytes
    used = boundaries.blocks_before * page_bytes + boundaries.snapshots_later * snapshot_bytes
    usable = [int(np.clip((budget - used) // between, 0, boundaries.count).sum()) for budget in budgets]
    # the page that ends at a boundary is there where all but the snapshot itself fits
    used -= snapshot_bytes
    aligned = [int(np.clip((budget - used) // between, 0, boundaries.count).sum()) for budget in budgets]
    return ArenaHits(
        attention=_pages(distances, tokens_per_block, ssm_reuse_interval, page_bytes, snapshot_bytes, budgets)
        * tokens_per_block,
        aligned=np.array(aligned, dtype=np.int64) * ssm_reuse_interval,
        usable=np.array(usable, dtype=np.int64) * ssm_reuse_interval,
    )


def _pages(
    distances: StackDistances,
    tokens_per_block: int,
    ssm_reuse_interval: int,
    page_bytes: int,
    snapshot_bytes: int,
    budgets: Sequence[int],
) -> Int64Array:
    """Pages that hit, [num_budgets]."""
    runs = distances.runs(tokens_per_block)
    blocks_each = ssm_reuse_interval // tokens_per_block
    between = blocks_each * page_bytes + snapshot_bytes
    # counted from the boundary at or above the run, so that each further one is `blocks_each` pages and a snapshot down
    phase = runs.first % blocks_each
    later_snapshots = distances.later_of(ssm_reuse_interval)[runs.segment]
    used = (runs.later - phase) * page_bytes + later_snapshots * snapshot_bytes
    hits = []
    for budget in budgets:
        intervals, rest = np.divmod(budget - used, between)
        pages = intervals * blocks_each + np.minimum(rest // page_bytes, blocks_each) - phase
        hits.append(int(np.clip(pages, 0, runs.count).sum()))
    return np.array(hits, dtype=np.int64)
