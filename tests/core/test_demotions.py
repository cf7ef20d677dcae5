"""What a demotion does over all tiers at once: as many slots go as are needed, the oldest go furthest, and a tier that
is smaller than what passes it keeps the youngest of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from payload import SCOPE, Request, Runner, Shape, make_config, run_at_random
from pictures import page_tiers
from test_tier_payload import KINDS, draw_shape

from ssmcache import KVCacheManager, ReuseScope, SimulatedMemory, sizing
from ssmcache.compaction import segments_of
from ssmcache.pool_groups import PoolGroup
from ssmcache.sparse import SparseStore
from ssmcache.tiers import Tiers


@pytest.mark.parametrize("staging", [1, 64 << 20], ids=["one staging slot", "enough staging"])
@pytest.mark.parametrize(("slots", "expected"), [
    ((6, 2, 10), (0, 2, 3)),  # three pass the host, and the two youngest of five stay there
    ((6, 1, 10), (0, 1, 4)),
    ((6, 2, 2), (0, 2, 2)),  # the oldest finds no place at all
    ((6, 5, 1), (0, 5, 0)),
])  # fmt: skip
def test_of_what_one_call_pushes_out_the_youngest_stay_nearest(
    slots: tuple[int, ...], expected: tuple[int, ...], staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "_STAGING_BYTES", staging)
    runner = Runner(Shape(block=1, slots=slots, partly=False))
    for text in ([1] * 6, [2] * 7):
        request = runner.create(text)
        assert runner.resume(request)
        assert runner.compute(request, len(text) - 1, reserve=False)
        runner.close(request)
    again = runner.create([1] * 6)
    assert runner.resume(again)
    assert again.kv.usable_tokens_by_tier == expected


class Lists:
    """Pages of requests one after the other as a list for each tier, the youngest first."""

    def __init__(self, slots: tuple[int, ...]) -> None:
        self.slots = slots
        self.tiers: list[list[tuple[int, ...]]] = [[] for _ in slots]

    def serve(self, text: tuple[int, ...]) -> None:
        path = [text[:end] for end in range(1, len(text) + 1)]
        known = sum(block in tier for tier in self.tiers for block in path[:-1])  # the last token is computed
        self.take(path[:known], known)
        self.take(path[:known], len(path) + 1)  # the rest is computed, with one page more
        self.tiers = [[block for block in tier if block not in path] for tier in self.tiers]
        self.tiers[0] = path + self.tiers[0]

    def take(self, here: list[tuple[int, ...]], num_pages: int) -> None:
        """These blocks come up, and there is room for so many pages of the request; what falls goes from top down."""
        self.tiers = [[block for block in tier if block not in here] for tier in self.tiers]
        room, falling = self.slots[0] - num_pages, self.tiers[0]
        self.tiers[0], falling = falling[:room], falling[room:]
        for tier in range(1, len(self.slots)):
            both = falling + self.tiers[tier]
            self.tiers[tier], falling = both[: self.slots[tier]], both[self.slots[tier] :]
        self.tiers[0] = here + self.tiers[0]


@pytest.mark.parametrize("num_tiers", [2, 3])
@pytest.mark.parametrize("staging", [1, 64 << 20], ids=["one staging slot", "enough staging"])
def test_requests_one_after_the_other_leave_the_tiers_as_one_list_cut_in_pieces(
    num_tiers: int, staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "_STAGING_BYTES", staging)
    num_passed = 0
    for seed in range(60):
        random = Random(seed)
        slots = tuple(random.randint(1 + 4 * (not tier), 9 - 5 * (tier == 1)) for tier in range(num_tiers))
        manager = KVCacheManager(make_config(Shape(block=1, slots=slots, partly=False), "."), SimulatedMemory())
        lists, texts = Lists(slots), [()]
        for _ in range(25):
            start = random.choice(texts)[: random.randint(0, 8)]
            text = (*start, *(random.randint(0, 2) for _ in range(random.randint(1, 8))))[: slots[0] - 1]
            texts.append(text)
            kv = manager.create_kv_cache(text[:-1])
            assert kv.resume()
            assert kv.resize(len(text) + 1)
            kv.commit(text[kv.num_committed_tokens :])
            kv.close()
            manager.check()
            lists.serve(text)
            expected = {block: tier for tier, blocks in enumerate(lists.tiers) for block in blocks}
            found = {sum(tokens, ()): tier for (_, *tokens), tier in page_tiers(manager).items()}
            assert found == expected
        num_passed += manager.store.pages.moved[0][-1] if num_tiers == 3 else 1
    assert num_passed > 0


# -- any calls ---------------------------------------------------------------------------------------------------------


Age = tuple[int, int, int]  # priority and time, then which goes first of one block and time


def movable(manager: KVCacheManager, group: PoolGroup) -> Iterator[tuple[Age, int]]:
    """(age, tier) of the slots of a pool that may move; no two are alike."""
    for tiers in group.members:
        for time, tier in _movable(manager, tiers):
            yield (time, tiers.order_in_block, tiers.layer_group), tier


def _movable(manager: KVCacheManager, tiers: Tiers[Any, Any]) -> Iterator[tuple[int, int]]:
    for segment in segments_of(manager, tiers):
        if not isinstance(tiers, SparseStore):
            if segment.run.holds == segment.run.idle_holds:
                last = segment.start + segment.count
                yield from (
                    (segment.rank + segment.stamp - block, segment.tier) for block in range(segment.start, last)
                )
            continue
        pins = tiers.pins.by_slot[segment.tier]
        for ordinal, slot in zip(segment.ordinals, segment.slots, strict=True):
            if not (slot in pins and pins[slot].locked) and not tiers._is_own(segment.run):
                yield segment.rank + segment.stamp - ordinal, segment.tier


class Watch:
    """Takes the place of `PoolGroup.bring`."""

    def __init__(self, bring: Callable[..., None], with_priorities: bool) -> None:
        self.bring, self.with_priorities = bring, with_priorities
        self.manager: KVCacheManager | None = None
        self.num_down = self.num_through = 0

    def __call__(self, group: PoolGroup, lifts: list[Any], tier: int, beside: int, stream: Any) -> None:
        before = dict(movable(self.manager, group))
        self.bring(group, lifts, tier, beside, stream)
        after = dict(movable(self.manager, group))
        pool = group.pools[tier]
        free = pool.capacity - pool.used
        assert free >= beside
        from_here = {time: after[time] for time, source in before.items() if source == tier and time in after}
        stayed = [time for time, target in from_here.items() if target == tier]
        down = [time for time, target in from_here.items() if target == tier + 1]
        through = [time for time, target in from_here.items() if target == tier + 2]
        if down or through:
            assert free == beside, "more went than there was need for"
        for older, younger in ((through, down + stayed), (down, stayed)):
            if self.with_priorities and self.manager.store.pages in group.members:
                break  # a page goes after those below it, whatever its priority
            assert not older or not younger or max(older) < min(younger), "not the oldest went, or not the furthest"
        self.num_down += len(down)
        self.num_through += len(through)


class RunnerWithPriorities(Runner):
    """Whose sequences want the one block more than the other, often not that which is above."""

    def create(self, tokens: list[int], scope: ReuseScope = SCOPE, **options: object) -> Request:
        return super().create(
            tokens, scope, priority=lambda group, block: (sum(tokens) + 7 * block) % 5 * 20, **options
        )


@pytest.mark.parametrize("with_priorities", [False, True], ids=["by age", "by priority"])
@pytest.mark.parametrize("slots", [(9, 7), (10, 3, 8), (14, 3, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_oldest_go_furthest_and_no_more_than_are_needed(
    kind: str, slots: tuple[int, ...], with_priorities: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(PoolGroup.bring, with_priorities)
    monkeypatch.setattr(PoolGroup, "bring", lambda *arguments: watch(*arguments))
    for seed in range(8):
        random = Random(seed)
        shape = draw_shape(random, kind, slots)
        runner = (RunnerWithPriorities if with_priorities else Runner)(shape, str(tmp_path))
        watch.manager = runner.manager
        run_at_random(runner, random, num_steps=60, longest=random.choice((8, 16)))
    assert watch.num_down > 0


class RunnerWithoutLoveForSinks(Runner):
    """A sink page goes first of all, in whatever tier, and takes with it what is below it in any tier."""

    def create(self, tokens: list[int], scope: ReuseScope = SCOPE, **options: object) -> Request:
        def priority(group: int, block: int) -> int:
            return 10 if block == 0 else 60 + (7 * block + sum(tokens)) % 3 * 10

        return super().create(tokens, scope, priority=priority, **options)


@pytest.mark.parametrize("slots", [(6, 2, 4), (8, 3, 4)])
def test_what_a_lost_sink_takes_along_makes_room_too(
    slots: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(PoolGroup.bring, with_priorities=True)
    monkeypatch.setattr(PoolGroup, "bring", lambda *arguments: watch(*arguments))
    shape = Shape(block=1, full=False, windows=((3, 1),), slots=slots, max_util=1.0, partly=False)
    for seed in range(60):
        runner = RunnerWithoutLoveForSinks(shape, str(tmp_path))
        watch.manager = runner.manager
        run_at_random(runner, Random(seed), num_steps=60, longest=12)
    assert watch.num_through > 0
