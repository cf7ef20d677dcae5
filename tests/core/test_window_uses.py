"""Which window pages go first: those that nobody would read who goes on anywhere, then those that are read between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
from payload import Runner, Shape, make_config, run_at_random
from pictures import deep_picture
from window_uses import READ, READ_BETWEEN, UNREAD, blocks_seen, uses_of_blocks

from ssmcache import KVCacheManager, SimulatedMemory
from ssmcache.layout import LayerGroupKind
from ssmcache.pool_groups import PoolGroup
from ssmcache.pools import IntArray
from ssmcache.segments import SparseSegment
from ssmcache.sparse import SparseStore
from ssmcache.tree import Run
from ssmcache.windows import WindowStore

# -- chats that take turns ---------------------------------------------------------------------------------------------

BLOCK, WINDOW, INTERVAL = 16, 32, 64
NUM_CHATS, NUM_TURNS = 20, 4
FIRST, MORE = 13 * BLOCK + 5, 3 * BLOCK + 3  # tokens of the first prompt, and of each turn after it
SHAPES: dict[str, dict[str, Any]] = {
    "a snapshot at every boundary": {"ssm": True},
    "a snapshot at every block": {"ssm": True, "interval": BLOCK},
    "a snapshot at the last boundary": {"ssm": True, "admission": "last"},
    "sinks": {"ssm": True, "sinks": 4},
    "a window and SSM": {"full": False, "ssm": True},
    "full and a window": {},
    "partial blocks": {"partly": True},
    "a window alone": {"full": False},
}


def make(
    window_slots: int, full: bool = True, ssm: bool = False, interval: int = INTERVAL, admission: str = "every",
    sinks: int = 0, partly: bool = False,
) -> KVCacheManager:  # fmt: skip
    """A manager that is short of window pages alone."""
    shape = Shape(BLOCK, full, ((WINDOW, sinks),), ssm, interval, slots=(1000,), partly=partly)
    manager = KVCacheManager(make_config(shape, ".", admission=admission), SimulatedMemory())
    manager.pools[int(full)][0].capacity = window_slots
    return manager


def starts_at(manager: KVCacheManager, num_tokens: int) -> int:
    """Where who goes on after so many committed tokens starts at best."""
    if manager.state_group >= 0:
        return num_tokens // manager.ssm_reuse_interval * manager.ssm_reuse_interval
    return num_tokens if manager.partly else num_tokens // BLOCK * BLOCK


def num_needed(manager: KVCacheManager) -> int:
    """Window pages that there must be at once, at the worst moment: for each chat what its next turn reads at its
    start, for the one that is served all that it computes, and one more if it starts with the copy of a partial block.
    """
    sinks = manager.groups[int(manager.store.pages is not None)].num_sink_tokens
    needed = 0
    for turn in range(NUM_TURNS + 1):
        length = FIRST + turn * MORE
        start = starts_at(manager, length - MORE) if turn else 0
        own = blocks_seen(WINDOW, sinks, BLOCK, start)
        computed = set(range(start // BLOCK, -(-length // BLOCK)))
        own_pages = len(own | computed) + (start % BLOCK > 0)
        waiting = [
            len(blocks_seen(WINDOW, sinks, BLOCK, starts_at(manager, FIRST + (turn - late) * MORE)))
            for late in (0, 1)
            if turn - late >= 0
        ]
        needed = max(needed, (NUM_CHATS - 1) * max(waiting) + own_pages)
    return needed


def num_continued(manager: KVCacheManager) -> int:
    """Turns after the first that start where the turn before could have left off."""
    texts = [[10_000 * chat + token for token in range(FIRST + NUM_TURNS * MORE)] for chat in range(NUM_CHATS)]
    continued = 0
    for turn in range(NUM_TURNS + 1):
        for text in texts:
            length = FIRST + turn * MORE
            kv = manager.create_kv_cache(text[: length - 1])
            assert kv.resume()
            start = kv.num_committed_tokens
            continued += turn > 0 and start >= starts_at(manager, length - MORE)
            assert kv.resize(length)
            if manager.state_group >= 0:
                kv.reserve_snapshots(kv.snapshot_points(length))
            kv.commit(text[start:length])
            kv.close()
        manager.check()
    return continued


@pytest.mark.parametrize("name", SHAPES)
def test_all_chats_go_on_as_soon_as_there_is_room_for_what_they_read(name: str) -> None:
    needed = num_needed(make(1000, **SHAPES[name]))
    assert needed < 80
    assert num_continued(make(needed, **SHAPES[name])) == NUM_CHATS * NUM_TURNS


@pytest.mark.parametrize("window_slots", [64, 100, 133, 200, 311])
def test_more_room_than_is_needed_is_never_worse(window_slots: int) -> None:
    assert num_continued(make(window_slots, ssm=True)) == NUM_CHATS * NUM_TURNS


def test_by_age_alone_no_chat_would_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindowStore, "set_uses", lambda *_: None)
    assert num_continued(make(133, ssm=True)) == 0


# -- single cases -----------------------------------------------------------------------------------------------------


def small(window_slots: int, **shape: Any) -> Runner:
    runner = Runner(Shape(windows=((4, 0),), slots=(60,), partly=False, **shape), memory=SimulatedMemory())
    runner.manager.pools[1][0].capacity = window_slots
    return runner


def leave(runner: Runner, text: list[int], end: int | None = None) -> None:
    """Prefill in one pass and close."""
    kv = runner.manager.create_kv_cache(text[:-1])
    assert kv.resume()
    end = len(text) if end is None else end
    assert kv.resize(end)
    if runner.shape.ssm:
        kv.reserve_snapshots(kv.snapshot_points(end))
    kv.commit(text[kv.num_committed_tokens : end])
    kv.close()
    runner.manager.check()


def test_where_paths_part_what_the_next_one_reads_stays_however_many_follow() -> None:
    runner = small(24)
    system = list(range(100, 120))
    for user in range(12):
        leave(runner, [*system, *[user] * 10])
        if user:
            assert runner.manager.probe_reuse([*system, 99]).usable_tokens == len(system)


def test_a_window_before_a_snapshot_that_went_goes_first_and_that_of_the_one_above_counts_instead() -> None:
    runner = small(60, ssm=True, interval=4)
    text = list(range(100, 113))
    leave(runner, text)
    store, manager = runner.manager.store, runner.manager
    (run,) = manager.store.all_runs()

    def uses() -> list[int]:
        found = uses_of_blocks(manager, 1)
        assert store.places is not None
        store.places.settle()
        assert list(store.places.uses(store.windows[0].window, run, 0, run.end)) == [
            found.get((run, block), UNREAD) for block in range(run.end)
        ]
        manager.check()
        return [found.get((run, block), UNREAD) for block in range(run.end)]

    between, end = [READ_BETWEEN] * 2, [READ] * 2
    assert uses() == [*between, *between, *end]
    assert store.snapshots is not None
    store.snapshots.pool_group.drop(0, 1)  # the deepest is the oldest
    assert uses() == [*between, *end, UNREAD, UNREAD]


def test_what_nobody_reads_moves_down_into_free_room_but_pushes_nothing_out() -> None:
    shape = Shape(windows=((4, 0),), slots=(60, 60), partly=False)
    runner = Runner(shape, memory=SimulatedMemory())
    gpu, host = runner.manager.pools[1]
    gpu.capacity, host.capacity = 10, 6
    leave(runner, [1] * 20)  # 8 of 10 window pages are of no use
    leave(runner, [2] * 12)
    assert runner.manager.store.windows[0].moved[0][1] == 6  # of no use either: there is room
    leave(runner, [3] * 20)  # those go for good, and what chats read stays, wherever it lies
    leave(runner, [4] * 12)
    runner.manager.check()
    for number, length in ((1, 20), (2, 12), (3, 20), (4, 12)):
        assert runner.manager.probe_reuse([number] * length).usable_tokens == length


def test_a_refused_resume_changes_no_use_and_no_order() -> None:
    runner = Runner(Shape(windows=((4, 0),), slots=(10, 20), partly=False, max_util=1.0), memory=SimulatedMemory())
    manager = runner.manager
    leave(runner, [1] * 16)
    busy = manager.create_kv_cache()
    assert busy.resume()
    assert busy.resize(20)  # all that there was goes down
    busy.commit([2] * 12)
    waiting = manager.create_kv_cache([1] * 16)
    before = deep_picture(manager)
    assert not waiting.resume()
    assert waiting.shortage is not None
    assert waiting.shortage.reason == "slots"
    assert deep_picture(manager) == before
    busy.close()
    assert waiting.resume()
    assert waiting.num_committed_tokens == 16
    manager.check()


# -- at random --------------------------------------------------------------------------------------------------------


class Watch:
    """Looks at each window page that goes for want of room, or moves down for it."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.seen: Counter[str] = Counter()
        self.nested = False  # what lies on a block that goes as a whole goes with it
        self.top = 0  # the tier for which room is made

    def compare(self, store: WindowStore, tier: int, victims: set[tuple[Run, int]], kept: set[int], what: str) -> None:
        """No victim is of more use than another page that could go instead."""
        uses = uses_of_blocks(self.runner.manager, store.layer_group)
        worst = max(uses.get(victim, UNREAD) for victim in victims)
        for run in self.runner.manager.store.all_runs():
            for segment in store.on(run):
                for ordinal, slot in zip(segment.ordinals, segment.slots, strict=True):
                    if segment.tier != tier or slot in kept or (run, ordinal) in victims:
                        continue
                    use = uses.get((run, ordinal), UNREAD)
                    assert use >= worst, f"{what}: a page of use {worst}, though there is one of use {use}"
                    self.seen[f"{what} {worst}, kept {use}"] += 1


