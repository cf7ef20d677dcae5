"""What kernels see: views of the pools, and where the bytes of each buffer lie."""

from __future__ import annotations

import numpy as np
import pytest

from ssmcache import (
    AttentionLayerConfig,
    BatchDesc,
    BufferConfig,
    GpuCacheTierConfig,
    HostMemory,
    KVCacheDesc,
    KVCacheManager,
    KVCacheManagerConfig,
    SimulatedMemory,
    SsmLayerConfig,
)
from ssmcache.memory.base import Memory

# (layer group, layer, role, size), in the order in which the bytes must lie in a slot
PLACES = [
    (0, 3, "key", 64),
    (0, 3, "value", 96),
    (0, 3, "scale", 4),
    (0, 4, "key", 64),
    (1, 7, "key", 32),
    (1, 7, "value", 16),
    (1, 9, "key", 32),
    (2, 8, "key", 24),
    (3, 11, "kv", 8),
    (4, 5, "ssm_state", 128),
    (4, 5, "conv_state", 12),
    (4, 6, "ssm_state", 128),
]
SHAPES = {7: (128, 1), 9: (128, 1), 8: (64, None), 11: (64, 16)}
ORDER = [8, 5, 3, 7, 4, 9, 6, 11]  # in which the layers are given; equal life cycles keep theirs
GROUPS = ((3, 4), (8,), (7, 9), (11,), (5, 6))


def place_of(layer: int) -> list[tuple[str, int]]:
    return [(role, size) for _, place_layer, role, size in PLACES if place_layer == layer]


def make(memory: Memory | None = None, **overrides: int) -> KVCacheManager:
    layers: list[AttentionLayerConfig | SsmLayerConfig] = []
    for layer in ORDER:
        buffers = [BufferConfig(role, size, overrides.get(f"{role}_{layer}")) for role, size in place_of(layer)]
        if layer in (5, 6):
            layers.append(SsmLayerConfig(layer, buffers))
        else:
            layers.append(AttentionLayerConfig(layer, buffers, *SHAPES.get(layer, (None, None))))
    # each layer group gets as many slots as it has bytes in one: 6 of each
    quota = 6 * sum(size for *_, size in PLACES)
    config = KVCacheManagerConfig(
        16, layers, [GpuCacheTierConfig(quota)], ssm_reuse_interval=16, typical_step=BatchDesc((KVCacheDesc(1),))
    )
    return KVCacheManager(config, memory or HostMemory())


def group_of(layer: int) -> int:
    return next(index for index, layers in enumerate(GROUPS) if layer in layers)


def places_in(group: int) -> list[tuple[int, str, int]]:
    """(layer, role, size) in the order of the bytes of a slot: that of the layers as given, then of their buffers."""
    layers = sorted(GROUPS[group], key=ORDER.index)
    return [(layer, role, size) for layer in layers for role, size in place_of(layer)]


def test_layers_of_one_life_cycle_are_a_group_full_attention_first_then_each_window_then_ssm() -> None:
    manager = make()
    assert manager.layer_grouping == GROUPS
    usage = manager.memory_usage().groups
    assert [group.kind for group in usage] == ["attention", "window", "window", "window", "ssm"]


def test_a_slot_of_a_group_has_all_its_buffers_and_a_pool_is_its_slots() -> None:
    memory = HostMemory()
    manager = make(memory)
    for group, usage in enumerate(manager.memory_usage().groups):
        slot_bytes = sum(size for _, _, size in places_in(group))
        assert usage.slot_bytes == slot_bytes
        assert usage.num_slots == 6
        assert memory.view(group).shape == (6, slot_bytes)
    assert memory.bytes_in_use == 6 * sum(size for *_, size in PLACES)


def test_no_sinks_and_zero_sinks_are_one_life_cycle_and_windows_of_other_sizes_or_sinks_are_not() -> None:
    buffers = [BufferConfig("kv", 8)]
    shapes = [(64, None), (64, 0), (64, 1), (65, 0), (None, None)]
    layers = [AttentionLayerConfig(layer, buffers, *shape) for layer, shape in enumerate(shapes)]
    manager = KVCacheManager(KVCacheManagerConfig(16, layers, [GpuCacheTierConfig(None)]), SimulatedMemory())
    assert manager.layer_grouping == ((4,), (0, 1), (2,), (3,))


def test_bytes_written_through_a_view_land_in_their_place_of_the_pool_and_nowhere_else() -> None:
    memory = HostMemory()
    manager = make(memory)
    for group in range(len(GROUPS)):
        memory.view(group)[:] = 0
    for value, (_, layer, role, size) in enumerate(PLACES, start=1):
        view = manager.buffer(layer, role)
        assert (view.shape, view.dtype) == ((6, size), np.uint8)
        view[:] = 10 * value + np.arange(6, dtype=np.uint8)[:, None]
    values = {(layer, role): 10 * value for value, (_, layer, role, _) in enumerate(PLACES, start=1)}
    for group in range(len(GROUPS)):
        for slot in range(6):
            expected = [values[layer, role] + slot for layer, role, size in places_in(group) for _ in range(size)]
            assert memory.view(group)[slot].tolist() == expected


