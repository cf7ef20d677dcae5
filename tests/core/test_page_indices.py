"""Block tables: rows that are filled for kernels, rows that are followed, and pages that are not adopted."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
from payload import Request, Runner, Shape, run_at_random

from ssmcache import KVCache, KVCacheStatus, ReuseScope, StateError

SCOPE = ReuseScope()
TEXT = list(range(100, 148))
WINDOWED = Shape(block=4, windows=((6, 1),), slots=(40,))


class RecordingRow(np.ndarray):
    """A row that remembers which of its entries were written."""

    written: list[int]

    @classmethod
    def of(cls, size: int) -> RecordingRow:
        row = np.full(size, 77, dtype=np.int32).view(cls)
        row.written = []
        return row

    def __setitem__(self, where: object, value: object) -> None:
        self.written += np.arange(self.size)[where].ravel().tolist()
        super().__setitem__(where, value)

    def take_written(self) -> list[int]:
        written, self.written = self.written, []
        return sorted(written)


def start(runner: Runner, tokens: list[int] = ()) -> KVCache:
    kv = runner.manager.create_kv_cache(tokens)
    assert kv.resume()
    return kv


# -- page_indices(out=) ------------------------------------------------------------------------------------------------


def test_a_row_is_filled_and_returned_and_its_tail_is_empty() -> None:
    kv = start(Runner(WINDOWED))
    assert kv.resize(30, 14)
    for group in (0, 1):
        out = np.full(12, 77, dtype=np.int32)
        assert kv.page_indices(group, out=out) is out
        assert out[:8].tolist() == kv.page_indices(group).tolist()
        assert out[8:].tolist() == [-1] * 4
    assert kv.page_indices(1, out=np.empty(8, np.int32))[0] >= 0


@pytest.mark.parametrize(
    "out",
    [np.full(7, 5, np.int32), np.full(8, 5, np.int64), np.full((8, 1), 5, np.int32), np.full(0, 5, np.int32)],
    ids=["too short", "of 64 bits", "in two dimensions", "empty"],
)
@pytest.mark.parametrize("group", [0, 1])
def test_a_row_that_does_not_fit_is_refused_and_not_written(out: np.ndarray, group: int) -> None:
    kv = start(Runner(WINDOWED))
    assert kv.resize(30, 14)
    out = out.copy()
    message = r"row of page indices: expected at least 8 int32 in one dimension, got int\d\d of shape"
    with pytest.raises(ValueError, match=message):
        kv.page_indices(group, out=out)
    with pytest.raises(ValueError, match=message):
        kv.bind_page_indices(group, out)
    assert (out == 5).all()
    assert kv.resize(32, 14)  # nothing was bound


# -- bound rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
def test_only_entries_that_change_are_written_and_the_row_is_always_what_page_indices_says(seed: int) -> None:
    random = Random(seed)
    block = random.choice((1, 2, 4))
    runner = Runner(Shape(block=block, windows=((random.randint(1, 9), random.randint(0, 5)),), slots=(110,)))
    size = 48 // block + 3
    known = start(runner)
    assert known.resize(30)
    known.commit(TEXT[:30])  # so that some blocks of the other are there already, and are swapped
    kv = start(runner, TEXT[: random.randint(0, 20)])
    rows = [RecordingRow.of(size) for _ in range(2)]
    for group, row in enumerate(rows):
        kv.bind_page_indices(group, row)
        assert row.take_written() == list(range(size))
    num_written = 0
    for _ in range(25):
        before = [np.array(row) for row in rows]
        if random.random() < 0.6:
            history = random.randint(kv.history_length, min(kv.history_length + 6, 48))
            assert kv.resize(random.randint(history, 48), history)
        else:
            end = random.randint(kv.num_committed_tokens, kv.capacity)
            kv.commit(TEXT[kv.num_committed_tokens : end])
        for group, row in enumerate(rows):
            assert np.array_equal(row, kv.page_indices(group, np.empty(size, np.int32)))
            written = row.take_written()
            assert written == np.flatnonzero(before[group] != row).tolist()
            num_written += len(written)
    assert num_written
    kv.close()
    known.close()
    runner.finish()


@pytest.mark.parametrize("seed", range(10))
def test_what_others_write_into_a_row_stays_but_where_an_entry_changes(seed: int) -> None:
    """So nothing else was written, not even with the same value, and the row was not read to find that out."""
    random = Random(seed)
    runner = Runner(Shape(block=2, windows=((7, 3),), slots=(110,)))
    known = start(runner)
    assert known.resize(30)
    known.commit(TEXT[:30])
    kv = start(runner, TEXT[: random.randint(0, 20)])
    rows = [np.zeros(30, np.int32) for _ in range(2)]
    for group, row in enumerate(rows):
        kv.bind_page_indices(group, row)
    for _ in range(40):
        before = [kv.page_indices(group, np.empty(30, np.int32)) for group in (0, 1)]
        for row in rows:
            row[:] = 99
        if random.random() < 0.6:
            history = random.randint(kv.history_length, min(kv.history_length + 6, 48))
            assert kv.resize(random.randint(history, 48), history)
        else:
            kv.commit(TEXT[kv.num_committed_tokens : random.randint(kv.num_committed_tokens, kv.capacity)])
        for group, row in enumerate(rows):
            now = kv.page_indices(group, np.empty(30, np.int32))
            assert row.tolist() == np.where(before[group] == now, 99, now).tolist()


def elements_handled(monkeypatch: pytest.MonkeyPatch, kv: KVCache, capacity: int, history: int) -> int:
    """Entries of all arrays that a `resize` makes by joining or filling."""
    count = 0

    def counted(name: str) -> Callable[..., np.ndarray]:
        function = getattr(np, name)

        def call(*args: Any, **options: Any) -> np.ndarray:
            nonlocal count
            result = function(*args, **options)
            count += result.size
            return result

        return call

    with monkeypatch.context() as patch:
        for name in ("concatenate", "full"):
            patch.setattr(np, name, counted(name))
        assert kv.resize(capacity, history)
    return count


@pytest.mark.parametrize("num_blocks", [10, 1_000])
def test_a_bound_row_costs_entries_that_change_however_long_it_is(
    num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(Shape(block=4, windows=((6, 1),), slots=(2_400,)))
    handled: dict[bool, list[int]] = {}
    for is_bound in (False, True):
        kv = start(runner)
        assert kv.resize(4 * num_blocks, 4 * num_blocks)
        rows = [RecordingRow.of(num_blocks + 4) for _ in range(2)]
        for group, row in enumerate(rows):
            if is_bound:
                kv.bind_page_indices(group, row)
                row.take_written()
        handled[is_bound] = []
        for length in range(4 * num_blocks + 1, 4 * num_blocks + 9):
            handled[is_bound].append(elements_handled(monkeypatch, kv, length, length - 1))
            if is_bound:
                ends_in_block = length % 4 == 1
                assert rows[0].take_written() == [length // 4] * ends_in_block
                assert len(rows[1].take_written()) <= 2
        kv.close()
    assert all(bound <= unbound + 4 for bound, unbound in zip(handled[True], handled[False], strict=True))
    assert handled[True][1:4] == [0, 0, 0]


def test_the_row_of_another_sequence_in_the_same_table_is_left_alone() -> None:
    runner = Runner(WINDOWED)
    table = np.full((3, 12), 77, dtype=np.int32)
    first, second = start(runner), start(runner)
    assert first.resize(8)
    assert second.resize(20)
    first.bind_page_indices(0, table[0])
    second.bind_page_indices(0, table[2])
    assert first.resize(40)
    assert second.resize(12)
    assert (table[1] == 77).all()
    assert table[0].tolist() == [*first.page_indices(0).tolist(), -1, -1]
    assert table[2].tolist() == [*second.page_indices(0).tolist(), *[-1] * 9]


@pytest.mark.parametrize("num_tiers", [1, 2])
@pytest.mark.parametrize("end", ["suspend", "close", "unbind"])
def test_a_row_is_let_go_at_suspend_at_close_and_when_none_is_bound(end: str, num_tiers: int) -> None:
    runner = Runner(Shape(block=4, windows=((6, 1),), slots=(40, 40)[:num_tiers]))
    kv = start(runner)
    assert kv.resize(20)
    rows = [RecordingRow.of(12) for _ in range(2)]
    for group, row in enumerate(rows):
        kv.bind_page_indices(group, row)
        row.take_written()
    if end == "suspend":
        kv.suspend()
        assert kv.resume()
    elif end == "close":
        kv.close()
        kv = start(runner)
    else:
        for group in (0, 1):
            kv.bind_page_indices(group, None)
    assert kv.resize(48, 30)
    kv.commit(TEXT)
    assert [row.take_written() for row in rows] == [[], []]
    kv.bind_page_indices(0, rows[0])
    assert rows[0].tolist() == kv.page_indices(0).tolist()


def test_a_resize_beyond_a_bound_row_is_refused_before_anything_changes() -> None:
    runner = Runner(WINDOWED)
    kv = start(runner)
    row = np.zeros(5, np.int32)
    kv.bind_page_indices(0, row)
    assert kv.resize(20, 8)
    before = runner.manager.memory_usage(), row.tolist(), kv.capacity, kv.history_length
    with pytest.raises(ValueError, match="expected at least 6 int32"):
        kv.resize(21, 12)
    assert (runner.manager.memory_usage(), row.tolist(), kv.capacity, kv.history_length) == before
    runner.manager.check()
    kv.bind_page_indices(0, None)
    assert kv.resize(21, 12)


def test_only_an_active_sequence_can_be_followed_and_only_a_group_of_attention() -> None:
    runner = Runner(Shape(block=4, ssm=True, slots=(20,)))
    kv = runner.manager.create_kv_cache()
    row = np.zeros(5, np.int32)
    with pytest.raises(StateError, match="bind_page_indices: expected an ACTIVE sequence"):
        kv.bind_page_indices(0, row)
    assert kv.resume()
    with pytest.raises(ValueError, match="expected a layer group of attention, got 1"):
        kv.bind_page_indices(1, row)
    assert kv.status is KVCacheStatus.ACTIVE


# -- adopt_kv=False ----------------------------------------------------------------------------------------------------


def hybrid_with_pages_beyond_the_snapshot(slots: int = 20) -> Runner:
    runner = Runner(Shape(block=4, ssm=True, interval=8, slots=(slots,)))
    request = runner.create(TEXT[:24])
    assert runner.resume(request)
    assert runner.compute(request, 8, reserve=True)
    assert runner.compute(request, 24, reserve=False)  # blocks 2 to 5, and a snapshot at 24 alone
    runner.close(request)
    return runner


def test_pages_that_are_not_adopted_are_computed_into_duplicates_and_swapped_for_the_known_ones_at_commit() -> None:
    runner = hybrid_with_pages_beyond_the_snapshot()
    request = runner.create(TEXT[:23], adopt_kv=False)
    kv = request.kv
    assert (kv.reuse_match.attention_tokens, kv.num_committed_tokens, kv.num_attention_tokens) == (20, 8, 8)
    assert runner.resume(request)
    shared = runner.manager.store.all_runs()[-1].pages.slots.tolist()
    assert runner.manager.used_slots(0) == 6
    assert kv.resize(23)
    assert runner.manager.used_slots(0) == 6 + 4  # blocks 2 to 5 once more
    assert not set(kv.page_indices(0)[2:].tolist()) & set(shared)
    assert runner.compute(request, 16, reserve=False)  # which checks every byte
    assert kv.page_indices(0)[:4].tolist() == [*kv.page_indices(0)[:2].tolist(), *shared[-4:-2]]
    assert runner.manager.used_slots(0) == 6 + 2
    assert runner.compute(request, 23, reserve=False)
    assert runner.manager.used_slots(0) == 6 + 1
    runner.close(request)
    assert runner.manager.used_slots(0) == 6
    runner.finish()


def test_adopted_pages_need_no_room_where_duplicates_do() -> None:
    for adopt_kv in (True, False):
        runner = hybrid_with_pages_beyond_the_snapshot(slots=6)
        request = runner.create(TEXT[:23], adopt_kv=adopt_kv)
        assert runner.resume(request)
        assert request.kv.num_attention_tokens == (20 if adopt_kv else 8)
        assert request.kv.resize(23)
        known = runner.manager.probe_reuse(TEXT[:24]).attention_tokens
        assert known == (20 if adopt_kv else 8)
        runner.finish()


class SomeAdopt(Runner):
    """Every other sequence adopts nothing."""

    def create(self, tokens: list[int], scope: ReuseScope = SCOPE, **options: object) -> Request:
        return super().create(tokens, scope, adopt_kv=len(tokens) % 2 == 0, **options)


@pytest.mark.parametrize("slots", [(9,), (8, 7)], ids=["one tier", "two tiers"])
@pytest.mark.parametrize("windows", [(), ((5, 1),)], ids=["hybrid", "hybrid with a window"])
def test_sequences_that_adopt_and_that_do_not_read_what_was_computed(
    slots: tuple[int, ...], windows: tuple[tuple[int, int], ...]
) -> None:
    for seed in range(12):
        random = Random(seed)
        block = random.choice((1, 2, 3))
        runner = SomeAdopt(Shape(block=block, ssm=True, interval=2 * block, slots=slots, windows=windows))
        run_at_random(runner, random, 120)
        assert runner.num_checked