@contextmanager
def watching(runner: Runner) -> Iterator[Watch]:
    watch = Watch(runner)
    evict, drop_from, select = SparseStore._evict, SparseStore.drop_from, PoolGroup._select

    def watched_evict(store: SparseStore, run: Run, tier: int, ordinals: IntArray, slots: IntArray) -> None:
        if isinstance(store, WindowStore) and not watch.nested:
            kept = set(store.pins.by_slot[tier])
            watch.compare(store, tier, {(run, ordinal) for ordinal in ordinals}, kept, "dropped")
        evict(store, run, tier, ordinals, slots)

    def watched_drop_from(store: SparseStore, *arguments: Any) -> None:
        outer, watch.nested = watch.nested, True
        drop_from(store, *arguments)
        watch.nested = outer

    def watched_select(group: PoolGroup, tier: int, count: int) -> list[SparseSegment]:
        selected = select(group, tier, count)
        (store,) = group.members
        if isinstance(store, WindowStore) and selected:
            parked = {segment.run for segment in selected} - set(watch.runner.manager.store.all_runs())
            places = {
                (segment.run, ordinal)
                for segment in selected
                if segment.run not in parked
                for ordinal in segment.ordinals
            }
            kept = {slot for slot, pin in store.pins.by_slot[tier].items() if pin.locked}
            if places:
                watch.compare(store, tier, places, kept, "moved")  # type: ignore[arg-type]
        return selected

    patch = pytest.MonkeyPatch()
    patch.setattr(SparseStore, "_evict", watched_evict)
    patch.setattr(SparseStore, "drop_from", watched_drop_from)
    patch.setattr(PoolGroup, "_select", watched_select)
    try:
        yield watch
    finally:
        patch.undo()


