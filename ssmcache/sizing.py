"""How many slots each layer group has in each tier, and how that changes while a manager runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ssmcache.compaction import compact
from ssmcache.config import (
    BatchDesc,
    CacheTierConfig,
    DiskCacheTierConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    KVCacheDesc,
    KVCacheManagerConfig,
)
from ssmcache.layout import DEFAULT_STEP, LayerGroup, LayerGroupKind, split_tier
from ssmcache.memory.base import GPU_TIER, Memory, TransferError
from ssmcache.pools import UNLIMITED_SLOTS, PagePool, StatePool, is_unlimited
from ssmcache.tiers import Tiers

if TYPE_CHECKING:
    from ssmcache.manager import KVCacheManager
    from ssmcache.sequence import KVCache

AnyPool = PagePool | StatePool

# beside its capacity a tier below the GPU has so many bytes for each layer group, in use while a batch of moves is
# under way: enough for a copy to run at full speed, little beside any host memory
_STAGING_BYTES = 64 << 20
_TOLERATED_RATIO = 1.25


def kind_of(tier: CacheTierConfig) -> int:
    """0 for the GPU, 1 for host memory, 2 for disk."""
    return (GpuCacheTierConfig, HostCacheTierConfig, DiskCacheTierConfig).index(type(tier))


def _staging_slots(group: LayerGroup, tier: int, capacity: int) -> int:
    return 0 if tier == GPU_TIER else max(1, min(capacity, _STAGING_BYTES // group.slot_bytes))


def make_pools(
    groups: Sequence[LayerGroup], config: KVCacheManagerConfig, memory: Memory
) -> tuple[tuple[AnyPool, ...], ...]:
    """The pools of each layer group, by tier, reserved in the memory.

    Errors: ValueError when a quota is too small, or the memory does not have it.
    """
    memory.open(config.cache_tiers, [group.slot_bytes for group in groups])
    by_tier: list[list[AnyPool]] = []
    for tier, tier_config in enumerate(config.cache_tiers):
        step = config.typical_step or DEFAULT_STEP
        slots = split_tier(groups, config, tier, tier_config.quota, step, memory.grain(tier))
        pools: list[AnyPool] = []
        for group, capacity in zip(groups, slots, strict=True):
            kind = PagePool if group.kind is LayerGroupKind.ATTENTION else StatePool
            pools.append(kind(capacity, _staging_slots(group, tier, capacity)))
        by_tier.append(pools)
        if not memory.resize(tier, _physical(pools)):
            memory.close()
            raise ValueError(f"tier {tier}: expected a memory with room for {tier_config.quota} bytes, got too little")
    return tuple(zip(*by_tier, strict=True))


def _physical(pools: Iterable[AnyPool]) -> list[int | None]:
    return [None if is_unlimited(pool) else pool.capacity + pool.staging for pool in pools]


def max_capacity(manager: KVCacheManager) -> int | None:
    """See `KVCacheManager.max_capacity`."""
    limits = [
        tiers.pools[GPU_TIER].capacity for tiers in manager.store.all_tiers() if tiers is not manager.store.snapshots
    ]
    least = min(limits, default=UNLIMITED_SLOTS)
    return None if least == UNLIMITED_SLOTS else least * manager.tokens_per_block


def held_by_others(tiers: Tiers[Any, Any], sequence: KVCache) -> int:
    """GPU slots that others than `sequence` lock, or hold where they cannot be evicted."""
    held, own = tiers.num_held(GPU_TIER), _gpu_slots_of(tiers, sequence)
    movable = 0
    if held and tiers.last_tier > GPU_TIER:  # what is held is idle, and so is the asking sequence
        movable = min(max(0, held - own), tiers.obtainable(GPU_TIER + 1))
    return tiers.pools[GPU_TIER].used - tiers.num_droppable(GPU_TIER) - own - movable


def _gpu_slots_of(tiers: Tiers[Any, Any], sequence: KVCache) -> int:
    """GPU slots that a suspended sequence alone holds; none before its first resume."""
    if not sequence.locked:
        return 0
    store, parked = sequence.store, sequence.parked
    if tiers is store.pages:
        runs = (run for run in sequence.cursor.path() if run.holds == 1 and run.pages is not None)
        shared = sum(run.end - run.start for run in runs if run.pages is not None and run.pages.tier == GPU_TIER)
        return shared + sequence.num_own_pages + (0 if parked is None else parked.num_gpu_pages())
    count = 0 if parked is None else parked.num_gpu_slots(tiers)
    if tiers is store.snapshots:
        return count + (sequence.states is not None and sequence.states.live_slot >= 0)
    for window in sequence.windows:
        if window.store is tiers:
            pins = window.pins.values()
            count += len(window.own) + sum(pin.tier == GPU_TIER and pin.locked + pin.held == 1 for pin in pins)
    return count


def step_of(traffic: Collection[tuple[int, int]]) -> BatchDesc | None:
    """The mean of the sequences closed lately, as a batch; None before any had room."""
    capacity = sum(capacity for capacity, _ in traffic)
    if capacity < len(traffic) or not traffic:
        return None
    history = sum(history for _, history in traffic) // len(traffic)
    return BatchDesc((KVCacheDesc(capacity // len(traffic), min(history, capacity // len(traffic))),))


def need_adjustment(manager: KVCacheManager) -> bool:
    """See `KVCacheManager.need_adjustment`."""
    wanted = _wanted_slots(manager, GPU_TIER, manager.quotas[GPU_TIER])
    if wanted is None:
        return False
    present = [pools[GPU_TIER].capacity for pools in manager.pools]
    ratios = [new / old for new, old in zip(wanted, present, strict=True)]
    return max(ratios) > _TOLERATED_RATIO or min(ratios) < 1 / _TOLERATED_RATIO


def _wanted_slots(manager: KVCacheManager, tier: int, quota: int | None) -> tuple[int, ...] | None:
    """The split that the traffic wants; None without a quota or without traffic."""
    step = step_of(manager.traffic)
    if step is None or quota is None:
        return None
    return split_tier(manager.groups, manager.config, tier, quota, step, manager.memory.grain(tier))


def resplit(manager: KVCacheManager, tiers: Iterable[int], quotas: Sequence[int | None]) -> bool:
    """Give some tiers new quotas and splits: by the traffic, or by the settings before there is any.

    Shrinks first, so that no more memory is in use than there was; False, and nothing changed, if what is held does not
    fit, or the memory cannot grow. Errors: ValueError for quotas that are too small.
    """
    new: dict[int, tuple[int, ...]] = {}
    for tier in tiers:
        quota = quotas[tier]
        slots = _wanted_slots(manager, tier, quota)
        if slots is None:
            step = manager.config.typical_step or DEFAULT_STEP
            slots = split_tier(manager.groups, manager.config, tier, quota, step, manager.memory.grain(tier))
        new[tier] = slots
    old = {tier: tuple(pools[tier].capacity for pools in manager.pools) for tier in new}
    groups = manager.store.all_tiers()
    _set_capacities(manager, {tier: tuple(map(min, new[tier], old[tier])) for tier in new})
    fits = all(group.obtainable(tier) >= 0 for group in groups for tier in range(group.last_tier + 1))
    manager.streams.acquire(None)
    try:
        if fits:
            for group in groups:
                for tier in range(group.last_tier + 1):
                    group.bring([], tier, 0, None)
            compact(manager, new)
    except TransferError:
        fits = False
    finally:
        manager.streams.release(None)
    if not fits or not _resize_memory(manager, new, old):
        _set_capacities(manager, old)
        return False
    _set_capacities(manager, new)
    manager.quotas = list(quotas)
    return True


def _set_capacities(manager: KVCacheManager, capacities: dict[int, tuple[int, ...]]) -> None:
    for tier, counts in capacities.items():
        for group, pools, capacity in zip(manager.groups, manager.pools, counts, strict=True):
            pools[tier].capacity = capacity
            pools[tier].staging = _staging_slots(group, tier, capacity)


def _resize_memory(manager: KVCacheManager, new: dict[int, tuple[int, ...]], old: dict[int, tuple[int, ...]]) -> bool:
    """Resize the pools of some tiers, all or none."""
    done: list[int] = []
    for tier, slots in new.items():
        if not manager.memory.resize(tier, _with_staging(manager, tier, slots)):
            for other in done:
                manager.memory.resize(other, _with_staging(manager, other, old[other]))
            return False
        done.append(tier)
    return True


def _with_staging(manager: KVCacheManager, tier: int, slots: Sequence[int]) -> list[int]:
    return [count + _staging_slots(group, tier, count) for group, count in zip(manager.groups, slots, strict=True)]
