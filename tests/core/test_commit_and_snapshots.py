"""Where commits leave snapshots, and what later prompts can reuse: the table of the design, and its neighbours."""

import numpy as np
import pytest
from managers import make_manager

from ssmcache import StateError

PROMPT = np.arange(1000, 2000)


def committed(manager, chunks, *, close=True, reserve=False):
    sequence = manager.create_kv_cache(())
    assert sequence.resume()
    assert sequence.resize(sum(chunks) + 1)
    if reserve:
        sequence.reserve_snapshots(sequence.snapshot_points(sum(chunks)))
    for count in chunks:
        start = sequence.num_committed_tokens
        sequence.commit(PROMPT[start : start + count])
        manager.check()
    if close:
        sequence.close()
    return sequence


@pytest.mark.parametrize(
    ("chunks", "prompt_tokens", "usable"),
    [
        ((64, 64), 128, 128),
        ((64, 64), 100, 64),
        ((128,), 128, 128),
        ((128,), 127, 0),
        ((48, 48, 32), 128, 128),
        ((96,), 96, 0),
        ((64, 40), 104, 64),
    ],
)
def test_commits_leave_the_snapshots_of_the_design_table(chunks, prompt_tokens, usable):
    manager = make_manager(None, None)
    committed(manager, chunks)
    match = manager.probe_reuse(PROMPT[:prompt_tokens])
    assert match.usable_tokens == usable
    assert match.attention_tokens == min(prompt_tokens, sum(chunks)) // 32 * 32


