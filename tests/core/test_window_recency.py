"""Which window pages a touch makes young: those that somebody needs who goes on at the end of the path, or at a
snapshot of it, or where others part from it. The order of eviction that follows is tested against an oracle in
`test_eviction_order.py`, and the use of pages, which comes before their age, in `test_window_uses.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from payload import Shape, make_config
from stored import Stored

from ssmcache import GpuCacheTierConfig, KVCache, KVCacheManager, ReuseScope, SimulatedMemory
from ssmcache.tree import Run
from ssmcache.windows import WindowStore

TEXT = list(range(1000, 1400))
NUM_CONVERSATIONS = 76


def make(window: tuple[int, int], slots: int, window_slots: int | None = None, **shape: object) -> KVCacheManager:
    config = make_config(Shape(windows=(window,), slots=(slots,), partly=False, **shape), ".")
    manager = KVCacheManager(config, SimulatedMemory())
    if window_slots is not None:
        manager.pools[1][0].capacity = window_slots  # so that full attention is never what is short
    return manager


def serve(manager: KVCacheManager, text: Sequence[int], close: bool = True, step: int = 2) -> KVCache:
    """Prefill in chunks and close."""
    kv = manager.create_kv_cache(text[:-1])
    assert kv.resume()
    go_on(kv, text, step)
    if close:
        kv.close()
    manager.check()
    return kv


def go_on(kv: KVCache, text: Sequence[int], step: int = 2) -> None:
    while kv.num_committed_tokens < len(text):
        start, end = kv.num_committed_tokens, min(len(text), kv.num_committed_tokens + step)
        assert kv.resize(max(end, kv.capacity), kv.history_length)
        kv.commit(text[start:end])


def blocks(manager: KVCacheManager, text: Sequence[int]) -> set[int]:
    """Blocks of a text that have a window page."""
    block = manager.tokens_per_block
    known = Stored(manager, ReuseScope()).full.items()
    return {
        len(tokens) // block - 1 for tokens, stored in known if stored.windows and tokens == tuple(text[: len(tokens)])
    }


def stamps(manager: KVCacheManager, cursor: Run) -> dict[int, int]:
    """Stamp by block of the path of a run."""
    store = manager.store.windows[0]
    return {b: segment.stamp for run in cursor.path() for segment in store.on(run) for b in segment.ordinals}


def touch_deepest_first(store: WindowStore, cursor: Run, stamp: int, ends: Sequence[int]) -> None:
    """The rule of full attention, on windows: every page of the path, the deepest as the oldest."""
    for run in cursor.path():
        for segment in store.on(run):
            segment.stamp = stamp
        store.join_like(run)


def count_reusable_continuations() -> int:
    """Many conversations that begin with one long system prompt; then a request of somebody else. There is room for the
    windows of all, but not for the window pages of the whole system prompt.
    """
    manager = make((6, 1), 400, 170)
    system_prompt = TEXT[:400]
    serve(manager, system_prompt)
    conversations = [[*system_prompt, *[turn] * 4] for turn in range(NUM_CONVERSATIONS)]
    for text in conversations:
        serve(manager, text)
    serve(manager, [7] * 8)
    return sum(manager.probe_reuse(text).usable_tokens == len(text) for text in conversations)


def test_the_windows_of_all_leaves_survive_where_deepest_first_would_keep_what_nobody_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert count_reusable_continuations() == NUM_CONVERSATIONS
    monkeypatch.setattr(WindowStore, "touch", touch_deepest_first)
    assert count_reusable_continuations() == NUM_CONVERSATIONS  # since what nobody needs goes first, whatever its age
    monkeypatch.setattr(WindowStore, "set_uses", lambda *_: None)
    assert count_reusable_continuations() == 0


@pytest.mark.parametrize(("window", "needed"), [((6, 3), {0, 1, 7, 8, 9}), ((6, 0), {7, 8, 9}), ((1, 1), {0})])
def test_a_close_touches_the_sinks_and_the_window_before_the_end_of_the_path_alone(
    window: tuple[int, int], needed: set[int]
) -> None:
    manager = make(window, 40)
    kv = serve(manager, TEXT[:20], close=False)
    cursor, before = kv.cursor, stamps(manager, kv.cursor)
    assert set(before) == set(range(10))
    assert len(set(before.values())) == 1  # one stamp for all that was committed since the resume
    kv.close()
    after = stamps(manager, cursor)
    assert {b for b in after if after[b] != before[b]} == needed
    assert {after[b] for b in needed} == {manager.store.clock.now}


def test_a_close_touches_the_window_where_others_part_from_the_path_too() -> None:
    manager = make((4, 1), 40)
    serve(manager, [*TEXT[:10], *[7] * 10])
    kv = serve(manager, TEXT[:24], close=False)  # 5 blocks are shared
    cursor, before = kv.cursor, stamps(manager, kv.cursor)
    kv.close()
    after = stamps(manager, cursor)
    # the sink; before the point where they part; before the end
    assert {b for b in after if after[b] != before[b]} == {0, 3, 4, 10, 11}


def test_a_suspend_touches_the_same_pages_as_a_close() -> None:
    manager = make((6, 3), 40)
    kv = serve(manager, TEXT[:20], close=False)
    before = stamps(manager, kv.cursor)
    kv.suspend()
    after = stamps(manager, kv.cursor)
    assert {b for b in after if after[b] != before[b]} == {0, 1, 7, 8, 9}


def test_in_a_hybrid_the_window_before_each_snapshot_is_touched_too() -> None:
    manager = make((4, 1), 40, ssm=True, interval=8)
    kv = serve(manager, TEXT[:20], close=False)
    cursor, before = kv.cursor, stamps(manager, kv.cursor)
    kv.close()
    after = stamps(manager, cursor)
    # the sink; before the snapshots at 8 and 16; before the end at 20
    assert {b for b in after if after[b] != before[b]} == {0, 2, 3, 6, 7, 8, 9}


def test_a_window_before_a_snapshot_that_went_is_not_touched_any_more() -> None:
    manager = make((4, 1), 40, ssm=True, interval=8)
    serve(manager, TEXT[:20])
    manager.pools[2][0].capacity = 2
    serve(manager, [7] * 6)  # takes the snapshot at 16
    assert manager.probe_reuse(TEXT[:20]).usable_tokens == 8
    kv = manager.create_kv_cache(TEXT[:20])
    assert kv.resume()
    cursor, before = kv.cursor, stamps(manager, kv.cursor)
    num_snapshots = sum(block.has_snapshot for block in Stored(manager, ReuseScope()).full.values())
    kv.close()
    after = stamps(manager, cursor)
    assert num_snapshots == 1
    assert {b for b in after if after[b] != before[b]} == {0, 2, 3, 8, 9}


def test_stale_pages_go_before_those_that_are_needed_whatever_their_place() -> None:
    manager = make((6, 1), 100, 20)
    serve(manager, TEXT[:40])  # 20 blocks
    serve(manager, [7] * 22)  # 11 blocks
    assert blocks(manager, [7] * 22) == set(range(11))
    assert blocks(manager, TEXT[:40]) == {0, 1, 2, 3, 4, 5, 17, 18, 19}  # the deepest of the stale ones first
    serve(manager, [8] * 10)
    assert blocks(manager, TEXT[:40]) == {0, 17, 18, 19}


@pytest.mark.parametrize("num_tiers", [1, 2])
def test_what_goes_stale_after_a_second_resume_is_younger_than_what_others_left_before(num_tiers: int) -> None:
    config = make_config(Shape(windows=((4, 0),), slots=(60, 60)[:num_tiers], partly=False), ".")
    assert isinstance(config.cache_tiers[0], GpuCacheTierConfig)
    manager = KVCacheManager(config, SimulatedMemory())
    kv = serve(manager, TEXT[:8], close=False)
    kv.suspend()
    other = serve(manager, [7] * 20, close=False)
    others = other.cursor
    other.close()
    assert kv.resume()
    go_on(kv, TEXT[:20])
    mine = stamps(manager, kv.cursor)
    newest_of_other = max(stamps(manager, others).values())
    assert min(mine[b] for b in range(4, 10)) > newest_of_other
    kv.close()
