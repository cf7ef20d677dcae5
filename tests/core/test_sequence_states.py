"""Status and lengths of a sequence; refusals that change nothing; what is held and who goes first."""

import numpy as np
import pytest
from managers import make_manager

from ssmcache import BlockKeys, KVCacheStatus, ReuseScope, StateError

TOKENS = np.arange(5000, 7000)


def leave(manager, start, length, scope=None):
    """Commit `length` tokens of a prompt of its own, and close."""
    prompt = TOKENS[start : start + length]
    sequence = manager.create_kv_cache(prompt[:-1], **({} if scope is None else {"reuse_scope": scope}))
    assert sequence.resume()
    assert sequence.resize(length + 1)
    sequence.reserve_snapshots(sequence.snapshot_points(length))
    sequence.commit(prompt[sequence.num_committed_tokens :])
    sequence.close()
    manager.check()


def open_with(manager, capacity, prompt=()):
    sequence = manager.create_kv_cache(prompt)
    assert sequence.resume()
    assert sequence.resize(capacity)
    return sequence


def test_a_sequence_goes_from_suspended_to_active_and_back_and_closes_twice():
    manager = make_manager(8, 3)
    sequence = manager.create_kv_cache(())
    assert sequence.status is KVCacheStatus.SUSPENDED
    with pytest.raises(StateError, match="ACTIVE"):
        sequence.resize(10)
    with pytest.raises(StateError, match="ACTIVE"):
        sequence.commit([1])
    with pytest.raises(StateError, match="ACTIVE"):
        sequence.suspend()
    assert sequence.resume()
    with pytest.raises(StateError, match="SUSPENDED"):
        sequence.resume()
    sequence.suspend()
    assert sequence.resume()
    sequence.close()
    sequence.close()
    assert sequence.status is KVCacheStatus.CLOSED
    with pytest.raises(StateError, match="SUSPENDED"):
        sequence.resume()
    manager.check()


def test_history_never_goes_back_and_capacity_shrinks_to_it():
    manager = make_manager(8, 3)
    sequence = open_with(manager, 100)
    assert sequence.resize(128, history_length=70)
    with pytest.raises(ValueError, match="history"):
        sequence.resize(128, history_length=60)
    with pytest.raises(ValueError, match="capacity"):
        sequence.resize(69)
    assert sequence.resize(70)
    assert sequence.page_indices(0).size == 3
    assert manager.used_slots(0) == 3
    manager.check()


def test_a_refused_resize_says_what_was_missing_and_changes_nothing():
    manager = make_manager(8, 3)
    leave(manager, 0, 100)
    sequence = open_with(manager, 160)
    before = (manager.memory_usage(), manager.stats(), sequence.page_indices(0).tolist())
    assert not sequence.resize(300)
    shortage = sequence.shortage
    assert (shortage.reason, shortage.layer_group, shortage.tier) == ("slots", 0, "gpu")
    assert (shortage.needed, shortage.free, shortage.evictable, shortage.held) == (5, 0, 3, 5)
    assert sequence.capacity == 160
    assert before == (manager.memory_usage(), manager.stats(), sequence.page_indices(0).tolist())
    assert sequence.resize(200)
    assert sequence.shortage is None
    manager.check()


def test_the_oldest_leaf_tail_goes_first_and_its_snapshot_with_it():
    manager = make_manager(8, 10)
    leave(manager, 0, 128)
    leave(manager, 500, 96)
    assert manager.probe_reuse(TOKENS[:128]) == (128, 128, 128)
    sequence = open_with(manager, 64)
    assert manager.probe_reuse(TOKENS[:128]) == (96, 96, 64)
    assert manager.probe_reuse(TOKENS[500:596]).attention_tokens == 96
    assert manager.stats().snapshots_evicted_unused == 1
    sequence.close()


def test_a_probe_and_a_create_without_resume_do_not_touch():
    manager = make_manager(8, 10)
    leave(manager, 0, 128)
    leave(manager, 500, 96)
    manager.probe_reuse(TOKENS[:128])
    manager.create_kv_cache(TOKENS[:128]).close()
    manager.check()
    open_with(manager, 64)
    assert manager.probe_reuse(TOKENS[:128]).attention_tokens == 96


def test_a_resume_and_close_touches_the_whole_path():
    manager = make_manager(8, 10)
    leave(manager, 0, 128)
    leave(manager, 500, 96)
    sequence = manager.create_kv_cache(TOKENS[:128])
    sequence.resume()
    sequence.close()
    open_with(manager, 64)
    assert manager.probe_reuse(TOKENS[:128]).attention_tokens == 128
    assert manager.probe_reuse(TOKENS[500:596]).attention_tokens == 64


