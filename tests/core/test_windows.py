"""Sliding windows: which blocks are stale, and what a resize and a commit do with the pages of those."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from payload import Runner, Shape
from stored import Stored

from ssmcache import KVCacheManager, KVCacheStatus, ReuseScope
from ssmcache.windows import Window

NUM_BLOCKS = 8
TEXT = list(range(100, 164))


def blocks_that_are_seen(size: int, num_sink_tokens: int, block: int, history: int) -> set[int]:
    """By definition: a query at q sees the keys above q - size up to its own, and the sinks before it. Some query at
    `history` or later must see some key of the block. Sinks are kept in whole blocks.
    """
    seen = set()
    for query in range(history, NUM_BLOCKS * block + size):
        for key in range(query + 1):
            if key > query - size or key < num_sink_tokens:
                seen.add(key // block)
    return seen


@pytest.mark.parametrize("block", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 12])
@pytest.mark.parametrize("num_sink_tokens", [0, 1, 2, 4, 5, 9])
def test_blocks_are_stale_exactly_when_no_query_to_come_sees_a_key_of_them(
    block: int, size: int, num_sink_tokens: int
) -> None:
    window = Window(size, num_sink_tokens, block)
    for history in range(NUM_BLOCKS * block + 1):
        seen = blocks_that_are_seen(size, num_sink_tokens, block, history)
        first, end = window.stale_blocks(history)
        stale = set(range(first, end))
        assert stale == set(range(NUM_BLOCKS)) - seen, f"history {history}"
        for num_blocks in range(NUM_BLOCKS + 1):
            expected = sorted(seen & set(range(num_blocks)))
            assert window.needed_blocks(history, num_blocks) == expected


@pytest.mark.parametrize("block", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 12])
@pytest.mark.parametrize("num_sink_tokens", [0, 1, 2, 4, 5, 9])
def test_up_to_the_next_change_the_same_blocks_are_stale_and_without_sinks_not_longer(
    block: int, size: int, num_sink_tokens: int
) -> None:
    window = Window(size, num_sink_tokens, block)
    for history in range(NUM_BLOCKS * block + 1):
        change = window.next_change(history)
        stale = [window.stale_blocks(later) for later in range(history, change + 1)]
        assert len(stale) > 1, f"history {history}"
        assert set(stale[:-1]) == {stale[0]}
        if not num_sink_tokens and history + 1 >= size:  # before that no key is out of the window yet
            assert stale[-1] == (0, stale[0][1] + 1)


@pytest.mark.parametrize(
    ("history", "stale"),
    [(0, 0), (127, 0), (158, 0), (159, 1), (190, 1), (191, 2), (192, 2), (222, 2), (223, 3)],
)
def test_a_window_of_128_in_blocks_of_32_lets_a_block_go_one_token_before_the_next_block_begins(
    history: int, stale: int
) -> None:
    assert Window(128, 0, 32).stale_blocks(history) == (0, stale)
    # one sink token keeps one block, from when there is a token in it
    assert Window(128, 1, 32).stale_blocks(history) == (min(1, history), max(min(1, history), stale))


def look(manager: KVCacheManager, kv: object, *groups: int) -> tuple[object, ...]:
    lengths = kv.status, kv.capacity, kv.history_length, kv.num_committed_tokens
    queues = [
        [(segment.serial, segment.stamp) for segment in tiers.queues[0].segments()]
        for tiers in manager.store.all_tiers()
    ]
    indices = [kv.page_indices(group).tolist() for group in groups]
    return lengths, manager.memory_usage(), manager.stats(), queues, indices


def only_window(slots: int, window: tuple[int, int] = (4, 0)) -> Runner:
    return Runner(Shape(full=False, windows=(window,), slots=(slots,)))


def test_capacity_and_history_of_one_resize_are_weighed_together() -> None:
    runner = only_window(4)
    kv = runner.manager.create_kv_cache()
    assert kv.resume()
    assert kv.resize(8)
    assert not kv.resize(10)  # the fifth block has no slot
    assert kv.resize(10, 8)  # unless the first two go at the same time
    assert kv.page_indices(0)[:2].tolist() == [-1, -1]
    assert runner.manager.used_slots(0) == 3
    runner.manager.check()


def test_private_pages_that_go_stale_are_free_at_once() -> None:
    runner = only_window(8)
    kv = runner.manager.create_kv_cache()
    assert kv.resume()
    assert kv.resize(16)
    usage = runner.manager.memory_usage().groups[0]
    assert (usage.used_slots, usage.cached_slots) == (8, 0)
    assert kv.resize(16, 12)
    usage = runner.manager.memory_usage().groups[0]
    assert (usage.used_slots, usage.cached_slots) == (4, 0)  # blocks 4 to 7
    kv.close()
    assert runner.manager.used_slots(0) == 0


def test_shared_pages_that_go_stale_stay_for_others_until_room_is_needed() -> None:
    runner = only_window(8)
    kv = runner.manager.create_kv_cache()
    assert kv.resume()
    assert kv.resize(16)
    kv.commit(TEXT[:12])
    usage = runner.manager.memory_usage().groups[0]
    assert (usage.used_slots, usage.cached_slots) == (8, 6)  # nothing was given back, blocks 0 to 3 are nobody's
    assert runner.manager.probe_reuse(TEXT[:4]).usable_tokens == 4
    assert not kv.resize(25, 12)
    assert (kv.shortage.needed, kv.shortage.free, kv.shortage.evictable) == (5, 0, 4)
    assert kv.resize(24, 12)  # 12 blocks, of which 4 to 11 are needed
    assert runner.manager.stats().window_pages_evicted == 4
    assert runner.manager.probe_reuse(TEXT[:4]).usable_tokens == 0
    assert kv.page_indices(0)[:4].tolist() == [-1] * 4
    runner.manager.check()


def test_a_page_that_another_sequence_sees_is_not_evictable_though_it_is_stale_here() -> None:
    runner = only_window(8)
    first = runner.manager.create_kv_cache()
    assert first.resume()
    assert first.resize(8)
    first.commit(TEXT[:8])
    other = runner.manager.create_kv_cache(TEXT[:8])
    assert other.resume()
    other_pages = other.page_indices(0).tolist()
    assert other_pages[2:] == first.page_indices(0)[2:].tolist()
    assert first.resize(16, 12)
    assert first.page_indices(0)[:4].tolist() == [-1] * 4
    assert not first.resize(22, 12)  # 6 blocks are its own then, and 2 are the other's
    assert first.shortage.evictable == 2
    assert first.resize(20, 12)
    assert other.page_indices(0).tolist() == other_pages
    runner.manager.check()


@pytest.mark.parametrize("tight", ["full", "window"])
def test_a_refused_resize_has_given_up_no_stale_page_and_taken_none(tight: str) -> None:
    shape = Shape(windows=((4, 1), (9, 0)) if tight == "window" else ((4, 1),), slots=(8,))
    runner = Runner(shape)
    groups = range(len(runner.manager.groups))
    other = runner.create(TEXT[30:36])
    assert runner.resume(other)
    assert runner.compute(other, 5, reserve=False)
    kv = runner.manager.create_kv_cache()
    assert kv.resume()
    assert kv.resize(9, 5)
    kv.commit(TEXT[:5])
    before = look(runner.manager, kv, *groups)
    assert not kv.resize(14 if tight == "full" else 12, 9)
    assert look(runner.manager, kv, *groups) == before
    assert kv.status is KVCacheStatus.ACTIVE
    runner.manager.check()
    assert kv.resize(10, 9)


def test_a_resize_that_only_one_of_two_windows_has_no_room_for_changes_neither() -> None:
    runner = Runner(Shape(full=False, windows=((3, 0), (12, 0)), slots=(7,)))
    kv = runner.manager.create_kv_cache()
    assert kv.resume()
    assert kv.resize(12)
    before = look(runner.manager, kv, 0, 1)
    assert not kv.resize(20, 10)
    assert (kv.shortage.layer_group, kv.shortage.needed) == (1, 4)
    assert look(runner.manager, kv, 0, 1) == before
    assert kv.resize(14, 10)
    assert kv.page_indices(0).tolist().count(-1) == 4
    assert kv.page_indices(1).tolist().count(-1) == 0


@pytest.mark.parametrize("seed", range(30))
def test_page_indices_are_missing_exactly_where_a_block_is_stale_or_never_was(seed: int) -> None:
    random = Random(seed)
    block = random.choice((1, 2, 3, 4))
    windows = ((random.randint(1, 9), random.randint(1, 5)), (random.randint(1, 9), 0))
    runner = Runner(Shape(block=block, full=random.random() < 0.5, windows=windows, slots=(130,)))
    first_group = int(runner.shape.full)
    for _ in range(3):
        kv = runner.manager.create_kv_cache(TEXT[: random.randint(0, 40)])
        assert kv.resume()
        while kv.history_length < 60:
            history = random.randint(kv.history_length, 60)
            assert kv.resize(random.randint(history, 64), history)
            check_indices(kv, first_group, windows, block)
            kv.commit(TEXT[kv.num_committed_tokens : random.randint(kv.num_committed_tokens, kv.capacity)])
            check_indices(kv, first_group, windows, block)
            runner.manager.check()
        kv.close()
    runner.finish()


def check_indices(kv: object, first_group: int, windows: tuple[tuple[int, int], ...], block: int) -> None:
    num_blocks = -(-kv.capacity // block)
    for group, (size, num_sink_tokens) in enumerate(windows, start=first_group):
        indices = kv.page_indices(group)
        assert indices.dtype == np.int32
        assert len(indices) == num_blocks
        # what is to come is seen, too, as far as there is capacity
        seen = {b for b in range(num_blocks) if is_seen(b, size, num_sink_tokens, block, kv.history_length)}
        assert {b for b in range(num_blocks) if indices[b] >= 0} == seen
    if first_group:
        assert (kv.page_indices(0) >= 0).all()


def is_seen(b: int, size: int, num_sink_tokens: int, block: int, history: int) -> bool:
    keys = range(b * block, (b + 1) * block)
    return any(key < num_sink_tokens or key > history - size for key in keys)


def test_a_sequence_that_closes_with_history_far_ahead_leaves_no_partial_block_without_its_window_page() -> None:
    runner = Runner(Shape(block=4, windows=((2, 0),), slots=(20,)))
    kv = runner.manager.create_kv_cache()
    assert kv.resume()
    assert kv.resize(20, 16)
    kv.commit(TEXT[:6])  # the window is past the unfinished block already
    kv.close()
    runner.manager.check()
    stored = Stored(runner.manager, ReuseScope())
    assert set(stored.full) == {tuple(TEXT[:4])}
    assert not stored.partial
    runner.finish()
