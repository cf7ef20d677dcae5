"""Replays a trace through a cache manager on simulated memory, and accounts for every token that did not hit.

Each request in order of arrival: created with its prompt less the last token, resumed, resized to the prompt and one
token more, its snapshots reserved, the prompt committed; where the trace has outputs, its output decoded (`decode.py`);
closed.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

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
from ssmcache_sim.accounting import ReplayResult, Served, account
from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.decode import Decoder
from ssmcache_sim.errors import TierFailedError
from ssmcache_sim.fates import BoundaryFates
from ssmcache_sim.memory_needed import check_memory
from ssmcache_sim.phase import phase_ceilings
from ssmcache_sim.settings import Prefill
from ssmcache_sim.trace import Int64Array, Trace

_REQUESTS_PER_PROGRESS = 256
_NO_MATCH = ReuseMatch(0, 0, 0)


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
    return account(trace, config, ceilings, phase, served, too_large, manager, bandwidths, observer)


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


def _serve_all(
    trace: Trace,
    manager: KVCacheManager,
    commit: _Commit,
    progress: Callable[[int], None] | None,
    runner: Runner | None,
    observer: BoundaryFates | None,
) -> Served:
    served = Served([], [], [[] for _ in manager.layer_grouping])
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
