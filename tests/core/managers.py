"""Small managers with exact numbers of slots, for tests."""

from ssmcache import (
    AttentionLayerConfig,
    BufferConfig,
    GpuCacheTierConfig,
    KVCacheManager,
    KVCacheManagerConfig,
    SimulatedMemory,
    SsmLayerConfig,
)

KEY_BYTES = VALUE_BYTES = 32
PAGE_BYTES = KEY_BYTES + VALUE_BYTES
STATE_BYTES = 100


def make_manager(
    pages: int | None,
    states: int | None,
    *,
    block: int = 32,
    interval: int = 64,
    memory: SimulatedMemory | None = None,
    **settings: object,
) -> KVCacheManager:
    """A manager with so many slots. `pages=0`: no attention layer; `states=0`: no SSM layer; both None: unlimited."""
    layers = []
    if pages != 0:
        layers.append(AttentionLayerConfig(0, (BufferConfig("key", KEY_BYTES), BufferConfig("value", VALUE_BYTES))))
    if states != 0:
        layers.append(SsmLayerConfig(1, (BufferConfig("ssm_state", STATE_BYTES - 8), BufferConfig("conv_state", 8))))
    quota = fraction = None
    if pages is not None and states is not None:
        quota = pages * PAGE_BYTES + states * STATE_BYTES
        if pages and states:
            fraction = states * STATE_BYTES / quota
    config = KVCacheManagerConfig(
        tokens_per_block=block,
        layers=layers,
        cache_tiers=[GpuCacheTierConfig(quota)],
        ssm_reuse_interval=interval,
        ssm_fraction=fraction,
        **settings,
    )
    manager = KVCacheManager(config, memory=memory or SimulatedMemory())
    if quota is not None:
        expected = [count for count in (pages, states) if count]
        assert [pools[0].capacity for pools in manager.pools] == expected
    return manager
