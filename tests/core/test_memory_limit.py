"""A model with as many windowed layers as full ones at the very end of its memory: 18 of each, K and V of 32 KiB a
block each, blocks of 32, a window of 128 with one sink token, 32 MiB of GPU.

A block of one group is 18 x 64 KiB = 1,152 KiB, so the memory is 28 blocks. A sequence of 704 tokens has 22 blocks in
the full group and at most 6 in the window (the sink, 4 in sight, the one being written): 28. Blocks of both are of one
size, so they share one pool and nobody has to say how it is split. (A model of upstream TensorRT-LLM's own tests.)
"""

from __future__ import annotations

import numpy as np
import pytest

from ssmcache import (
    AttentionLayerConfig,
    BatchDesc,
    BufferConfig,
    GpuCacheTierConfig,
    KVCache,
    KVCacheDesc,
    KVCacheManager,
    KVCacheManagerConfig,
    SimulatedMemory,
)

BLOCK, WINDOW, LIMIT = 32, 128, 704
TOKENS = np.arange(LIMIT + 1)
# the last block of it is computed in one step: 22 blocks, and 6 that are not stale
AT_THE_LIMIT = BatchDesc((KVCacheDesc(capacity=LIMIT, history_length=LIMIT - BLOCK),))


def make(**settings: object) -> KVCacheManager:
    buffers = (BufferConfig("key", 32 << 10), BufferConfig("value", 32 << 10))
    full = [AttentionLayerConfig(layer, buffers) for layer in range(0, 36, 2)]
    windowed = [AttentionLayerConfig(layer, buffers, WINDOW, 1) for layer in range(1, 36, 2)]
    layers = sorted(full + windowed, key=lambda layer: layer.layer_id)
    config = KVCacheManagerConfig(
        tokens_per_block=BLOCK, layers=layers, cache_tiers=[GpuCacheTierConfig(32 << 20)], **settings
    )
    return KVCacheManager(config, SimulatedMemory())


def slots(manager: KVCacheManager) -> list[int | None]:
    return [usage.num_slots for usage in manager.memory_usage().groups]


def start(manager: KVCacheManager) -> KVCache:
    kv = manager.create_kv_cache()
    assert kv.resume()
    return kv


def grow(kv: KVCache, step: int, commit: bool) -> int:
    """Compute `step` tokens at a time until there is no room; returns the tokens that there was room for."""
    while kv.capacity < len(TOKENS) and kv.resize(min(kv.capacity + step, len(TOKENS)), kv.capacity):
        if commit:
            kv.commit(TOKENS[kv.num_committed_tokens : kv.capacity])
        kv.manager.check()
    return kv.capacity


@pytest.mark.parametrize(
    "settings",
    [{}, {"typical_step": AT_THE_LIMIT}, {"constraints": (AT_THE_LIMIT,)}],
    ids=["by default", "as the typical step", "as a constraint"],
)
@pytest.mark.parametrize("step", [1, 2, 8, 16, 32])
@pytest.mark.parametrize("commit", [True, False], ids=["committed", "private"])
def test_a_sequence_reaches_704_tokens_and_not_one_more(settings: dict[str, object], step: int, commit: bool) -> None:
    manager = make(**settings)
    assert manager.layer_grouping == (tuple(range(0, 36, 2)), tuple(range(1, 36, 2)))
    assert slots(manager) == [28, 28]
    assert [usage.pool for usage in manager.memory_usage().groups] == [0, 0]
    kv = start(manager)
    assert grow(kv, step, commit) == LIMIT
    assert manager.used_slots(0) == 22
    assert 5 <= manager.used_slots(1) <= 6
    before = manager.memory_usage(), kv.page_indices(0).tolist(), kv.page_indices(1).tolist()
    assert not kv.resize(LIMIT + 1, LIMIT)
    assert kv.shortage.layer_group == 0
    assert kv.shortage.needed == kv.shortage.free + kv.shortage.evictable + 1  # what is stale by now is not enough
    assert (manager.memory_usage(), kv.page_indices(0).tolist(), kv.page_indices(1).tolist()) == before
    assert np.flatnonzero(kv.page_indices(1) >= 0).tolist()[0] == 0
    assert not set(kv.page_indices(0).tolist()) & set(kv.page_indices(1).tolist()) - {-1}
    manager.check()
    kv.close()
    manager.clear_reusable_blocks()
    assert manager.memory_usage().used_bytes == 0


def test_a_second_sequence_takes_the_place_of_the_first_ones_blocks() -> None:
    manager = make()
    for start_token in (0, 1000, 2000):
        kv = start(manager)
        while kv.capacity < LIMIT:
            assert kv.resize(kv.capacity + BLOCK, kv.capacity)
            kv.commit(TOKENS[kv.num_committed_tokens : kv.capacity] + start_token)
        assert not kv.resize(LIMIT + 1, LIMIT)
        kv.close()
        manager.check()
        assert manager.probe_reuse(TOKENS[:LIMIT] + start_token).usable_tokens == LIMIT


def blocks_needed(capacity: int, history: int) -> int:
    """All blocks in the full group; in the windowed one the sink, those in sight of a query at `history`, and those
    that are to be written.
    """
    num_blocks = -(-capacity // BLOCK)
    in_sight = {key // BLOCK for key in range(max(0, history + 1 - WINDOW), capacity)}
    return num_blocks + len(in_sight | {0})


@pytest.mark.parametrize("step", [64, 31, 24, 100, 300])
def test_a_larger_step_ends_where_all_that_it_needs_is_more_than_the_memory(step: int) -> None:
    expected = 0
    while expected < len(TOKENS) and blocks_needed(min(expected + step, len(TOKENS)), expected) <= 28:
        expected = min(expected + step, len(TOKENS))
    kv = start(make())
    assert grow(kv, step, commit=True) == expected
    assert kv.shortage.needed > kv.shortage.free + kv.shortage.evictable
    # to the end of the block there is room, and from there on block by block
    while kv.capacity < LIMIT:
        assert kv.resize((kv.capacity // BLOCK + 1) * BLOCK, kv.capacity)
    assert not kv.resize(LIMIT + 1, LIMIT)


def test_adjusting_changes_nothing_where_all_is_one_pool() -> None:
    manager = make()
    kv = start(manager)
    assert grow(kv, 32, commit=True) == LIMIT
    kv.close()
    assert not manager.need_adjustment
    assert manager.adjust()
    assert slots(manager) == [28, 28]
    manager.check()


def test_a_constraint_that_does_not_fit_is_refused_with_the_bytes_that_it_takes() -> None:
    more = BatchDesc((KVCacheDesc(LIMIT + 1, LIMIT - BLOCK),))
    with pytest.raises(
        ValueError, match=r"quota of the GPU tier: expected at least 35389440 bytes .* got 33554432 bytes"
    ):
        make(constraints=(more,))
