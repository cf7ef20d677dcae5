"""Copies between the tiers that fail: never a wrong byte, a reason that says what to do, and every slot comes back.

A failed write is "io": the page is where it was, and the tier takes no more than it has. A failed read is "lost" for
whoever needs the page: a sequence that held it can only be closed, one that was not resumed yet finds less.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from faulty_memory import Fault, FaultyMemory, at_random, once
from payload import Request, Runner, Shape, run_at_random
from test_tier_payload import KINDS, TIERS, draw_shape

from ssmcache import KVCacheStatus, sizing
from ssmcache.events import matchable

FACTOR = int(os.environ.get("REFERENCE_CASES", "1"))
GPU, HOST, DISK = 0, 1, 2
TIGHT = (6, 7), (5, 3, 6)  # slots by tier


class FaultyRunner(Runner):
    """Counts the reasons of refusals, and holds the manager to what they mean."""

    def __init__(self, shape: Shape, path: str = ".", fault: Fault | None = None, **settings: object) -> None:
        self.memory = FaultyMemory(fault)
        self.reasons: Counter[str] = Counter()
        super().__init__(shape, path, self.memory, **settings)

    def resume(self, request: Request) -> bool:
        held, was_lost = request.kv.locked, request.kv.shortage is not None and request.kv.shortage.reason == "lost"
        granted = super().resume(request)
        if not granted:
            assert request.kv.status is KVCacheStatus.SUSPENDED
            self.reasons[request.kv.shortage.reason] += 1
            assert request.kv.shortage.reason == "lost" or not (held and was_lost), "lost, and found again"
        assert not (granted and held and was_lost), "lost, and found again"
        return granted

    def compute(self, request: Request, end: int, reserve: bool) -> bool:
        granted = super().compute(request, end, reserve)
        if not granted:
            self.reasons[f"resize {request.kv.shortage.reason}"] += 1
            assert request.kv.shortage.reason != "lost", "an ACTIVE sequence has all that it needs on the GPU"
        return granted

    def leave(self, tokens: list[int]) -> None:
        """Compute and commit all but the last token, and close."""
        request = self.create(tokens)
        assert self.resume(request)
        assert self.compute(request, len(tokens) - 1, reserve=True)
        self.close(request)

    def push_down(self, num_blocks: int) -> None:
        """Ask for so many blocks of the GPU, and give them back: others move down."""
        request = self.create([99, 99])
        assert self.resume(request)
        assert request.kv.resize(num_blocks * self.shape.block)
        self.close(request)

    def known(self, tokens: list[int]) -> int:
        return self.manager.probe_reuse(tokens).usable_tokens


@pytest.mark.parametrize("faults", ["reads", "writes", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_faults_never_lead_to_a_wrong_byte_and_every_slot_comes_back(
    kind: str, faults: str, tmp_path: Path
) -> None:
    reasons: Counter[str] = Counter()
    num_failed = 0
    for seed in range(6 * FACTOR):
        random = Random(seed)
        shape = draw_shape(random, kind, TIGHT[seed % 2])
        fault = at_random(random, random.choice((0.1, 0.3, 0.6)), losses=faults != "writes", writes=faults != "reads")
        runner = FaultyRunner(shape, str(tmp_path), fault)
        run_at_random(runner, random, 160, longest=random.choice((8, 12)))
        reasons.update(runner.reasons)
        num_failed += runner.memory.num_failed
    assert num_failed > 2
    assert faults == "writes" or reasons["lost"]
    assert faults == "reads" or reasons["io"] or reasons["resize io"]


@pytest.mark.parametrize("kind", KINDS)
def test_random_faults_while_moves_need_rounds_leave_everything_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "_STAGING_BYTES", 1)
    for seed in range(100, 100 + 5 * FACTOR):
        random = Random(seed)
        shape = draw_shape(random, kind, TIERS["three tiers"])
        runner = FaultyRunner(shape, str(tmp_path), at_random(random, 0.2, losses=True, writes=True))
        run_at_random(runner, random, 120, longest=random.choice((8, 16, 24)))


@pytest.mark.parametrize(("kind", "seed"), [("full", 1084), ("hybrid", 1067), ("windows", 1021)])
def test_a_failure_between_rounds_leaves_no_page_in_a_warmer_tier_than_the_page_above_it(
    kind: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds that did, with pages on their way past the host."""
    monkeypatch.setattr(sizing, "_STAGING_BYTES", 1)
    random = Random(seed)
    shape = draw_shape(random, kind, TIERS["three tiers"])
    runner = FaultyRunner(shape, str(tmp_path), at_random(random, 0.15, losses=True, writes=True))
    run_at_random(runner, random, 120, longest=random.choice((8, 16, 24)))


