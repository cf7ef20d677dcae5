"""Admission `last`: a request keeps the last boundary of its prompt, and that of what it has decoded so far."""

import numpy as np
import pytest
from managers import make_manager

PROMPT = np.arange(1000, 2000)


def last_manager(pages=None, states=None):
    return make_manager(pages, states, admission="last")


def snapshots_of(manager):
    """Tokens before each snapshot in the tree."""
    runs = manager.store.all_runs()
    return sorted((ordinal + 1) * 32 for run in runs for segment in run.items for ordinal in segment.ordinals)


def serve(manager, prompt, cuts=(), reserve=False, priority=None):
    """A request whose prompt is committed up to each of the cuts, and then to its end."""
    sequence = manager.create_kv_cache(prompt[:-1], priority=priority)
    assert sequence.resume()
    assert sequence.resize(len(prompt) + 1)
    if reserve:
        sequence.reserve_snapshots(sequence.snapshot_points(len(prompt)))
    for cut in (*cuts, len(prompt)):
        if cut > sequence.num_committed_tokens:
            sequence.commit(prompt[sequence.num_committed_tokens : cut])
            manager.check()
    sequence.close()
    manager.check()


@pytest.mark.parametrize("cuts", [(192,), (64, 128, 192), (100, 192), (10, 64, 192, 199)])
def test_commits_in_pieces_leave_the_one_snapshot_of_the_prompt_as_one_commit_does(cuts):
    reserved, pieces = last_manager(), last_manager()
    serve(reserved, PROMPT[:200], reserve=True)
    serve(pieces, PROMPT[:200], cuts)
    assert snapshots_of(reserved) == snapshots_of(pieces) == [192]
    assert (reserved.stats().copied_states, pieces.stats().copied_states) == (0, 1)
    assert reserved.stats().snapshots_skipped_not_admitted == pieces.stats().snapshots_skipped_not_admitted == 2


def test_a_prompt_that_ends_on_a_boundary_keeps_that_one():
    manager = last_manager()
    serve(manager, PROMPT[:192], reserve=True)
    assert snapshots_of(manager) == [192]
    assert manager.probe_reuse(PROMPT[:191]).usable_tokens == 0
    assert manager.probe_reuse(PROMPT[:193]).usable_tokens == 192


def test_points_of_a_prompt_are_its_last_boundary_alone_and_then_each_next_one():
    manager = last_manager()
    sequence = manager.create_kv_cache(PROMPT[:199])
    sequence.resume()
    sequence.resize(300)
    assert [list(sequence.snapshot_points(end)) for end in (64, 191, 192, 200, 255, 256)] == [
        [], [], [192], [192], [192], [192, 256],
    ]  # fmt: skip
    assert sequence.next_snapshot_point() == 192
    sequence.commit(PROMPT[:192])
    assert sequence.next_snapshot_point() == 256
    assert list(sequence.snapshot_points(255)) == []


def test_points_that_are_not_the_last_get_no_slot_and_a_slot_that_is_passed_over_goes_back():
    manager = last_manager()
    sequence = manager.create_kv_cache(PROMPT[:199])
    sequence.resume()
    sequence.resize(300)
    assert list(sequence.reserve_snapshots([64, 128, 192])) == [192]
    assert list(sequence.reserve_snapshots([256])) == [192, 256]  # before it is known where decoding ends
    sequence.commit(PROMPT[:260])
    manager.check()
    assert snapshots_of(manager) == [192, 256]
    sequence.commit(PROMPT[260:261])
    sequence.reserve_snapshots([300])  # no boundary, and what is never reached
    sequence.close()
    assert manager.used_slots(1) == 2
    assert manager.stats().snapshots_skipped_not_admitted == 3


