"""How the bytes of a tier become slots: floors, quotas, grains, and that what a constraint names really runs."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import (
    AttentionLayerConfig,
    BatchDesc,
    BufferConfig,
    DiskCacheTierConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    HostMemory,
    KVCache,
    KVCacheDesc,
    KVCacheManager,
    KVCacheManagerConfig,
    SimulatedMemory,
    SsmLayerConfig,
)
from ssmcache.layout import LayerGroup, layer_groups, split_tier

Layers = list[AttentionLayerConfig | SsmLayerConfig]
STEP = BatchDesc((KVCacheDesc(64),))


@st.composite
def some_layers(draw: st.DrawFn) -> Layers:
    layers: Layers = []
    sizes = draw(st.sampled_from((st.integers(1, 70), st.integers(1, 2))))  # also of slots that share a pool
    if draw(st.booleans()):
        layers.append(AttentionLayerConfig(0, (BufferConfig("key", draw(sizes)), BufferConfig("value", draw(sizes)))))
    for index in range(draw(st.integers(0, 2))):
        window, sinks = draw(st.integers(1, 12)), draw(st.sampled_from((None, 1, 5)))
        layers.append(AttentionLayerConfig(1 + index, (BufferConfig("kv", draw(sizes)),), window, sinks))
    if not layers or draw(st.booleans()):
        layers.append(SsmLayerConfig(9, (BufferConfig("state", draw(sizes)),)))
    return layers


@st.composite
def batches(draw: st.DrawFn) -> BatchDesc:
    descs = []
    for _ in range(draw(st.integers(1, 4))):
        capacity = draw(st.integers(1, 24))
        descs.append(KVCacheDesc(capacity, draw(st.integers(0, capacity))))
    return BatchDesc(tuple(descs))


def config_of(layers: Layers, quota: int, block: int, **more: Any) -> KVCacheManagerConfig:
    return KVCacheManagerConfig(block, layers, [GpuCacheTierConfig(quota)], ssm_reuse_interval=2 * block, **more)


def needed_slots(group: LayerGroup, desc: KVCacheDesc, block: int) -> int:
    """Block by block: what a query at `history` or later may read, or is yet to be written."""
    if group.kind.value == "ssm":
        return 1
    count = 0
    for ordinal in range(ceil(desc.capacity / block)):
        tokens = range(ordinal * block, (ordinal + 1) * block)
        window = group.window_size
        count += (
            window is None
            or ordinal < ceil(group.num_sink_tokens / block)
            or any(token > desc.history_length - window for token in tokens)
        )
    return count


def pools_of(groups: Sequence[LayerGroup], apart: bool = False) -> list[list[LayerGroup]]:
    """Layer groups that share a pool: those with slots of one size; states are `apart` where their share is given."""
    pools: dict[tuple[int, bool], list[LayerGroup]] = {}
    for group in groups:
        pools.setdefault((group.slot_bytes, apart and group.kind.value == "ssm"), []).append(group)
    return list(pools.values())


def least_slots(pool: list[LayerGroup], constraints: Sequence[BatchDesc], block: int, max_util: float) -> int:
    """Fewest slots, by trying them, with which each batch fits whoever of it is let in last."""
    slots = len(pool)
    for batch in constraints:
        needs = [sum(needed_slots(group, desc, block) for group in pool) for desc in batch.kv_caches]
        while sum(needs) > slots or any(sum(needs) - need > Fraction(str(max_util)) * slots for need in needs):
            slots += 1
    return slots


def pool_bytes(group: LayerGroup, slots: int, grain: int) -> int:
    return ceil(slots * group.slot_bytes / grain) * grain


@given(
    layers=some_layers(), constraints=st.lists(batches(), max_size=3), step=batches(), block=st.integers(1, 5),
    grain=st.sampled_from((1, 7, 64, 1000)), more=st.integers(0, 5000), max_util=st.sampled_from((0.3, 0.97, 1.0)),
    tier=st.integers(0, 2), fraction=st.none() | st.floats(0.01, 0.99),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_floors_are_met_within_the_quota_and_hardly_anything_is_wasted(
    layers: Layers, constraints: list[BatchDesc], step: BatchDesc, block: int, grain: int, more: int, max_util: float,
    tier: int, fraction: float | None,
) -> None:  # fmt: skip
    is_hybrid = len({type(layer) for layer in layers}) == 2
    config = config_of(
        layers, 1, block, constraints=constraints, max_util_for_resume=max_util,
        ssm_fraction=fraction if is_hybrid else None,
    )  # fmt: skip
    groups = layer_groups(config)
    pools = pools_of(groups, config.ssm_fraction is not None)
    floors = [least_slots(pool, constraints if tier == 0 else [], block, max_util) for pool in pools]
    firsts = [pool[0] for pool in pools]
    least = sum(pool_bytes(group, floor, grain) for group, floor in zip(firsts, floors, strict=True))
    quota = max(1, least - grain + 1) + more
    by_group = dict(zip(groups, split_tier(groups, config, tier, quota, step, grain), strict=True))
    assert all(len({by_group[group] for group in pool}) == 1 for pool in pools)
    slots = [by_group[group] for group in firsts]
    assert all(count >= floor for count, floor in zip(slots, floors, strict=True))
    used = sum(pool_bytes(group, count, grain) for group, count in zip(firsts, slots, strict=True))
    rounded = ceil(quota / grain) * grain
    assert used <= rounded
    assert rounded - used < max(grain, *(group.slot_bytes for group in groups), 0) * len(groups) + grain
    if grain > max(group.slot_bytes for group in groups):
        for group, count in zip(firsts, slots, strict=True):
            assert pool_bytes(group, count + 1, grain) > pool_bytes(group, count, grain), "a grain has room left"
    with pytest.raises(ValueError, match=r"^quota of the (GPU|next|last) tier: expected at least \d+ bytes .* got \d+"):
        split_tier(groups, config, tier, least - grain, step, grain)


def test_a_step_that_uses_states_alone_leaves_what_is_not_for_states_to_the_pages() -> None:
    window = AttentionLayerConfig(0, (BufferConfig("kv", 8),), sliding_window_size=1)  # nothing before is needed
    config = config_of([window, SsmLayerConfig(9, (BufferConfig("state", 8),))], 1, 1, ssm_fraction=0.25)
    step = BatchDesc((KVCacheDesc(capacity=1, history_length=1),))
    groups = layer_groups(config)
    slots = split_tier(groups, config, 0, 8000, step, 1)
    assert [(group.kind.value, count) for group, count in zip(groups, slots, strict=True)] == [
        ("window", 750), ("ssm", 250)
    ]  # fmt: skip


@given(layers=some_layers(), step=batches(), block=st.integers(1, 5), admission=st.sampled_from(("every", "last")))
@settings(max_examples=100, deadline=None)
def test_much_memory_is_split_as_the_typical_step_uses_it(
    layers: Layers, step: BatchDesc, block: int, admission: str
) -> None:
    config = config_of(layers, 1, block, admission=admission)
    groups = layer_groups(config)
    quota = 10**9
    slots = split_tier(groups, config, 0, quota, step, 1)
    uses = dict.fromkeys(groups, 0)
    for group in groups:
        uses[group] += sum(needed_slots(group, desc, block) for desc in step.kv_caches)
        if group.kind.value == "ssm":
            most = 1 if admission == "last" else 24
            uses[group] += sum(min(most, desc.capacity // config.ssm_reuse_interval) for desc in step.kv_caches)
    total = sum(use * group.slot_bytes for group, use in uses.items())
    if total:
        for group, count in zip(groups, slots, strict=True):
            use = sum(uses[other] for other in groups if other.slot_bytes == group.slot_bytes)
            # the first group gets what others leave, less than a slot each
            assert count == pytest.approx(quota * use / total, abs=sum(group.slot_bytes for group in groups))


def run_batch(manager: KVCacheManager, batch: BatchDesc, prompts: list[list[int]], resume_first: bool) -> list[KVCache]:
    """Resume all sequences of a batch and give each its capacity and history, one by one or all by turns."""
    sequences = [manager.create_kv_cache(prompt) for prompt in prompts]

    def grow(index: int) -> None:
        desc, kv = batch.kv_caches[index], sequences[index]
        assert kv.resize(desc.capacity, max(desc.history_length, kv.history_length)), (kv.shortage, desc)

    for index, kv in enumerate(sequences):
        assert kv.resume(), (kv.shortage, batch)
        if not resume_first:
            grow(index)
        manager.check()
    if resume_first:
        for index in range(len(sequences)):
            grow(index)
            manager.check()
    return sequences


@given(
    layers=some_layers(), constraints=st.lists(batches(), min_size=1, max_size=3), block=st.integers(1, 5),
    max_util=st.sampled_from((0.3, 0.8, 0.97, 1.0)), resume_first=st.booleans(), order=st.randoms(),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_on_a_quota_without_slack_the_batch_of_every_constraint_runs_and_a_byte_less_is_refused(
    layers: Layers, constraints: list[BatchDesc], block: int, max_util: float, resume_first: bool, order: Any
) -> None:
    settings = {"constraints": constraints, "max_util_for_resume": max_util}
    groups = layer_groups(config_of(layers, 1, block))
    pools = pools_of(groups)
    floors = [least_slots(pool, constraints, block, max_util) for pool in pools]
    quota = sum(floor * pool[0].slot_bytes for floor, pool in zip(floors, pools, strict=True))
    manager = KVCacheManager(config_of(layers, quota, block, **settings), SimulatedMemory())
    assert [group.pools[0].capacity for group in manager.store.pool_groups] == floors
    texts: list[list[int]] = []
    for _ in range(2):
        for batch in constraints:
            descs = list(batch.kv_caches)
            order.shuffle(descs)  # whoever is let in last
            prompts = [order.choice(texts)[: desc.history_length] if texts else [] for desc in descs]
            # with a prefix taken up, a sequence may have more of a window than at the history that it is named with
            sequences = run_batch(manager, BatchDesc(descs), prompts, resume_first and not texts)
            for kv, desc, prompt in zip(sequences, descs, prompts, strict=True):
                prompt += [order.randrange(2) for _ in range(desc.capacity - len(prompt))]
                kv.commit(prompt[kv.num_committed_tokens :])  # what stays must not be in the way
                kv.close()
                texts.append(prompt)
    expected = rf"^quota of the GPU tier: expected (at least {quota} bytes .*|a positive integer, got ){quota - 1}"
    with pytest.raises(ValueError, match=expected):
        KVCacheManager(config_of(layers, quota - 1, block, **settings), SimulatedMemory())


class Granular(HostMemory):
    """A memory that is given out by the 100 bytes; knows what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, list[int | None]]] = []
        self.num_closed = 0

    def grain(self, tier: int) -> int:
        return 100

    def resize(self, tier: int, num_slots: Sequence[int | None]) -> bool:
        self.asked.append((tier, list(num_slots)))
        return super().resize(tier, num_slots)

    def close(self) -> None:
        self.num_closed += 1
        super().close()


