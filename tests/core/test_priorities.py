"""Priorities: who goes first is in `test_eviction_order.py`; here is what a priority is given to, and when."""

from __future__ import annotations

from collections import Counter

import pytest
from payload import Shape, make_config
from stored import Stored

from ssmcache import KVCache, KVCacheManager, KVCacheStatus, ReuseScope, SimulatedMemory
from ssmcache.priority import PriorityCallback
from ssmcache.segments import DEFAULT_PRIORITY

TEXT = tuple(range(100, 140))
OTHER = tuple(range(200, 240))


def make(slots: int, full: bool = True, windows: tuple[tuple[int, int], ...] = (), ssm: bool = False) -> KVCacheManager:
    shape = Shape(block=1, full=full, windows=windows, ssm=ssm, interval=1, slots=(slots,), partly=False)
    return KVCacheManager(make_config(shape, "."), SimulatedMemory())


def start(manager: KVCacheManager, text: tuple[int, ...] = (), priority: PriorityCallback | None = None) -> KVCache:
    kv = manager.create_kv_cache(text, priority=priority)
    assert kv.resume()
    return kv


def leave(manager: KVCacheManager, text: tuple[int, ...], priority: PriorityCallback | None = None) -> None:
    """Commit a text token by token, and close."""
    kv = start(manager, text[:-1], priority)
    while kv.num_committed_tokens < len(text):
        assert kv.resize(kv.num_committed_tokens + 1, kv.num_committed_tokens)
        kv.commit(text[kv.num_committed_tokens : kv.num_committed_tokens + 1])
    kv.close()
    manager.check()


def pages(manager: KVCacheManager) -> set[tuple[int, ...]]:
    return {tokens for tokens, block in Stored(manager, ReuseScope()).full.items() if block.has_page}


def window_pages(manager: KVCacheManager, text: tuple[int, ...]) -> set[int]:
    """Blocks of a text that have one."""
    stored = Stored(manager, ReuseScope()).full
    return {len(tokens) - 1 for tokens, block in stored.items() if block.windows and tokens == text[: len(tokens)]}


def ranks(manager: KVCacheManager) -> list[tuple[int, int, int]]:
    """Every run as (start, end, priority of its pages), from the top down."""
    runs = sorted(manager.store.all_runs(), key=lambda run: run.start)
    return [(run.start, run.end, DEFAULT_PRIORITY + (run.pages.rank >> 54)) for run in runs if run.pages is not None]


def always(value: int) -> PriorityCallback:
    return lambda group, block: value


def test_an_older_block_of_higher_priority_stays_and_a_younger_one_of_lower_priority_goes() -> None:
    manager = make(8)
    leave(manager, TEXT[:3], always(36))
    leave(manager, OTHER[:3], always(34))
    leave(manager, (7, 8, 9, 10))
    assert pages(manager) == {TEXT[:1], TEXT[:2], TEXT[:3], OTHER[:1], *((7, 8, 9, 10)[:n] for n in range(1, 5))}


def test_a_tail_of_high_priority_keeps_what_is_above_it_whatever_that_was_given() -> None:
    manager = make(8)
    leave(manager, TEXT[:4], lambda group, block: 100 if block == 3 else 0)
    leave(manager, OTHER[:4], always(99))
    kv = start(manager)
    assert kv.resize(4)
    assert pages(manager) == {TEXT[:n] for n in range(1, 5)}
    assert kv.resize(5)  # the tail goes at last; then the rest of it is of the lowest priority
    kv.close()
    assert pages(manager) == {TEXT[:n] for n in range(1, 4)}


def test_blocks_of_one_commit_become_runs_of_equal_priority() -> None:
    manager = make(20)
    kv = start(manager, priority=lambda group, block: (50, 50, 50, 10, 10, 50)[block] if block < 6 else 35)
    assert kv.resize(8)
    kv.commit(TEXT[:8])
    assert ranks(manager) == [(0, 3, 50), (3, 5, 10), (5, 6, 50), (6, 8, 35)]
    kv.close()
    manager.check()
    assert ranks(manager) == [(0, 3, 50), (3, 5, 10), (5, 6, 50), (6, 8, 35)]


def test_a_block_keeps_the_highest_priority_whoever_gave_it_and_in_whatever_order() -> None:
    manager = make(20)
    leave(manager, TEXT[:6], lambda group, block: (60, 60, 40, 40, 40, 40, 35)[block])
    start(manager, TEXT[:6], lambda group, block: (50, 50, 50, 30, 70, 0, 35)[block]).close()  # at its first resume
    expected = [(0, 2, 60), (2, 3, 50), (3, 4, 40), (4, 5, 70), (5, 6, 40)]
    assert ranks(manager) == expected
    kv = start(manager, TEXT[:1], always(45))  # at a commit of blocks that are known: 2 and the last two get more
    assert kv.resize(6)
    kv.commit(TEXT[1:6])
    kv.close()
    manager.check()
    assert ranks(manager) == [(0, 2, 60), (2, 3, 50), (3, 4, 45), (4, 5, 70), (5, 6, 45)]


def test_a_sequence_without_a_callback_raises_what_had_less_to_the_default() -> None:
    manager = make(20)
    leave(manager, TEXT[:4], lambda group, block: 80 if block == 0 else 10)
    start(manager, TEXT[:2]).close()
    assert ranks(manager) == [(0, 1, 80), (1, 2, 35), (2, 4, 10)]