def test_what_a_created_sequence_found_goes_last():
    manager = make_manager(8, 10)
    leave(manager, 0, 128)
    leave(manager, 500, 96)
    waiting = manager.create_kv_cache(TOKENS[:128])
    sequence = open_with(manager, 128)
    assert manager.probe_reuse(TOKENS[:128]) == (128, 128, 128)
    assert manager.probe_reuse(TOKENS[500:596]).attention_tokens == 0
    manager.check()
    assert sequence.resize(160)
    assert manager.probe_reuse(TOKENS[:128]) == (96, 96, 64)
    assert waiting.num_committed_tokens == 128
    sequence.close()
    assert waiting.resume()
    assert waiting.num_committed_tokens == 64
    manager.check()


def test_the_first_resume_finds_what_others_committed_since_creation():
    manager = make_manager(20, 10)
    waiting = manager.create_kv_cache(TOKENS[:100])
    assert waiting.num_committed_tokens == 0
    leave(manager, 0, 128)
    assert waiting.resume()
    assert waiting.num_committed_tokens == 64
    assert waiting.num_attention_tokens == 96
    assert manager.stats().usable_tokens == 64
    manager.check()


def test_kv_beyond_the_missing_snapshot_is_adopted_not_computed_into_new_pages():
    manager = make_manager(8, 10)
    leave(manager, 0, 100)
    sequence = manager.create_kv_cache(TOKENS[:99])
    sequence.resume()
    assert (sequence.num_committed_tokens, sequence.num_attention_tokens) == (64, 96)
    assert manager.used_slots(0) == 3
    sequence.resize(101)
    assert manager.used_slots(0) == 3 + 1
    manager.check()


def test_a_block_whose_last_token_must_be_computed_is_adopted_so_a_repeat_evicts_nothing():
    manager = make_manager(4 + 1, 3)
    ready = BlockKeys(np.arange(4), 32, 128)
    for expected in (0, 64):
        sequence = manager.create_kv_cache(ready[:-1])
        assert sequence.resume()
        assert sequence.resize(129)
        assert sequence.num_committed_tokens == expected
        sequence.reserve_snapshots(sequence.snapshot_points(128))
        sequence.commit(ready[sequence.num_committed_tokens :])
        sequence.close()
        manager.check()
    assert manager.used_slots(0) == 4
    assert manager.stats().pages_evicted == 0
    assert manager.stats().snapshots_evicted == 0


def test_the_source_is_never_evicted_to_make_room_for_the_state_started_from_it():
    manager = make_manager(8, 2)
    leave(manager, 0, 64)
    other = open_with(manager, 10)
    sequence = manager.create_kv_cache(TOKENS[:70])
    assert sequence.num_committed_tokens == 64
    assert sequence.resume()
    assert sequence.ssm_slot(1) != other.ssm_slot(1)
    assert manager.stats().copied_states == 0  # the source was the only slot left: it became the live state
    assert manager.probe_reuse(TOKENS[:70]).usable_tokens == 0
    manager.check()


def test_a_source_that_somebody_else_waits_for_is_not_taken_over():
    manager = make_manager(8, 2, max_util_for_resume=1.0)
    leave(manager, 0, 64)
    open_with(manager, 10)
    first, second = (manager.create_kv_cache(TOKENS[:70]) for _ in range(2))
    assert not first.resume()
    assert (first.shortage.reason, first.shortage.layer_group) == ("slots", 1)
    assert first.status is KVCacheStatus.SUSPENDED
    assert first.num_committed_tokens == 64
    manager.check()
    second.close()
    assert first.resume()


def test_out_of_states_is_an_answer_not_an_error():
    manager = make_manager(8, 2, max_util_for_resume=1.0)
    open_with(manager, 10)
    open_with(manager, 10)
    third = manager.create_kv_cache(())
    assert not third.resume()
    assert third.shortage.needed == 1
    manager.check()


def test_the_resume_gate_counts_what_others_hold_and_is_open_while_nobody_runs():
    manager = make_manager(10, 0, max_util_for_resume=0.5)
    busy = open_with(manager, 6 * 32)
    waiting = manager.create_kv_cache(())
    assert not waiting.resume()
    assert waiting.shortage.reason == "utilization"
    assert (waiting.shortage.held, waiting.shortage.free) == (6, 4)
    busy.suspend()
    assert waiting.resume()
    assert busy.resume()  # its own pages do not count against it
    manager.check()


