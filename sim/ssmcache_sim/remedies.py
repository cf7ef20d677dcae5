"""Which other setting would have kept what a request lost: by the distances of the one-pass grid, so exactly or not at
all.

Memory: a boundary with the KV distance K and the snapshot distance S is usable in all pools that hold K blocks and S
snapshots beside what a request takes for itself, so the least memory is found by trying how a memory is divided. Other
intervals and block sizes are tried at the same memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ssmcache.config import GpuCacheTierConfig, KVCacheManagerConfig
from ssmcache.models import ModelSpec
from ssmcache_sim.errors import SettingsError
from ssmcache_sim.grid import StackDistances, stack_distances
from ssmcache_sim.grid_cells import GridCapacity, grid_capacity
from ssmcache_sim.hit_depth import hit_depths
from ssmcache_sim.settings import ReplaySettings, build_config
from ssmcache_sim.trace import Int64Array, Trace

_MOST_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Remedy:
    """A setting with which a request would have skipped more, all others as they are.

    Attributes:
        setting: `gpu_memory_bytes`, `ssm_reuse_interval` or `tokens_per_block`.
        value: of the setting. Of memory: the least with which the grid can tell.
        usable_tokens: what the request would have skipped.
        is_least: nothing below `value` would do; else less may do, but is not enough for the largest request, so that
            what the cache holds then is another matter. True for memory alone.
    """

    setting: str
    value: int
    usable_tokens: int
    is_least: bool


def variants_of(model: ModelSpec, settings: ReplaySettings, trace: Trace) -> list[KVCacheManagerConfig]:
    """Configs with another interval (the block times powers of two, up to the longest prompt), or with a smaller block
    that the trace records.
    """
    block, interval = settings.tokens_per_block, settings.ssm_reuse_interval
    tried: list[ReplaySettings] = []
    if interval is not None:
        longest = int(trace.prompt_tokens.max())
        doubled = (block << power for power in range(longest.bit_length()))
        tried += [replace(settings, ssm_reuse_interval=size) for size in doubled if size <= longest]
    smaller = (trace.tokens_per_block << power for power in range(block.bit_length()))
    tried += [replace(settings, tokens_per_block=size) for size in smaller if size < block]
    configs = []
    for variant in tried:
        try:
            configs.append(build_config(model, variant))
        except SettingsError:
            continue
    return configs


class Remedies:
    """Finds remedies for requests of one trace.

    Args:
        trace: as recorded.
        config: as replayed, and `variants` with another interval or block.

    Attributes:
        why_not: why the memory that would do cannot be told; empty where it can.

    Cost: one pass over the trace, and O(segments) for each variant.
    """

    def __init__(self, trace: Trace, config: KVCacheManagerConfig, variants: Sequence[KVCacheManagerConfig]) -> None:
        self._trace, self._config = trace, config
        self._alone = replace(config, cache_tiers=(GpuCacheTierConfig(None),))
        unlimited = grid_capacity(trace, self._alone)
        self.why_not = unlimited if isinstance(unlimited, str) else ""
        told = [] if self.why_not else [one for one in variants if _trace_has(trace, one)]
        capacities = [(one, grid_capacity(trace, one)) for one in told]
        usable = [(one, capacity) for one, capacity in capacities if isinstance(capacity, GridCapacity)]
        sizes = {config.tokens_per_block} | {one.tokens_per_block for one, _ in usable}
        sizes |= {one.ssm_reuse_interval for one in (config, *told) if one.has_ssm}
        self._distances = None if self.why_not else stack_distances(trace, sizes)
        self._usable = [(one, self._usable_tokens(one, capacity)) for one, capacity in usable]
        own = grid_capacity(trace, config) if not self.why_not else self.why_not
        self.capacity = None if isinstance(own, str) else own
        self._told_from: int | None = None  # the least memory that the grid can tell of

    def of(self, request: int, usable_tokens: int, ceiling_tokens: int) -> tuple[Remedy, ...]:
        """What would have made a request skip more than it did: the memory that would keep all up to its ceiling, the
        best other interval and the best smaller block at the memory given.
        """
        if self._distances is None:
            return ()
        remedies = []
        if usable_tokens < ceiling_tokens and self._config.cache_tiers[0].quota is not None:
            remedies.append(self._memory(request, ceiling_tokens))
        for setting in ("ssm_reuse_interval", "tokens_per_block"):
            tried = [
                Remedy(setting, getattr(one, setting), int(usable[request]), is_least=False)
                for one, usable in self._usable
                if getattr(one, setting) != getattr(self._config, setting) and self._is_alike(one, setting)
            ]
            # of equal ones the largest: fewer snapshots, fewer blocks
            best = max(tried, key=lambda remedy: (remedy.usable_tokens, remedy.value), default=None)
            if best is not None and best.usable_tokens > usable_tokens:
                remedies.append(best)
        return tuple(remedies)

    def distance(self, request: int, end_token: int, size: int) -> int | None:
        """Blocks (or snapshots) of `size` tokens that were used later than the one that ends there, itself included;
        None where nobody had it before, or the grid cannot tell.
        """
        distances = self._distances
        if distances is None or self.capacity is None:
            return None
        return _distance(distances, request, end_token, size)

    def _is_alike(self, one: KVCacheManagerConfig, but_for: str) -> bool:
        names = {"ssm_reuse_interval", "tokens_per_block"} - {but_for}
        return all(getattr(one, name) == getattr(self._config, name) for name in names)

    def _usable_tokens(self, config: KVCacheManagerConfig, capacity: GridCapacity) -> Int64Array:
        """[num_requests] usable hits of a config."""
        assert self._distances is not None
        interval = config.ssm_reuse_interval if config.has_ssm else None
        usable = np.zeros(self._trace.num_requests, dtype=np.int64)
        found = self._distances.request[self._distances.start == 0]
        usable[found] = hit_depths(self._distances, config.tokens_per_block, interval, capacity).hit_tokens
        return usable

    def _memory(self, request: int, target_tokens: int) -> Remedy:
        """The least memory of the GPU, alone, with which the request skips so many tokens."""
        assert self._distances is not None
        config = self._config
        blocks = _distance(self._distances, request, target_tokens, config.tokens_per_block)
        snapshots = 0
        if config.has_ssm:
            found = _distance(self._distances, request, target_tokens, config.ssm_reuse_interval)
            assert found is not None
            snapshots = found
        assert blocks is not None
        needed = _Needed(blocks, snapshots)
        value = _least(lambda num_bytes: self._holds(num_bytes, needed))
        # the grid speaks of memory that holds the largest request; below that another order may keep it, too
        if self._told_from is None:
            self._told_from = _least(lambda num_bytes: self._holds(num_bytes, _NOTHING))
        return Remedy("gpu_memory_bytes", value, target_tokens, is_least=value > self._told_from)

    def _holds(self, num_bytes: int, needed: "_Needed") -> bool:
        try:
            capacity = grid_capacity(self._trace, replace(self._alone, cache_tiers=(GpuCacheTierConfig(num_bytes),)))
        except ValueError:  # not one slot of each kind
            return False
        if isinstance(capacity, str):
            return False
        return capacity.blocks >= needed.blocks and (capacity.snapshots or 0) >= needed.snapshots


@dataclass(frozen=True, slots=True)
class _Needed:
    blocks: int
    snapshots: int


_NOTHING = _Needed(0, 0)


def _least(does: Callable[[int], bool]) -> int:
    """The least number of bytes that does, where all more do, too."""
    too_few, enough = 0, 1
    while not does(enough):
        assert enough < _MOST_BYTES
        too_few, enough = enough, enough * 2
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if does(middle):
            enough = middle
        else:
            too_few = middle
    return enough


def _trace_has(trace: Trace, config: KVCacheManagerConfig) -> bool:
    return config.tokens_per_block % trace.tokens_per_block == 0


def _distance(distances: StackDistances, request: int, end_token: int, size: int) -> int | None:
    end = end_token // distances.tokens_per_block
    first, last = np.searchsorted(distances.request, [request, request + 1])
    segment = int(first + np.searchsorted(distances.start[first:last], end - 1, side="right")) - 1
    if segment < first or end > distances.end[segment]:
        return None
    factor = size // distances.tokens_per_block
    later = int(distances.later_of(size)[segment])
    return later + end // factor - int(distances.start[segment]) // factor