# -- writing ---------------------------------------------------------------------------------------------------------


def test_a_tier_that_cannot_be_written_takes_no_more_and_nothing_is_lost() -> None:
    runner = FaultyRunner(Shape(block=1, slots=(4, 4), partly=False), fault=once(GPU, HOST, (), after=1))
    runner.leave([1, 1, 1, 1, 0])
    busy = runner.create([2, 0])
    assert runner.resume(busy)
    assert busy.kv.resize(1)
    assert not busy.kv.resize(3)
    assert (busy.kv.shortage.reason, busy.kv.shortage.tier) == ("io", "host")
    assert (busy.kv.capacity, busy.kv.num_own_pages) == (1, 1)
    runner.manager.check()
    assert runner.known([1, 1, 1, 1]) == 4
    assert runner.manager.memory_usage().tiers[HOST][0].num_slots == 1
    assert busy.kv.resize(3)  # the oldest are dropped, as if there were no more room below
    assert runner.known([1, 1, 1, 1]) == 2
    runner.finish()


def test_a_resume_that_fails_at_a_write_can_be_tried_again() -> None:
    runner = FaultyRunner(Shape(block=1, slots=(4, 4, 4), partly=False, max_util=1.0))
    runner.leave([1, 1, 1, 1, 0])
    runner.leave([2, 2, 2, 2, 0])
    request = runner.create([1, 1, 1, 1, 0])
    runner.memory.fault = once(GPU, HOST, ())
    assert not runner.resume(request)
    assert request.kv.shortage.reason == "io"
    runner.manager.check()
    assert runner.known([1, 1, 1, 1]) == 4
    assert runner.resume(request)  # what is in the way goes past the host, or is dropped
    assert request.kv.num_committed_tokens == 4
    runner.finish()


# -- reading ---------------------------------------------------------------------------------------------------------


def suspended_on_the_host(runner: FaultyRunner, tokens: list[int]) -> Request:
    """A sequence with two private pages, all of it in the tier below the GPU."""
    request = runner.create(tokens)
    assert runner.resume(request)
    assert runner.compute(request, len(tokens) - 1, reserve=True)
    assert request.kv.resize(len(tokens) + 1)
    runner.suspend(request)
    runner.push_down(8)
    return request


@pytest.mark.parametrize("lost", [(0,), (2,), (1, 3), (5,), (0, 1, 2, 3, 4, 5)])
def test_a_sequence_that_lost_a_page_can_only_be_closed_and_all_its_slots_come_back(lost: Sequence[int]) -> None:
    runner = FaultyRunner(Shape(block=1, slots=(8, 8), partly=False))
    request = suspended_on_the_host(runner, [1, 2, 3, 4, 0])
    runner.memory.fault = once(HOST, GPU, lost)
    for _ in range(2):
        assert not runner.resume(request)
        assert (request.kv.shortage.reason, request.kv.shortage.tier) == ("lost", "host")
        assert not request.kv.prefetch(GPU)
        assert request.kv.shortage.reason == "lost"
        runner.manager.check()
    # what lies above the page is as good as before; the last two pages were private
    assert runner.known([1, 2, 3, 4]) == min(lost[0], 4)
    runner.close(request)
    runner.manager.check()
    used = [tier[0].used_slots for tier in runner.manager.memory_usage().tiers]
    assert sum(used) == min(lost[0], 4)
    runner.finish()


