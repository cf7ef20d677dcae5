"""What a manager tells about itself: counts and memory, put together from where they are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssmcache.compaction import num_private_slots
from ssmcache.memory.base import GPU_TIER
from ssmcache.pools import SlotPool, is_unlimited
from ssmcache.stats import CacheStats, LayerGroupUsage, MemoryUsage, Transfers
from ssmcache.tiers import Tiers

if TYPE_CHECKING:
    from ssmcache.manager import KVCacheManager


def memory_usage(manager: KVCacheManager) -> MemoryUsage:
    """See `KVCacheManager.memory_usage`."""
    return MemoryUsage(
        tuple(
            tuple(_group_usage(manager, index, tier) for index in range(len(manager.groups)))
            for tier in range(len(manager.tier_names))
        )
    )


def _group_usage(manager: KVCacheManager, index: int, tier: int) -> LayerGroupUsage:
    group, pool = manager.groups[index], manager.pools[index][tier]
    return LayerGroupUsage(
        layer_group=index,
        kind=group.kind.value,
        tier=manager.tier_names[tier],
        slot_bytes=group.slot_bytes,
        num_slots=limit_of(pool),
        used_slots=manager.used_slots(index, tier),
        cached_slots=manager.store.all_tiers()[index].cached[tier],
        peak_slots=min(pool.peak_used, pool.capacity),  # staging slots do not count
        pool=group.pool,
    )


def used_slots(manager: KVCacheManager, tiers: Tiers[Any, Any], tier: int) -> int:
    """See `KVCacheManager.used_slots`."""
    if not tiers.pool_group.is_shared:
        return tiers.pools[tier].used
    return tiers.cached[tier] + (num_private_slots(manager, tiers) if tier == GPU_TIER else 0)


def limit_of(pool: SlotPool) -> int | None:  # type: ignore[type-arg]  # of pages or of states
    return None if is_unlimited(pool) else pool.capacity


def collect_stats(manager: KVCacheManager) -> CacheStats:
    """See `KVCacheManager.stats`."""
    counters, store = manager.counters, manager.store
    snapshots = store.snapshots
    state_bytes = manager.groups[manager.state_group].slot_bytes if snapshots is not None else 0
    below = counters.usable_tokens_below
    return CacheStats(
        lookups=counters.lookups,
        lookup_tokens=counters.lookup_tokens,
        tree_tokens=counters.tree_tokens,
        attention_tokens=counters.attention_tokens,
        usable_tokens=counters.usable_tokens,
        usable_tokens_by_tier=(counters.usable_tokens - sum(below), *below),
        snapshots_taken=counters.snapshots_taken,
        snapshots_reused=counters.snapshots_reused,
        snapshots_evicted=0 if snapshots is None else snapshots.num_evicted,
        snapshots_evicted_unused=0 if snapshots is None else snapshots.num_evicted_unused,
        snapshots_skipped_crossed=counters.snapshots_skipped_crossed,
        snapshots_skipped_no_room=counters.snapshots_skipped_no_room,
        snapshots_skipped_not_admitted=counters.snapshots_skipped_not_admitted,
        snapshots_skipped_history=counters.snapshots_skipped_history,
        snapshots_superseded=counters.snapshots_superseded,
        pages_evicted=0 if store.pages is None else store.pages.num_evicted,
        window_pages_evicted=sum(window.num_evicted for window in store.windows),
        copied_states=counters.copied_states,
        copied_bytes=counters.copied_states * state_bytes,
        transfers=tuple(_transfers(manager)),
        blocks_full=counters.blocks_full,
        blocks_partial=counters.blocks_partial,
        blocks_missed=counters.blocks_looked_up - counters.blocks_full - counters.blocks_partial,
        blocks_allocated=sum(group.num_allocated for group in (store.pages, *store.windows) if group is not None),
    )


def _transfers(manager: KVCacheManager) -> list[Transfers]:
    names = manager.tier_names
    found = []
    for tiers in manager.store.all_tiers():
        index = tiers.layer_group
        slot_bytes = manager.groups[index].slot_bytes
        for source, name in enumerate(names):
            for target, target_name in enumerate(names):
                count = tiers.moved[source][target]
                if target == GPU_TIER:
                    count += manager.counters.copied[index, source]
                if count:
                    found.append(Transfers(index, name, target_name, count, count * slot_bytes))
    return found
