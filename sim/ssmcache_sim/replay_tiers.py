"""What the tiers below the GPU did in a replay, and whether they can do anything at all."""

from collections.abc import Sequence

import numpy as np

from ssmcache import KVCacheManager, KVCacheManagerConfig, LayerGroupUsage
from ssmcache.layout import layer_groups
from ssmcache.memory.bandwidths import BandwidthProfile
from ssmcache_sim.errors import MemoryTooSmallError
from ssmcache_sim.sizes import format_size
from ssmcache_sim.totals import LayerGroupPeak, MovedSlots, TierTotals
from ssmcache_sim.trace import Int64Array

TierTokens = np.ndarray[tuple[int, int], np.dtype[np.int64]]


def check_lower_tiers(config: KVCacheManagerConfig) -> None:
    """Errors: MemoryTooSmallError where a tier below the GPU has no room for a slot of each layer group."""
    slot_bytes = [group.slot_bytes for group in layer_groups(config)]
    for name, tier in zip(config.tier_names[1:], config.cache_tiers[1:], strict=True):
        assert tier.quota is not None, "only the GPU is unlimited"
        if tier.quota < sum(slot_bytes):
            raise MemoryTooSmallError(
                f"{name} memory too small: expected at least {sum(slot_bytes)} bytes ({format_size(sum(slot_bytes))}) "
                f"for one slot of each layer group, got {tier.quota} bytes ({format_size(tier.quota)})"
            )


def tokens_by_tier(found: Sequence[tuple[int, ...]], num_tiers: int, usable: Int64Array) -> TierTokens:
    """Usable tokens by tier, [num_tiers, num_requests].

    Args:
        found: by request, tokens by tier as the manager tells them; empty for none.
        usable: [num_requests] of all tiers, which a trace's ready keys match in full blocks only.
    """
    none = (0,) * num_tiers
    by_tier = np.array([tokens or none for tokens in found], dtype=np.int64).T.copy()
    assert (by_tier.sum(axis=0) == usable).all(), "hits by tier that are not the hits"
    return by_tier


def tier_totals(manager: KVCacheManager, by_tier: TierTokens) -> tuple[TierTotals, ...]:
    """Hits and peaks of each tier; empty with the GPU alone."""
    tiers = manager.memory_usage().tiers
    if len(tiers) == 1:
        return ()
    return tuple(
        TierTotals(groups[0].tier, int(tokens.sum()), tuple(map(peak, groups)))
        for groups, tokens in zip(tiers, by_tier, strict=True)
    )


def peak(group: LayerGroupUsage) -> LayerGroupPeak:
    """The most that a layer group used of its pool in one tier."""
    num_bytes = None if group.num_slots is None else group.num_slots * group.slot_bytes
    return LayerGroupPeak(group.layer_group, group.kind, group.peak_slots * group.slot_bytes, num_bytes)


def moved_slots(
    manager: KVCacheManager, config: KVCacheManagerConfig, bandwidths: BandwidthProfile
) -> tuple[MovedSlots, ...]:
    """What was moved between tiers, and copied within the GPU; empty with the GPU alone."""
    if len(manager.tier_names) == 1:
        return ()
    tiers = dict(zip(config.tier_names, config.cache_tiers, strict=True))
    return tuple(
        MovedSlots(
            layer_group=each.layer_group,
            kind=manager.groups[each.layer_group].kind.value,
            source_tier=each.source_tier,
            tier=each.tier,
            num_slots=each.num_slots,
            num_bytes=each.num_bytes,
            seconds=each.num_bytes / bandwidths.between(tiers[each.source_tier], tiers[each.tier]),
        )
        for each in manager.stats().transfers
    )
