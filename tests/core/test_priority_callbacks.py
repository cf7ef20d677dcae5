"""Priority callbacks that make calls themselves: they are asked before anything changes, so whatever they do to others
is done, and what they do to their own sequence ends the call that asked them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from payload import Shape, make_config
from test_priorities import OTHER, TEXT, leave, look, make, pages, ranks, start

from ssmcache import KVCache, KVCacheManager, KVCacheStatus, PriorityRange, SimulatedMemory, StateError
from ssmcache.priority import PriorityCallback

LATER = 6  # the callbacks act when they are asked for this block


class Meddler:
    """Acts once, when it is asked for a block; remembers what it left behind."""

    def __init__(self, manager: KVCacheManager, act: Callable[[KVCache], object], block: int = LATER) -> None:
        self.manager, self.act, self.block = manager, act, block
        self.kv: KVCache | None = None
        self.left: object = None

    def __call__(self, group: int, block: int) -> int:
        if block == self.block and group == 0 and self.left is None and self.kv is not None:
            self.left = ()
            self.act(self.kv)
            self.left = look(self.manager, self.kv)
        return 50


ON_ITSELF_AT_COMMIT: dict[str, Callable[[KVCache], object]] = {
    "close": lambda kv: kv.close(),
    "suspend": lambda kv: kv.suspend(),
    "commit": lambda kv: kv.commit(TEXT[4:5]),
    "commit all of it": lambda kv: kv.commit(TEXT[4:8]),
    "resize": lambda kv: kv.resize(12),
    "more history": lambda kv: kv.resize(10, 9),
    "stop_committing": lambda kv: kv.stop_committing(),
}


@pytest.mark.parametrize("act", ON_ITSELF_AT_COMMIT)
@pytest.mark.parametrize("tiers", [1, 2])
def test_a_callback_that_changes_its_own_sequence_ends_the_commit_before_it_changed_anything(
    act: str, tiers: int
) -> None:
    shape = Shape(block=1, windows=((3, 1),), ssm=True, interval=1, slots=(20, 20)[:tiers], partly=False)
    manager = KVCacheManager(make_config(shape, "."), SimulatedMemory())
    meddler = Meddler(manager, ON_ITSELF_AT_COMMIT[act])
    kv = start(manager, (), meddler)
    assert kv.resize(10)
    kv.commit(TEXT[:4])
    meddler.kv = kv
    with pytest.raises(StateError, match="commit: expected a priority callback that leaves its own sequence as it is"):
        kv.commit(TEXT[4:8])
    assert look(manager, kv) == meddler.left
    manager.check()
    kv.close()
    manager.check()
    manager.clear_reusable_blocks()
    assert manager.memory_usage().used_bytes == 0


@pytest.mark.parametrize("act", ["close", "resume"])
def test_a_callback_that_changes_its_own_sequence_ends_the_first_resume(act: str) -> None:
    manager = make(20, windows=((3, 1),), ssm=True)
    leave(manager, TEXT[:6])
    meddler = Meddler(manager, lambda kv: kv.close() if act == "close" else kv.resume(), 2)
    kv = meddler.kv = manager.create_kv_cache(TEXT[:5], priority=meddler)
    with pytest.raises(StateError, match="resume: expected a priority callback that leaves its own sequence as it is"):
        kv.resume()
    assert kv.status is (KVCacheStatus.CLOSED if act == "close" else KVCacheStatus.ACTIVE)
    assert look(manager, kv) == meddler.left
    manager.check()
    kv.close()
    manager.check()
    assert not manager.num_active


def test_what_a_callback_asks_of_its_own_sequence_without_changing_it_is_answered() -> None:
    manager = make(20, ssm=True)
    meddler = Meddler(manager, lambda kv: (kv.page_indices(0), kv.reserve_snapshots([6]), kv.snapshot_points(8)))
    kv = start(manager, (), meddler)
    assert kv.resize(10)
    meddler.kv = kv
    kv.commit(TEXT[:8])
    assert meddler.left
    kv.close()
    manager.check()
    assert ranks(manager) == [(0, 8, 50)]
    assert manager.probe_reuse(TEXT[:8]).usable_tokens == 8


def test_a_callback_that_always_commits_ends_with_an_error_and_nothing_changed() -> None:
    manager = make(20)
    known: list[KVCache] = []

    def priority(group: int, block: int) -> int:
        if known:
            known[0].commit(TEXT[:4])
        return 50

    kv = start(manager, (), priority)
    assert kv.resize(10)
    known.append(kv)
    before = look(manager, kv)
    with pytest.raises(RecursionError):
        kv.commit(TEXT[:4])
    assert look(manager, kv) == before
    known.clear()
    kv.commit(TEXT[:4])
    manager.check()


@pytest.mark.parametrize("call", ["resume", "commit"])
def test_what_a_callback_does_to_others_stays_done_and_the_call_goes_on_from_there(call: str) -> None:
    """The prompt's own blocks are evicted while its sequence, which only was created, waits for the callback."""
    manager = make(12)
    leave(manager, TEXT[:6])

    def crowd(_: KVCache) -> None:
        leave(manager, OTHER[: 11 if call == "resume" else 5], lambda group, block: 60)
        other = start(manager, OTHER[:2])
        assert other.resize(3)
        other.commit(OTHER[2:3])
        other.close()

    meddler = Meddler(manager, crowd, 3 if call == "resume" else LATER)
    kv = meddler.kv = manager.create_kv_cache(TEXT[:5], priority=meddler)
    assert kv.num_committed_tokens == 5
    assert kv.resume()
    assert kv.num_committed_tokens == (0 if call == "resume" else 5)
    manager.check()
    assert kv.resize(7)
    kv.commit(TEXT[kv.num_committed_tokens : 7])
    assert meddler.left
    manager.check()
    kv.close()
    manager.check()
    assert {TEXT[:n] for n in range(1, 8)} <= pages(manager)


