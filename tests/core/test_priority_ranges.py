"""Priorities by range: they mean what a callback that looks each block up in them means, and cost the same however many
blocks they cover.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import numpy as np
import pytest
import test_eviction_order
import test_priorities_at_random
from eviction_reference import PriorityFunction
from test_eviction_order import serve_at_random
from test_priorities import OTHER, TEXT, leave, make, pages, ranks, start

import ssmcache
from ssmcache import KVCache, KVCacheManager, PriorityRange

GIVEN = (0, 10, 35, 80, 100)


def lookup(ranges: Sequence[PriorityRange]) -> PriorityFunction:
    """The oracle: the range that a block lies in, looked for among all of them."""

    def priority(group: int, block: int) -> int:
        found = [
            entry.priority
            for entry in ranges
            if entry.layer_group in (None, group)
            and block in range(entry.start_block, 10**9 if entry.end_block is None else entry.end_block)
        ]
        assert len(found) <= 1
        return found[0] if found else 35

    return priority


def random_ranges(random: Random, num_groups: int = 4, longest: int = 80) -> list[PriorityRange]:
    """With gaps and without, for all layer groups or some, in any order."""
    ranges: list[PriorityRange] = []
    for group in [None] if random.random() < 0.5 else random.sample(range(num_groups), random.randint(0, num_groups)):
        cuts = sorted(random.sample(range(longest), 2 * random.randint(1, 4)))
        ends: list[int | None] = [*cuts[1:], None]
        for first, end in zip(cuts, ends, strict=True):
            if random.random() < 0.7:
                ranges.append(PriorityRange(first, end, random.choice(GIVEN), group))
    random.shuffle(ranges)
    return ranges


class Looked:
    """Ranges, and what they say of a block."""

    def __init__(self, random: Random) -> None:
        self.ranges = random_ranges(random, longest=20)
        self._lookup = lookup(self.ranges)

    def __call__(self, group: int, block: int) -> int:
        return self._lookup(group, block)


@pytest.mark.parametrize("name", test_eviction_order.SHAPES)
def test_ranges_decide_who_goes_first_as_the_oracle_of_single_blocks_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = KVCacheManager.create_kv_cache

    def create_with_ranges(manager: KVCacheManager, *args: Any, priority: Looked | None, **options: Any) -> KVCache:
        ranges = (
            [entry for entry in priority.ranges if (entry.layer_group or 0) < len(manager.groups)] if priority else None
        )
        return create(manager, *args, priority=ranges, **options)

    monkeypatch.setattr(KVCacheManager, "create_kv_cache", create_with_ranges)
    monkeypatch.setattr(test_eviction_order, "priorities", Looked)
    pairs = [serve_at_random(test_eviction_order.SHAPES[name], seed, True) for seed in range(100, 108)]
    assert all(sum(pair.reference.num_evicted[group] for pair in pairs) > 10 for group in pairs[0].reference.entries)


class SomeRanges(test_priorities_at_random.SomePriorities):
    """Most sequences have ranges, or a callback that looks blocks up in them."""

    as_callback: bool

    def create(self, tokens: list[int], scope: Any = test_priorities_at_random.SCOPE, **options: Any) -> Any:
        ranges = random_ranges(self.random, len(self.manager.groups))
        if self.random.random() < 0.7:
            options["priority"] = lookup(ranges) if self.as_callback else tuple(ranges)
        return super(test_priorities_at_random.SomePriorities, self).create(tokens, scope, **options)


@pytest.mark.parametrize("name", test_priorities_at_random.SHAPES)
def test_ranges_on_several_tiers_do_all_that_a_callback_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_priorities_at_random, "SomePriorities", SomeRanges)
    for seed in range(3):
        found = []
        for as_callback in (False, True):
            monkeypatch.setattr(SomeRanges, "as_callback", as_callback, raising=False)
            folder = tmp_path / f"{seed}-{as_callback}"
            folder.mkdir()
            runner = test_priorities_at_random.run(test_priorities_at_random.SHAPES[name], seed, folder)
            found.append((runner.num_checked, runner.num_refused, runner.manager.stats()))
        assert found[0] == found[1]


# -- cost --------------------------------------------------------------------------------------------------------------


def lines_run(call: Callable[[], object]) -> int:
    """How many lines of the package run: what Python does, not what NumPy does in one step."""
    folder = str(Path(ssmcache.__file__).parent)
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(folder):
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


def serve(manager: KVCacheManager, text: range, ranges: Sequence[PriorityRange] | None) -> int:
    """Lines that a request runs whose text but for its last quarter is known."""

    def request() -> None:
        kv = manager.create_kv_cache(text[:-1], priority=ranges)
        assert kv.resume()
        assert kv.resize(len(text))
        kv.commit(text[kv.num_committed_tokens :])
        kv.close()

    return lines_run(request)


def scaled(ranges: Sequence[PriorityRange], factor: int) -> list[PriorityRange]:
    return [
        PriorityRange(r.start_block * factor, r.end_block and r.end_block * factor, r.priority, r.layer_group)
        for r in ranges
    ]


@pytest.mark.parametrize("ssm", [False, True], ids=["full", "full and SSM"])
@pytest.mark.parametrize("user", ["ranges", "nobody"])
def test_what_priorities_cost_does_not_grow_with_the_blocks_that_they_cover(user: str, ssm: bool) -> None:
    """Also where somebody else has used a callback before: nobody visits blocks one by one."""
    ranges = [PriorityRange(0, 10, 80), PriorityRange(20, 30, 10), PriorityRange(30, None, 50)]
    lines = []
    for factor in (1, 20):
        manager = make(8_000, ssm=ssm)
        manager.admission.interval = 40 * factor  # as many snapshots for each length
        text = range(80 * factor)
        first = scaled(ranges, factor)
        leave_at_once(manager, text[: 60 * factor], lookup(first))
        lines.append(serve(manager, text, first if user == "ranges" else None))
        manager.check()
    assert lines[1] <= lines[0] + 5


def leave_at_once(manager: KVCacheManager, text: range, priority: PriorityFunction) -> None:
    kv = manager.create_kv_cache(priority=priority)
    assert kv.resume()
    assert kv.resize(len(text))
    kv.commit(text)
    kv.close()


def test_a_sequence_without_priorities_runs_nothing_more_once_blocks_have_the_default() -> None:
    lines = []
    for used in (False, True):
        manager = make(100)
        if used:
            leave(manager, OTHER[:8], lambda group, block: 10)
        leave(manager, TEXT[:8])
        lines.append(serve(manager, range(100, 116), None))
    assert lines[1] - lines[0] <= 25  # a few for each run of the path


# -- what is given -----------------------------------------------------------------------------------------------------


def test_a_range_is_a_record_that_takes_integers_of_any_kind() -> None:
    entry = PriorityRange(np.int64(2), np.uint8(4), np.int32(50), layer_group=np.int16(1))
    assert entry == PriorityRange(2, 4, 50, 1)
    assert {type(value) for value in (entry.start_block, entry.end_block, entry.priority)} == {int}
    assert hash(entry) == hash(PriorityRange(2, 4, 50, 1))
    with pytest.raises(AttributeError):
        entry.priority = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "fields",
    [
        (-1, 4, 50), (2, 2, 50), (3, 2, 50), (0, 4, -1), (0, 4, 101), (0.0, 4, 50), (0, 4.0, 50), (0, 4, 50.0),
        (None, 4, 50), (0, 4, None), (0, 4, True), ("0", 4, 50), (0, 4, 50, -1), (0, 4, 50, 0.5), (0, 4, float("nan")),
    ],
)  # fmt: skip
def test_a_range_that_is_none_is_refused_when_it_is_made(fields: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="PriorityRange: expected"):
        PriorityRange(*fields)


OVERLAPS = {
    "the same": [PriorityRange(0, 4, 50), PriorityRange(0, 4, 50)],
    "in part": [PriorityRange(3, 8, 50), PriorityRange(0, 4, 10)],
    "within one without an end": [PriorityRange(2, None, 50), PriorityRange(9, 10, 10)],
    "one group and all": [PriorityRange(0, 4, 50, 1), PriorityRange(2, 3, 10)],
    "one group": [PriorityRange(0, 4, 50, 1), PriorityRange(2, 3, 10, 1)],
}
WRONG = {
    "no sequence": (7, TypeError, "expected a callable or a sequence of PriorityRange, got int"),
    "one range": (PriorityRange(0, 4, 50), TypeError, "got PriorityRange$"),
    "text": ("80", TypeError, "got str in it"),
    "tuples": ([(0, 4, 50)], TypeError, "got tuple in it"),
    "a generator": ((PriorityRange(0, 4, 50) for _ in range(1)), TypeError, "got generator"),
    "no such layer group": ([PriorityRange(0, 4, 50, 2)], ValueError, r"expected a layer group in 0\.\.1, got"),
} | {name: (ranges, ValueError, "do not overlap in a layer group") for name, ranges in OVERLAPS.items()}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_priorities_are_refused_before_a_sequence_is_made(name: str) -> None:
    given, error, message = WRONG[name]
    manager = make(20, ssm=True)
    for _ in range(2):
        with pytest.raises(error, match=message):
            manager.create_kv_cache(TEXT[:4], priority=given)
    assert not manager.open_sequences
    assert not manager.store.roots
    leave(manager, TEXT[:4])


def test_ranges_that_touch_or_are_of_different_groups_do_not_overlap() -> None:
    manager = make(20, ssm=True)
    leave(
        manager,
        TEXT[:8],
        [
            PriorityRange(4, 6, 60, 0),
            PriorityRange(0, 4, 50, 0),
            PriorityRange(6, None, 60, 0),
            PriorityRange(1, 5, 9, 1),
        ],
    )
    assert ranks(manager) == [(0, 4, 50), (4, 8, 60)]
    assert {segment.rank for run in manager.store.all_runs() for segment in run.items} == {0, (9 - 35) << 54}


def test_no_ranges_at_all_give_the_default() -> None:
    manager = make(20)
    leave(manager, TEXT[:4], lambda group, block: 10)
    start(manager, TEXT[:4], []).close()
    assert ranks(manager) == [(0, 4, 35)]


def test_a_low_range_goes_before_older_blocks_and_a_high_one_stays() -> None:
    manager = make(8)
    leave(manager, TEXT[:3], [PriorityRange(0, None, 36)])
    leave(manager, OTHER[:3], (PriorityRange(1, None, 34),))
    leave(manager, (7, 8, 9, 10))
    assert pages(manager) == {TEXT[:1], TEXT[:2], TEXT[:3], OTHER[:1], *((7, 8, 9, 10)[:n] for n in range(1, 5))}