def test_reserved_points_give_the_tree_of_chunked_commits_without_a_copy():
    chunked, reserved = make_manager(None, None), make_manager(None, None)
    committed(chunked, (64, 64, 64, 8))
    committed(reserved, (200,), reserve=True)
    for length in range(0, 260, 4):
        assert chunked.probe_reuse(PROMPT[:length]) == reserved.probe_reuse(PROMPT[:length])
    assert chunked.stats().copied_states == 3
    assert reserved.stats().copied_states == 0
    assert chunked.stats().snapshots_taken == reserved.stats().snapshots_taken == 3


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 191])
def test_reserved_states_lie_at_the_points_before_the_end_and_nowhere_else(length):
    manager = make_manager(None, None)
    committed(manager, (length,), reserve=True)
    (run,) = manager.store.all_runs()
    ordinals = [ordinal for segment in run.items for ordinal in segment.ordinals]
    assert ordinals == [point // 32 - 1 for point in range(64, length + 1, 64)]


def test_a_boundary_that_a_commit_passes_is_counted_and_gives_no_snapshot():
    manager = make_manager(None, None)
    committed(manager, (200,))
    assert manager.stats().snapshots_taken == 0
    assert manager.stats().snapshots_skipped_crossed == 3


def test_a_snapshot_is_added_to_an_existing_block_that_has_none():
    manager = make_manager(None, None)
    committed(manager, (200,))
    assert manager.probe_reuse(PROMPT[:199]).usable_tokens == 0
    committed(manager, (64, 136))
    assert manager.probe_reuse(PROMPT[:199]).usable_tokens == 64
    assert manager.memory_usage().groups[0].used_slots == 200 // 32


def test_a_second_sequence_with_the_same_prompt_ends_on_the_same_pages():
    manager = make_manager(None, None)
    first = committed(manager, (128,), close=False)
    second = committed(manager, (128,), close=False)
    assert first.page_indices(0)[:4].tolist() == second.page_indices(0)[:4].tolist()
    assert first.page_indices(0)[4] != second.page_indices(0)[4]
    assert manager.used_slots(0) == 4 + 2
    first.close()
    second.close()
    assert manager.used_slots(0) == 4


def test_history_ahead_of_the_commit_takes_no_copy_of_the_live_state():
    manager = make_manager(None, None)
    sequence = manager.create_kv_cache(())
    sequence.resume()
    sequence.resize(130, history_length=100)
    sequence.commit(PROMPT[:64])
    assert manager.stats().snapshots_taken == 0
    assert manager.stats().snapshots_skipped_history == 1
    sequence.commit(PROMPT[64:128])
    assert manager.stats().snapshots_taken == 1


def test_reserved_slots_that_the_next_commit_does_not_cover_go_back():
    manager = make_manager(None, None)
    sequence = manager.create_kv_cache(())
    sequence.resume()
    sequence.resize(300)
    assert list(sequence.reserve_snapshots([64, 128, 192])) == [64, 128, 192]
    assert manager.used_slots(1) == 1 + 3
    sequence.commit(PROMPT[:70])
    assert manager.used_slots(1) == 1 + 1
    sequence.reserve_snapshots([128])
    sequence.suspend()
    assert manager.used_slots(1) == 1 + 1
    sequence.resume()
    sequence.reserve_snapshots([128])
    sequence.close()
    assert manager.used_slots(1) == 1
    manager.check()


def test_a_slot_reserved_too_far_ahead_serves_the_end_of_the_commit():
    manager = make_manager(20, 2)
    sequence = manager.create_kv_cache(())
    sequence.resume()
    sequence.resize(300)
    assert list(sequence.reserve_snapshots([256])) == [256]
    sequence.commit(PROMPT[:64])
    assert manager.stats().snapshots_taken == 1
    assert manager.stats().snapshots_skipped_no_room == 0
    manager.check()


def test_a_commit_that_ends_on_a_reserved_point_makes_no_second_copy():
    manager = make_manager(None, None)
    committed(manager, (128,), reserve=True)
    assert manager.stats().copied_states == 0
    assert manager.used_slots(1) == 2


def test_where_room_is_short_the_shallowest_points_are_served_and_the_rest_is_counted():
    manager = make_manager(20, 3)
    sequence = manager.create_kv_cache(())
    sequence.resume()
    sequence.resize(300)
    assert list(sequence.reserve_snapshots(sequence.snapshot_points(300))) == [64, 128]
    sequence.commit(PROMPT[:300])
    sequence.close()
    assert manager.stats().snapshots_skipped_no_room == 2
    assert manager.stats().snapshots_skipped_crossed == 0
    assert manager.probe_reuse(PROMPT[:299]).usable_tokens == 128


def test_snapshots_of_the_own_path_are_never_given_up_for_a_reservation():
    manager = make_manager(20, 3)
    committed(manager, (64, 64))
    sequence = manager.create_kv_cache(PROMPT[:299])
    sequence.resume()
    sequence.resize(300)
    assert sequence.reserve_snapshots([192, 256]) == {}
    sequence.commit(PROMPT[128:300])
    sequence.close()
    assert manager.probe_reuse(PROMPT[:299]).usable_tokens == 128


def test_points_that_the_interval_does_not_want_are_counted_as_not_admitted():
    manager = make_manager(None, None)
    sequence = manager.create_kv_cache(())
    sequence.resume()
    sequence.resize(100)
    assert list(sequence.reserve_snapshots([32, 64, 70])) == [64]
    assert manager.stats().snapshots_skipped_not_admitted == 2


@pytest.mark.parametrize("points", [[0], [101], [64, 128]])
def test_points_outside_the_sequence_are_refused(points):
    manager = make_manager(None, None)
    sequence = manager.create_kv_cache(())
    sequence.resume()
    sequence.resize(100)
    with pytest.raises(ValueError, match=r"reserve_snapshots: expected points in 1\.\.100"):
        sequence.reserve_snapshots(points)
    manager.check()


def test_reserving_without_ssm_layers_is_refused_but_asking_for_points_gives_none():
    manager = make_manager(None, 0)
    sequence = manager.create_kv_cache(())
    sequence.resume()
    sequence.resize(100)
    assert list(sequence.snapshot_points(100)) == []
    assert sequence.next_snapshot_point() is None
    assert sequence.reserve_snapshots([]) == {}
    with pytest.raises(ValueError, match="SSM layers"):
        sequence.reserve_snapshots([64])


def test_snapshot_points_are_the_multiples_of_the_interval_ahead():
    manager = make_manager(None, None)
    sequence = manager.create_kv_cache(())
    sequence.resume()
    sequence.resize(300)
    assert list(sequence.snapshot_points(200)) == [64, 128, 192]
    sequence.commit(PROMPT[:64])
    assert list(sequence.snapshot_points(128)) == [128]
    assert sequence.next_snapshot_point() == 128


def test_decoding_token_by_token_leaves_the_snapshots_and_one_run():
    manager = make_manager(None, None, block=4, interval=8)
    sequence = manager.create_kv_cache(())
    sequence.resume()
    for position in range(40):
        assert sequence.resize(position + 1)
        sequence.commit(PROMPT[position : position + 1])
        manager.check()
    sequence.close()
    manager.check()
    assert manager.stats().snapshots_taken == 5
    assert manager.probe_reuse(PROMPT[:39]).usable_tokens == 32
    assert len(manager.store.all_runs()) == 1


def test_other_tokens_than_those_of_the_shared_pages_are_refused_and_change_nothing():
    manager = make_manager(None, None)
    committed(manager, (96,))
    sequence = manager.create_kv_cache(PROMPT[:95])
    sequence.resume()
    sequence.resize(100)
    assert (sequence.num_committed_tokens, sequence.num_attention_tokens) == (0, 64)
    with pytest.raises(ValueError, match="tokens that the sequence was created with"):
        sequence.commit(PROMPT[1:97])
    assert sequence.num_committed_tokens == 0
    manager.check()
    sequence.commit(PROMPT[:96])


def test_commit_beyond_the_capacity_is_refused():
    manager = make_manager(None, None)
    sequence = manager.create_kv_cache(())
    sequence.resume()
    sequence.resize(64)
    with pytest.raises(ValueError, match="at most 64 tokens"):
        sequence.commit(PROMPT[:65])


def test_after_stop_committing_commits_are_errors_and_close_keeps_what_was_committed():
    manager = make_manager(None, None)
    sequence = manager.create_kv_cache(())
    sequence.resume()
    sequence.resize(128)
    sequence.commit(PROMPT[:64])
    sequence.stop_committing()
    sequence.stop_committing()
    with pytest.raises(StateError, match="stop_committing"):
        sequence.commit(PROMPT[64:128])
    sequence.close()
    assert manager.probe_reuse(PROMPT[:127]).usable_tokens == 64