def test_a_callback_may_change_sizes_while_its_sequence_is_not_active() -> None:
    manager = make(12)
    leave(manager, TEXT[:6])
    meddler = Meddler(manager, lambda kv: manager.resize_tier(0, manager.quotas[0] // 3), 2)
    kv = meddler.kv = manager.create_kv_cache(TEXT[:3], priority=meddler)
    assert kv.resume()
    assert kv.num_committed_tokens == 3
    manager.check()
    kv.close()
    manager.check()


# -- blocks that are known --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [(), ((6, 0),)])
def test_a_partial_block_that_is_known_keeps_the_highest_priority_that_a_tail_was_given(
    windows: tuple[tuple[int, int], ...],
) -> None:
    manager = KVCacheManager(make_config(Shape(block=4, windows=windows, slots=(20,)), "."), SimulatedMemory())
    text = TEXT[:6]
    given: list[PriorityCallback | list[PriorityRange] | None] = [
        lambda group, block: 10, None, [PriorityRange(0, 1, 50)], lambda group, block: 80, [PriorityRange(1, 2, 60)],
    ]  # fmt: skip
    found = []
    for priority in given:
        kv = manager.create_kv_cache((), priority=priority)
        assert kv.resume()
        assert kv.resize(6)
        kv.commit(text)
        kv.close()
        manager.check()
        found.append(ranks(manager))
        sparse = {segment.rank for run in manager.store.all_runs() if run.start == 1 for segment in run.items}
        assert sparse == ({(found[-1][-1][2] - 35) << 54} if windows else set())
    tails = [max(priority for _, end, priority in runs if end == 2) for runs in found]
    assert tails == [10, 35, 35, 80, 80]


def test_a_sequence_from_before_the_first_priorities_raises_what_it_commits_again() -> None:
    manager = make(20)
    kv = start(manager)
    leave(manager, TEXT[:4], lambda group, block: 10)
    assert ranks(manager) == [(0, 4, 10)]
    assert kv.resize(4)
    kv.commit(TEXT[:3])
    kv.close()
    manager.check()
    assert ranks(manager) == [(0, 3, 35), (3, 4, 10)]
