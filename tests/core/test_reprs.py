"""What a person sees of the objects of the core: short, with units."""

import numpy as np
from managers import PAGE_BYTES, STATE_BYTES, make_manager

from ssmcache import (
    AttentionLayerConfig,
    BlockKeys,
    BufferConfig,
    DiskCacheTierConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    KVCacheManagerConfig,
)
from ssmcache.models import load_model, preset_names
from ssmcache.units import format_size, plural


def test_a_config_names_blocks_layers_and_tiers() -> None:
    buffers = (BufferConfig("kv", 64),)
    config = KVCacheManagerConfig(
        tokens_per_block=16,
        layers=[AttentionLayerConfig(0, buffers), AttentionLayerConfig(1, buffers, sliding_window_size=64)],
        cache_tiers=[GpuCacheTierConfig(1 << 20), HostCacheTierConfig(3 << 30), DiskCacheTierConfig(5 << 40, ".")],
    )
    assert repr(config) == (
        "KVCacheManagerConfig(block 16, 1 attention + 1 sliding-window layers, gpu 1 MiB, host 3 GiB, disk 5 TiB)"
    )
    assert config.tier_names == ("gpu", "host", "disk")


def test_a_manager_tells_its_config_memory_and_sequences() -> None:
    manager = make_manager(pages=10, states=4, block=32, interval=64)
    assert "block 32, interval 64, 1 attention + 1 SSM layers, gpu" in repr(manager)
    assert "SimulatedMemory, 0 open sequences, 0 ACTIVE" in repr(manager)
    kv = manager.create_kv_cache(range(100), id="r1")
    kv.resume()
    assert "1 open sequence, 1 ACTIVE" in repr(manager)
    kv.close()
    manager.shutdown()
    assert "shut down" in repr(manager)


def test_a_sequence_tells_its_status_lengths_and_shortage() -> None:
    manager = make_manager(pages=4, states=4, block=32, interval=64)
    kv = manager.create_kv_cache(range(64), id="r1")
    assert repr(kv) == "<KVCache('r1') SUSPENDED: tokens 0 committed, 0 history, 0 capacity>"
    assert kv.resume()
    assert kv.resize(65)
    kv.commit(range(64))
    assert repr(kv) == "<KVCache('r1') ACTIVE: tokens 64 committed, 64 history, 65 capacity>"
    assert not kv.resize(1000)
    assert repr(kv).endswith("65 capacity; refused: slots>")
    kv.close()
    assert repr(kv).startswith("<KVCache('r1') CLOSED:")
    assert repr(manager.create_kv_cache()).startswith("<KVCache SUSPENDED:")


def test_stats_and_memory_are_counts_that_add_up() -> None:
    manager = make_manager(pages=8, states=4, block=32, interval=64)
    for _ in range(2):
        kv = manager.create_kv_cache(range(99))
        assert kv.resume()
        assert kv.resize(100)
        kv.reserve_snapshots(kv.snapshot_points(99))
        kv.commit(range(kv.num_committed_tokens, 99))
        kv.close()
    told = repr(manager.stats()).split("\n")
    assert told[0] == "CacheStats: 2 lookups of 198 tokens"
    assert told[1] == f"  reusable: 64 tokens ({64 / 198:.2%}); with KV 96, known 96"
    assert told[2] == "  snapshots: 1 taken, 1 reuse, 0 evicted (0 unused), 0 skipped"
    assert told[4:] == [f"  layer group 1, gpu to gpu: 1 slot, {STATE_BYTES} B"]
    usage = repr(manager.memory_usage()).split("\n")
    assert usage == [
        "MemoryUsage:",
        f"  gpu, layer group 0 (attention): {3 * PAGE_BYTES} B of {8 * PAGE_BYTES} B, 3 slots in use, "
        "3 of them for reuse",
        f"  gpu, layer group 1 (ssm): {STATE_BYTES} B of {4 * STATE_BYTES} B, 1 slot in use, 1 of them for reuse",
    ]


def test_keys_are_named_by_their_place() -> None:
    keys = BlockKeys(np.arange(40), 100, 4050)
    assert repr(keys[1000:-1]) == "BlockKeys(tokens 1,000 to 4,049, blocks of 100)"


def test_a_model_tells_what_it_caches() -> None:
    assert repr(load_model("nemotron-h-8b")) == (
        "ModelSpec(nemotron-h-8b)\n  4 attention layers: 16 KiB of bfloat16 KV a token\n"
        "  24 SSM layers: 97.41 MiB a snapshot, states in float32"
    )
    for name in preset_names():
        assert max(map(len, repr(load_model(name)).split("\n"))) < 80


def test_sizes_and_counts_as_people_read_them() -> None:
    assert [format_size(size) for size in (0, 1023, 1536, None)] == ["0 B", "1023 B", "1.5 KiB", "unlimited"]
    assert [plural(count, "page") for count in (0, 1, 1200)] == ["0 pages", "1 page", "1,200 pages"]