@pytest.mark.parametrize("states", [3, 9])
def test_decoding_keeps_that_of_the_prompt_and_replaces_the_next_one_by_the_next(states):
    manager = last_manager(40, states)
    serve(manager, PROMPT[500:564], reserve=True)
    sequence = manager.create_kv_cache(PROMPT[:99])
    sequence.resume()
    sequence.resize(400)
    sequence.commit(PROMPT[:64])
    for end in range(65, 330):
        sequence.commit(PROMPT[end - 1 : end])
        manager.check()
        others = [] if states == 3 and end >= 128 else [64]
        assert snapshots_of(manager) == sorted([64, *others, *([end // 64 * 64] if end >= 128 else [])])
    sequence.close()
    stats = manager.stats()
    # a full pool gives up one of the others, not two: each next one lies where the one before was
    assert (stats.snapshots_taken, stats.snapshots_superseded, stats.snapshots_evicted) == (6, 3, states == 3)
    assert manager.probe_reuse(PROMPT[:99]).usable_tokens == 64
    assert manager.probe_reuse(PROMPT[:400]).usable_tokens == 320


@pytest.mark.parametrize("is_new", [True, False])
def test_no_room_but_that_of_the_prompt_is_no_room_while_decoding(is_new):
    manager = last_manager(40, 2)  # a live state and one snapshot
    if not is_new:
        serve(manager, PROMPT[:64], reserve=True)
    sequence = manager.create_kv_cache(PROMPT[:70])
    sequence.resume()
    sequence.resize(400)
    for end in (64, 128, 192):
        sequence.commit(PROMPT[sequence.num_committed_tokens : end])
    assert list(sequence.reserve_snapshots([256])) == []
    sequence.close()
    assert snapshots_of(manager) == [64]
    assert manager.stats().snapshots_skipped_no_room == 2


def test_of_the_two_that_a_request_leaves_the_decoded_one_goes_first_and_others_before_it():
    manager = last_manager(40, 4)
    serve(manager, PROMPT[500:564], reserve=True)
    sequence = manager.create_kv_cache(PROMPT[:63])
    sequence.resume()
    sequence.resize(129)
    sequence.commit(PROMPT[:64])
    sequence.commit(PROMPT[64:128])
    sequence.close()
    left = []
    for start in (600, 700, 800):
        serve(manager, PROMPT[start : start + 64], reserve=True)
        left.append(
            [manager.probe_reuse(tokens).usable_tokens for tokens in (PROMPT[500:600], PROMPT[:65], PROMPT[:200])]
        )
    assert left == [[0, 64, 128], [0, 64, 64], [0, 0, 0]]


@pytest.mark.parametrize("priority", [None, lambda group, block: 35])  # with one, snapshots of one touch would join
def test_a_later_request_touches_only_its_own_of_two_snapshots_that_were_taken_together(priority):
    manager = last_manager(40, 4)
    sequence = manager.create_kv_cache(PROMPT[:63], priority=priority)
    sequence.resume()
    sequence.resize(200)
    sequence.reserve_snapshots([64, 128])
    sequence.commit(PROMPT[:128])  # prompt and output at once
    sequence.suspend()  # which touches both
    sequence.resume()
    sequence.commit(PROMPT[128:161])
    manager.check()
    sequence.close()
    assert snapshots_of(manager) == [64, 128]
    manager.check()
    serve(manager, PROMPT[500:564], reserve=True)
    serve(manager, PROMPT[:70], reserve=True, priority=priority)  # touches 64 alone
    serve(manager, PROMPT[600:664], reserve=True)
    assert manager.probe_reuse(PROMPT[:200]).usable_tokens == 64
    assert manager.probe_reuse(PROMPT[500:600]).usable_tokens == 64


@pytest.mark.parametrize("other", ["started from it", "is about to start", "touched it"])
def test_decoding_leaves_a_snapshot_that_others_make_use_of(other):
    manager = last_manager()
    sequence = manager.create_kv_cache(PROMPT[:99])
    sequence.resume()
    sequence.resize(400)
    sequence.commit(PROMPT[:100])
    sequence.reserve_snapshots([])
    assert snapshots_of(manager) == []  # 64 was passed
    sequence.commit(PROMPT[100:128])
    assert snapshots_of(manager) == [128]  # decoded
    if other == "started from it":
        serve(manager, PROMPT[:150])
    elif other == "is about to start":
        manager.create_kv_cache(PROMPT[:150])
    else:
        serve(manager, PROMPT[:128])
    sequence.commit(PROMPT[128:192])
    assert snapshots_of(manager) == [128, 192]
    manager.check()


def test_a_suspended_sequence_still_knows_its_own_snapshot():
    manager = last_manager()
    sequence = manager.create_kv_cache(())
    sequence.resume()
    sequence.resize(400)
    sequence.commit(PROMPT[:64])
    sequence.suspend()
    sequence.resume()
    sequence.commit(PROMPT[64:128])
    assert snapshots_of(manager) == [128]


def test_only_the_own_last_snapshot_is_touched_and_the_one_started_from_may_go_for_it():
    manager = last_manager(40, 3)  # a live state and two snapshots
    serve(manager, PROMPT[:64], reserve=True)
    serve(manager, PROMPT[500:564], reserve=True)
    # it starts from 64, which is the oldest: that one goes, though it lies on its path
    serve(manager, PROMPT[:130], reserve=True)
    assert manager.probe_reuse(PROMPT[:128]).usable_tokens == 128
    assert manager.probe_reuse(PROMPT[:127]).usable_tokens == 0
    assert manager.probe_reuse(PROMPT[500:600]).usable_tokens == 64


def test_a_snapshot_goes_with_its_kv():
    manager = last_manager(10, 5)
    serve(manager, PROMPT[:128], reserve=True)
    serve(manager, PROMPT[500:788], reserve=True)
    assert manager.probe_reuse(PROMPT[:200]).usable_tokens == 0
    assert manager.stats().snapshots_evicted == 1


def test_an_unknown_admission_is_refused():
    with pytest.raises(ValueError, match="admission: expected 'every' or 'last', got 'first'"):
        make_manager(4, 4, admission="first")
