"""`clear_reusable_blocks` while sequences are open: what they hold stays theirs, and nothing of before is offered.

Every byte says under which weights it was computed. A clear is new weights for its scope: whoever starts to reuse
something finds only what was computed since, and whoever was there before goes on with exactly what it has.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from faulty_memory import FaultyMemory, at_random, once
from managers import make_manager
from payload import Request, Runner, Shape, run_at_random
from stored import Stored
from test_events import Mirror, content_of, follow

from ssmcache import BlockKeys, KVCacheStatus, ReuseScope
from ssmcache.memory.base import Memory

NONE, SALT = ReuseScope(), ReuseScope(salt=0)
SHAPES = {
    "full": Shape(slots=(14,)),
    "full, two tiers": Shape(slots=(9, 9)),
    "full, three tiers": Shape(slots=(7, 4, 8)),
    "full and SSM": Shape(ssm=True, slots=(14,)),
    "full and SSM, two tiers": Shape(ssm=True, slots=(9, 8)),
    "SSM": Shape(ssm=True, full=False, slots=(9,)),
    "SSM, two tiers": Shape(ssm=True, full=False, slots=(6, 6)),
    "full and a window": Shape(windows=((4, 2),), slots=(16,)),
    "full and two windows, two tiers": Shape(windows=((4, 2), (7, 0)), slots=(11, 9)),
    "a window, two tiers": Shape(full=False, windows=((5, 3),), slots=(11, 9)),
    "full, a window and SSM, three tiers": Shape(ssm=True, windows=((5, 3),), slots=(11, 6, 6)),
}  # fmt: skip


class Retraining(Runner):
    """Bytes depend on the weights of the time when they were computed, by token and by scope."""

    def __init__(self, shape: Shape, path: str = ".", memory: Memory | None = None, **settings: object) -> None:
        super().__init__(shape, path, memory, **settings)
        self.weights: Counter[ReuseScope] = Counter()
        self.seen: Counter[str] = Counter()

    def page(self, request: Request, layer: int, role: str, block: int, end: int) -> np.ndarray:
        number = request.weights[end - 1]
        return super().page(request, layer, f"{role} {number}", block, end)

    def state(self, request: Request, end: int) -> np.ndarray:
        return super().state(request, end) ^ np.uint8(request.state_weights % 251 + 1)

    def create(self, tokens: list[int], scope: ReuseScope = NONE, **options: object) -> Request:
        request = super().create(tokens, scope, **options)
        request.retired = False
        return request

    def resume(self, request: Request) -> bool:
        if not request.kv.locked:
            request.weights = [self.weights[request.scope]] * len(request.tokens)
            request.state_weights = self.weights[request.scope]
        self.seen["reused"] += (granted := super().resume(request)) and request.kv.reuse_match.usable_tokens > 0
        self.seen["resumed after a clear"] += granted and request.retired
        return granted

    def compute(self, request: Request, end: int, reserve: bool) -> bool:
        start = max(request.computed, request.kv.num_attention_tokens)
        before = request.weights[:]
        request.weights[start:end] = [self.weights[request.scope]] * max(0, end - start)
        stored = Stored(self.manager, request.scope) if request.retired else None
        if not super().compute(request, end, reserve):
            request.weights = before
            return False
        assert request.kv.num_committed_tokens == end
        if stored is not None:
            after = Stored(self.manager, request.scope)  # others may have gone for its pages
            assert after.full.keys() <= stored.full.keys(), "offered, although it was open"
            assert {block.tokens for block in after.partial} <= {block.tokens for block in stored.partial}
            for tokens, block in after.full.items():
                assert block.windows <= stored.full[tokens].windows
                assert block.has_snapshot <= stored.full[tokens].has_snapshot
            self.seen["committed after a clear"] += 1
        return True

    def write_state(self, request: Request, slot: int, end: int) -> None:
        request.state_weights = self.weights[request.scope]
        super().write_state(request, slot, end)

    def clear(self, scope: ReuseScope | None) -> None:
        kept = {request: self.look_at(request) for request in self.requests if request.kv.locked}
        others = {other: Stored(self.manager, other).full for other in self.scopes() if scope not in (None, other)}
        self.manager.clear_reusable_blocks(scope)
        for request in self.requests:
            if scope in (None, request.scope):
                request.retired |= request.kv.locked
        for cleared in self.scopes() if scope is None else [scope]:
            self.weights[cleared] += 1
            found = Stored(self.manager, cleared)
            assert not found.full
            assert not found.partial
        for other, blocks in others.items():
            assert Stored(self.manager, other).full == blocks
        for request, picture in kept.items():
            assert self.look_at(request) == picture
            if request.kv.status is KVCacheStatus.ACTIVE:
                self.check_pages(request, request.computed)
                self.check_state(request, request.computed)
        self.seen["cleared while open"] += len(kept)
        self.manager.check()

    def scopes(self) -> set[ReuseScope]:
        return {NONE, SALT, *(request.scope for request in self.requests), *self.manager.store.roots}

    def look_at(self, request: Request) -> tuple[object, ...]:
        """What a sequence can see of itself."""
        kv = request.kv
        groups = {group for group, _, _ in self.layers()}
        is_active = kv.status is KVCacheStatus.ACTIVE
        pages = [kv.page_indices(group).tolist() for group in groups] if is_active else None
        slot = kv.ssm_slot(self.manager.state_group) if is_active and self.shape.ssm else None
        return kv.status, kv.num_committed_tokens, kv.history_length, kv.capacity, kv.num_attention_tokens, pages, slot


class ClearingAtRandom(Random):
    """Between the steps of `run_at_random`, of which each begins by choosing an action, now and then a clear."""

    runner: Retraining
    share: float

    def random(self) -> float:
        if super().random() < self.share:
            self.runner.clear(self.choice((None, NONE, SALT, SALT, ReuseScope(lora_id=7))))
        return super().random()


def run(runner: Retraining, seed: int, num_steps: int = 150, longest: int = 16, share: float = 0.06) -> None:
    random = ClearingAtRandom(seed)
    random.runner, random.share = runner, share
    run_at_random(runner, random, num_steps, longest)


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_that_was_computed_before_a_clear_is_ever_reused_and_every_byte_of_open_sequences_stays(
    name: str, tmp_path: Path
) -> None:
    seen: Counter[str] = Counter()
    for seed in range(10):
        settings = {
            field: getattr(SHAPES[name], field) for field in ("full", "windows", "ssm", "slots")
        }  # fmt: skip
        runner = Retraining(
            Shape(**settings, block=2 + seed % 2, interval=2 * (2 + seed % 2), max_util=(0.9, 1.0)[seed % 2]),
            str(tmp_path),
            admission=("every", "last")[seed % 3 == 2] if SHAPES[name].ssm else "every",
        )
        run(runner, seed)
        seen += runner.seen
    for what in ("reused", "resumed after a clear", "committed after a clear", "cleared while open"):
        assert seen[what] > 3, what


@pytest.mark.parametrize("name", [name for name in SHAPES if "tiers" in name])
def test_pages_that_cannot_be_read_are_lost_for_who_holds_them_before_a_clear_and_after(
    name: str, tmp_path: Path
) -> None:
    num_failed = 0
    for seed in range(12):
        memory = FaultyMemory()
        settings = {field: getattr(SHAPES[name], field) for field in ("full", "windows", "ssm")}
        slots = tuple(max(4, count - 3) for count in SHAPES[name].slots)
        runner = Retraining(Shape(**settings, slots=slots), str(tmp_path), memory)
        memory.fault = at_random(Random(seed), 0.4, losses=True, writes=seed % 4 == 0)
        run(runner, seed, 150, share=0.02)
        num_failed += memory.num_failed
    assert num_failed > 5


@pytest.mark.parametrize("name", ["full", "full, two tiers", "full and two windows, two tiers", "full and SSM"])
def test_events_tell_what_can_be_matched_after_clears(name: str, tmp_path: Path) -> None:
    class Mirrored(Retraining):
        mirror: Mirror

        def clear(self, scope: ReuseScope | None) -> None:
            super().clear(scope)
            follow(self.mirror, self.manager.take_events())
            assert self.mirror == content_of(self.manager)

    for seed in range(6):
        settings = {field: getattr(SHAPES[name], field) for field in ("windows", "ssm", "slots")}
        runner = Mirrored(Shape(**settings, partly=False), str(tmp_path), event_buffer_size=100_000)
        runner.mirror = {}
        run(runner, seed)


# -- case by case ------------------------------------------------------------------------------------------------------

TEXT = list(range(50, 70))


def make(**shape: object) -> Retraining:
    return Retraining(Shape(**{"block": 4, "interval": 8, "slots": (30,), **shape}))


def used(runner: Runner) -> list[int]:
    return [usage.used_slots for tier in runner.manager.memory_usage().tiers for usage in tier]


def started(runner: Runner, text: list[int], end: int, scope: ReuseScope = NONE) -> Request:
    request = runner.create(text, scope)
    assert runner.resume(request)
    assert runner.compute(request, end, reserve=True)
    return request


def test_an_active_sequence_goes_on_and_leaves_nothing_for_others() -> None:
    runner = make()
    request = started(runner, TEXT, 10)
    runner.clear(None)
    assert runner.manager.probe_reuse(TEXT) == (0, 0, 0)
    assert runner.compute(request, 18, reserve=True)
    assert runner.manager.probe_reuse(TEXT) == (0, 0, 0)
    other = started(runner, TEXT, 20)  # under new weights, and for others
    assert other.kv.reuse_match == (0, 0, 0)
    assert runner.compute(request, 20, reserve=True)  # the same blocks, which are the other one's
    assert not set(request.kv.page_indices(0).tolist()) & set(other.kv.page_indices(0).tolist())
    runner.close(request)
    assert runner.manager.used_slots(0) == 5
    runner.close(other)
    assert runner.manager.probe_reuse(TEXT).usable_tokens == 20
    runner.finish()


def test_the_last_part_of_a_block_is_not_left_either() -> None:
    runner = make()
    request = started(runner, TEXT, 7)
    runner.clear(NONE)
    runner.close(request)
    assert used(runner) == [0]
    assert runner.manager.probe_reuse(TEXT) == (0, 0, 0)
    runner.finish()


def test_slots_go_back_when_the_last_holder_closes_and_what_nobody_holds_at_once() -> None:
    runner = make(ssm=True)
    runner.close(started(runner, [1] * 16, 16))
    first = started(runner, TEXT, 16)
    second = started(runner, [*TEXT[:16], 9], 16)
    assert second.kv.num_attention_tokens == 16
    assert used(runner) == [8, 6]  # four blocks each, two snapshots each, two live states
    runner.clear(None)
    assert used(runner) == [4, 2]
    runner.close(first)
    assert used(runner) == [4, 1]
    runner.close(second)
    assert used(runner) == [0, 0]
    runner.finish()


def test_reserved_slots_go_back_at_the_next_commit_and_none_are_reserved_any_more() -> None:
    runner = make(ssm=True)
    request = runner.create(TEXT)
    assert runner.resume(request)
    assert request.kv.resize(20)
    reserved = request.kv.reserve_snapshots([8])
    runner.clear(None)
    assert request.kv.reserve_snapshots([16]) == reserved  # a kernel may be writing there
    assert list(request.kv.snapshot_points(20)) == []
    assert request.kv.next_snapshot_point() is None
    assert runner.compute(request, 20, reserve=True)
    assert used(runner) == [5, 1]
    stats = runner.manager.stats()
    assert (stats.snapshots_taken, stats.snapshots_skipped_not_admitted) == (0, 2)
    runner.finish()


def test_a_sequence_that_was_only_created_finds_nothing_of_before_and_offers_what_it_computes() -> None:
    runner = make()
    runner.close(started(runner, TEXT, 16))
    waiting = runner.create(TEXT)
    assert waiting.kv.num_committed_tokens == 16
    runner.clear(None)
    assert used(runner) == [0]
    assert waiting.kv.num_attention_tokens == 0
    assert runner.resume(waiting)
    assert waiting.kv.num_committed_tokens == 0
    assert runner.compute(waiting, 20, reserve=True)
    runner.close(waiting)
    assert runner.manager.probe_reuse(TEXT).usable_tokens == 20
    runner.finish()


def test_a_suspended_sequence_comes_back_from_the_tiers_below() -> None:
    runner = make(slots=(6, 12), ssm=True)
    request = started(runner, TEXT, 16)
    runner.suspend(request)
    other = started(runner, [1] * 20, 20)
    assert request.kv.parked is not None
    runner.clear(None)
    runner.close(other)
    assert used(runner) == [1, 1, 3, 0]  # by tier: blocks and states
    assert runner.resume(request)
    assert runner.compute(request, 20, reserve=True)
    runner.close(request)
    assert used(runner) == [0] * 4
    runner.finish()


def test_a_page_that_is_lost_after_a_clear_is_lost_for_those_alone_who_hold_it() -> None:
    memory = FaultyMemory()
    runner = Retraining(Shape(block=1, slots=(8, 10), partly=False), memory=memory)
    first, second = (started(runner, text, 4) for text in ([1, 2, 3, 4, 0], [1, 2, 5, 6, 0]))
    runner.suspend(first)
    runner.suspend(second)
    runner.clear(None)
    big = runner.create([9, 9])
    assert runner.resume(big)
    assert big.kv.resize(8)  # all else goes to the host
    runner.close(big)
    memory.fault = once(1, 0, (3,))
    for _ in range(2):
        assert not runner.resume(first)
        assert first.kv.shortage.reason == "lost"
        runner.manager.check()
    assert runner.resume(second)
    assert runner.compute(second, 5, reserve=False)
    runner.close(second)
    runner.close(first)
    assert used(runner) == [0, 0]
    runner.finish()


def test_a_cleared_scope_leaves_other_scopes_as_they_are() -> None:
    runner = make()
    adapter = ReuseScope(lora_id=3)
    for scope in (NONE, SALT, adapter):
        runner.close(started(runner, TEXT, 16, scope))
    runner.clear(adapter)
    assert [runner.manager.probe_reuse(TEXT, scope).usable_tokens for scope in (NONE, SALT, adapter)] == [16, 16, 0]
    assert adapter not in runner.manager.store.roots
    runner.clear(NONE)  # the scope without adapter and salt, not all
    assert [runner.manager.probe_reuse(TEXT, scope).usable_tokens for scope in (NONE, SALT, adapter)] == [0, 16, 0]
    runner.clear(None)
    assert used(runner) == [0]
    runner.finish()


def test_a_scope_that_only_sequences_of_before_have_may_change_its_kind_of_keys() -> None:
    manager = make_manager(20, 0, block=4)
    kv = manager.create_kv_cache(TEXT)
    assert kv.resume()
    assert kv.resize(20)
    kv.commit(TEXT[:8])
    manager.clear_reusable_blocks()
    assert manager.create_kv_cache(BlockKeys([1, 2], 4, 8)).resume()
    kv.commit(TEXT[8:])
    assert kv.num_committed_tokens == 20
    manager.check()


def test_two_clears_one_after_the_other_and_a_clear_of_nothing() -> None:
    runner = make()
    first = started(runner, TEXT, 10)
    runner.clear(None)
    runner.clear(None)
    second = started(runner, TEXT, 10)
    runner.clear(NONE)
    runner.clear(ReuseScope(salt=12))
    assert runner.compute(first, 20, reserve=True)
    assert runner.compute(second, 20, reserve=True)
    runner.close(second)
    runner.close(first)
    assert used(runner) == [0]
    runner.finish()


def test_what_is_cleared_does_not_count_as_evicted() -> None:
    runner = make(ssm=True)
    runner.close(started(runner, TEXT, 16))
    open_one = started(runner, [1] * 16, 16)
    runner.clear(None)
    runner.close(open_one)
    stats = runner.manager.stats()
    assert (stats.pages_evicted, stats.snapshots_evicted, stats.snapshots_evicted_unused) == (0, 0, 0)


@pytest.mark.parametrize("scope", [0, "salt", (None, None), ReuseScope])
def test_what_is_no_scope_is_refused_and_changes_nothing(scope: object) -> None:
    runner = make()
    runner.close(started(runner, TEXT, 16))
    with pytest.raises(TypeError, match="clear_reusable_blocks: expected a ReuseScope, got"):
        runner.manager.clear_reusable_blocks(scope)
    assert runner.manager.probe_reuse(TEXT).usable_tokens == 16
