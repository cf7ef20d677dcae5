"""A last block that matches in part: which tokens, whose page, and what becomes of the leaves that closes leave."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from payload import Request, Runner, Shape
from stored import Stored

from ssmcache import (
    AttentionLayerConfig,
    BlockKeys,
    BufferConfig,
    GpuCacheTierConfig,
    KVCacheManager,
    KVCacheManagerConfig,
    ReuseScope,
    SimulatedMemory,
)

SCOPE = ReuseScope()
TEXT = list(range(100, 140))


def unlimited(block: int, window: int | None = None, **options: object) -> KVCacheManager:
    layers = [AttentionLayerConfig(0, (BufferConfig("kv", 64),), window)]
    config = KVCacheManagerConfig(block, layers, [GpuCacheTierConfig(None)], **options)
    return KVCacheManager(config, SimulatedMemory())


def leave(manager: KVCacheManager, text: object, prompt: object = ()) -> None:
    kv = manager.create_kv_cache(prompt)
    assert kv.resume()
    assert kv.resize(max(len(text), kv.num_committed_tokens))
    kv.commit(text[kv.num_committed_tokens :])
    kv.close()
    manager.check()


def make(slots: int = 20, **shape: object) -> Runner:
    return Runner(Shape(**{"block": 4, "slots": (slots,), **shape}))


def serve(runner: Runner, text: list[int], close: bool = True) -> Request:
    """Prefill with every byte checked."""
    request = runner.create(text)
    assert runner.resume(request)
    assert runner.compute(request, len(text), reserve=True)
    if close:
        runner.close(request)
    runner.manager.check()
    return request


def leaves(runner: Runner) -> list[list[int]]:
    """The tokens of all partial blocks, with those before them."""
    return sorted(list(block.tokens) for block in Stored(runner.manager, SCOPE).partial)


# -- which tokens -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    block=st.integers(2, 5),
    texts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=8),
    prompt=st.lists(st.integers(0, 1), max_size=14),
    window=st.sampled_from((None, 20)),
)
def test_without_limits_the_reuse_is_the_longest_common_prefix_with_any_text(
    block: int, texts: list[list[int]], prompt: list[int], window: int | None
) -> None:
    manager = unlimited(block, window)
    for text in texts:
        leave(manager, text, text[:-1])
    if window is not None:  # without full attention no partial block is left, but full ones match in part
        texts = [text[: len(text) // block * block] for text in texts]
    expected = max(common(text, prompt) for text in texts)
    assert manager.probe_reuse(prompt) == (expected, expected, expected)


def common(left: list[int], right: list[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


# -- whose page -------------------------------------------------------------------------------------------------------


def test_the_page_is_copied_at_the_first_resume_and_the_copy_is_written_while_the_leaf_stays_as_it_is() -> None:
    runner = make()
    serve(runner, TEXT[:7])
    request = runner.create([*TEXT[:7], 1, 2])
    assert (request.kv.num_committed_tokens, request.kv.num_attention_tokens) == (7, 7)
    assert runner.manager.used_slots(0) == 2  # creation copies nothing
    assert runner.resume(request)  # which checks the bytes
    assert request.kv.page_indices(0).size == 2
    leaf = next(run for run in runner.manager.store.all_runs() if run.num_tokens)
    assert request.kv.page_indices(0)[1] != leaf.pages.slots[0]
    assert request.kv.page_indices(0)[0] == leaf.parent.pages.slots[0]
    assert runner.compute(request, 9, reserve=False)
    runner.close(request)
    serve(runner, [*TEXT[:7], 3, 4])  # starts from the leaf, or what has its tokens, once more
    runner.finish()


def test_a_prompt_may_share_less_than_the_leaf_and_still_copies_it() -> None:
    runner = make()
    serve(runner, TEXT[:7])
    request = serve(runner, [*TEXT[:6], 1, 2, 3])
    assert request.kv.reuse_match == (6, 6, 6)
    runner.finish()


def test_a_private_page_of_a_block_in_the_making_is_never_swapped_for_a_shared_one_before_the_block_is_full() -> None:
    runner = make()
    serve(runner, TEXT[:8])
    request = runner.create(TEXT[:7])  # matches the second block in part
    assert runner.resume(request)
    shared = int(runner.manager.store.all_runs()[-1].pages.slots[-1])
    own = int(request.kv.page_indices(0)[1])
    assert own != shared
    request.tokens = TEXT[:8]
    assert runner.compute(request, 7, reserve=False)
    assert request.kv.page_indices(0)[1] == own
    assert runner.compute(request, 8, reserve=False)  # now it is full, and there already
    assert request.kv.page_indices(0)[1] == shared
    assert runner.manager.used_slots(0) == 2
    runner.finish()


def test_two_sequences_that_end_inside_one_block_leave_two_ends_of_which_each_is_found() -> None:
    runner = make()
    serve(runner, [*TEXT[:5], 1, 2])
    serve(runner, [*TEXT[:5], 3])
    assert leaves(runner) == [[*TEXT[:5], 1, 2], [*TEXT[:5], 3]]
    assert serve(runner, [*TEXT[:5], 1, 2, 9]).kv.reuse_match.usable_tokens == 7
    assert serve(runner, [*TEXT[:5], 3, 9]).kv.reuse_match.usable_tokens == 6
    runner.finish()


def test_two_open_sequences_write_their_ends_of_one_block_into_pages_of_their_own() -> None:
    runner = make()
    serve(runner, TEXT[:6])
    first, second = (runner.create([*TEXT[:6], end, end]) for end in (1, 2))
    for request in (first, second):
        assert runner.resume(request)
    assert first.kv.page_indices(0)[1] != second.kv.page_indices(0)[1]
    for request in (first, second):
        assert runner.compute(request, 7, reserve=False)
    for request in (first, second):  # whole blocks by now, and both are kept
        assert runner.compute(request, 8, reserve=False)
    runner.finish()


# -- what becomes of the leaves ---------------------------------------------------------------------------------------


def test_a_longer_leaf_takes_the_place_of_one_that_it_begins_with_and_a_shorter_one_is_not_kept_beside_it() -> None:
    runner = make()
    serve(runner, TEXT[:5])
    serve(runner, TEXT[:7])
    assert leaves(runner) == [TEXT[:7]]
    serve(runner, TEXT[:6])
    assert leaves(runner) == [TEXT[:7]]
    assert runner.manager.used_slots(0) == 2
    runner.finish()


def test_no_leaf_is_left_where_a_full_block_begins_with_it() -> None:
    runner = make()
    serve(runner, TEXT[:12])
    serve(runner, TEXT[:6])
    serve(runner, TEXT[:10])
    assert leaves(runner) == []
    assert runner.manager.used_slots(0) == 3
    runner.finish()


def test_a_full_block_takes_the_place_of_a_leaf_that_it_begins_with() -> None:
    runner = make()
    serve(runner, TEXT[:6])
    serve(runner, TEXT[:14])
    assert leaves(runner) == [TEXT[:14]]
    assert runner.manager.used_slots(0) == 4
    assert len(runner.manager.store.all_runs()) == 2  # so nothing cuts the path of a conversation at each turn
    runner.finish()


@pytest.mark.parametrize("longer", [7, 9])
def test_a_leaf_that_somebody_waits_for_stays_beside_what_begins_with_it(longer: int) -> None:
    runner = make()
    serve(runner, TEXT[:5])
    waiting = runner.create([*TEXT[:5], 1, 1])
    serve(runner, TEXT[:longer])
    assert TEXT[:5] in leaves(runner)
    assert waiting.kv.num_committed_tokens == 5
    assert runner.resume(waiting)
    runner.finish()


def test_a_leaf_that_is_used_again_and_again_does_not_get_old() -> None:
    runner = make(5)
    serve(runner, TEXT[:5])
    serve(runner, [1, 2, 3, 4, 5, 6])
    serve(runner, TEXT[:5])  # which ends where it ended before
    serve(runner, [7, 7])
    serve(runner, [8, 8])
    assert TEXT[:5] in leaves(runner)
    runner.finish()


def test_a_leaf_that_has_lost_its_window_page_gets_the_one_of_a_text_that_ends_as_it_does() -> None:
    runner = make(windows=((6, 0),))
    runner.manager.pools[1][0].capacity = 4
    serve(runner, TEXT[:6])
    serve(runner, [1] * 16)
    assert leaves(runner) == [TEXT[:6]]
    assert runner.manager.probe_reuse(TEXT[:6]) == (6, 0, 0)
    serve(runner, TEXT[:6])
    assert leaves(runner) == [TEXT[:6]]
    assert runner.manager.probe_reuse(TEXT[:6]) == (6, 6, 6)
    runner.finish()


def test_without_room_for_the_copy_a_leaf_that_nobody_else_wants_becomes_the_sequences_own() -> None:
    runner = make(2)
    serve(runner, TEXT[:6])
    slot = int(next(run for run in runner.manager.store.all_runs() if run.num_tokens).pages.slots[0])
    request = runner.create(TEXT[:8])
    assert runner.resume(request)
    assert request.kv.num_committed_tokens == 6
    assert request.kv.page_indices(0)[1] == slot
    assert leaves(runner) == []
    assert runner.compute(request, 8, reserve=False)
    runner.finish()


def test_a_leaf_that_somebody_else_waits_for_is_not_taken_over_but_done_without() -> None:
    runner = make(2, max_util=1.0)
    serve(runner, TEXT[:6])
    first, second = runner.create(TEXT[:8]), runner.create(TEXT[:8])
    before = runner.manager.memory_usage(), leaves(runner)
    assert runner.resume(first)
    assert first.kv.num_committed_tokens == 4
    assert (runner.manager.memory_usage(), leaves(runner)) == before
    runner.close(first)
    assert runner.resume(second)
    assert second.kv.num_committed_tokens == 6
    runner.finish()


def test_a_block_in_the_middle_of_others_is_copied_and_never_taken_over() -> None:
    runner = make(3, max_util=1.0)
    serve(runner, TEXT[:12])
    request = runner.create([*TEXT[:10], 1, 2])
    assert runner.resume(request)  # the third block was the only one to go, but it is the source
    assert leaves(runner) == []
    runner.finish()


# -- where there are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{"ssm": True}, {"partly": False}, {"full": False, "ssm": True}])
def test_with_states_or_by_the_setting_only_full_blocks_match_and_no_leaf_is_left(shape: dict[str, object]) -> None:
    runner = make(**shape)
    serve(runner, TEXT[:6])
    assert leaves(runner) == []
    assert runner.manager.probe_reuse(TEXT[:6]).usable_tokens == 4
    assert runner.manager.probe_reuse(TEXT[:3]).usable_tokens == 0
    runner.finish()


def test_partial_reuse_with_states_is_refused() -> None:
    with pytest.raises(ValueError, match="enable_partial_reuse: expected None or False with SSM layers, got True"):
        make(ssm=True, partly=True)


def test_ready_keys_never_match_in_part() -> None:
    manager = unlimited(4)
    leave(manager, BlockKeys([1], 4, 6), BlockKeys([1], 4, 6))
    assert manager.probe_reuse(BlockKeys([1], 4, 6)).usable_tokens == 4
    assert all(not run.num_tokens for run in manager.store.all_runs())


def test_digests_match_in_part_like_tokens() -> None:
    manager = unlimited(4)
    item = bytes(31)
    text = [1, 2, item + b"a", item + b"b", item + b"c", 3]
    leave(manager, text)
    assert manager.probe_reuse([*text[:5], 4]).usable_tokens == 5
    assert manager.probe_reuse([*text[:4], item + b"d", 3]).usable_tokens == 4
