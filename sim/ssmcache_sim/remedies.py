"""Which other setting would have kept what a request lost: never a guess.

Memory: a boundary with the KV distance K and the snapshot distance S is usable in all pools that hold K blocks and S
snapshots beside what a request takes for itself, so the least memory is found by trying how a memory is divided. Other
intervals and block sizes are tried at the same memory, all of them by the distances of one pass. Where the grid is not
exact, a few neighbours are replayed instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ssmcache.config import GpuCacheTierConfig, KVCacheManagerConfig
from ssmcache.models import ModelSpec
from ssmcache_sim.errors import MemoryTooSmallError, SettingsError
from ssmcache_sim.grid import StackDistances, stack_distances
from ssmcache_sim.grid_cells import GridCapacity, grid_capacity
from ssmcache_sim.hit_depth import hit_depths
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import Prefill, ReplaySettings, build_config
from ssmcache_sim.trace import Int64Array, Trace

_MOST_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Remedy:
    """A setting with which a request would have skipped more, all others as they are.

    Attributes:
        setting: `gpu_memory_bytes`, `ssm_reuse_interval` or `tokens_per_block`.
        value: of the setting. Memory by the grid is that of the GPU alone, without other tiers, and all above it do as
            well.
        usable_tokens: what the request would have skipped.
        engine: who says so: `grid` or `replay`.
        is_least: of memory: nothing below `value` would do. Else less may do, but the grid speaks only of memory that
            holds the largest request, and a replay only of what was replayed.
    """

    setting: str
    value: int
    usable_tokens: int
    engine: str
    is_least: bool = False


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
        config: as replayed, and `variants` with another interval or block; `prefill` for replays.

    Attributes:
        why_replayed: why the least memory that would do cannot be told; empty where it can.
        capacity: what the config holds, where the grid is exact for it.

    Cost: one pass over the trace, and O(segments) for each variant; and up to six replays where the grid is not exact.
    """

    def __init__(
        self,
        trace: Trace,
        config: KVCacheManagerConfig,
        variants: Sequence[KVCacheManagerConfig],
        prefill: Prefill,
    ) -> None:
        self._trace, self._config, self._prefill = trace, config, prefill
        self._variants = [one for one in variants if one.tokens_per_block % trace.tokens_per_block == 0]
        self._alone = replace(config, cache_tiers=(GpuCacheTierConfig(None),))
        unlimited = grid_capacity(trace, self._alone)
        self.why_replayed = unlimited if isinstance(unlimited, str) else ""
        self.capacity = self._capacity_of(config)
        sizes = {one.tokens_per_block for one in (config, *self._variants)}
        sizes |= {one.ssm_reuse_interval for one in (config, *self._variants) if one.has_ssm}
        self._distances = None if self.why_replayed else stack_distances(trace, sizes)

    def of(self, request: int, usable_tokens: int, ceiling_tokens: int) -> tuple[Remedy, ...]:
        """What would have made a request skip more than it did: memory that would keep all up to its ceiling, the best
        other interval and the best smaller block at the memory given.
        """
        remedies = []
        quota = self._config.cache_tiers[0].quota
        if usable_tokens < ceiling_tokens and quota is not None:
            remedies += [one for one in self._memory(request, ceiling_tokens) if one.value > quota]
        for setting in ("ssm_reuse_interval", "tokens_per_block"):
            tried = [
                Remedy(setting, getattr(one, setting), int(usable[request]), engine)
                for one, usable, engine in self._tried
                if self._differs_in(one, setting)
            ]
            # of equal ones the largest: fewer snapshots, fewer blocks
            remedies += sorted(tried, key=lambda remedy: (remedy.usable_tokens, remedy.value))[-1:]
        return tuple(remedy for remedy in remedies if remedy.usable_tokens > usable_tokens)

    @cached_property
    def _tried(self) -> list[tuple[KVCacheManagerConfig, Int64Array, str]]:
        """Variants with the [num_requests] usable hits of each, and who counted them."""
        tried: list[tuple[KVCacheManagerConfig, Int64Array, str]] = []
        rest = []
        for one in self._variants:
            capacity = self._capacity_of(one)
            if capacity is not None and self._distances is not None:
                tried.append((one, self._usable_by_grid(self._distances, one, capacity), "grid"))
            else:
                rest.append(one)
        for setting in ("ssm_reuse_interval", "tokens_per_block"):
            if not any(self._differs_in(one, setting) for one, _, _ in tried):
                tried += [
                    (one, usable, "replay") for one in self._neighbours(rest, setting) for usable in self._by(one)
                ]
        return tried

    @cached_property
    def _more_memory(self) -> list[tuple[int, Int64Array]]:
        """Twice and four times the memory of the GPU, replayed."""
        gpu, *lower = self._config.cache_tiers
        assert gpu.quota is not None
        sizes = [gpu.quota * factor for factor in (2, 4)]
        configs = [replace(self._config, cache_tiers=(GpuCacheTierConfig(size), *lower)) for size in sizes]
        return [(size, usable) for size, one in zip(sizes, configs, strict=True) for usable in self._by(one)]

    def _neighbours(self, configs: Sequence[KVCacheManagerConfig], setting: str) -> list[KVCacheManagerConfig]:
        """Those with the next smaller and the next larger value."""
        own = getattr(self._config, setting)
        alike = sorted(
            (one for one in configs if self._differs_in(one, setting)), key=lambda one: int(getattr(one, setting))
        )
        smaller = [one for one in alike if getattr(one, setting) < own]
        larger = [one for one in alike if getattr(one, setting) > own]
        return smaller[-1:] + larger[:1]

    def _by(self, config: KVCacheManagerConfig) -> list[Int64Array]:
        """Usable hits by a replay; nothing where no request fits."""
        try:
            return [replay(self._trace, config, prefill=self._prefill).usable]
        except MemoryTooSmallError:
            return []

    def distance(self, request: int, end_token: int, size: int) -> int | None:
        """Blocks (or snapshots) of `size` tokens that were used later than the one that ends there, itself included;
        None where the grid is not exact for the config.
        """
        if self._distances is None or self.capacity is None:
            return None
        return _distance(self._distances, request, end_token, size)

    def _differs_in(self, one: KVCacheManagerConfig, setting: str) -> bool:
        """Whether a variant has another value of this setting, and the same of the other one."""
        names = [setting, *({"ssm_reuse_interval", "tokens_per_block"} - {setting})]
        is_other, is_other_too = (getattr(one, name) != getattr(self._config, name) for name in names)
        return is_other and not is_other_too

    def _usable_by_grid(
        self, distances: StackDistances, config: KVCacheManagerConfig, capacity: GridCapacity
    ) -> Int64Array:
        interval = config.ssm_reuse_interval if config.has_ssm else None
        usable = np.zeros(self._trace.num_requests, dtype=np.int64)
        found = distances.request[distances.start == 0]
        usable[found] = hit_depths(distances, config.tokens_per_block, interval, capacity).hit_tokens
        return usable

    def _memory(self, request: int, target_tokens: int) -> list[Remedy]:
        """The least memory of the GPU, alone, with which the request skips so many tokens; or the best of those that
        were replayed.
        """
        config = self._config
        if self._distances is None:
            replayed = [
                Remedy("gpu_memory_bytes", size, int(usable[request]), "replay") for size, usable in self._more_memory
            ]
            return sorted(replayed, key=lambda remedy: (-remedy.usable_tokens, remedy.value))[:1]
        sizes = [config.tokens_per_block] + ([config.ssm_reuse_interval] if config.has_ssm else [])
        needed = [_distance(self._distances, request, target_tokens, size) for size in sizes]
        value = _least(lambda num_bytes: self._holds(num_bytes, *needed))
        return [Remedy("gpu_memory_bytes", value, target_tokens, "grid", is_least=value > self._told_from)]

    @cached_property
    def _told_from(self) -> int:
        """The least memory that the grid can tell of: that of the largest request."""
        return _least(self._holds)

    def _holds(self, num_bytes: int, blocks: int = 0, snapshots: int = 0) -> bool:
        """Whether pools of so much memory hold them, and the largest request, too."""
        capacity = self._capacity_of(replace(self._alone, cache_tiers=(GpuCacheTierConfig(num_bytes),)))
        return capacity is not None and capacity.blocks >= blocks and (capacity.snapshots or 0) >= snapshots

    def _capacity_of(self, config: KVCacheManagerConfig) -> GridCapacity | None:
        """None where the grid is not exact for a config."""
        try:
            capacity = grid_capacity(self._trace, config)
        except ValueError:  # not one slot of each kind
            return None
        return None if isinstance(capacity, str) else capacity


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


def _distance(distances: StackDistances, request: int, end_token: int, size: int) -> int:
    """Stack distance of the block of `size` that ends there, which an earlier request had."""
    end = end_token // distances.tokens_per_block
    first, last = np.searchsorted(distances.request, [request, request + 1])
    segment = int(first + np.searchsorted(distances.start[first:last], end - 1, side="right")) - 1
    assert first <= segment
    assert end <= distances.end[segment]
    factor = size // distances.tokens_per_block
    return int(distances.later_of(size)[segment]) + end // factor - int(distances.start[segment]) // factor
