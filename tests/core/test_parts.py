"""The parts that a manager is made of: pools, queue, keys, memory, and that `check` notices damage."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from managers import STATE_BYTES, make_manager

from ssmcache import BlockKeys
from ssmcache.eviction import EvictionQueue
from ssmcache.keys import KeyKind, ReuseScope
from ssmcache.pools import PagePool, StatePool, int_array
from ssmcache.segments import DEFAULT_RANK, PageSegment
from ssmcache.tree import Root, Run


@pytest.mark.parametrize("pool_type", [PagePool, StatePool])
@given(steps=st.lists(st.integers(-40, 60), max_size=60))
def test_a_pool_hands_out_each_slot_once_and_the_last_returned_first(pool_type, steps):
    pool = pool_type(200)
    taken, returned, next_fresh = [], [], 0
    for step in steps:
        if step >= 0:
            count = min(step, pool.free)
            if count == 0:
                continue
            slots = list(pool.take(count))
            old = min(count, len(returned))
            expected = returned[len(returned) - old :] + list(range(next_fresh, next_fresh + count - old))
            next_fresh += count - old
            del returned[len(returned) - old :]
            assert slots == expected
            taken += slots
        else:
            count = min(-step, len(taken))
            back = taken[len(taken) - count :]
            del taken[len(taken) - count :]
            pool.give_back(np.array(back, dtype=np.int32) if pool_type is PagePool else int_array(back))
            returned += back
        assert sorted(pool.returned_slots()) == sorted(returned)
        assert pool.used == len(taken)
        assert pool.num_ever_used == next_fresh
    assert pool.peak_used <= 200


@pytest.mark.parametrize("pool_type", [PagePool, StatePool])
def test_a_pool_remembers_its_peak(pool_type):
    pool = pool_type(10)
    slots = pool.take(7)
    pool.give_back(slots)
    pool.take(2)
    assert (pool.peak_used, pool.used, pool.free) == (7, 2, 8)
    with pytest.raises(AssertionError):
        pool.take(9)


def test_a_queue_gives_what_may_go_by_the_age_of_its_tail_whatever_was_touched_held_or_dropped():
    rng = random.Random(4)
    root = Root(KeyKind(1, True), ReuseScope())
    queue, in_queue, clock = EvictionQueue(), set(), 0
    segments = [
        PageSegment(Run(root, root.kind, n, 0, 1, np.zeros(1)), 0, DEFAULT_RANK, n, 0, False, 0, np.zeros(1, np.int32))
        for n in range(50)
    ]
    for step in range(4000):
        segment = rng.choice(segments)
        action = rng.random()
        if action < 0.3:
            clock += rng.randrange(1, 5)
            segment.stamp = clock
            segment.run.holds = 0
            queue.put(segment)
            in_queue.add(segment)
        elif action < 0.5 and not segment.run.holds:
            clock += 1
            segment.stamp = clock  # a touch tells the queue nothing
        elif action < 0.6:
            segment.run.holds = 1  # nor does a hold
            in_queue.discard(segment)
        elif action < 0.62 and segment in in_queue:
            in_queue.discard(segment)
            run = segment.run
            queue.retire(segment)
            segments[segments.index(segment)] = PageSegment(
                run, 0, DEFAULT_RANK, 100 + step, 0, False, 0, np.zeros(1, np.int32)
            )
        elif action > 0.8:
            oldest = queue.oldest()
            assert oldest is min(in_queue, key=lambda segment: segment.stamp, default=None)
            if oldest is not None and action > 0.9:
                queue.take_out(oldest)
                in_queue.discard(oldest)
        assert set(queue.segments()) >= in_queue


def test_a_queue_does_not_keep_what_has_left_the_tree():
    root = Root(KeyKind(1, True), ReuseScope())
    queue, one = EvictionQueue(), np.zeros(1, np.int32)
    for n in range(10_000):
        segment = PageSegment(Run(root, root.kind, n, 0, 1, np.zeros(1)), n, DEFAULT_RANK, n, 0, False, 0, one)
        queue.put(segment)
        if n % 100:
            queue.retire(segment)
    assert len(queue._heap) <= 2 * 100 + 200


@given(st.integers(1, 3), st.lists(st.integers(0, 1), min_size=18, max_size=18), *[st.integers(0, 2)] * 3)
def test_common_blocks_of_tokens_equals_a_comparison_block_by_block(width, tokens, left_start, right_start, more):
    left, right = np.array(tokens[:9]), np.array(tokens[9:])
    num = min(1 + more, 9 // width - max(left_start, right_start))
    blocks = [[part[i * width : (i + 1) * width].tolist() for i in range(9 // width)] for part in (left, right)]
    expected = 0
    while expected < num and blocks[0][left_start + expected] == blocks[1][right_start + expected]:
        expected += 1
    assert num < 1 or KeyKind(width, False).common_blocks(left, left_start, right, right_start, num) == expected


@given(st.integers(0, 8), st.integers(0, 3), st.integers(0, 3))
def test_common_blocks_of_ready_keys_finds_where_the_prefixes_part(equal, left_start, right_start):
    left = np.arange(20) + 100 - left_start
    right = np.arange(20) + 100 - right_start
    right[right_start + equal :] += 1000
    assert KeyKind(1, True).common_blocks(left, left_start, right, right_start, 8) == min(equal, 8)


def test_parts_of_block_keys_are_views_that_know_their_place():
    keys = BlockKeys([10, 11, 12], 16, 50)
    part = keys[16:40]
    assert (len(keys), len(part), part.start, part.stop) == (50, 24, 16, 40)
    assert part.keys is keys.keys
    assert len(keys[:-1]) == 49
    assert len(part[8:]) == 16
    assert part[8:].start == 24
    assert len(keys[45:10]) == 0
    with pytest.raises(ValueError, match="step 1"):
        keys[::2]


def test_block_keys_copy_what_could_change_and_keep_what_cannot():
    array = np.arange(3)
    keys = BlockKeys(array, 16, 48)
    array[0] = 99
    assert keys.keys[0] == 0
    array.flags.writeable = False
    assert BlockKeys(array, 16, 48).keys is array


@pytest.mark.parametrize(("keys", "num_tokens"), [([1, 2], 48), ([1, 2, 3], 47), ([[1], [2]], 32), ([1], 0)])
def test_block_keys_without_one_key_for_each_full_block_are_refused(keys, num_tokens):
    with pytest.raises(ValueError, match=r"keys of a prompt of \d+ tokens in blocks of 16: expected shape"):
        BlockKeys(keys, 16, num_tokens)


def test_block_keys_of_another_block_size_or_from_the_middle_are_refused():
    manager = make_manager(None, None)
    with pytest.raises(ValueError, match="block keys from token 0 on in blocks of 32"):
        manager.create_kv_cache(BlockKeys([1], 16, 16))
    with pytest.raises(ValueError, match="block keys from token 0 on"):
        manager.create_kv_cache(BlockKeys([1, 2], 32, 64)[32:])
    sequence = manager.create_kv_cache(BlockKeys([1, 2], 32, 70))
    sequence.resume()
    sequence.resize(70)
    with pytest.raises(ValueError, match="from token 0 on, got ready block keys from token 32 on"):
        sequence.commit(BlockKeys([1, 2], 32, 70)[32:])
    with pytest.raises(ValueError, match="expected ready block keys, as at creation, got tokens"):
        sequence.commit([1, 2, 3])


def test_the_manager_counts_the_bytes_of_the_states_that_it_copies():
    manager = make_manager(None, None)
    sequence = manager.create_kv_cache(())
    sequence.resume(stream="compute")
    sequence.resize(64)
    sequence.commit(range(64))
    assert manager.stats().copied_bytes == manager.memory.num_copied_bytes == STATE_BYTES


def damage_pool(manager):
    manager.store.pages.pools[0].take(1)


def damage_holds(manager):
    manager.store.all_runs()[0].holds += 1


def damage_queue(manager):
    queue = manager.store.pages.queues[0]
    queue.take_out(queue.oldest())


def damage_parent(manager):
    run = manager.store.all_runs()[0]
    run.parent = run


def damage_length(manager):
    manager.store.all_runs()[0].end += 1


def damage_snapshot(manager):
    segment = manager.store.all_runs()[0].items[0]
    segment.ordinals[0] = 100


def damage_count(manager):
    manager.store.pages.cached[0] += 1


def damage_slot(manager):
    pages = manager.store.all_runs()[0].pages
    pages.slots[0] = pages.slots[1]


def damage_stamp(manager):
    manager.store.all_runs()[0].pages.stamp -= 10


@pytest.mark.parametrize(
    "damage",
    [
        damage_pool,
        damage_holds,
        damage_queue,
        damage_parent,
        damage_length,
        damage_snapshot,
        damage_count,
        damage_slot,
        damage_stamp,
    ],
)
def test_check_notices_damage(damage):
    manager = make_manager(20, 5)
    sequence = manager.create_kv_cache(())
    sequence.resume()
    sequence.resize(130)
    sequence.reserve_snapshots([64, 128])
    sequence.commit(range(130))
    sequence.close()
    manager.check()
    damage(manager)
    with pytest.raises(AssertionError):
        manager.check()
