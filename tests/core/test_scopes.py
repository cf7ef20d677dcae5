"""Who shares with whom: scopes of LoRA id and salt, and multimodal items named by digests."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from payload import Runner, Shape

from ssmcache import KVCacheManager, ReuseScope

SCOPES = [ReuseScope(lora_id, salt) for lora_id, salt in product((None, 0, 1), repeat=2)]
TEXT = list(range(10, 24))
CAT, DOG = bytes(range(32)), bytes(range(1, 33))
SHAPES = {"attention": Shape(block=4, windows=((6, 1),), slots=(40,)), "hybrid": Shape(block=4, ssm=True, slots=(40,))}


def serve(runner: Runner, tokens: list[int], scope: ReuseScope = SCOPES[0]) -> int:
    """Prefill with every byte checked; returns the reused tokens."""
    request = runner.create(tokens, scope)
    assert runner.resume(request)
    reused = request.kv.num_committed_tokens
    assert runner.compute(request, len(tokens), reserve=True)
    runner.close(request)
    runner.manager.check()
    return reused


def name(scope: ReuseScope) -> str:
    return f"LoRA {scope.lora_id}, salt {scope.salt}"


@pytest.mark.parametrize("right", SCOPES, ids=name)
@pytest.mark.parametrize("left", SCOPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_sequences_share_only_within_their_own_scope(left: ReuseScope, right: ReuseScope, shape: str) -> None:
    runner = Runner(SHAPES[shape])
    assert serve(runner, TEXT, left) == 0
    full_or_part = 13 if shape == "attention" else 12
    expected = full_or_part if left == right else 0
    assert runner.manager.probe_reuse(TEXT[:-1], right).usable_tokens == expected
    assert serve(runner, TEXT, right) == expected
    assert serve(runner, TEXT, left) == full_or_part  # and what one leaves takes nothing from the other
    runner.finish()


def test_all_scopes_at_once_keep_what_is_theirs() -> None:
    runner = Runner(Shape(block=4, slots=(60,)))
    for scope in SCOPES:
        assert serve(runner, TEXT, scope) == 0
    assert runner.manager.used_slots(0) == 4 * len(SCOPES)
    for scope in SCOPES:
        assert serve(runner, TEXT, scope) == 13
    assert set(runner.manager.store.roots) == set(SCOPES)
    runner.finish()


def make() -> KVCacheManager:
    return Runner(Shape(block=4, slots=(20,))).manager


def leave(manager: KVCacheManager, tokens: list[int | bytes]) -> None:
    kv = manager.create_kv_cache()
    assert kv.resume()
    assert kv.resize(len(tokens))
    kv.commit(tokens)
    kv.close()
    manager.check()


def test_equal_digests_are_shared_and_different_ones_are_not() -> None:
    manager = make()
    leave(manager, [1, CAT, CAT, 2, 3, DOG, 4, 5])
    assert manager.probe_reuse([1, bytes(bytearray(CAT)), CAT, 2, 3, DOG, 4, 5]).usable_tokens == 8
    assert manager.probe_reuse([1, CAT, CAT, 2, 3, CAT, 4, 5]).usable_tokens == 5
    assert manager.probe_reuse([1, CAT, DOG, 2, 3, DOG, 4, 5]).usable_tokens == 2
    assert manager.probe_reuse([1, CAT[::-1], CAT, 2]).usable_tokens == 1


def test_a_digest_is_no_integer_and_the_order_in_which_they_were_first_seen_says_nothing() -> None:
    manager = make()
    manager.probe_reuse([DOG, CAT])
    leave(manager, [CAT, CAT, DOG, DOG])
    assert manager.probe_reuse([CAT, CAT, DOG, DOG]).usable_tokens == 4
    assert manager.probe_reuse([DOG, DOG, CAT, CAT]).usable_tokens == 0
    for integer in range(3):
        assert manager.probe_reuse([integer] * 4).usable_tokens == 0


def test_digests_alone_and_those_that_end_in_zeros_are_told_apart() -> None:
    manager = make()
    ends = [bytes(31) + b"\0", bytes(30) + b"\1\0", bytes(32 - 2) + b"\0\1"]
    leave(manager, [ends[0], ends[1], ends[2], ends[1]])
    assert manager.probe_reuse([ends[0], ends[1], ends[2], ends[1]]).usable_tokens == 4
    assert manager.probe_reuse([ends[0], ends[1], ends[1], ends[1]]).usable_tokens == 2


@pytest.mark.parametrize("length", [0, 1, 31, 33, 64])
@pytest.mark.parametrize("beside", [[], [1, 2], [CAT]], ids=["alone", "with integers", "with a digest"])
def test_a_digest_of_another_length_is_refused_and_nothing_remembered(length: int, beside: list[int | bytes]) -> None:
    manager = make()
    wrong = bytes(range(1, 1 + length))
    with pytest.raises(ValueError, match=rf"tokens: expected digests of 32 bytes, got one of {length}$"):
        manager.create_kv_cache([*beside, wrong])
    assert manager.open_sequences == {}
    manager.check()
    kv = manager.create_kv_cache()
    assert kv.resume()
    assert kv.resize(8)
    kv.commit([1, 2, CAT])
    with pytest.raises(ValueError, match="expected digests of 32 bytes"):
        kv.commit([*beside, wrong])
    assert kv.num_committed_tokens == 3
    kv.close()
    assert manager.probe_reuse([1, 2, CAT, 4]).usable_tokens == 3


@pytest.mark.parametrize("tokens", [[CAT, 1.5], [CAT, -1], [CAT, "a"], [CAT, None], [[CAT]]])
def test_digests_with_what_is_neither_are_refused(tokens: list[object]) -> None:
    manager = make()
    with pytest.raises(ValueError, match=r"^tokens: expected integers"):
        manager.create_kv_cache(tokens)
    manager.check()


def test_an_integer_too_great_for_a_token_is_refused_instead_of_passing_for_a_digest() -> None:
    manager = make()
    leave(manager, [CAT, CAT, CAT, CAT])
    with pytest.raises(
        ValueError, match=r"tokens: expected integers up to 9223372036854775807, got 18446744073709551615"
    ):
        manager.probe_reuse(np.full(4, 2**64 - 1, dtype=np.uint64))
    assert manager.probe_reuse(np.full(4, 2**63 - 1, dtype=np.uint64)).usable_tokens == 0
