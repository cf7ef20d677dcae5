"""Tiers that change their sizes while a manager runs: bytes stay right, and the oldest goes."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from managers import make_manager
from payload import BYTES, Request, Runner, Shape, random_text

from ssmcache import BatchDesc, KVCacheDesc, KVCacheManager, KVCacheStatus, ReuseScope
from ssmcache.sizing import step_of

SLOT = 2 * BYTES
SHAPES = {
    "full, 1 tier": Shape(slots=(10,)),
    "full, 2 tiers": Shape(slots=(8, 8)),
    "full, 3 tiers": Shape(slots=(6, 5, 7)),
    "hybrid, 1 tier": Shape(ssm=True, slots=(9,)),
    "hybrid, 2 tiers": Shape(ssm=True, slots=(7, 6)),
    "hybrid, 3 tiers": Shape(ssm=True, slots=(6, 4, 6)),
    "SSM alone, 2 tiers": Shape(ssm=True, full=False, slots=(4, 5)),
    "window, 1 tier": Shape(windows=((4, 2),), slots=(12,)),
    "windows, 2 tiers": Shape(windows=((4, 2), (7, 0)), slots=(10, 8)),
    "window, 3 tiers": Shape(windows=((3, 0),), slots=(9, 5, 7)),
    "a window alone, 2 tiers": Shape(full=False, windows=((4, 2),), slots=(9, 8)),
    "window and SSM, 3 tiers": Shape(windows=((5, 3),), ssm=True, slots=(8, 4, 5)),
    "all in one pool, 1 tier": Shape(windows=((4, 2), (7, 0)), ssm=True, slots=(9,), shared=True),
    "full and window in one pool, 3 tiers": Shape(windows=((5, 3),), slots=(8, 4, 5), shared=True),
}


def content_of(manager: KVCacheManager) -> list[Any]:
    """Everything that a refused change could have changed, bytes included."""
    segments = [
        (type(segment), segment.tier, segment.stamp, segment.rank, segment.queued, list(segment.slots))
        for run in manager.store.all_runs()
        for segment in (run.pages, *run.items)
        if segment is not None
    ]
    pools = [
        (pool.capacity, pool.staging, pool.used, pool.num_ever_used, pool.returned_slots())
        for pools in manager.pools
        for pool in pools
    ]
    views = [manager.memory.view(group.pool).tolist() for group in manager.groups]
    sequences = [(kv.status, kv.num_committed_tokens, kv.cursor.end) for kv in manager.open_sequences]
    queues = [[len(queue.segments()) for queue in tiers.queues] for tiers in manager.store.all_tiers()]
    return [segments, pools, views, sequences, queues, manager.quotas, manager.stats(), manager.memory_usage()]


def resize_at_random(runner: Runner, random: Random) -> bool | None:
    """`adjust` or `resize_tier`; None where the call itself is a mistake."""
    manager = runner.manager
    tier = random.randrange(len(manager.quotas))
    slot_bytes = [group.slot_bytes for group in manager.groups]
    quota = sum(slot_bytes) * random.randint(1, runner.shape.slots[tier] + 4) + random.randrange(SLOT)
    adjusts = random.random() < 0.4
    if manager.num_active:
        with pytest.raises(RuntimeError, match="expected no ACTIVE sequence, got"):
            manager.adjust() if adjusts else manager.resize_tier(tier, quota)
        return None
    before = content_of(manager)
    done = manager.adjust() if adjusts else manager.resize_tier(tier, quota)
    if not done:
        assert content_of(manager) == before
    elif adjusts:
        assert not manager.need_adjustment
    # layer groups that share a pool have slots of one size
    by_pool = [group.pools for group in manager.store.pool_groups]
    sizes = list(dict.fromkeys(slot_bytes))
    for index in range(len(manager.quotas)):
        used = sum(pools[index].capacity * size for size, pools in zip(sizes, by_pool, strict=True))
        assert used <= manager.quotas[index]
    physical = sum(
        (pool.capacity + pool.staging) * size for size, pools in zip(sizes, by_pool, strict=True) for pool in pools
    )
    assert manager.memory.bytes_in_use == physical
    return done


def run_and_resize(runner: Runner, random: Random, num_steps: int) -> tuple[int, int]:
    """Any calls, with changes of size among them, payload and invariants checked; how many were made and refused."""
    known: list[list[int]] = []
    made = refused = 0
    for _ in range(num_steps):
        active = [r for r in runner.requests if r.kv.status is KVCacheStatus.ACTIVE]
        suspended = [r for r in runner.requests if r.kv.status is KVCacheStatus.SUSPENDED]
        action = random.random()
        if action < 0.2 and len(runner.requests) < 5:
            runner.create(random_text(random, known, 12), random.choice((ReuseScope(), ReuseScope(salt=0))))
        elif action < 0.4 and suspended:
            runner.resume(random.choice(suspended))
        elif action < 0.6 and active:
            request = random.choice(active)
            left = len(request.tokens) - request.computed
            if left > 0:
                runner.compute(request, request.computed + random.randint(1, left), random.random() < 0.5)
        elif action < 0.8 and active:
            for request in active if random.random() < 0.6 else active[:1]:
                runner.suspend(request)
        elif action < 0.93:
            done = resize_at_random(runner, random)
            made += done is True
            refused += done is False
        elif runner.requests:
            runner.close(random.choice(runner.requests))
        runner.manager.check()
    runner.finish()
    return made, refused


@pytest.mark.parametrize("name", SHAPES)
def test_bytes_stay_right_whatever_is_resized_and_a_refusal_changes_nothing(name: str, tmp_path: Path) -> None:
    made = refused = checked = 0
    for seed in range(20):
        runner = Runner(SHAPES[name], str(tmp_path))
        counts = run_and_resize(runner, Random(seed), 120)
        made, refused, checked = made + counts[0], refused + counts[1], checked + runner.num_checked
    assert made > 20
    assert refused > 0
    assert checked > 500


def compute_all(runner: Runner, tokens: list[int]) -> Request:
    request = runner.create(tokens)
    assert runner.resume(request)
    for end in range(2, len(tokens) + 1, 2):
        assert runner.compute(request, end, False)
    return request


def close_one(manager: KVCacheManager, capacity: int) -> None:
    kv = manager.create_kv_cache(())
    assert kv.resume()
    assert kv.resize(capacity)
    kv.close()


def found(runner: Runner, tokens: list[int]) -> int:
    return runner.manager.probe_reuse(tokens).usable_tokens


def test_a_smaller_last_tier_drops_the_oldest_and_a_larger_one_keeps_everything() -> None:
    runner = Runner(Shape(slots=(12,), partly=False))
    texts = [[n] * 6 for n in range(4)]
    for text in texts:
        runner.close(compute_all(runner, text))
    manager = runner.manager
    assert manager.resize_tier(0, 8 * SLOT)
    manager.check()
    assert [found(runner, text) for text in texts] == [0, 4, 6, 6]  # the tail of the path is older than its head
    assert manager.resize_tier(0, 20 * SLOT)
    manager.check()
    assert [found(runner, text) for text in texts] == [0, 4, 6, 6]
    for text in texts[1:]:
        request = runner.create([*text, 9])
        assert runner.resume(request)  # reads the bytes
        runner.close(request)
    runner.finish()


def test_a_smaller_upper_tier_moves_the_oldest_down_and_drops_nothing() -> None:
    runner = Runner(Shape(slots=(8, 12), partly=False))
    texts = [[n] * 4 for n in range(4)]
    for text in texts:
        runner.close(compute_all(runner, text))
    assert runner.manager.resize_tier(0, 3 * SLOT)
    runner.manager.check()
    assert [found(runner, text) for text in texts] == [4, 4, 4, 4]
    usage = runner.manager.memory_usage()
    assert [tier[0].used_slots for tier in usage.tiers] == [3, 5]
    tiers = [run.pages.tier for run in runner.manager.store.all_runs() if run.pages is not None]
    assert sorted(tiers) in ([0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1])
    runner.finish()


def test_what_is_held_must_fit_and_soft_holds_need_not() -> None:
    runner = Runner(Shape(slots=(10,), partly=False))
    request = compute_all(runner, [1] * 12)
    runner.suspend(request)
    other = compute_all(runner, [2] * 6)
    runner.close(other)
    waiting = runner.create([2] * 6 + [3])
    before = content_of(runner.manager)
    assert not runner.manager.resize_tier(0, 5 * SLOT)
    assert content_of(runner.manager) == before
    assert runner.manager.resize_tier(0, 6 * SLOT)
    runner.manager.check()
    assert not waiting.kv.soft
    assert runner.resume(request)
    runner.finish()


@pytest.mark.parametrize("quota", [0, -5, 1.5, SLOT - 1])
def test_a_quota_that_cannot_be_and_a_tier_that_is_not_there_are_refused(quota: object) -> None:
    runner = Runner(Shape(slots=(10, 10)))
    before = content_of(runner.manager)
    with pytest.raises(ValueError, match=r"expected .*, got [-\d.]+"):
        runner.manager.resize_tier(1, quota)  # type: ignore[arg-type]
    for tier in (-1, 2):
        with pytest.raises(ValueError, match=rf"resize_tier: expected a tier with a quota, of 2, got {tier}"):
            runner.manager.resize_tier(tier, 10 * SLOT)
    assert content_of(runner.manager) == before
    with pytest.raises(ValueError, match="resize_tier: expected a tier with a quota"):
        make_manager(None, None).resize_tier(0, 1000)


def test_an_unlimited_cache_has_nothing_to_adjust() -> None:
    manager = make_manager(None, None)
    kv = manager.create_kv_cache(())
    assert kv.resume()
    assert kv.resize(640)
    kv.close()
    before = manager.memory.bytes_in_use
    assert not manager.need_adjustment
    assert manager.adjust()
    manager.check()
    assert manager.memory.bytes_in_use == before


def test_adjustment_is_wanted_only_beyond_a_quarter_and_not_after_it_was_made() -> None:
    # with an interval of 8 blocks, capacity c wants ceil(c / B) pages to 1 + c // 8B states
    seen = set()
    for num_blocks in range(1, 60):
        runner = Runner(Shape(block=1, ssm=True, interval=8, slots=(600,)))
        manager = runner.manager
        present = [pools[0].capacity for pools in manager.pools]
        assert not manager.need_adjustment, "nothing was seen yet"
        close_one(manager, num_blocks)
        wants = np.array([num_blocks, 1 + num_blocks // 8])
        sizes = np.array([group.slot_bytes for group in manager.groups])
        wanted = wants * (sizes * present).sum() / (wants * sizes).sum()
        ratio = max(np.maximum(wanted / present, present / wanted))
        if abs(ratio - 1.25) > 0.01:  # whole slots
            assert manager.need_adjustment == (ratio > 1.25)
            seen.add(manager.need_adjustment)
        assert manager.adjust()
        assert not manager.need_adjustment
        assert [pools[0].capacity for pools in manager.pools] == pytest.approx(
            wanted, abs=2
        )  # whole slots; the first gets the rest
    assert seen == {False, True}


def test_adjustment_is_wanted_where_but_one_small_pool_is_far_too_large() -> None:
    runner = Runner(Shape(block=1, ssm=True, interval=8, slots=(600,)))
    manager = runner.manager
    close_one(manager, 8)  # 8 pages to 2 states
    assert manager.adjust()
    for _ in range(manager.traffic.maxlen):
        close_one(manager, 7)  # 7 pages to 1 state: 1.09 times the pages, 0.63 times the states
    assert manager.need_adjustment
    assert manager.adjust()
    pages, states = (pools[0].capacity for pools in manager.pools)
    assert pages == pytest.approx(7 * states, abs=7)
    assert not manager.need_adjustment


def test_sequences_that_never_ran_say_nothing_about_the_traffic() -> None:
    runner = Runner(Shape(block=1, ssm=True, interval=8, slots=(600,)))
    for _ in range(50):
        runner.manager.create_kv_cache([1, 2, 3]).close()
    close_one(runner.manager, 40)
    wanted = step_of(runner.manager.traffic)
    assert wanted == BatchDesc((KVCacheDesc(40, 0),))
