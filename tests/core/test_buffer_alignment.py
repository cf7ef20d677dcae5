"""Buffers start where their elements, and kernels, can be read: within the slots, and in memory."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from ssmcache import (
    AttentionLayerConfig,
    BufferConfig,
    GpuCacheTierConfig,
    HostMemory,
    KVCacheManager,
    KVCacheManagerConfig,
    LayerConfig,
    SimulatedMemory,
    SsmLayerConfig,
)
from ssmcache.models import load_model, preset_names


def make(sizes: list[int], quota: int = 1 << 20) -> KVCacheManager:
    """One layer for each size, the last one recurrent."""
    layers: list[LayerConfig] = [
        AttentionLayerConfig(index, (BufferConfig("kv", size),)) for index, size in enumerate(sizes[:-1])
    ]
    layers.append(SsmLayerConfig(len(layers), (BufferConfig("conv", sizes[0]), BufferConfig("state", sizes[-1]))))
    return KVCacheManager(KVCacheManagerConfig(16, layers, [GpuCacheTierConfig(quota)]), HostMemory())


def views(manager: KVCacheManager, *groups: int) -> list[tuple[int, np.ndarray]]:
    """(size, [slots, bytes]) of every buffer of some layer groups."""
    places = [place for group in groups for place in manager.groups[group].buffers]
    return [(place.size, manager.buffer(place.layer_id, place.role)) for place in places]


def test_a_small_buffer_does_not_shift_those_after_it_off_their_alignment() -> None:
    manager = make([4096, 6, 4096, 20, 8192, 4096])
    for size, view in views(manager, 0, 1):
        starts = view.ctypes.data + view.strides[0] * np.arange(len(view))
        assert not (starts % (256 if size % 256 == 0 else 4 if size % 4 == 0 else 2)).any(), size


@pytest.mark.parametrize("seed", range(40))
def test_buffers_of_any_sizes_can_be_seen_as_any_elements_that_they_are_made_of(seed: int) -> None:
    random = Random(seed)
    sizes = [random.choice((1, 2, 3, 6, 10, 12, 64, 256, 1000, 1024, 6 * 256)) for _ in range(5)]
    manager = make(sizes)
    for index, group in enumerate(manager.groups):
        for number, (size, view) in enumerate(views(manager, index)):
            for dtype in (np.uint8, np.float16, np.float32):
                if size % np.dtype(dtype).itemsize == 0:
                    typed = view.view(dtype)
                    assert typed.flags.aligned or group.slot_bytes < 64, (size, dtype)
            view[:] = number
            assert view.strides[0] == group.slot_bytes
        for number, (_, view) in enumerate(views(manager, index)):
            assert (view == number).all(), "buffers overlap"
        waste = group.slot_bytes - sum(place.size for place in group.buffers)
        assert 0 <= 16 * waste <= group.slot_bytes
        if all(place.size % 256 == 0 for place in group.buffers):
            assert waste == 0


@pytest.mark.parametrize("tokens_per_block", [1, 16, 64, 512])
def test_slots_of_published_models_are_the_bytes_of_their_buffers(tokens_per_block: int) -> None:
    for name in preset_names():
        model = load_model(name)
        for kv_dtype, state_dtype in (("bf16", "fp32"), ("fp8", "bf16")):
            layers = model.cache_layers(tokens_per_block, kv_dtype, state_dtype)
            interval = 512 if tokens_per_block < 512 else tokens_per_block
            config = KVCacheManagerConfig(
                tokens_per_block, layers, [GpuCacheTierConfig(1 << 40)], ssm_reuse_interval=interval
            )
            for usage in KVCacheManager(config, SimulatedMemory()).memory_usage().groups:
                expected = (
                    model.snapshot_bytes(state_dtype)
                    if usage.kind == "ssm"
                    else tokens_per_block * model.kv_bytes_per_token(kv_dtype)
                )
                assert usage.slot_bytes == expected, (name, usage)
