"""Looks at everything that a cache holds, before and after each request: what came and went, without being told."""

from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import strategies as st

from ssmcache import (
    AttentionLayerConfig,
    BatchDesc,
    BufferConfig,
    GpuCacheTierConfig,
    KVCacheDesc,
    KVCacheManager,
    KVCacheManagerConfig,
    SimulatedMemory,
    SsmLayerConfig,
)
from ssmcache_sim.accounting import ReplayResult
from ssmcache_sim.causes import SNAPSHOT_CAUSES
from ssmcache_sim.settings import Prefill
from ssmcache_sim.trace import Trace

stretches = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 10)), min_size=1, max_size=3)
branching_prompts = st.lists(
    stretches.map(lambda parts: [token for token, length in parts for _ in range(length)]), min_size=1, max_size=25
)
_REASONS = ("crossed", "no_room", "history")


def windowed(num_windows: int, num_states: int) -> KVCacheManagerConfig:
    """Blocks of 2 and an interval of 4: plenty of pages of full attention, some of a window of 3 tokens, and states."""
    layers = (
        AttentionLayerConfig(0, (BufferConfig("key", 1),)),
        AttentionLayerConfig(1, (BufferConfig("key", 64),), sliding_window_size=3),
        SsmLayerConfig(2, (BufferConfig("ssm_state", 64),)),
    )
    quota = 64 * (num_windows + num_states) + 64
    return KVCacheManagerConfig(2, layers, (GpuCacheTierConfig(quota),), 4, ssm_fraction=64 * num_states / quota)


def scarce_windowed(page_bytes: int, quota: int) -> KVCacheManagerConfig:
    """The same layers with pages of so many bytes, few slots of each kind."""
    config = windowed(1, 1)
    pages = AttentionLayerConfig(0, (BufferConfig("key", page_bytes),))
    step = BatchDesc((KVCacheDesc(capacity=20),))
    tiers = (GpuCacheTierConfig(quota),)
    return replace(config, layers=(pages, *config.layers[1:]), cache_tiers=tiers, ssm_fraction=0.4, typical_step=step)


@dataclass(slots=True)
class Seen:
    """By key of a block: during which request its page went; what happened last to its snapshot, and when; when one was
    taken last; the last served request that had it.
    """

    kv_gone: dict[int, int] = field(default_factory=dict)
    fate: dict[int, str] = field(default_factory=dict)
    ended: dict[int, int] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    used_by: dict[int, int] = field(default_factory=dict)

    def copy(self) -> "Seen":
        return Seen(*(dict(getattr(self, name)) for name in self.__slots__))


def watched(trace: Trace, config: KVCacheManagerConfig, prefill: Prefill, result: ReplayResult) -> list[Seen]:
    """What was to be known just before each request."""
    manager = KVCacheManager(config, SimulatedMemory())
    interval = config.ssm_reuse_interval
    factor = interval // config.tokens_per_block
    seen, history = Seen(), []
    for request, prompt in enumerate(trace.prompts()):
        history.append(seen.copy())
        if result.too_large[request]:
            continue
        before, pages, skips = _snapshots_in(manager), _pages_in(manager), _skips_of(manager)
        kv = manager.create_kv_cache(prompt[:-1])
        assert kv.resume()
        assert kv.resize(prompt.stop + 1)
        wanted = kv.snapshot_points(prompt.stop)
        if not config.has_ssm:
            pass
        elif prefill == "reserved":
            kv.reserve_snapshots(kv.snapshot_points(prompt.stop))
        else:
            for point in kv.snapshot_points(prompt.stop):
                kv.commit(prompt[kv.num_committed_tokens : point])
        kept = before & _snapshots_in(manager)  # what goes until here may be taken anew
        kv.commit(prompt[kv.num_committed_tokens :])
        kv.close()
        path = prompt.keys.tolist()
        after, pages_after = _snapshots_in(manager), _pages_in(manager)
        seen.kv_gone.update(dict.fromkeys(pages - pages_after, request))
        for key in pages_after:
            seen.kv_gone.pop(key, None)
        seen.fate.update(dict.fromkeys(before - after, "evicted"))
        seen.ended.update(dict.fromkeys(before - after, request))
        seen.fate.update(dict.fromkeys(after, "window"))
        seen.taken.update(dict.fromkeys(after - kept, request))
        seen.used_by.update(dict.fromkeys(path, request))
        reasons = [reason for reason, count in _skips_of(manager).items() if count > skips[reason]]
        for index, key in enumerate(path[factor - 1 :: factor], 1):
            if key not in after and index * interval in wanted:
                (seen.fate[key],) = reasons
                seen.ended[key] = request
    return history


def expected_causes(trace: Trace, config: KVCacheManagerConfig, prefill: Prefill, result: ReplayResult) -> np.ndarray:
    """[num_causes, num_requests] tokens without a usable snapshot."""
    interval = config.ssm_reuse_interval
    factor = interval // config.tokens_per_block
    lost = np.zeros((len(SNAPSHOT_CAUSES), trace.num_requests), dtype=np.int64)
    for request, seen in enumerate(watched(trace, config, prefill, result)):
        ends = trace.prompt(request).keys[factor - 1 :: factor].tolist()
        first, last = (int(tokens[request]) // interval for tokens in (result.usable, result.attention))
        for key in ends[first:last]:
            lost[SNAPSHOT_CAUSES.index(seen.fate.get(key, "not_admitted")), request] += interval
    return lost


def _snapshots_in(manager: KVCacheManager) -> set[int]:
    """Keys of the blocks that have a snapshot, in any tier."""
    return {
        int(run.keys[ordinal - run.start])
        for run in manager.store.all_runs()
        for segment in run.items
        if segment.store is manager.store.snapshots
        for ordinal in segment.ordinals
    }


def _pages_in(manager: KVCacheManager) -> set[int]:
    """Keys of the blocks that have a page of full attention."""
    return {int(key) for run in manager.store.all_runs() if run.pages is not None for key in run.keys}


def _skips_of(manager: KVCacheManager) -> dict[str, int]:
    stats = manager.stats()
    return {reason: getattr(stats, f"snapshots_skipped_{reason}") for reason in _REASONS}