def test_the_resume_gate_counts_states_too():
    manager = make_manager(100, 4, max_util_for_resume=0.5)
    for _ in range(3):
        open_with(manager, 1)
    waiting = manager.create_kv_cache(())
    assert not waiting.resume()
    assert (waiting.shortage.reason, waiting.shortage.layer_group) == ("utilization", 1)


@pytest.mark.parametrize("left", [ReuseScope(), ReuseScope(0), ReuseScope(1), ReuseScope(None, 0), ReuseScope(0, 0)])
@pytest.mark.parametrize("right", [ReuseScope(), ReuseScope(0), ReuseScope(1), ReuseScope(None, 0), ReuseScope(0, 0)])
def test_scopes_share_only_with_their_equals(left, right):
    manager = make_manager(20, 10)
    leave(manager, 0, 64, left)
    expected = 64 if left == right else 0
    assert manager.probe_reuse(TOKENS[:64], right).usable_tokens == expected


def test_a_scope_does_not_mix_tokens_and_ready_keys():
    manager = make_manager(20, 10)
    leave(manager, 0, 64)
    ready = BlockKeys([1, 2], 32, 64)
    with pytest.raises(ValueError, match=r"expected tokens in blocks of 32.*got ready block keys"):
        manager.create_kv_cache(ready)
    with pytest.raises(ValueError, match=r"probe_reuse: expected tokens in blocks of 32.*got ready block keys"):
        manager.probe_reuse(ready)
    manager.check()


def test_an_empty_scope_is_forgotten():
    manager = make_manager(4, 3)
    for salt in range(20):
        leave(manager, 0, 64, ReuseScope(salt=salt))
    assert len(manager.store.roots) <= 2


def test_shutdown_is_refused_while_sequences_are_open():
    manager = make_manager(8, 3)
    leave(manager, 0, 64)
    sequence = manager.create_kv_cache(())
    with pytest.raises(RuntimeError, match="shutdown"):
        manager.shutdown()
    sequence.close()
    manager.clear_reusable_blocks()
    manager.check()
    assert manager.memory_usage().used_bytes == 0
    assert manager.probe_reuse(TOKENS[:64]) == (0, 0, 0)
    leave(manager, 0, 64)
    manager.shutdown()
    assert manager.memory.bytes_in_use == 0


def test_page_indices_name_the_shared_and_the_private_pages_in_order():
    manager = make_manager(20, 0)
    first = open_with(manager, 100)
    first.commit(TOKENS[:64])
    second = open_with(manager, 100, TOKENS[:99])
    assert second.page_indices(0)[:2].tolist() == first.page_indices(0)[:2].tolist()
    assert len({*first.page_indices(0).tolist(), *second.page_indices(0).tolist()}) == 6
    with pytest.raises(ValueError, match="a layer group of attention"):
        first.page_indices(1)
    with pytest.raises(ValueError, match="SSM layer group"):
        first.ssm_slot(0)
    first.close()
    with pytest.raises(StateError, match="resumed"):
        first.page_indices(0)


def test_pages_are_asked_for_after_the_first_resume_only():
    manager = make_manager(8, 3)
    sequence = manager.create_kv_cache(())
    with pytest.raises(StateError, match="resumed"):
        sequence.page_indices(0)
    with pytest.raises(StateError, match="resumed"):
        sequence.ssm_slot(1)


@pytest.mark.parametrize("tokens", [[-1, 2], [[1, 2]], [1.5], ["a"]])
def test_tokens_that_are_no_tokens_are_refused(tokens):
    manager = make_manager(8, 3)
    with pytest.raises(ValueError, match="tokens: expected integers"):
        manager.create_kv_cache(tokens)
    manager.check()
    assert manager.open_sequences == {}


def test_a_pure_ssm_model_keeps_blocks_only_as_far_as_snapshots_need_them():
    manager = make_manager(0, 3)
    leave(manager, 0, 150)
    assert manager.probe_reuse(TOKENS[:150]) == (128, 128, 128)
    assert sum(run.end - run.start for run in manager.store.all_runs()) == 4
    leave(manager, 500, 70)
    manager.check()
    assert manager.probe_reuse(TOKENS[:150]) == (64, 64, 64)
    leave(manager, 900, 150)
    manager.check()
    assert manager.probe_reuse(TOKENS[:150]) == (0, 0, 0)
    assert manager.max_capacity is None
