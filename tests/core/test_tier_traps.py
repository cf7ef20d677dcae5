"""Traps of several tiers, each on a cache small enough to follow by hand."""

from __future__ import annotations

import pytest
from payload import Runner, Shape

from ssmcache import sizing


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