RANDOM_SHAPES = {
    "full and a window": Shape(windows=((5, 0),), slots=(40,)),
    "sinks": Shape(windows=((5, 3),), slots=(40,)),
    "two windows": Shape(windows=((3, 0), (8, 0)), slots=(40,)),
    "two tiers": Shape(windows=((5, 0),), slots=(40, 40)),
    "SSM": Shape(windows=((5, 0),), ssm=True, slots=(40,)),
    "SSM, sinks and two tiers": Shape(windows=((4, 2),), ssm=True, slots=(40, 40)),
    "a window alone": Shape(full=False, windows=((5, 2),), slots=(40,)),
    "a window and SSM": Shape(full=False, windows=((5, 0),), ssm=True, interval=2, slots=(40,)),
}
WINDOW_SLOTS = (14, 6)  # by tier


@pytest.mark.parametrize("name", RANDOM_SHAPES)
def test_no_page_goes_or_moves_down_while_one_of_less_use_could(name: str) -> None:
    seen: Counter[str] = Counter()
    for seed in range(6):
        random = Random(seed)
        runner = Runner(RANDOM_SHAPES[name], memory=SimulatedMemory())
        for group, pools in zip(runner.manager.groups, runner.manager.pools, strict=True):
            if group.kind is LayerGroupKind.WINDOW:  # so that those are short
                for pool, count in zip(pools, WINDOW_SLOTS, strict=False):
                    pool.capacity = count
        with watching(runner) as watch:
            run_at_random_unchecked(runner, random)
        seen += watch.seen
    assert seen[f"dropped {UNREAD}, kept {READ}"] > 20
    assert seen[f"dropped {READ}, kept {READ}"] > 20


def run_at_random_unchecked(runner: Runner, random: Random) -> None:
    runner.check_pages = runner.check_state = lambda *_: None  # type: ignore[method-assign]
    runner.write_pages = runner.write_state = lambda *_: None  # type: ignore[method-assign]
    run_at_random(runner, random, 150)
    runner.finish()
