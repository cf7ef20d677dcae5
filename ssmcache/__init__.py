"""Prefix caching for hybrid language models: one cache manager, on real memory or in a simulator."""

from ssmcache.calls import BrokenManagerError
from ssmcache.config import (
    AttentionLayerConfig,
    BatchDesc,
    BufferConfig,
    DiskCacheTierConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    KVCacheDesc,
    KVCacheManagerConfig,
    LayerConfig,
    SsmLayerConfig,
)
from ssmcache.keys import BlockKeys, ReuseScope
from ssmcache.manager import KVCacheManager
from ssmcache.memory.host import HostMemory
from ssmcache.memory.simulated import SimulatedMemory
from ssmcache.priority import PriorityRange
from ssmcache.sequence import KVCache
from ssmcache.sequence_pages import KVCacheStatus, StateError
from ssmcache.stats import CacheStats, LayerGroupUsage, MemoryUsage, ReuseMatch, Shortage

__all__ = [
    "AttentionLayerConfig",
    "BatchDesc",
    "BlockKeys",
    "BrokenManagerError",
    "BufferConfig",
    "CacheStats",
    "DiskCacheTierConfig",
    "GpuCacheTierConfig",
    "HostCacheTierConfig",
    "HostMemory",
    "KVCache",
    "KVCacheDesc",
    "KVCacheManager",
    "KVCacheManagerConfig",
    "KVCacheStatus",
    "LayerConfig",
    "LayerGroupUsage",
    "MemoryUsage",
    "PriorityRange",
    "ReuseMatch",
    "ReuseScope",
    "Shortage",
    "SimulatedMemory",
    "SsmLayerConfig",
    "StateError",
]

__version__ = "0.1.0"