def test_a_memory_with_a_grain_is_asked_for_pools_that_fill_it():
    layers: Layers = [
        AttentionLayerConfig(0, (BufferConfig("kv", 30),)),
        SsmLayerConfig(1, (BufferConfig("state", 70),)),
    ]
    memory = Granular()
    config = config_of(layers, 301, 4, typical_step=STEP, constraints=[BatchDesc((KVCacheDesc(4),))])
    manager = KVCacheManager(config, memory)
    # 16 pages of 30 bytes and 9 states of 70: 227 of 400 bytes are for states, three slots, 300 bytes with the grain
    assert memory.asked == [(0, [3, 4])]
    assert manager.buffer(0, "kv").shape[0] == memory.asked[0][1][0]
    assert manager.resize_tier(0, 201)  # 170 of 300
    assert memory.asked[-1] == (0, [3, 2])
    assert manager.resize_tier(0, 101)
    assert memory.asked[-1] == (0, [3, 1])
    with pytest.raises(ValueError, match=r"expected at least 200 bytes .* got 100 bytes"):
        manager.resize_tier(0, 100)


def test_a_manager_that_cannot_be_made_gives_the_memory_back(tmp_path):
    layers: Layers = [AttentionLayerConfig(0, (BufferConfig("kv", 30),))]
    tiers = [GpuCacheTierConfig(1000), HostCacheTierConfig(1000), DiskCacheTierConfig(20, str(tmp_path))]
    memory = HostMemory()
    with pytest.raises(ValueError, match=r"quota of the last tier: expected at least 30 bytes .* got 20 bytes"):
        KVCacheManager(KVCacheManagerConfig(4, layers, tiers), memory)
    assert memory.bytes_in_use == 0
