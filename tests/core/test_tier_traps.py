"""Traps of several tiers, each on a cache small enough to follow by hand, or at random where a rule holds always."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from faulty_memory import FaultyMemory, once
from payload import Request, Runner, Shape, make_config, run_at_random
from pictures import deep_picture
from test_tier_payload import KINDS, TIERS, draw_shape

from ssmcache import KVCache, KVCacheManager, SimulatedMemory, sizing


def leave(runner: Runner, tokens: list[int]) -> None:
    """Compute and commit all but the last token, and close."""
    request = runner.create(tokens)
    assert runner.resume(request)
    assert runner.compute(request, len(tokens) - 1, reserve=True)
    runner.close(request)


def test_a_resume_that_could_only_evict_its_own_source_in_a_lower_tier_is_refused() -> None:
    runner = Runner(Shape(block=1, full=False, ssm=True, interval=1, slots=(2, 2), max_util=1.0))
    leave(runner, [1, 2])
    first, second, third = (runner.create([token, 6]) for token in (5, 7, 8))
    assert runner.resume(first)
    assert runner.resume(second)
    runner.suspend(first)
    runner.suspend(second)
    assert runner.resume(third)
    runner.suspend(third)
    # the host has the snapshot and a state that is held, the GPU two of those: the snapshot would have to go
    request = runner.create([1, 2])
    assert request.kv.num_committed_tokens == 1
    assert not runner.resume(request)
    assert (request.kv.shortage.reason, request.kv.shortage.needed) == ("slots", 1)
    runner.manager.check()
    runner.close(first)
    assert runner.resume(request)
    assert request.kv.num_committed_tokens == 1
    runner.finish()


def test_who_was_created_last_loses_its_match_first_even_if_another_was_prefetched_since() -> None:
    runner = Runner(Shape(block=1, slots=(4, 1), partly=False))
    leave(runner, [1, 1, 0])
    leave(runner, [2, 2, 0])
    first, second = runner.create([1, 1, 0]), runner.create([2, 2, 0])
    assert first.kv.prefetch(0)
    runner.manager.check()
    busy = runner.create([3, 0])
    assert runner.resume(busy)
    assert busy.kv.resize(3)
    assert (first.kv.num_attention_tokens, second.kv.num_attention_tokens) == (2, 0)
    runner.finish()


def test_pages_that_go_because_one_above_them_goes_count_as_evicted() -> None:
    runner = Runner(Shape(block=1, slots=(3, 1), partly=False))
    leave(runner, [1, 1, 0])
    held = runner.create([2, 0])
    assert runner.resume(held)
    assert held.kv.resize(2)  # the second of the two pages goes to the host
    runner.suspend(held)
    other = runner.create([3, 0])
    assert runner.resume(other)
    assert not other.kv.resize(3)
    assert other.kv.resize(2)  # one of the held pages takes the only slot of the host
    assert runner.manager.probe_reuse([1, 1]).attention_tokens == 0
    assert runner.manager.stats().pages_evicted == 2
    runner.finish()


def test_a_page_that_arrives_in_a_tier_before_what_is_below_it_has_left_is_the_next_to_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sizing, "_STAGING_BYTES", 1)  # one slot: the moves take turns
    runner = Runner(Shape(block=1, slots=(4, 2, 2), partly=False, max_util=1.0))
    leave(runner, [1, 1, 0])
    leave(runner, [2, 2, 2, 2, 0])
    busy = runner.create([3, 0])
    assert runner.resume(busy)
    assert busy.kv.resize(2)
    # half of the second text is on the GPU, the rest on the host, the first text on the disk: all change places
    first = runner.create([1, 1, 0])
    assert runner.resume(first)
    assert first.kv.usable_tokens_by_tier == (0, 0, 2)
    runner.manager.check()
    runner.close(first)
    again = runner.create([2, 2, 2, 2, 0])
    runner.close(busy)
    assert runner.resume(again)
    assert again.kv.usable_tokens_by_tier == (0, 2, 2)
    runner.finish()


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_call_leaves_every_slot_age_count_and_queue_as_it_was(
    kind: str, tiers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_refused = 0

    def watched(call: Callable[..., bool]) -> Callable[..., bool]:
        def make(kv: KVCache, *arguments: Any) -> bool:
            nonlocal num_refused
            before = deep_picture(kv.manager)
            granted = call(kv, *arguments)
            if not granted:
                num_refused += 1
                after = deep_picture(kv.manager)
                assert not [name for name in after if after[name] != before[name]]
            return granted

        return make

    for name in ("resume", "resize", "prefetch"):
        monkeypatch.setattr(KVCache, name, watched(getattr(KVCache, name)))
    for seed in range(300, 304):
        random = Random(seed)
        run_at_random(Runner(draw_shape(random, kind, TIERS[tiers]), str(tmp_path)), random, 120, longest=20)
    assert num_refused > 2


@pytest.mark.parametrize("call", ["resize", "resume", "prefetch"])
def test_a_call_whose_first_write_fails_leaves_all_but_the_size_of_that_tier_as_it_was(call: str) -> None:
    runner = Runner(Shape(block=1, slots=(4, 4, 4), partly=False, max_util=1.0), memory=FaultyMemory())
    leave(runner, [1, 1, 1, 0])
    busy = runner.create([2, 2, 2, 2, 0])
    assert runner.resume(busy)
    assert runner.compute(busy, 4, reserve=False)
    waiting = runner.create([1, 1, 1, 0])
    runner.suspend(busy)
    other = runner.create([3, 0])
    assert runner.resume(other)
    before = deep_picture(runner.manager)
    runner.manager.memory.fault = lambda moves: () if moves.destination_tier else None
    arguments = {"resize": (2,), "resume": (), "prefetch": (0,)}[call]
    kv = other.kv if call == "resize" else waiting.kv
    assert not getattr(kv, call)(*arguments)
    assert kv.shortage.reason == "io"
    runner.manager.check()
    after = deep_picture(runner.manager)
    assert {name for name in after if after[name] != before[name]} <= {"pools", "memory"}
    runner.finish()


# -- what goes -------------------------------------------------------------------------------------------------------


def test_nothing_leaves_the_cache_while_a_tier_below_has_a_free_slot() -> None:
    for seed in range(30):
        random = Random(seed)
        slots = (9, random.randint(1, 6), random.randint(1, 6))
        manager = KVCacheManager(make_config(Shape(block=1, slots=slots, partly=False), "."), SimulatedMemory())
        num_evicted = 0
        for _ in range(40):
            tokens = [random.randint(0, 2) for _ in range(random.randint(2, 9))]
            kv = manager.create_kv_cache(tokens[:-1])
            assert kv.resume()
            assert kv.resize(len(tokens))
            if manager.stats().pages_evicted > num_evicted:
                num_evicted = manager.stats().pages_evicted
                assert [tier[0].used_slots for tier in manager.memory_usage().tiers] == list(slots)
            kv.commit(tokens[kv.num_committed_tokens :])
            kv.close()
        assert num_evicted


def test_a_lost_page_takes_all_branches_below_it_out_of_reach_and_their_pages_come_back() -> None:
    runner = Runner(Shape(block=1, slots=(9, 16), partly=False, max_util=1.0), memory=FaultyMemory())
    texts = [[1, 2, 3, 4, 4], [1, 2, 3, 5, 5], [1, 2, 6, 6], [7, 7]]
    for text in texts:
        leave(runner, [*text, 0])
    holder = runner.create([*texts[1], 0])
    assert runner.resume(holder)
    runner.suspend(holder)
    leave(runner, [9] * 9 + [0])
    assert [tier[0].used_slots for tier in runner.manager.memory_usage().tiers] == [9, 11]
    request: Request = runner.create([*texts[0], 0])
    runner.manager.memory.fault = once(1, 0, (2,))
    assert not runner.resume(request)
    runner.manager.check()
    probes = [runner.manager.probe_reuse(text).usable_tokens for text in texts]
    assert probes == [2, 2, 4, 2]
    # the branch that nobody holds is free already, the other one when its holder has closed
    used = [tier[0].used_slots for tier in runner.manager.memory_usage().tiers]
    assert sum(used) == 9 + 11 - 2
    runner.close(holder)
    assert [tier[0].used_slots for tier in runner.manager.memory_usage().tiers] == [used[0], used[1] - 3]
    assert runner.resume(request)
    assert request.kv.num_committed_tokens == 2
    runner.finish()
