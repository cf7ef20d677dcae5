"""Sequences that were suspended while others need the GPU: where they go, how they come back, and what they share."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from payload import Request, Runner, Shape, make_config
from pictures import deep_picture, page_tiers, parked_tiers, snapshot_tiers

from ssmcache import KVCache, KVCacheManager, KVCacheStatus, SimulatedMemory, StateError

GPU, HOST, DISK = 0, 1, 2


def start(runner: Runner, tokens: list[int], capacity: int | None = None) -> Request:
    """An ACTIVE sequence that has computed and committed all but its last token."""
    request = runner.create(tokens)
    assert runner.resume(request)
    assert runner.compute(request, len(tokens) - 1, reserve=True)
    if capacity is not None:
        assert request.kv.resize(capacity)
    return request


def used(runner: Runner, layer_group: int = 0) -> list[int]:
    return [tier[layer_group].used_slots for tier in runner.manager.memory_usage().tiers]


# -- room ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [(8, 8), (8, 3, 5), (8, 1, 9)])
def test_a_suspended_sequence_leaves_all_of_the_gpu_to_others_where_the_tiers_below_have_room(
    slots: tuple[int, ...],
) -> None:
    runner = Runner(Shape(block=1, slots=slots, partly=False, max_util=0.5))
    waiting = start(runner, [1, 2, 3, 4, 0], capacity=8)
    runner.suspend(waiting)
    assert used(runner)[GPU] == 8  # nobody needs it yet
    busy = runner.create([9, 0])
    assert runner.resume(busy)
    assert busy.kv.resize(8)
    runner.manager.check()
    assert (used(runner)[GPU], sum(used(runner)[HOST:])) == (8, 8)
    assert all(tier > GPU for tier in page_tiers(runner.manager).values())
    assert runner.manager.stats().pages_evicted == 0
    runner.close(busy)
    assert runner.resume(waiting)
    assert used(runner) == [8, *[0] * (len(slots) - 1)]
    runner.finish()


def test_held_pages_count_against_the_gate_only_where_they_cannot_move() -> None:
    runner = Runner(Shape(block=1, slots=(8, 4), partly=False, max_util=0.5))
    holding = start(runner, [1, 2, 3, 4, 0], capacity=7)
    runner.suspend(holding)
    busy = runner.create([9, 0])
    assert runner.resume(busy)
    assert busy.kv.resize(1)
    newcomer = runner.create([8, 0])
    assert runner.resume(newcomer)  # 1 page is locked and 3 of the 7 have no room below: 4 of 8
    runner.close(newcomer)
    assert busy.kv.resize(2)  # the oldest held page is on the host now
    newcomer = runner.create([8, 0])
    assert not runner.resume(newcomer)
    assert (newcomer.kv.shortage.reason, newcomer.kv.shortage.held) == ("utilization", 5)
    runner.finish()


def test_a_sequence_is_let_in_again_whatever_it_holds_itself() -> None:
    runner = Runner(Shape(block=1, slots=(8, 1), partly=False, max_util=0.3))
    busy = start(runner, [9, 0])
    holding = start(runner, [1, 2, 3, 4, 0], capacity=7)
    runner.suspend(holding)
    newcomer = runner.create([8, 0])
    assert not runner.resume(newcomer)
    assert newcomer.kv.shortage.reason == "utilization"
    assert runner.resume(holding)
    runner.close(busy)
    runner.finish()


@pytest.mark.parametrize("slots", [(6, 3), (6, 2, 3)])
def test_a_request_longer_than_a_tier_is_refused_by_the_gpu_alone_and_changes_nothing(slots: tuple[int, ...]) -> None:
    runner = Runner(Shape(block=1, slots=slots, partly=False))
    request = start(runner, [1, 2, 3, 4, 5, 0], capacity=6)  # longer than the tiers below
    before = deep_picture(runner.manager)
    assert not request.kv.resize(7)
    assert (request.kv.shortage.reason, request.kv.shortage.tier, request.kv.shortage.needed) == ("slots", "gpu", 1)
    assert deep_picture(runner.manager) == before
    runner.suspend(request)
    other = runner.create([9, 0])
    assert runner.resume(other)
    assert not other.kv.resize(6)
    assert other.kv.resize(sum(slots[1:]))
    runner.manager.check()
    assert not request.kv.prefetch(GPU)
    assert not runner.resume(request)
    assert request.kv.shortage.reason == "slots"
    runner.close(other)
    assert runner.resume(request)
    runner.finish()


@pytest.mark.parametrize("shape", [Shape(block=2, slots=(9, 4)), Shape(block=2, slots=(9, 3, 2), ssm=True, interval=4)])
def test_a_thousand_sequences_in_batches_all_finish_and_no_slot_leaks(shape: Shape) -> None:
    """Whoever finds no room is suspended; if nobody gets on, one starts again."""
    manager = KVCacheManager(make_config(shape, "."), SimulatedMemory())
    random, num_left = Random(5), 1000
    count: Counter[str] = Counter()
    batch: list[tuple[KVCache, list[int]]] = []
    while num_left or batch:
        while num_left and len(batch) < 4:
            num_left -= 1
            tokens = [random.randint(0, 1) for _ in range(random.randint(2, 16))]
            batch.append((manager.create_kv_cache(tokens[:-1]), tokens))
        progress = False
        for member in list(batch):
            outcome = advance(*member, random)
            count[outcome] += 1
            progress |= outcome in ("finished", "computed")
            if outcome == "finished":
                batch.remove(member)
        if not progress:
            kv, tokens = batch.pop(random.randrange(len(batch)))
            kv.close()
            batch.append((manager.create_kv_cache(tokens[:-1]), tokens))
            count["started again"] += 1
        manager.check()
    assert count["finished"] == 1000
    assert min(count[outcome] for outcome in ("suspended", "refused", "started again")) > 10
    manager.clear_reusable_blocks()
    assert not any(pool.used for pools in manager.pools for pool in pools)


def advance(kv: KVCache, tokens: list[int], random: Random) -> str:
    """Compute a few tokens more, as far as there is room."""
    if kv.status is KVCacheStatus.SUSPENDED and not kv.resume():
        return "refused"
    end = min(len(tokens), kv.num_committed_tokens + random.randint(1, 6))
    if not kv.resize(max(end, kv.capacity)):
        kv.suspend()
        return "suspended"
    kv.reserve_snapshots(kv.snapshot_points(end))
    kv.commit(tokens[kv.num_committed_tokens : end])
    if end < len(tokens):
        return "computed"
    kv.close()
    return "finished"


# -- snapshots -------------------------------------------------------------------------------------------------------


def test_a_sequence_goes_on_and_commits_after_its_snapshot_was_evicted_while_it_was_suspended() -> None:
    runner = Runner(Shape(block=2, ssm=True, interval=2, slots=(4, 2), max_util=1.0))
    owner = start(runner, [1, 1, 2, 2, 0])
    owner.tokens = [1, 1, 2, 2, 3, 3, 0]
    assert len(snapshot_tiers(runner.manager)) == 2
    runner.suspend(owner)
    others = [runner.create([5 + index, 0]) for index in range(4)]
    assert all(runner.resume(other) for other in others)  # the live states fill the GPU, the owner's is on the host
    runner.manager.check()
    assert len(snapshot_tiers(runner.manager)) == 1
    for other in others:
        runner.suspend(other)
    for other in others:
        runner.close(other)
    assert runner.resume(owner)
    assert runner.compute(owner, 6, reserve=False)
    assert runner.manager.probe_reuse([1, 1, 2, 2, 3, 3]).usable_tokens == 6
    runner.close(owner)
    again = runner.create([1, 1, 2, 2, 3, 3, 0])
    assert runner.resume(again)
    assert again.kv.num_committed_tokens == 6
    runner.finish()


def test_a_source_that_is_all_there_is_on_the_gpu_becomes_the_live_state() -> None:
    runner = Runner(Shape(block=1, full=False, ssm=True, interval=1, slots=(2, 1), max_util=1.0))
    runner.close(start(runner, [1, 2]))
    busy = runner.create([8, 0])
    assert runner.resume(busy)
    held = runner.create([7, 0])  # takes the snapshot's place, which goes to the host
    assert runner.resume(held)
    runner.suspend(held)
    first, second = runner.create([1, 2]), runner.create([1, 2])
    assert first.kv.prefetch(GPU)
    assert snapshot_tiers(runner.manager).popitem()[1] == GPU
    before = deep_picture(runner.manager)
    assert not runner.resume(first)  # the other one waits for it, too
    assert first.kv.shortage.reason == "slots"
    assert deep_picture(runner.manager) == before
    runner.close(second)
    assert runner.resume(first)
    assert first.kv.num_committed_tokens == 1
    assert runner.manager.stats().copied_states == 0
    assert snapshot_tiers(runner.manager) == {}
    runner.finish()


def test_snapshots_are_added_to_known_blocks_that_have_none() -> None:
    runner = Runner(Shape(block=1, ssm=True, interval=2, slots=(8, 8)))
    first = runner.create([1, 2, 3, 4, 0])
    assert runner.resume(first)
    assert runner.compute(first, 4, reserve=False)
    runner.close(first)
    assert sorted(len(block) - 1 for block in snapshot_tiers(runner.manager)) == [4]
    second = runner.create([1, 2, 3, 0])
    assert runner.resume(second)
    assert second.kv.num_attention_tokens == 3
    assert runner.compute(second, 3, reserve=True)
    assert sorted(len(block) - 1 for block in snapshot_tiers(runner.manager)) == [2, 4]
    assert len(page_tiers(runner.manager)) == 4
    runner.finish()


# -- sharing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_is_below", [False, True])
def test_two_sequences_that_compute_the_same_prefix_end_up_on_one_set_of_pages(first_is_below: bool) -> None:
    runner = Runner(Shape(block=1, slots=(8, 8), partly=False, max_util=1.0))
    first, second = runner.create([1, 2, 3, 0]), runner.create([1, 2, 3, 0])
    assert runner.resume(first)
    assert runner.resume(second)
    assert runner.compute(first, 3, reserve=False)
    if first_is_below:
        runner.suspend(first)
        filler = start(runner, [9] * 8 + [0])
        runner.close(filler)
        assert {tier for block, tier in page_tiers(runner.manager).items() if block[1] == (1,)} == {HOST}
        moved = runner.manager.stats().transfers
    assert runner.compute(second, 3, reserve=False)
    runner.manager.check()
    mine = {block: tier for block, tier in page_tiers(runner.manager).items() if block[1] == (1,)}
    assert len(mine) == 3
    assert set(mine.values()) == {GPU}
    if first_is_below:
        assert [part for part in runner.manager.stats().transfers if part.tier == "gpu"] == [
            part for part in moved if part.tier == "gpu"
        ]  # the copy on the GPU was kept, none was made
        assert runner.resume(first)
    assert first.kv.page_indices(0).tolist()[:3] == second.kv.page_indices(0).tolist()[:3]
    runner.finish()


# -- prefetch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [GPU, HOST, DISK])
@pytest.mark.parametrize("resumed", [False, True], ids=["created", "suspended"])
def test_prefetch_brings_what_lies_below_a_tier_up_to_it_and_no_further(tier: int, resumed: bool) -> None:
    runner = Runner(Shape(block=2, ssm=True, interval=2, slots=(4, 4, 8), max_util=1.0))
    request = start(runner, [1, 1, 2, 2, 3, 3, 0])
    if resumed:
        runner.suspend(request)
    else:
        runner.close(request)
    for first in (20, 30):  # push it to the host, then on to the disk
        fillers = [runner.create([first + index, 0]) for index in range(4)]
        assert all(runner.resume(filler) for filler in fillers)
        assert fillers[0].kv.resize(8)
        for filler in fillers:
            runner.suspend(filler)
    for filler in [filler for filler in runner.requests if filler is not request]:
        runner.close(filler)
    if not resumed:
        request = runner.create([1, 1, 2, 2, 3, 3, 0])
    before = page_tiers(runner.manager), snapshot_tiers(runner.manager), parked_tiers(request.kv)
    assert set(before[0].values()) == {DISK}
    assert request.kv.prefetch(tier)
    runner.manager.check()
    assert set(page_tiers(runner.manager).values()) == {tier}
    if resumed:
        assert parked_tiers(request.kv) == ((), (tier,))
    else:  # the snapshot that it would start from, no other
        after = snapshot_tiers(runner.manager)
        (source,) = (block for block in after if len(block) == 4)
        assert {block: found for block, found in after.items() if after[block] != before[1][block]} == (
            {} if tier == before[1][source] else {source: tier}
        )
    picture = deep_picture(runner.manager)
    assert request.kv.prefetch(tier)
    assert deep_picture(runner.manager) == picture, "there was nothing left to bring up"
    assert runner.resume(request)
    runner.finish()


def test_prefetch_is_for_sequences_that_are_not_active_and_for_tiers_that_exist() -> None:
    runner = Runner(Shape(block=1, slots=(4, 4), partly=False))
    request = start(runner, [1, 2, 0])
    with pytest.raises(StateError, match="prefetch: expected a SUSPENDED sequence, got ACTIVE"):
        request.kv.prefetch()
    runner.suspend(request)
    with pytest.raises(ValueError, match=r"prefetch: expected a tier in 0\.\.1, got 2"):
        request.kv.prefetch(2)
    runner.finish()