def test_who_was_not_resumed_yet_finds_what_is_left_after_a_loss() -> None:
    runner = FaultyRunner(Shape(block=1, slots=(8, 8), partly=False))
    runner.leave([1, 2, 3, 4, 5, 0])
    runner.push_down(8)
    first, second = runner.create([1, 2, 3, 4, 5, 0]), runner.create([1, 2, 3, 9, 9, 0])
    runner.memory.fault = once(HOST, GPU, (3,))
    assert not runner.resume(first)
    assert first.kv.shortage.reason == "lost"
    runner.manager.check()
    assert runner.resume(first)
    assert first.kv.num_committed_tokens == 3
    assert runner.resume(second)
    assert second.kv.num_committed_tokens == 3
    runner.finish()


@pytest.mark.parametrize("lost_position", [0, 1, 2])
@pytest.mark.parametrize("windows", [(), ((3, 0),)], ids=["full", "windows"])
@pytest.mark.parametrize("prefetched", [False, True])
def test_a_loss_on_the_way_to_a_block_that_matches_in_part_ends(
    lost_position: int, windows: tuple[tuple[int, int], ...], prefetched: bool
) -> None:
    """The path, or the block itself, which is copied after it."""
    runner = FaultyRunner(Shape(block=2, slots=(6, 8), windows=windows))
    runner.leave([1, 2, 3, 4, 5, 6, 0])
    runner.push_down(6)
    request = runner.create([1, 2, 3, 4, 5, 9, 9])
    assert request.kv.num_committed_tokens == 5
    if prefetched:
        assert request.kv.prefetch(GPU)
        runner.push_down(4)
    position = lost_position
    runner.memory.fault = once(HOST, GPU, (0,), after=position) if position == 2 else once(HOST, GPU, (position,))
    if not runner.resume(request):
        assert request.kv.shortage.reason == "lost"
    runner.manager.check()
    assert request.kv.status is KVCacheStatus.ACTIVE or runner.resume(request)
    runner.finish()


def test_a_snapshot_that_cannot_be_read_is_gone_and_an_earlier_one_is_used() -> None:
    runner = FaultyRunner(Shape(block=1, ssm=True, interval=1, slots=(6, 8), max_util=1.0))
    runner.leave([1, 2, 3, 0])
    fillers = [runner.create([10 + index, 0]) for index in range(6)]
    assert all(runner.resume(filler) for filler in fillers)
    for filler in fillers:
        runner.close(filler)
    request = runner.create([1, 2, 3, 0])
    assert request.kv.source.tier == HOST
    runner.memory.fault = once(HOST, GPU, (0,), layer_group=1)
    assert not runner.resume(request)
    assert request.kv.shortage.reason == "lost"
    runner.manager.check()
    assert runner.resume(request)
    assert (request.kv.num_committed_tokens, request.kv.num_attention_tokens) == (2, 3)
    runner.finish()


def test_an_active_sequence_goes_on_when_a_page_of_others_is_lost_on_its_way_down() -> None:
    runner = FaultyRunner(Shape(block=1, slots=(4, 4, 4), partly=False))
    runner.leave([1, 1, 1, 1, 0])
    runner.push_down(4)
    runner.leave([2, 2, 2, 2, 0])
    busy = runner.create([3, 0])
    assert runner.resume(busy)
    runner.memory.fault = once(HOST, DISK, (1,))
    assert not busy.kv.resize(3)
    assert busy.kv.shortage.reason == "io"
    runner.manager.check()
    assert runner.known([1, 1, 1, 1]) < 4
    assert runner.known([2, 2, 2, 2]) == 4
    assert busy.kv.resize(3)
    runner.finish()


def test_events_tell_that_lost_blocks_cannot_be_matched_even_while_they_are_held() -> None:
    runner = FaultyRunner(Shape(block=1, slots=(8, 8), partly=False), event_buffer_size=1000)
    request = suspended_on_the_host(runner, [1, 2, 3, 4, 0])
    runner.memory.fault = once(HOST, GPU, (2,))
    assert not runner.resume(request)
    events = runner.manager.take_events()
    assert len(list(matchable(events))) == runner.known([1, 2, 3, 4]) == 2
    runner.close(request)
    assert runner.manager.take_events() == []
    runner.finish()
