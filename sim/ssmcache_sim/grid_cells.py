"""Cells of a sweep by the one-pass grid: which of them it can do exactly, and their totals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssmcache.config import KVCacheManagerConfig
from ssmcache.layout import LayerGroupKind, layer_groups, split_quota
from ssmcache.pools import UNLIMITED_SLOTS
from ssmcache_sim.grid import UNLIMITED, StackDistances, attention_hits, hybrid_hits, stack_distances
from ssmcache_sim.totals import ReplayTotals
from ssmcache_sim.trace import Trace

EXACT = "exact: default recency, every boundary, and the largest request fits"


@dataclass(frozen=True, slots=True)
class GridCapacity:
    """What a cell's pools hold beyond what one request takes: blocks of KV, and snapshots (None: no SSM layers)."""

    blocks: int
    snapshots: int | None


def grid_capacity(trace: Trace, config: KVCacheManagerConfig) -> GridCapacity | str:
    """The capacity of a cell for the grid, or why it must be replayed: in plain words, for people.

    A pool of N slots is a stack of N - 1: each request takes one page and one live state more than it leaves.
    Errors: ValueError if no manager can have this config.
    """
    groups = layer_groups(config)
    slots = dict(zip((group.kind for group in groups), split_quota(groups, config), strict=True))
    if LayerGroupKind.ATTENTION not in slots:
        return "no attention layers: blocks stay only as far as snapshots need them"
    blocks = _stack(slots[LayerGroupKind.ATTENTION])
    longest = int(trace.prompt_tokens.max())
    if longest // config.tokens_per_block > blocks:
        return f"the largest request ({longest} tokens) does not fit into the KV pool"
    if not config.has_ssm:
        return GridCapacity(blocks, None)
    snapshots = _stack(slots[LayerGroupKind.SSM])
    if longest // config.ssm_reuse_interval > snapshots:
        return f"the snapshots of the largest request ({longest} tokens) do not fit into the SSM pool"
    return GridCapacity(blocks, snapshots)


def _stack(num_slots: int) -> int:
    return UNLIMITED if num_slots == UNLIMITED_SLOTS else num_slots - 1


def grid_totals(trace: Trace, cells: Sequence[tuple[KVCacheManagerConfig, GridCapacity]]) -> list[ReplayTotals]:
    """Token totals of each cell, from one pass over the trace. A grid counts no snapshots and no peak memory."""
    sizes = {config.tokens_per_block for config, _ in cells}
    sizes |= {config.ssm_reuse_interval for config, _ in cells if config.has_ssm}
    distances = stack_distances(trace, sizes)
    shapes: dict[tuple[int, int | None], list[int]] = {}
    for index, (config, _) in enumerate(cells):
        shape = (config.tokens_per_block, config.ssm_reuse_interval if config.has_ssm else None)
        shapes.setdefault(shape, []).append(index)
    totals: dict[int, ReplayTotals] = {}
    for (block, interval), indices in shapes.items():
        capacities = [cells[index][1] for index in indices]
        totals.update(zip(indices, _totals_of_shape(trace, distances, block, interval, capacities), strict=True))
    return [totals[index] for index in range(len(cells))]


def _totals_of_shape(
    trace: Trace, distances: StackDistances, block: int, interval: int | None, capacities: Sequence[GridCapacity]
) -> list[ReplayTotals]:
    """Totals of cells of one block size and interval."""
    blocks = sorted({capacity.blocks for capacity in capacities} | {UNLIMITED})
    snapshots = sorted({capacity.snapshots or 0 for capacity in capacities} | {UNLIMITED})
    kv_hits = attention_hits(distances, block, blocks)
    if interval is None:
        plane = np.repeat(kv_hits[:, np.newaxis], len(snapshots), axis=1)
    else:
        plane = hybrid_hits(distances, block, interval, blocks, snapshots)
    result = []
    for capacity in capacities:
        row, column = blocks.index(capacity.blocks), snapshots.index(capacity.snapshots or 0)
        # with all snapshots, what is lost of the KV that is there is lost to the interval
        attention, aligned, usable = int(kv_hits[row]), int(plane[row, -1]), int(plane[row, column])
        result.append(
            ReplayTotals(
                requests=trace.num_requests,
                too_large_requests=0,
                prompt_tokens=int(trace.prompt_tokens.sum()),
                tree_hit_tokens=attention,
                attention_hit_tokens=attention,
                usable_hit_tokens=usable,
                kv_ceiling_hit_tokens=int(kv_hits[-1]),
                ceiling_hit_tokens=int(plane[-1, -1]),
                lost_evicted_tokens=int(kv_hits[-1]) - attention,
                lost_alignment_tokens=attention - aligned,
                lost_snapshot_tokens=aligned - usable,
                snapshots=None,
                peaks=(),
            )
        )
    return result
