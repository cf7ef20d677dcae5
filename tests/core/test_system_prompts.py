"""Batches whose sequences share a system prompt: its pages, and snapshots, are counted once."""

from __future__ import annotations

from fractions import Fraction
from random import Random

import pytest

from ssmcache import (
    AttentionLayerConfig,
    BatchDesc,
    BufferConfig,
    GpuCacheTierConfig,
    KVCacheDesc,
    KVCacheManager,
    KVCacheManagerConfig,
    LayerConfig,
    SimulatedMemory,
    SsmLayerConfig,
)
from ssmcache.layout import LayerGroup, floor_slots, layer_groups, step_slots

SHAPES = [(None, None), (5, 0), (7, 3), (2, 1), None]  # (window, sinks), None: SSM


def config(shape: object, block: int = 2, quota: int = 1 << 30, **more: object) -> KVCacheManagerConfig:
    buffers = (BufferConfig("data", 1),)
    layer: LayerConfig = SsmLayerConfig(0, buffers) if shape is None else AttentionLayerConfig(0, buffers, *shape)
    return KVCacheManagerConfig(
        block, [layer], [GpuCacheTierConfig(quota)], ssm_reuse_interval=2 * block, **more
    )  # fmt: skip


def needed(group: LayerGroup, desc: KVCacheDesc, block: int) -> list[int]:
    """Blocks, by definition: those that a query at `history` or later may read, or that are yet to be written."""
    ordinals = range(-(-desc.capacity // block))
    if group.window_size is None:
        return list(ordinals)
    sinks = -(-group.num_sink_tokens // block)
    last_seen = desc.history_length - group.window_size
    return [n for n in ordinals if n < sinks or (n + 1) * block - 1 > last_seen]


def slots_of(group: LayerGroup, batch: BatchDesc, block: int) -> list[set[object]]:
    """Names of the slots that each sequence needs, equal for those that are shared."""
    found: list[set[object]] = []
    for number, desc in enumerate(batch.kv_caches):
        if group.kind.value == "ssm":
            found.append({number})
            continue
        blocks = needed(group, desc, block)
        found.append({n if (n + 1) * block <= batch.system_prompt_length else (number, n) for n in blocks})
    return found


def random_batch(random: Random) -> BatchDesc:
    capacities = [random.randint(1, 24) for _ in range(random.randint(1, 5))]
    descs = [KVCacheDesc(capacity, random.randint(0, capacity)) for capacity in capacities]
    return BatchDesc(descs, random.randint(0, min(capacities)))


@pytest.mark.parametrize("shape", SHAPES)
def test_floors_count_shared_pages_once_and_are_the_least_that_the_gate_lets_in(shape: object) -> None:
    random = Random(str(shape))
    for _ in range(200):
        block, share = random.randint(1, 4), random.choice(("0.3", "0.7", "0.97", "1"))
        batch = random_batch(random)
        settings = config(shape, block, max_util_for_resume=float(share), constraints=(batch,))
        (group,) = layer_groups(settings)
        names = slots_of(group, batch, block)
        total = len(set().union(*names))
        others = [len(set().union(*names[:last], *names[last + 1 :])) for last in range(len(names))]
        least = 1
        while least < total or any(count > Fraction(share) * least for count in others):
            least += 1
        assert floor_slots((group,), settings) == least, (batch, block, share)


@pytest.mark.parametrize("admission", ["every", "last"])
def test_the_snapshots_of_a_typical_step_are_counted_once_as_well(admission: str) -> None:
    random = Random(admission)
    for _ in range(300):
        batch, block = random_batch(random), random.randint(1, 3)
        settings = config(None, block, admission=admission)
        (group,) = layer_groups(settings)
        interval = settings.ssm_reuse_interval
        snapshots: set[object] = set()
        for number, desc in enumerate(batch.kv_caches):
            points = list(range(interval, desc.capacity + 1, interval))
            for point in points if admission == "every" else points[-1:]:
                snapshots.add(point if point <= batch.system_prompt_length else (number, point))
        assert step_slots(group, batch, settings) == len(batch.kv_caches) + len(snapshots), batch


def test_a_batch_that_shares_its_prompt_runs_on_the_floor() -> None:
    prompt = list(range(64))
    batch = BatchDesc([KVCacheDesc(96, 64)] * 5, system_prompt_length=64)
    settings = config((None, None), 16, 4 + 5 * 2, max_util_for_resume=1.0, constraints=(batch,))
    manager = KVCacheManager(settings, SimulatedMemory())
    assert manager.memory_usage().groups[0].num_slots == 14
    for number in range(5):
        kv = manager.create_kv_cache([*prompt, 1000 + number][:64])
        assert kv.resume()
        assert kv.resize(96), kv.shortage
        kv.commit(prompt[kv.num_committed_tokens :])
    assert manager.used_slots(0) == 14
    with pytest.raises(ValueError, match="expected at least 14 bytes"):
        KVCacheManager(config((None, None), 16, 13, max_util_for_resume=1.0, constraints=(batch,)), SimulatedMemory())


@pytest.mark.parametrize("length", [-1, 33, 1.0, True, "4", None])
def test_a_system_prompt_is_a_part_of_every_sequence(length: object) -> None:
    with pytest.raises(ValueError, match=r"^system_prompt_length of a BatchDesc: expected an integer in 0..32"):
        BatchDesc([KVCacheDesc(32), KVCacheDesc(64)], system_prompt_length=length)
