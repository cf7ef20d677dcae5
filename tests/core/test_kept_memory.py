"""What the tree and the free lists keep is bounded by what lives there: no part of a long array keeps all of it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
from managers import make_manager
from payload import Runner, Shape, run_at_random

from ssmcache import BlockKeys, KVCacheManager
from ssmcache.pools import PagePool

BLOCK, LONG, NUM_HEADS = 16, 4_000, 40


def owner(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def arrays_of(manager: KVCacheManager) -> Iterator[tuple[np.ndarray, int]]:
    """Every array that the tree keeps, with the entries of it that are of use."""
    for run in manager.store.all_runs():
        yield run.key_buffer, run.keys.size
        if run.pages is not None:
            yield run.pages._buffer, run.pages.count


def assert_fits(manager: KVCacheManager) -> None:
    for array, used in arrays_of(manager):
        assert owner(array).size <= 2 * used, f"{used} entries keep {owner(array).size}"


def serve(manager: KVCacheManager, text: object, pieces: int = 1) -> None:
    kv = manager.create_kv_cache(text[:-1])
    assert kv.resume()
    assert kv.resize(len(text))
    step = -(-len(text) // pieces)
    while kv.num_committed_tokens < len(text):
        start = kv.num_committed_tokens
        kv.commit(text[start : min(len(text), (start // step + 1) * step)])
    kv.close()


def head_of(text: object) -> object:
    return text[: BLOCK + 1]


def token_texts() -> list[list[int]]:
    return [list(range(number * LONG, (number + 1) * LONG)) for number in range(NUM_HEADS)]


def ready_texts() -> list[BlockKeys]:
    blocks = LONG // BLOCK
    return [BlockKeys(np.arange(blocks) + number * blocks, BLOCK, LONG) for number in range(NUM_HEADS)]


@pytest.mark.parametrize("pieces", [1, 7], ids=["one commit", "seven commits"])
@pytest.mark.parametrize("texts", [token_texts, ready_texts], ids=["tokens", "ready keys"])
def test_heads_that_are_used_again_do_not_keep_the_long_prompts_that_they_began(texts: object, pieces: int) -> None:
    manager = make_manager(LONG // BLOCK + 2 * NUM_HEADS + 4, 0, block=BLOCK)
    known = texts()
    for number, text in enumerate(known):
        serve(manager, text, pieces)
        for other in known[: number + 1]:
            serve(manager, head_of(other))
    assert all(manager.probe_reuse(head_of(text)).usable_tokens >= BLOCK for text in known)
    assert_fits(manager)
    manager.check()


def test_the_memory_of_heads_is_that_of_heads() -> None:
    manager = make_manager(LONG // BLOCK + 2 * NUM_HEADS + 4, 0, block=BLOCK)
    tracemalloc.start()
    try:
        for number in range(NUM_HEADS):
            text = np.arange(number * LONG, (number + 1) * LONG)
            serve(manager, text)
            for other in range(number + 1):
                serve(manager, np.arange(other * LONG, other * LONG + BLOCK + 1))
            del text
        serve(manager, np.arange(10**8, 10**8 + BLOCK * (LONG // BLOCK)))  # takes all but the heads
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    heads = [range(number * LONG, number * LONG + BLOCK) for number in range(NUM_HEADS)]
    assert all(manager.probe_reuse(head).usable_tokens == BLOCK for head in heads)
    # heads and the last prompt; objects take more than keys do. The prompts were 1.3 MB.
    assert kept < 400_000, f"{kept:,} bytes"


def test_a_commit_that_adds_little_to_what_is_known_keeps_little() -> None:
    manager = make_manager(None, 0, block=BLOCK)
    text = np.arange(LONG)
    first, second = (manager.create_kv_cache(()) for _ in range(2))
    for kv, length in ((first, LONG - 3 * BLOCK), (second, LONG)):
        assert kv.resume()
        assert kv.resize(length)
        kv.commit(text[:length])
    assert_fits(manager)


def test_what_a_shrunk_sequence_has_keeps_what_it_needs() -> None:
    manager = make_manager(None, 0, block=BLOCK)
    kv = manager.create_kv_cache(())
    assert kv.resume()
    assert kv.resize(LONG)
    assert kv.resize(BLOCK)
    assert owner(kv.own_pages).size <= 2


@pytest.mark.parametrize("shape", [Shape(slots=(10,)), Shape(slots=(7, 7)), Shape(windows=((4, 2),), slots=(8, 6, 6))])
def test_no_array_keeps_more_than_twice_what_is_of_use_whatever_is_called(shape: Shape, tmp_path: object) -> None:
    class Watched(Runner):
        def compute(self, *arguments: object) -> bool:
            done = super().compute(*arguments)
            assert_fits(self.manager)
            return done

    for seed in range(8):
        run_at_random(Watched(shape, str(tmp_path)), Random(seed), 120, longest=20)


def test_free_slots_come_last_in_first_out_and_keep_no_array() -> None:
    """Beside a list that does the same."""
    random = Random(0)
    pool, stack, fresh = PagePool(1000), [], 0
    held: list[np.ndarray] = []
    for _ in range(2000):
        if random.random() < 0.5 or not held:
            count = random.randint(0, min(40, pool.free))
            slots = pool.take(count)
            reused = stack[max(0, len(stack) - count) :]
            del stack[len(stack) - len(reused) :]
            expected = reused + list(range(fresh, fresh + count - len(reused)))
            fresh += count - len(reused)
            assert slots.tolist() == expected
            assert slots.dtype == np.int32
            assert owner(slots).size == count
            held.append(slots)
        else:
            slots = held.pop(random.randrange(len(held)))
            keep = random.randint(0, slots.size)
            pool.give_back(slots[keep:])
            stack += slots[keep:].tolist()
            if keep:
                held.append(slots[:keep].copy())
            slots[:] = -1  # the pool has a copy
        assert pool.returned_slots() == stack
        assert pool.used == sum(slots.size for slots in held)
        assert pool.num_ever_used == fresh