def test_snapshots_and_window_pages_have_the_priority_of_their_own_group_and_block() -> None:
    manager = make(7, windows=((2, 0),), ssm=True)
    # (full, window, SSM): only SSM slots are short, and that of block 1 shall stay
    leave(manager, TEXT[:4], lambda group, block: 90 if (group, block) == (2, 1) else 35 - block)
    manager.pools[2][0].capacity = 5
    leave(manager, OTHER[:3], always(36))
    stored = Stored(manager, ReuseScope()).full
    assert {tokens for tokens, block in stored.items() if block.has_snapshot} == {
        TEXT[:2],
        *(OTHER[:n] for n in (1, 2, 3)),
    }


def test_a_sink_page_of_low_priority_takes_all_below_it_along_and_nothing_else_goes_for_the_same_room() -> None:
    manager = make(10, full=False, windows=((3, 1),))
    leave(manager, OTHER[:4], always(50))
    leave(manager, TEXT[:6], lambda group, block: 100 if block else 0)
    assert manager.used_slots(0) == 10
    kv = start(manager)
    assert kv.resize(5)
    assert window_pages(manager, TEXT) == set()
    assert window_pages(manager, OTHER) == {0, 1, 2, 3}
    assert manager.pools[0][0].free == 1
    manager.check()


def test_blocks_that_were_raised_to_the_priority_of_others_go_in_one_order_with_them() -> None:
    manager = make(8, full=False, windows=((2, 0),))
    leave(manager, TEXT[:8], lambda group, block: 35 if block % 2 else 50)
    kv = start(manager, TEXT[:8], lambda group, block: 50 if block == 3 else 35)
    assert kv.resize(13, 8)
    # first 5 and 1, of the default priority (7 is needed), then 6, 4 and 3
    assert window_pages(manager, TEXT) == {0, 2, 7}
    manager.check()


def test_a_callback_is_asked_once_for_each_group_and_block_as_far_as_they_are_needed() -> None:
    manager = make(20, windows=((2, 0),), ssm=True)
    asked: Counter[tuple[int, int]] = Counter()

    def priority(group: int, block: int) -> int:
        asked[group, block] += 1
        return 40

    kv = start(manager, TEXT[:4], priority)
    assert kv.resize(12)
    for end in (3, 4, 9):
        kv.commit(TEXT[kv.num_committed_tokens : end])
    kv.suspend()
    assert kv.resume()
    kv.close()
    assert set(asked) == {(group, block) for group in range(3) for block in range(10)}
    assert set(asked.values()) == {1}


class CallbackError(Exception):
    """Of a caller's callback."""


def fail() -> int:
    raise CallbackError


ANSWERS = {
    "-1": lambda: -1,
    "101": lambda: 101,
    "1.5": lambda: 1.5,
    "None": lambda: None,
    "True": lambda: True,
    "an error": fail,
}


def look(manager: KVCacheManager, kv: KVCache) -> tuple[object, ...]:
    lengths = kv.status, kv.num_committed_tokens, kv.history_length, kv.capacity, kv.num_attention_tokens
    held = [(run.start, run.end, run.holds, run.soft_holds, len(run.items)) for run in manager.store.all_runs()]
    queues = [[(s.stamp, s.rank, s.serial) for s in tiers.queues[0].segments()] for tiers in manager.store.all_tiers()]
    return lengths, manager.memory_usage(), manager.stats(), held, queues, manager.store.clock.now


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("bad_block", [0, 3])
def test_a_callback_that_fails_at_the_first_resume_leaves_all_as_it_was(answer: str, bad_block: int) -> None:
    manager = make(20, windows=((3, 1),), ssm=True)
    leave(manager, TEXT[:6])
    answers = {"bad": True}
    wrong = ANSWERS[answer]
    kv = manager.create_kv_cache(
        TEXT[:6], priority=lambda group, block: wrong() if answers["bad"] and block == bad_block else 60
    )
    before = look(manager, kv)
    message = f"priority of block {bad_block} in layer group 0: expected an integer in 0..100, got {answer}"
    with pytest.raises((CallbackError, ValueError), match=None if answer == "an error" else message):
        kv.resume()
    assert look(manager, kv) == before
    manager.check()
    answers["bad"] = False
    assert kv.resume()
    kv.close()
    manager.clear_reusable_blocks()
    assert manager.memory_usage().used_bytes == 0


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_callback_that_fails_at_a_commit_leaves_all_as_it_was(answer: str) -> None:
    manager = make(20, windows=((3, 1),), ssm=True)
    answers = {"bad": True}
    wrong = ANSWERS[answer]
    kv = start(manager, (), lambda group, block: wrong() if answers["bad"] and (group, block) == (1, 6) else 60)
    assert kv.resize(10)
    kv.commit(TEXT[:4])
    before = look(manager, kv), [kv.page_indices(group).tolist() for group in (0, 1)]
    with pytest.raises((CallbackError, ValueError)):
        kv.commit(TEXT[4:8])
    assert (look(manager, kv), [kv.page_indices(group).tolist() for group in (0, 1)]) == before
    manager.check()
    answers["bad"] = False
    kv.commit(TEXT[4:8])
    assert kv.num_committed_tokens == 8
    kv.close()
    manager.check()
    assert kv.status is KVCacheStatus.CLOSED
