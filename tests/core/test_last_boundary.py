"""Admission `last`: one snapshot a request, at the last boundary of its prompt, then of what it has decoded."""

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


def serve(manager, prompt, cuts=(), reserve=False):
    """A request whose prompt is committed up to each of the cuts, and then to its end."""
    sequence = manager.create_kv_cache(prompt[:-1])
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
        [], [], [192], [192], [192], [256],
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
    assert snapshots_of(manager) == [256]
    sequence.close()
    assert manager.used_slots(1) == 1
    assert manager.stats().snapshots_skipped_not_admitted == 3


def test_decoding_replaces_the_snapshot_by_the_next_one():
    manager = last_manager(40, 4)
    sequence = manager.create_kv_cache(PROMPT[:99])
    sequence.resume()
    sequence.resize(400)
    sequence.commit(PROMPT[:64])
    for end in range(65, 330):
        sequence.commit(PROMPT[end - 1 : end])
        manager.check()
        assert snapshots_of(manager) == [end // 64 * 64]
    assert manager.used_slots(1) == 2
    sequence.close()
    stats = manager.stats()
    assert (stats.snapshots_taken, stats.snapshots_superseded, stats.snapshots_evicted) == (5, 4, 0)


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
    assert snapshots_of(manager) == [128]
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
