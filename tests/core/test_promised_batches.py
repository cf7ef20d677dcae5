"""A batch that `constraints` name is let in on the smallest memory that the floors ask for, at any utilization."""

from __future__ import annotations

from fractions import Fraction
from itertools import count
from random import Random

import numpy as np
import pytest

from ssmcache import (
    AttentionLayerConfig,
    BatchDesc,
    BufferConfig,
    GpuCacheTierConfig,
    KVCacheDesc,
    KVCacheManager,
    KVCacheManagerConfig,
    SimulatedMemory,
    SsmLayerConfig,
)

# with these, 0.7 * 90 is 63 in decimals and less than that in floats; the numbers of sequences that an engine has
TROUBLE = [(0.7, 64), (0.7, 120), (0.7, 127)]
SHARES = [
    "0.01",
    "0.07",
    "0.1",
    "0.29",
    "0.3",
    "0.55",
    "0.57",
    "0.6",
    "0.7",
    "0.8",
    "0.9",
    "0.95",
    "0.97",
    "0.999",
    "1",
]


def config(share: object, batch: BatchDesc, quota: int, pages: bool = False) -> KVCacheManagerConfig:
    layers = [SsmLayerConfig(0, (BufferConfig("state", 1),))]
    if pages:
        layers = [AttentionLayerConfig(0, (BufferConfig("kv", 1),))]
    return KVCacheManagerConfig(
        tokens_per_block=1, layers=layers, cache_tiers=[GpuCacheTierConfig(quota)], ssm_reuse_interval=1000,
        max_util_for_resume=share, constraints=(batch,),
    )  # fmt: skip


def least_slots(share: str, needs: list[int]) -> int:
    """By trying them: the batch fits, and whoever comes last finds no more than the share held, in exact numbers."""
    limit, total = Fraction(share), sum(needs)
    return next(slots for slots in count(max(1, total)) if total - min(needs) <= limit * slots)


def let_in(manager: KVCacheManager, needs: list[int], pages: bool) -> bool:
    for need in needs:
        kv = manager.create_kv_cache()
        if not (kv.resume() and kv.resize(need if pages else 1)):
            return False
    return True


@pytest.mark.parametrize(("share", "num_sequences"), TROUBLE)
def test_batches_that_floats_miss_by_one_are_let_in(share: float, num_sequences: int) -> None:
    batch = BatchDesc((KVCacheDesc(1),) * num_sequences)
    least = least_slots(str(share), [1] * num_sequences)
    manager = KVCacheManager(config(share, batch, least), SimulatedMemory())
    assert let_in(manager, [1] * num_sequences, pages=False)
    assert manager.used_slots(0) == num_sequences


@pytest.mark.parametrize("share", SHARES)
def test_floors_are_the_least_with_which_a_batch_of_any_size_is_let_in(share: str) -> None:
    for num_sequences in range(1, 130):
        needs = [1] * num_sequences
        batch = BatchDesc((KVCacheDesc(1),) * num_sequences)
        least = least_slots(share, needs)
        manager = KVCacheManager(config(float(share), batch, least), SimulatedMemory())
        assert let_in(manager, needs, pages=False), (share, num_sequences)
        if least > 1:
            with pytest.raises(ValueError, match=f"expected at least {least} bytes"):
                KVCacheManager(config(float(share), batch, least - 1), SimulatedMemory())


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, Fraction])
def test_shares_of_two_decimals_and_sequences_of_all_lengths(kind: type) -> None:
    random = Random(7)
    for _ in range(150):
        hundredths = random.randint(1, 100)
        share = f"{hundredths / 100}"
        needs = [random.randint(1, 40) for _ in range(random.randint(1, 12))]
        batch = BatchDesc(tuple(KVCacheDesc(need) for need in needs))
        least = least_slots(share, needs)
        given = Fraction(hundredths, 100) if kind is Fraction else kind(share)
        manager = KVCacheManager(config(given, batch, least, pages=True), SimulatedMemory())
        needs.sort(reverse=True)  # the smallest comes last, and finds the most held
        assert let_in(manager, needs, pages=True), (share, needs)
        if least > 1:
            with pytest.raises(ValueError, match=f"expected at least {least} bytes"):
                KVCacheManager(config(given, batch, least - 1, pages=True), SimulatedMemory())


@pytest.mark.parametrize("share", SHARES)
def test_the_gate_lets_in_at_exactly_the_share_and_not_above_it(share: str) -> None:
    limit = Fraction(share)
    for num_slots in range(1, 101, 3):
        manager = KVCacheManager(config(float(share), BatchDesc((KVCacheDesc(1),)), num_slots), SimulatedMemory())
        for num_held in range(num_slots):
            kv = manager.create_kv_cache()
            assert kv.resume() == (num_held <= limit * num_slots), (share, num_slots, num_held)
            if kv.shortage is not None:
                assert kv.shortage.reason == "utilization"
                break
