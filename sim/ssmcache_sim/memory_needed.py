"""The least memory that a trace can be replayed with."""

import sys
from dataclasses import replace

from ssmcache import GpuCacheTierConfig, KVCacheManager, KVCacheManagerConfig, SimulatedMemory
from ssmcache_sim.errors import MemoryTooSmallError
from ssmcache_sim.replay_tiers import check_lower_tiers
from ssmcache_sim.sizes import format_size
from ssmcache_sim.trace import Trace


def check_memory(trace: Trace, config: KVCacheManagerConfig) -> None:
    """Errors: MemoryTooSmallError, naming the least memory that would do, when not even the shortest path fits on the
    GPU, or a tier below it holds nothing.
    """
    check_lower_tiers(config)
    quota = config.cache_tiers[0].quota
    if quota is None:
        return
    needed_tokens = int(trace.path_tokens.min()) + 1
    if _capacity(config, quota) >= needed_tokens:
        return
    too_small, enough = quota, quota * 2
    while _capacity(config, enough) < needed_tokens:
        too_small, enough = enough, enough * 2
    while enough - too_small > 1:
        middle = (too_small + enough) // 2
        if _capacity(config, middle) < needed_tokens:
            too_small = middle
        else:
            enough = middle
    raise MemoryTooSmallError(
        f"memory too small for every request: expected at least {enough} bytes ({format_size(enough)}) for the "
        f"shortest request, got {quota} bytes ({format_size(quota)})"
    )


def _capacity(config: KVCacheManagerConfig, quota: int) -> int:
    """Tokens that one sequence alone has room for with `quota` bytes; 0 where not even a manager can be made."""
    resized = replace(config, cache_tiers=(GpuCacheTierConfig(quota=quota),))
    try:
        max_capacity = KVCacheManager(resized, memory=SimulatedMemory()).max_capacity
    except ValueError:
        return 0
    return sys.maxsize if max_capacity is None else max_capacity  # None: a state has room for any number of tokens
