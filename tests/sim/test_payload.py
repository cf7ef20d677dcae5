"""The formulas of the payload against plain loops over Python integers."""

from random import Random

import numpy as np
import pytest

from ssmcache_sim.payload import (
    GOLDEN,
    MULTIPLIER,
    Pages,
    PayloadBuffer,
    Recurrence,
    block_seeds,
    mix,
    token_values,
)
from ssmcache_sim.payload_host import HostKernels

MASK = 2**64 - 1


def mixed(value: int) -> int:
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def test_mix_is_the_generator_of_splitmix64() -> None:
    """The first numbers from seed 1234567, as its reference implementation prints them."""
    state = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(GOLDEN)
    assert mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def token(keys: list[int], position: int, block: int, request: int) -> int:
    index = position // block
    key = keys[index] if index < len(keys) else -1 - request
    return mixed(mixed(key) + position)


@pytest.mark.parametrize("num_tokens", [4, 11, 12, 13])
def test_a_token_is_named_by_the_key_of_its_block_and_its_position(num_tokens: int) -> None:
    keys = [5, 0, 9, 123456789][: num_tokens // 4]
    seeds = block_seeds(np.array(keys, dtype=np.int64), num_tokens, 4, request=3)
    assert seeds.size == -(-num_tokens // 4)
    for start in range(num_tokens):
        for stop in range(start, num_tokens + 1):
            expected = [token(keys, position, 4, 3) for position in range(start, stop)]
            assert token_values(seeds, start, stop, 4).tolist() == expected


def test_a_step_of_the_recurrence_is_as_many_single_ones() -> None:
    random = Random(1)
    tokens = [random.getrandbits(64) for _ in range(50)]
    recurrence = Recurrence(50)
    for cut in (0, 1, 17, 50):
        digest = random.getrandbits(64)
        expected = digest
        for value in tokens[:cut]:
            expected = (expected * MULTIPLIER + value) & MASK
        step = recurrence.step(np.array(tokens[:cut], dtype=np.uint64))
        assert (digest * step.factor + step.addend) & MASK == expected


def page_buffer(num_slots: int, block: int, words: int) -> PayloadBuffer:
    return PayloadBuffer(0, "layer 0 key", words, 77, np.full((num_slots, block, words), 0xA5, dtype=np.uint64))


def test_pages_hold_each_token_in_its_place_and_nothing_else_is_written() -> None:
    buffer, kernels = page_buffer(6, 4, 3), HostKernels(1, 1)
    seeds = block_seeds(np.array([8, 6, 7], dtype=np.int64), 14, 4, request=0)
    pages = Pages(np.array([5, -1, 2, 0], dtype=np.int32), seeds)
    kernels.write_pages(buffer, pages, 2, 14)
    expected = np.full((6, 4, 3), 0xA5, dtype=np.uint64)
    for position in range(2, 14):
        slot = [5, -1, 2, 0][position // 4]
        if slot >= 0:
            value = token([8, 6, 7], position, 4, 0)
            expected[slot, position % 4] = [mixed(value + 77 + word * GOLDEN) for word in range(3)]
    assert (buffer.view == expected).all()
    kernels.check_pages(buffer, pages, 2, 14, request=0)
    assert kernels.wrong_bytes().sum() == 0


def test_every_wrong_byte_of_a_page_is_counted_for_its_request_and_buffer() -> None:
    buffer, kernels = page_buffer(2, 4, 2), HostKernels(3, 1)
    pages = Pages(np.array([1], dtype=np.int32), block_seeds(np.array([8], dtype=np.int64), 4, 4, request=0))
    kernels.write_pages(buffer, pages, 0, 4)
    buffer.view.view(np.uint8)[1, 2, 3] ^= 1
    buffer.view.view(np.uint8)[1, 3, 15] ^= 255
    for stop in (2, 3, 4):
        kernels.check_pages(buffer, pages, 0, stop, request=1)
    kernels.check_pages(buffer, pages, 3, 4, request=2)
    assert kernels.wrong_bytes().tolist() == [[0], [3], [1]]


def test_a_state_goes_on_from_what_lies_in_the_live_slot() -> None:
    view = np.full((4, 5), 0xA5, dtype=np.uint64)
    buffer, kernels = PayloadBuffer(0, "layer 1 ssm_state", 5, 99, view), HostKernels(1, 1)
    tokens = np.arange(30, dtype=np.uint64)
    recurrence = Recurrence(30)
    steps = [recurrence.step(tokens[:10]), recurrence.step(tokens[10:30])]
    kernels.write_states(buffer, 3, True, steps, [1, 3])
    for slot, stop in ((1, 10), (3, 30)):
        digest = recurrence.step(tokens[:stop]).addend
        rest = [mixed(digest + 99 + word * GOLDEN) for word in range(1, 5)]
        assert view[slot].tolist() == [digest, *rest]
        kernels.check_state(buffer, slot, digest, 0)
    assert (view[[0, 2]] == 0xA5).all()
    assert kernels.wrong_bytes().sum() == 0
    # the same from the state after ten tokens, and what a wrong start makes of it
    view[2] = view[1]
    kernels.write_states(buffer, 2, False, [steps[1]], [2])
    assert (view[2] == view[3]).all()
    view[2] = 0
    kernels.write_states(buffer, 2, False, [steps[1]], [2])
    kernels.check_state(buffer, 2, recurrence.step(tokens).addend, 0)
    assert kernels.wrong_bytes().sum() >= 36
