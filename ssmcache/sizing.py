"""How many slots each pool has in each tier, and how that changes while a manager runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ssmcache.compaction import compact
from ssmcache.config import (
    BatchDesc,
    KVCacheDesc,
    KVCacheManagerConfig,
)
from ssmcache.layout import DEFAULT_STEP, LayerGroup, LayerGroupKind, pool_members, split_tier
from ssmcache.memory.base import GPU_TIER, Memory, TransferError
from ssmcache.pool_groups import PoolGroup
from ssmcache.pools import UNLIMITED_SLOTS, AnyPool, PagePool, StatePool, is_unlimited
from ssmcache.tiers import Tiers

if TYPE_CHECKING:
    from ssmcache.manager import KVCacheManager
    from ssmcache.sequence import KVCache

# beside its capacity a tier below the GPU has so many bytes for each pool, in use while a batch of moves is
# under way: enough for a copy to run at full speed, little beside any host memory
_STAGING_BYTES = 64 << 20
_TOLERATED_RATIO = 1.25


def _staging_slots(slot_bytes: int, tier: int, capacity: int) -> int:
    return 0 if tier == GPU_TIER else max(1, min(capacity, _STAGING_BYTES // slot_bytes))


def make_pools(
    groups: Sequence[LayerGroup], config: KVCacheManagerConfig, memory: Memory
) -> tuple[tuple[AnyPool, ...], ...]:
    """The pools, by tier, that layer groups have or share, reserved in the memory.

    Errors: ValueError when a quota is too small, or the memory does not have it; the memory is closed then.
    """
    memory.open(config.cache_tiers, [members[0].slot_bytes for members in pool_members(groups)])
    try:
        by_tier = [_make_pools_of_tier(groups, config, memory, tier) for tier in range(len(config.cache_tiers))]
    except ValueError:
        memory.close()
        raise
    return tuple(zip(*by_tier, strict=True))


def _make_pools_of_tier(
    groups: Sequence[LayerGroup], config: KVCacheManagerConfig, memory: Memory, tier: int
) -> list[AnyPool]:
    quota = config.cache_tiers[tier].quota
    slots = split_tier(groups, config, tier, quota, config.typical_step or DEFAULT_STEP, memory.grain(tier))
    pools: list[AnyPool] = []
    for members, capacity in zip(pool_members(groups), _by_pool(groups, slots), strict=True):
        kind = PagePool if [group.kind for group in members] == [LayerGroupKind.ATTENTION] else StatePool
        pools.append(kind(capacity, _staging_slots(members[0].slot_bytes, tier, capacity)))
    if not memory.resize(tier, [None if is_unlimited(pool) else pool.capacity + pool.staging for pool in pools]):
        raise ValueError(f"tier {tier}: expected a memory with room for {quota} bytes, got too little")
    return pools


def _by_pool(groups: Sequence[LayerGroup], slots: Sequence[int]) -> list[int]:
    """Slots of each pool, of those of each layer group."""
    return list(dict(zip((group.pool for group in groups), slots, strict=True)).values())


def max_capacity(manager: KVCacheManager) -> int | None:
    """See `KVCacheManager.max_capacity`."""
    least = UNLIMITED_SLOTS
    for pool_group, members in zip(manager.store.pool_groups, pool_members(manager.groups), strict=True):
        pool, num_states = pool_group.pools[GPU_TIER], sum(group.kind is LayerGroupKind.SSM for group in members)
        num_pages = len(members) - num_states  # of each block
        if num_pages and not is_unlimited(pool):
            least = min(least, (pool.capacity - num_states) // num_pages)
    return None if least == UNLIMITED_SLOTS else least * manager.tokens_per_block


def held_by_others(group: PoolGroup, sequence: KVCache) -> int:
    """GPU slots of a pool that others than `sequence` lock, or hold where they cannot be evicted."""
    held, own = group.num_held(GPU_TIER), sum([_gpu_slots_of(tiers, sequence) for tiers in group.members])
    movable = 0
    if held and group.last_tier > GPU_TIER:  # what is held is idle, and so is the asking sequence
        movable = min(max(0, held - own), group.room_below(GPU_TIER))
    return group.pools[GPU_TIER].used - group.num_droppable(GPU_TIER) - own - movable


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
    if step_of(manager.traffic) is None:
        return False
    for tier, quota in enumerate(manager.quotas):
        wanted = _wanted_slots(manager, tier, quota)
        for new, pool_group in zip(wanted, manager.store.pool_groups, strict=True):
            old = pool_group.pools[tier].capacity
            if max(new, old) > _TOLERATED_RATIO * min(new, old):
                return True
    return False


def _wanted_slots(manager: KVCacheManager, tier: int, quota: int | None) -> list[int]:
    """The split between pools that the traffic wants; that of the settings before there is any."""
    step = step_of(manager.traffic) or manager.config.typical_step or DEFAULT_STEP
    slots = split_tier(manager.groups, manager.config, tier, quota, step, manager.memory.grain(tier))
    return _by_pool(manager.groups, slots)


class _Change:
    """The slots of one tier, by pool, before and after a change. Totals are what the memory has, with the slots
    for staging; `total` is the present one.
    """

    def __init__(self, manager: KVCacheManager, tier: int, new: Sequence[int]) -> None:
        pools = [pool_group.pools[tier] for pool_group in manager.store.pool_groups]
        self._slot_bytes = [members[0].slot_bytes for members in pool_members(manager.groups)]
        self.tier = tier
        self.pools = pools
        self.new = new
        self.old = [pool.capacity for pool in pools]
        self.total = self.old_total = [pool.capacity + pool.staging for pool in pools]
        staging = [_staging_slots(size, tier, count) for size, count in zip(self._slot_bytes, new, strict=True)]
        self.new_total = [count + more for count, more in zip(new, staging, strict=True)]

    def set_capacities(self, capacities: Sequence[int], totals: Sequence[int]) -> None:
        for pool, capacity, total in zip(self.pools, capacities, totals, strict=True):
            pool.capacity, pool.staging = capacity, total - capacity

    def shrink(self) -> None:
        """Let no more be in use than there will be room for; the memory is still as it was."""
        self.set_capacities(list(map(min, self.old, self.new)), self.old_total)

    @property
    def is_none(self) -> bool:
        return self.old == list(self.new) and self.old_total == self.new_total

    def grown_total(self) -> list[int]:
        """The old pools, grown where they will grow by as many bytes as the tier will have more: the memory has no more
        to give after that.
        """
        bytes_left = sum(
            (new - old) * slot_bytes
            for old, new, slot_bytes in zip(self.old_total, self.new_total, self._slot_bytes, strict=True)
        )
        grown = []
        for old, new, slot_bytes in zip(self.old_total, self.new_total, self._slot_bytes, strict=True):
            more = max(0, min(new - old, bytes_left // slot_bytes))
            bytes_left -= more * slot_bytes
            grown.append(old + more)
        return grown


def resplit(manager: KVCacheManager, tiers: Iterable[int], quotas: Sequence[int | None]) -> bool:
    """Give some tiers new quotas and splits: by the traffic, or by the settings before there is any.

    The memory is first asked for what it will have more, and pools grow by the rest once others have shrunk, so that no
    more is in use than before or after. False if what is held does not fit or the memory has not enough, and nothing
    has changed then; False, too, if a tier below could not be read or written, and some pages may have moved then.
    Errors: ValueError for quotas that are too small.
    """
    changes = [
        _Change(manager, tier, _wanted_slots(manager, tier, quotas[tier])) for tier in tiers if quotas[tier] is not None
    ]
    changes = [change for change in changes if not change.is_none]
    if changes and not _carry_out(manager, changes):
        return False
    manager.quotas = list(quotas)
    return True


def _carry_out(manager: KVCacheManager, changes: Sequence[_Change]) -> bool:
    memory = manager.memory
    manager.calls.changing = True
    for change in changes:
        change.shrink()
    groups = manager.store.pool_groups
    fits = all(group.obtainable(tier) >= 0 for group in groups for tier in range(group.last_tier + 1))
    if (
        fits
        and _resize_memory(memory, changes, [change.grown_total() for change in changes])
        and _make_room(manager, changes)
        and _resize_memory(memory, changes, [change.new_total for change in changes])
    ):
        for change in changes:
            change.set_capacities(change.new, change.new_total)
        return True
    if not _resize_memory(memory, changes, [change.old_total for change in changes]):
        raise RuntimeError("resize: expected the memory to give back what it had before, got too little")
    for change in changes:
        change.set_capacities(change.old, change.old_total)
    return False


def _make_room(manager: KVCacheManager, changes: Sequence[_Change]) -> bool:
    """Move and drop what no longer fits, and make the rest lie in the slots that remain; False if a copy failed."""
    stream = manager.streams.latest
    groups = manager.store.pool_groups
    try:
        for group in groups:
            for tier in range(group.last_tier + 1):
                group.bring([], tier, 0, stream)
        for change in changes:
            for group, old, new in zip(groups, change.old_total, change.new_total, strict=True):
                if new < old:
                    compact(manager, group, change.tier, new, stream)
    except TransferError:
        return False
    finally:
        manager.streams.end(stream)
    return True


def _resize_memory(memory: Memory, changes: Sequence[_Change], totals: Sequence[list[int]]) -> bool:
    """Resize the pools of some tiers, all or none."""
    before = [change.total for change in changes]
    for index, (change, total) in enumerate(zip(changes, totals, strict=True)):
        if total == change.total:
            continue
        if not memory.resize(change.tier, total):
            for other, old in zip(changes[:index], before[:index], strict=True):
                if not memory.resize(other.tier, old):
                    raise RuntimeError(
                        f"resize of tier {other.tier}: expected room for what was there before, got none"
                    )
                other.total = old
            return False
        change.total = total
    return True
