"""Cells of a sweep by the one-pass grid: which of them it can do exactly, and their totals."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ssmcache.config import KVCacheManagerConfig
from ssmcache.layout import DEFAULT_STEP, LayerGroupKind, layer_groups, pool_members, split_quota, split_tier
from ssmcache.pools import UNLIMITED_SLOTS
from ssmcache_sim.causes import SNAPSHOT_CAUSES, last_block_tokens, snapshot_columns
from ssmcache_sim.errors import SettingsError
from ssmcache_sim.grid import UNLIMITED, StackDistances, attention_hits, hybrid_hits, stack_distances
from ssmcache_sim.grid_arena import arena_hits
from ssmcache_sim.grid_last import last_boundaries, last_evicted, last_hits, last_needs_replay
from ssmcache_sim.grid_tiers import tier_hits
from ssmcache_sim.totals import ReplayTotals, TierTotals
from ssmcache_sim.trace import Trace

EXACT = "exact: default recency, every boundary, and the largest request fits"
EXACT_LAST = "exact: default recency, last boundaries, and no snapshot outlives its KV"
ARENA = "an arena: one budget of bytes that no memory of pools can be; exact for its own rules"


@dataclass(frozen=True, slots=True)
class GridCapacity:
    """What a cell's pools hold beyond what one request takes: blocks of KV, and snapshots (None: no SSM layers);
    blocks of the tiers below the GPU.
    """

    blocks: int
    snapshots: int | None
    lower_blocks: tuple[int, ...] = ()

    @property
    def all_blocks(self) -> int:
        """Blocks of all tiers together: what hits is a matter of these alone."""
        return self.blocks + sum(self.lower_blocks)


@dataclass(frozen=True, slots=True)
class ArenaCapacity:
    """What an arena holds beyond what one request takes, in bytes, and the bytes of what it holds."""

    num_bytes: int
    page_bytes: int
    snapshot_bytes: int


def grid_capacity(trace: Trace, config: KVCacheManagerConfig) -> GridCapacity | str:
    """The capacity of a cell for the grid, or why it must be replayed: in plain words, for people.

    A pool of N slots is a stack of N - 1: each request takes one page and one live state more than it leaves. Below the
    GPU it is one of N.
    Errors: ValueError if no manager can have this config.
    """
    groups = layer_groups(config)
    slots = dict(zip((group.kind for group in groups), split_quota(groups, config), strict=True))
    if LayerGroupKind.ATTENTION not in slots:
        return "no attention layers: blocks stay only as far as snapshots need them"
    if config.has_windows:
        return "sliding windows: their pages have an order of use of their own"
    if len(pool_members(groups)) < len(groups):
        return "pages and states are of one size and share a pool: neither has an order of use of its own"
    blocks = _stack(slots[LayerGroupKind.ATTENTION])
    longest = trace.longest_path
    if longest // config.tokens_per_block > blocks:
        return f"the largest request ({longest} tokens) does not fit into the KV pool"
    if not config.has_ssm:
        return GridCapacity(blocks, None, _lower_blocks(config))
    if len(config.cache_tiers) > 1:
        return "snapshots are read on the tier where they lie: no order of use over all tiers"
    snapshots = _stack(slots[LayerGroupKind.SSM])
    if config.admission == "last":
        return _last_capacity(trace, config.ssm_reuse_interval, blocks, snapshots)
    if longest // config.ssm_reuse_interval > snapshots:
        return f"the snapshots of the largest request ({longest} tokens) do not fit into the SSM pool"
    return GridCapacity(blocks, snapshots)


def _last_capacity(trace: Trace, ssm_reuse_interval: int, blocks: int, snapshots: int) -> GridCapacity | str:
    return last_needs_replay(trace, ssm_reuse_interval, blocks, snapshots) or GridCapacity(blocks, snapshots)


def _lower_blocks(config: KVCacheManagerConfig) -> tuple[int, ...]:
    """Blocks of each tier below the GPU, of attention alone."""
    groups, step = layer_groups(config), config.typical_step or DEFAULT_STEP
    lower = enumerate(config.cache_tiers[1:], 1)
    return tuple(split_tier(groups, config, tier, tier_config.quota, step, 1)[0] for tier, tier_config in lower)


def _stack(num_slots: int) -> int:
    return UNLIMITED if num_slots == UNLIMITED_SLOTS else num_slots - 1


def arena_capacity(trace: Trace, config: KVCacheManagerConfig) -> ArenaCapacity:
    """The memory of a cell as one arena for pages and snapshots: see `grid_arena.py`.

    Errors: SettingsError where it says nothing exact: nobody else can, since no manager has such a memory.
    """
    slot_bytes = {group.kind: group.slot_bytes for group in layer_groups(config)}
    if len(slot_bytes) < 2:
        raise SettingsError("arena: expected a model with attention and SSM layers, got one whose memory is one pool")
    page_bytes, snapshot_bytes = slot_bytes[LayerGroupKind.ATTENTION], slot_bytes[LayerGroupKind.SSM]
    quota = config.cache_tiers[0].quota
    if quota is None:
        return ArenaCapacity(UNLIMITED, page_bytes, snapshot_bytes)
    longest = trace.longest_path
    num_pages, num_states = longest // config.tokens_per_block + 1, longest // config.ssm_reuse_interval + 1
    needed = num_pages * page_bytes + num_states * snapshot_bytes
    if quota < needed:
        raise SettingsError(
            f"arena: expected room for the largest request ({longest} tokens), {needed} bytes, got {quota} bytes"
        )
    return ArenaCapacity(quota - page_bytes - snapshot_bytes, page_bytes, snapshot_bytes)


def grid_totals(
    trace: Trace, cells: Sequence[tuple[KVCacheManagerConfig, GridCapacity | ArenaCapacity]]
) -> list[ReplayTotals]:
    """Token totals of each cell, from one pass over the trace. A grid counts no snapshots, peak memory or moves."""
    sizes = {config.tokens_per_block for config, _ in cells}
    sizes |= {config.ssm_reuse_interval for config, _ in cells if config.has_ssm}
    distances = stack_distances(trace, sizes)
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, cell in enumerate(cells):
        alike.setdefault(_shape(*cell), []).append(index)
    totals: dict[int, ReplayTotals] = {}
    for indices in alike.values():
        config = cells[indices[0]][0]
        *hits, unlimited = _hits_of_shape(trace, distances, config, [cells[index][1] for index in indices])
        for index, one in zip(indices, hits, strict=True):
            totals[index] = _totals(trace, cells[index][0], one, unlimited)
    return [totals[index] for index in range(len(cells))]


@dataclass(frozen=True, slots=True)
class _Hits:
    """Tokens: KV there; KV there down to a boundary in each request; KV and snapshot there, and by tier if several; of
    those that lack a snapshot, those whose boundary never had one.
    """

    attention: int
    aligned: int
    usable: int
    by_tier: tuple[int, ...] = ()
    not_admitted: int = 0


def _shape(config: KVCacheManagerConfig, capacity: GridCapacity | ArenaCapacity) -> tuple[object, ...]:
    """Cells of equal shape differ in their capacity alone."""
    shape = (config.tokens_per_block, *((config.ssm_reuse_interval, config.admission) if config.has_ssm else ()))
    return (*shape, capacity.page_bytes, capacity.snapshot_bytes) if isinstance(capacity, ArenaCapacity) else shape


def _hits_of_shape(
    trace: Trace,
    distances: StackDistances,
    config: KVCacheManagerConfig,
    capacities: Sequence[GridCapacity | ArenaCapacity],
) -> list[_Hits]:
    """Hits of cells of one shape, and in the end those of unlimited memory with a snapshot at every boundary."""
    arenas = [capacity for capacity in capacities if isinstance(capacity, ArenaCapacity)]
    pools = [capacity for capacity in capacities if isinstance(capacity, GridCapacity)]
    assert not (arenas and pools), "an arena has another shape than pools"
    return _arena_hits(distances, config, arenas) if arenas else _pool_hits(trace, distances, config, pools)


def _arena_hits(
    distances: StackDistances, config: KVCacheManagerConfig, arenas: Sequence[ArenaCapacity]
) -> list[_Hits]:
    budgets = [*(arena.num_bytes for arena in arenas), UNLIMITED]
    shape = (config.tokens_per_block, config.ssm_reuse_interval, arenas[0].page_bytes, arenas[0].snapshot_bytes)
    hits = arena_hits(distances, *shape, budgets)
    return list(map(_Hits, hits.attention.tolist(), hits.aligned.tolist(), hits.usable.tolist()))


def _pool_hits(
    trace: Trace, distances: StackDistances, config: KVCacheManagerConfig, pools: Sequence[GridCapacity]
) -> list[_Hits]:
    block = config.tokens_per_block
    blocks = sorted({pool.blocks for pool in pools} | {UNLIMITED})
    snapshots = sorted({pool.snapshots or 0 for pool in pools} | {UNLIMITED})
    kv_hits = attention_hits(distances, block, blocks)
    if config.has_ssm:
        plane = hybrid_hits(distances, block, config.ssm_reuse_interval, blocks, snapshots)
    else:
        plane = np.repeat(kv_hits[:, np.newaxis], len(snapshots), axis=1)
    usable, found = plane, None
    if config.has_ssm and config.admission == "last":
        found = last_boundaries(trace, config.ssm_reuse_interval)
        usable = last_hits(distances, found, block, blocks, snapshots)
    hits = []
    for pool in pools:
        if pool.lower_blocks:
            by_tier = tier_hits(distances, block, (pool.blocks, *pool.lower_blocks)).hit_tokens
            hits.append(_Hits(*(sum(by_tier),) * 3, by_tier))
            continue
        row, column = blocks.index(pool.blocks), snapshots.index(pool.snapshots or 0)
        # with all snapshots, what is lost of the KV that is there is lost to the interval
        one = _Hits(int(kv_hits[row]), int(plane[row, -1]), int(usable[row, column]))
        if found is not None:
            evicted = last_evicted(distances, found, block, pool.blocks, pool.snapshots or 0, trace.num_requests)
            one = replace(one, not_admitted=one.aligned - one.usable - evicted)
        hits.append(one)
    return [*hits, _Hits(int(kv_hits[-1]), int(plane[-1, -1]), int(plane[-1, -1]))]


def _totals(trace: Trace, config: KVCacheManagerConfig, hits: _Hits, unlimited: _Hits) -> ReplayTotals:
    names = config.tier_names if hits.by_tier else ()
    prompt_tokens = int(trace.prompt_tokens.sum())
    last_block = int(last_block_tokens(trace, config.tokens_per_block).sum())
    # a boundary that had a snapshot once and lacks it has lost it
    evicted = hits.aligned - hits.usable - hits.not_admitted
    lacking = {"evicted": evicted, "not_admitted": hits.not_admitted}
    return ReplayTotals(
        requests=trace.num_requests,
        too_large_requests=0,
        prompt_tokens=prompt_tokens,
        tree_hit_tokens=hits.attention,
        attention_hit_tokens=hits.attention,
        usable_hit_tokens=hits.usable,
        kv_ceiling_hit_tokens=unlimited.attention,
        ceiling_hit_tokens=unlimited.usable,
        lost_evicted_tokens=unlimited.attention - hits.attention,
        lost_alignment_tokens=hits.attention - hits.aligned,
        lost_snapshot_tokens=hits.aligned - hits.usable,
        lost_evicted_too_large_tokens=0,
        **snapshot_columns(lacking.get(cause, 0) for cause in SNAPSHOT_CAUSES),
        never_seen_tokens=prompt_tokens - last_block - unlimited.attention,
        last_block_tokens=last_block,
        snapshots=None,
        peaks=(),
        tiers=tuple(TierTotals(name, tokens, ()) for name, tokens in zip(names, hits.by_tier, strict=True)),
        moved=None if names else (),
    )
