"""What became of the requests of a replay: every token that did not hit has a cause, and the sums."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ssmcache import KVCacheManager, KVCacheManagerConfig, ReuseMatch
from ssmcache.memory.bandwidths import BandwidthProfile
from ssmcache_sim.causes import SNAPSHOT_CAUSES, last_block_tokens, lost_to_size, snapshot_columns
from ssmcache_sim.ceilings import Ceilings
from ssmcache_sim.fates import BoundaryFates, SnapshotLosses
from ssmcache_sim.phase import PhaseCeilings
from ssmcache_sim.replay_tiers import TierTokens, moved_slots, peak, tier_totals, tokens_by_tier
from ssmcache_sim.totals import ReplayTotals, SnapshotCounts
from ssmcache_sim.trace import BoolArray, Int64Array, Trace


@dataclass(frozen=True, slots=True, eq=False)
class ReplayResult:
    """What became of each request, [num_requests] tokens of its prompt unless said otherwise, and the totals.

    For each request: usable + lost_evicted + lost_alignment + lost_snapshot = kv_ceiling, and kv_ceiling + never_seen +
    last_block = its prompt tokens: see `causes.py`. Hits count full blocks.

    Attributes:
        trace: as replayed, in blocks of the manager.
        tree, attention, usable: hits by prefix known, by KV present, and tokens that were really skipped. Without
            attention layers no KV can be missing, and `attention` is the ceiling.
        kv_ceiling, ceiling: hits with unlimited memory, for attention alone and at the interval.
        lost_evicted: KV that unlimited memory would have had.
        lost_to_size: the part of `lost_evicted` that requests too large for the memory have cost.
        lost_alignment: KV present beyond the last multiple of the interval.
        lost_snapshot: the rest: KV present, but no snapshot at a usable position.
        lost_snapshot_by: [num_causes, num_requests] of `lost_snapshot`, by `SNAPSHOT_CAUSES`.
        never_seen: in blocks that no earlier path began with.
        last_block: tokens that no cache skips.
        too_large: [num_requests] bool, did not fit into the memory even alone, with its output where the trace has
            outputs: served without the cache, no hits.
        used_bytes: [num_layer_groups, num_requests] GPU memory in use after each request.
        usable_by_tier: [num_tiers, num_requests] of `usable`, by the tier where the pages lay when the request came
            (without attention layers: where the state lay).
        phase: the ceilings of the same prompts, shifted against blocks and interval.
    """

    trace: Trace
    tree: Int64Array
    attention: Int64Array
    usable: Int64Array
    kv_ceiling: Int64Array
    ceiling: Int64Array
    lost_evicted: Int64Array
    lost_alignment: Int64Array
    lost_snapshot: Int64Array
    lost_to_size: Int64Array
    lost_snapshot_by: SnapshotLosses
    never_seen: Int64Array
    last_block: Int64Array
    too_large: BoolArray
    used_bytes: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    usable_by_tier: TierTokens
    phase: PhaseCeilings
    totals: ReplayTotals

    def __repr__(self) -> str:
        return f"ReplayResult({self.trace.label}, blocks of {self.trace.tokens_per_block:,} tokens: {self.totals!r})"


class Served(NamedTuple):
    """What became of the requests: by request what was found, and on which tiers (empty with the GPU alone, or where
    nothing was); by layer group the GPU slots in use after each request.
    """

    matches: list[ReuseMatch]
    by_tier: list[tuple[int, ...]]
    used_slots: list[list[int]]


def account(
    trace: Trace,
    config: KVCacheManagerConfig,
    ceilings: Ceilings,
    phase: PhaseCeilings,
    served: Served,
    too_large: BoolArray,
    manager: KVCacheManager,
    bandwidths: BandwidthProfile,
    observer: BoundaryFates | None,
) -> ReplayResult:
    """Splits every token below the KV ceiling into hit and lost, and sums up."""
    block = trace.tokens_per_block
    # a match may end inside a block whose last token must be computed; the figures count full blocks
    tree, attention, usable = (np.array(served.matches, dtype=np.int64) // block * block).T.copy()
    if not config.has_attention:
        attention = ceilings.kv_tokens  # without attention layers no KV can be missing
    interval = config.ssm_reuse_interval if config.has_ssm else 1
    aligned = attention // interval * interval
    lost_evicted = ceilings.kv_tokens - attention
    lost_alignment = attention - aligned
    lost_snapshot = aligned - usable
    for lost in (lost_evicted, lost_alignment, lost_snapshot):
        assert (lost >= 0).all(), f"request {int(np.argmin(lost))} hits more than it can: {int(lost.min())}"
    assert (usable + lost_evicted + lost_alignment + lost_snapshot == ceilings.kv_tokens).all()
    too_large_lost = lost_to_size(trace, too_large, attention, ceilings.kv_tokens)
    lost_snapshot_by: SnapshotLosses = np.zeros((len(SNAPSHOT_CAUSES), trace.num_requests), dtype=np.int64)
    if observer is not None and config.has_ssm:
        lost_snapshot_by = observer.losses(lost_snapshot)
    last_block = last_block_tokens(trace, block)
    never_seen = trace.prompt_tokens - last_block - ceilings.kv_tokens
    num_tiers = len(config.cache_tiers)
    by_tier = usable[np.newaxis] if num_tiers == 1 else tokens_by_tier(served.by_tier, num_tiers, usable)
    groups = manager.memory_usage().groups
    slot_bytes = np.array([group.slot_bytes for group in groups], dtype=np.int64)
    totals = ReplayTotals(
        requests=trace.num_requests,
        too_large_requests=int(too_large.sum()),
        prompt_tokens=int(trace.prompt_tokens.sum()),
        tree_hit_tokens=int(tree.sum()),
        attention_hit_tokens=int(attention.sum()),
        usable_hit_tokens=int(usable.sum()),
        kv_ceiling_hit_tokens=int(ceilings.kv_tokens.sum()),
        ceiling_hit_tokens=int(ceilings.tokens.sum()),
        lost_evicted_tokens=int(lost_evicted.sum()),
        lost_alignment_tokens=int(lost_alignment.sum()),
        lost_snapshot_tokens=int(lost_snapshot.sum()),
        lost_evicted_too_large_tokens=int(too_large_lost.sum()),
        **snapshot_columns(lost_snapshot_by.sum(axis=1).tolist()),
        never_seen_tokens=int(never_seen.sum()),
        last_block_tokens=int(last_block.sum()),
        snapshots=_snapshot_counts(manager),
        peaks=tuple(map(peak, groups)),
        tiers=tier_totals(manager, by_tier),
        moved=moved_slots(manager, config, bandwidths),
    )
    return ReplayResult(
        trace=trace,
        tree=tree,
        attention=attention,
        usable=usable,
        kv_ceiling=ceilings.kv_tokens,
        ceiling=ceilings.tokens,
        lost_evicted=lost_evicted,
        lost_alignment=lost_alignment,
        lost_snapshot=lost_snapshot,
        lost_to_size=too_large_lost,
        lost_snapshot_by=lost_snapshot_by,
        never_seen=never_seen,
        last_block=last_block,
        too_large=too_large,
        used_bytes=np.array(served.used_slots, dtype=np.int64) * slot_bytes[:, np.newaxis],
        usable_by_tier=by_tier,
        phase=phase,
        totals=totals,
    )


def _snapshot_counts(manager: KVCacheManager) -> SnapshotCounts:
    stats = manager.stats()
    return SnapshotCounts(
        taken=stats.snapshots_taken,
        reused=stats.snapshots_reused,
        evicted=stats.snapshots_evicted,
        evicted_unused=stats.snapshots_evicted_unused,
        skipped_crossed=stats.snapshots_skipped_crossed,
        skipped_no_room=stats.snapshots_skipped_no_room,
        skipped_not_admitted=stats.snapshots_skipped_not_admitted,
        skipped_history=stats.snapshots_skipped_history,
    )