def test_a_view_is_no_copy_and_its_stride_is_that_of_the_slots() -> None:
    memory = HostMemory()
    manager = make(memory)
    for _, layer, role, size in PLACES:
        view = manager.buffer(layer, role)
        pool = memory.view(group_of(layer))
        assert np.shares_memory(view, pool)
        assert manager.page_stride(layer, role) == view.strides[0] == pool.shape[1]
        before = [size for other, name, size in places_in(group_of(layer))[: _index(layer, role)]]
        offset = view.__array_interface__["data"][0] - pool.__array_interface__["data"][0]
        assert offset == sum(before)
        assert view.shape[1] == size


def _index(layer: int, role: str) -> int:
    return [place[:2] for place in places_in(group_of(layer))].index((layer, role))


@pytest.mark.parametrize(
    ("layer", "role", "dtype", "shape", "expected"),
    [
        (3, "key", np.float32, None, (6, 16)),
        (3, "value", np.float16, (16, 3), (6, 16, 3)),
        (4, "key", np.float64, (2, 4), (6, 2, 4)),
        (3, "scale", np.float32, (), (6,)),
        (5, "ssm_state", np.float32, (2, 4, 4), (6, 2, 4, 4)),
        (6, "ssm_state", np.uint8, (128,), (6, 128)),
        (5, "conv_state", np.int16, (3, 2), (6, 3, 2)),
    ],
)
def test_a_view_of_a_dtype_and_shape_is_no_copy_either_and_holds_the_same_bytes(
    layer: int, role: str, dtype: type, shape: tuple[int, ...] | None, expected: tuple[int, ...]
) -> None:
    memory = HostMemory()
    manager = make(memory)
    view = manager.buffer(layer, role, dtype, shape)
    assert (view.shape, view.dtype) == (expected, np.dtype(dtype))
    raw = manager.buffer(layer, role)
    assert np.shares_memory(view, raw)
    values = np.arange(view.size).reshape(expected).astype(dtype)
    view[...] = values
    assert raw.tobytes() == values.tobytes()
    raw[2] = 0
    assert not view[2].any()
    assert (np.delete(view, 2, axis=0) == np.delete(values, 2, axis=0)).all()


def test_smaller_pages_of_a_block_are_views_into_it_in_order() -> None:
    memory = HostMemory()
    manager = make(memory, key_3=4, value_3=8)  # of blocks of 16
    keys, values = manager.buffer(3, "key"), manager.buffer(3, "value")
    assert (keys.shape, values.shape) == ((6, 4, 16), (6, 2, 48))
    assert keys.strides == (manager.page_stride(3, "key"), 16, 1)
    keys[5, 3], values[0, 1, 47] = 7, 9
    pool = memory.view(0)
    start = sum(size for _, _, size in places_in(0)[: _index(3, "key")])
    assert (pool[5, start + 48 : start + 64] == 7).all()
    assert pool[0, start + 64 + 95] == 9
    assert (pool == 7).sum() == 16
    assert manager.buffer(3, "key", np.float32).shape == (6, 4, 4)
    assert manager.buffer(3, "key", np.float32, (4, 2, 2)).shape == (6, 4, 2, 2)
    assert manager.memory_usage().groups[0].slot_bytes == make().memory_usage().groups[0].slot_bytes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            {"key_3": 5},
            r"tokens_per_block_override of buffer 'key': expected a divisor of tokens_per_block \(16\), got 5",
        ),
        ({"key_3": 32}, "expected a divisor of"),
        ({"key_3": 0}, "expected a positive integer, got 0"),
        ({"scale_3": 2}, "size of buffer 'scale': expected a multiple of its 8 pages, got 4"),
        ({"ssm_state_5": 4}, "tokens_per_block_override of layer 5: expected None for a state, got 4"),
    ],
)
def test_an_override_that_does_not_divide_the_block_is_refused(override: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**override)


@pytest.mark.parametrize(("layer", "role"), [(99, "key"), (3, "ssm_state"), (5, "key")])
def test_an_unknown_buffer_is_refused_with_the_known_ones(layer: int, role: str) -> None:
    manager = make()
    for call in (manager.buffer, manager.page_stride):
        with pytest.raises(ValueError, match=rf"buffer: expected one of \[\(3, 'key'\), .*got \({layer}, '{role}'\)"):
            call(layer, role)


def test_a_simulated_memory_has_no_views_but_strides() -> None:
    manager = make(SimulatedMemory())
    assert manager.buffer(3, "key") is None
    assert manager.page_stride(3, "key") == 64 + 96 + 4 + 64
