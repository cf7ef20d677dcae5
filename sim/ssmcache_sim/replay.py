"""Replays a trace through a cache manager on simulated memory, and accounts for every token that did not hit.

Each request in order of arrival: created with its prompt less the last token, resumed, resized to the prompt and one
token more, its snapshots reserved, the prompt committed; where the trace has outputs, its output decoded (`decode.py`);
closed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ssmcache import (
    BlockKeys,
    KVCache,
    KVCacheManager,
    KVCacheManagerConfig,
    ReuseMatch,
    Shortage,
    SimulatedMemory,
)
from ssmcache.events import CacheObserver
from ssmcache.memory.bandwidths import DEFAULT_BANDWIDTHS, BandwidthProfile
from ssmcache_sim.causes import SNAPSHOT_CAUSES, last_block_tokens, lost_to_size, snapshot_columns
from ssmcache_sim.ceilings import Ceilings, infinite_cache
from ssmcache_sim.decode import Decoder
from ssmcache_sim.errors import TierFailedError
from ssmcache_sim.fates import BoundaryFates, SnapshotLosses
from ssmcache_sim.memory_needed import check_memory
from ssmcache_sim.phase import PhaseCeilings, phase_ceilings
from ssmcache_sim.replay_tiers import TierTokens, moved_slots, peak, tier_totals, tokens_by_tier
from ssmcache_sim.settings import Prefill
from ssmcache_sim.totals import ReplayTotals, SnapshotCounts
from ssmcache_sim.trace import BoolArray, Int64Array, Trace

_REQUESTS_PER_PROGRESS = 256
_NO_MATCH = ReuseMatch(0, 0, 0)


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


class Runner(Protocol):
    """Who plays the model in a replay: computes where the memory has bytes, or watches what the manager does."""

    def manager(self, config: KVCacheManagerConfig, observer: CacheObserver | None) -> KVCacheManager:
        """The manager to replay with, which tells an observer of its cache. Called once, first."""

    def stream(self, request: int) -> Any:
        """The stream that a request computes on."""

    def found(self, kv: KVCache) -> None:
        """A request has looked its prompt up. `kv.id` is its number in the trace."""

    def compute(self, kv: KVCache, end: int, reserved: Mapping[int, int]) -> None:
        """The ACTIVE sequence computes the tokens up to `end`, which are committed next.

        Args:
            reserved: {position: slot} of the states to write in passing.
        """


def replay(
    trace: Trace,
    config: KVCacheManagerConfig,
    *,
    prefill: Prefill = "reserved",
    bandwidths: BandwidthProfile = DEFAULT_BANDWIDTHS,
    progress: Callable[[int], None] | None = None,
    runner: Runner | None = None,
    fates: Callable[[Trace, Int64Array], BoundaryFates] | None = None,
) -> ReplayResult:
    """Serves every request of the trace, in blocks of `config.tokens_per_block`.

    Args:
        bandwidths: what copies take on the simulated memory; no decision depends on it.
        progress: called now and then with the number of requests served.
        runner: None: the memory is simulated, and nothing is computed.
        fates: makes the observer of the manager, of the trace in its blocks and the KV ceilings; None: the least that
            the result needs.

    Errors: TraceError for blocks that the trace does not record; MemoryTooSmallError when no request fits;
    TierFailedError where a real tier cannot be read or written.
    """
    recorded, trace = trace, trace.with_block(config.tokens_per_block)
    check_memory(trace, config)
    ceilings = infinite_cache(trace, config.ssm_reuse_interval if config.has_ssm else None)
    observer = None
    if fates is not None:
        observer = fates(trace, ceilings.kv_tokens)
    elif config.has_ssm:
        observer = BoundaryFates(trace, config, ceilings.kv_tokens)
    if runner is None:
        manager = KVCacheManager(config, SimulatedMemory(bandwidths), observer)
    else:
        manager = runner.manager(config, observer)
    served = _serve_all(trace, manager, _committer(config, prefill, runner), progress, runner, observer)
    too_large = np.zeros(trace.num_requests, dtype=np.bool_)
    if manager.max_capacity is not None:
        too_large = trace.path_tokens + 1 > manager.max_capacity
    phase = phase_ceilings(recorded, config.ssm_reuse_interval if config.has_ssm else config.tokens_per_block)
    return _account(trace, config, ceilings, phase, served, too_large, manager, bandwidths, observer)


_Commit = Callable[[KVCache, BlockKeys], None]


def _committer(config: KVCacheManagerConfig, prefill: Prefill, runner: Runner | None) -> _Commit:
    """What a request does between `resize` and `close`."""
    has_ssm, compute = config.has_ssm, None if runner is None else runner.compute

    def commit(kv: KVCache, prompt: BlockKeys) -> None:
        reserved = kv.reserve_snapshots(kv.snapshot_points(prompt.stop)) if has_ssm else {}
        if compute is not None:
            compute(kv, prompt.stop, reserved)
        kv.commit(prompt[kv.num_committed_tokens :])

    def commit_chunks(kv: KVCache, prompt: BlockKeys) -> None:
        ends = list(kv.snapshot_points(prompt.stop))
        if not ends or ends[-1] < prompt.stop:
            ends.append(prompt.stop)
        for end in ends:
            if compute is not None:
                compute(kv, end, {})
            kv.commit(prompt[kv.num_committed_tokens : end])

    return commit_chunks if has_ssm and prefill == "chunked" else commit


class _Served(NamedTuple):
    """What became of the requests: by request what was found, and on which tiers (empty with the GPU alone, or where
    nothing was); by layer group the GPU slots in use after each request.
    """

    matches: list[ReuseMatch]
    by_tier: list[tuple[int, ...]]
    used_slots: list[list[int]]


def _serve_all(
    trace: Trace,
    manager: KVCacheManager,
    commit: _Commit,
    progress: Callable[[int], None] | None,
    runner: Runner | None,
    observer: BoundaryFates | None,
) -> _Served:
    served = _Served([], [], [[] for _ in manager.layer_grouping])
    matches, by_tier, used_slots = served
    recorders = [(slots.append, group) for group, slots in enumerate(used_slots)]
    capacity = manager.max_capacity
    create, used = manager.create_kv_cache, manager.used_slots
    compute = None if runner is None else runner.compute
    decoder = Decoder(trace, manager, compute) if trace.has_outputs else None
    for index, (path, num_tokens) in enumerate(zip(trace.paths(), trace.prompt_tokens.tolist(), strict=True)):
        needed = path.stop + 1
        if capacity is not None and needed > capacity:
            matches.append(_NO_MATCH)
            by_tier.append(())
        else:
            prompt = path if path.stop == num_tokens else path[:num_tokens]
            kv = create(prompt[:-1], id=index)
            stream = None
            if observer is not None:  # what it found stays as it is, since nobody else is served meanwhile
                observer.look_up(index, path.keys, kv.reuse_match)
            if runner is not None:
                runner.found(kv)
                stream = runner.stream(index)
            fits = kv.resume(stream) and kv.resize(num_tokens + 1)
            if fits:
                matches.append(kv.reuse_match)
                by_tier.append(kv.usable_tokens_by_tier)
                commit(kv, prompt)
                fits = decoder is None or decoder.decode(kv, index, path)
            if not fits:
                raise _refused(index, needed, capacity, kv.shortage)
            kv.close()
        for record, group in recorders:
            record(used(group))
        if progress is not None and index % _REQUESTS_PER_PROGRESS == 0:
            progress(index)
    if progress is not None:
        progress(trace.num_requests)
    return served


def _refused(index: int, needed: int, capacity: int | None, shortage: Shortage | None) -> Exception:
    if shortage is not None and shortage.reason in ("io", "lost"):
        return TierFailedError(
            f"request {index}: expected a {shortage.tier} tier that can be read and written, got "
            f"{'pages that cannot be read' if shortage.reason == 'lost' else 'a failed copy'}"
        )
    # one request at a time and room for it alone: the manager is wrong, not the user
    return RuntimeError(f"request {index} of {needed} tokens fits {capacity}, but: {shortage}")


def _account(
    trace: Trace,
    config: KVCacheManagerConfig,
    ceilings: Ceilings,
    phase: PhaseCeilings,
    served: _Served,
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
