"""Every invariant of a manager, in one place."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ssmcache.pools import SlotPool
from ssmcache.tree import Root, Run, Segment

if TYPE_CHECKING:
    from ssmcache.manager import KVCacheManager


def _expect(condition: bool, message: str) -> None:
    # not `assert`: the check must also run under -O
    if not condition:
        raise AssertionError(message)


def check_manager(manager: KVCacheManager) -> None:
    """Raise AssertionError with the first broken invariant."""
    store = manager.store
    runs = store.all_runs()
    for root in store.roots.values():
        _check_children(root)
    for run in runs:
        _check_run(run, has_pages=store.page_pool is not None)
    _check_holds(manager, runs)
    _check_queues(manager, runs)
    if store.page_pool is not None:
        cached = [slot for run in runs if run.pages is not None for slot in run.pages.slots.tolist()]
        private = [slot for sequence in manager.open_sequences for slot in sequence.private_pages()]
        _check_slots("page", store.page_pool, cached, private)
        _expect(len(cached) == store.num_cached_pages, f"{len(cached)} cached pages, counted {store.num_cached_pages}")
        locked = sum(run.end - run.start for run in runs if run.holds)
        _expect(locked == store.num_locked_pages, f"{locked} locked pages, counted {store.num_locked_pages}")
    if store.snapshots is not None:
        cached = [slot for run in runs for segment in run.snapshots for slot in segment.slots]
        private = [slot for sequence in manager.open_sequences for slot in sequence.private_states()]
        _check_slots("state", store.snapshots.pool, cached, private)
        counted = store.snapshots.num_cached
        _expect(len(cached) == counted, f"{len(cached)} cached snapshots, counted {counted}")
        _expect(store.snapshots.reused_slots() <= set(cached), "a slot that is no snapshot counts as a reused one")
        _expect(set(store.snapshots.held_sources) <= set(cached), "a held source is no snapshot of the tree")


def _check_slots(what: str, pool: SlotPool, cached: list[int], private: list[int]) -> None:
    """Each slot ever used is exactly one of: in the tree, a sequence's own, free."""
    everywhere = Counter(cached + private + pool.returned_slots())
    twice = [slot for slot, count in everywhere.items() if count > 1]
    _expect(not twice, f"{what} slots with two owners: {twice[:5]}")
    ever_used = set(range(pool.num_ever_used))
    _expect(set(everywhere) == ever_used, f"{what} slots lost or made up: {sorted(set(everywhere) ^ ever_used)[:5]}")
    used = len(cached) + len(private)
    _expect(used == pool.used, f"{used} {what} slots in use, counted {pool.used}")
    _expect(pool.used <= pool.capacity, f"{pool.used} {what} slots in use of {pool.capacity}")


def _check_children(run: Run) -> None:
    for edge, child in run.children.items():
        _expect(child.parent is run, f"run {child.start}..{child.end} does not know its parent")
        _expect(child.edge == edge == child.kind.edge_key(child.keys, 0), f"run {child.start}..{child.end}: wrong edge")
        _expect(child.start == run.end, f"run {child.start}..{child.end} below a run that ends at {run.end}")


def _check_run(run: Run, has_pages: bool) -> None:
    name = f"run {run.start}..{run.end}"
    _expect(run.end > run.start, f"{name} is empty")
    _expect(run.keys.size == (run.end - run.start) * run.kind.width, f"{name} has {run.keys.size} keys")
    _check_children(run)
    _expect((run.pages is not None) == has_pages, f"{name}: pages where none belong, or none where they do")
    if run.pages is not None:
        _expect(run.pages.run is run, f"{name}: its pages belong to another run")
        covered = (run.pages.start, run.pages.start + run.pages.count)
        _expect(covered == (run.start, run.end), f"{name} has pages for {covered}")
        if not run.holds:
            for child in run.children.values():
                below = child.pages
                older = below is not None and below.stamp - child.start < run.pages.stamp - (run.end - 1)
                _expect(older, f"{name} is older than its descendant")
    ordinals: list[int] = []
    for segment in run.snapshots:
        _expect(segment.run is run, f"{name}: a snapshot segment belongs to another run")
        _expect(len(segment.ordinals) == len(segment.slots) > 0, f"{name}: empty or uneven snapshot segment")
        _expect(list(segment.ordinals) == sorted(segment.ordinals), f"{name}: snapshots out of order")
        ordinals += segment.ordinals
    _expect(len(set(ordinals)) == len(ordinals), f"{name}: two snapshots after one block")
    _expect(all(run.start <= ordinal < run.end for ordinal in ordinals), f"{name}: snapshot outside the run")


def _check_holds(manager: KVCacheManager, runs: list[Run]) -> None:
    holds: Counter[Run] = Counter()
    soft_holds: Counter[Run] = Counter()
    sources: Counter[int] = Counter()
    sequences: Counter[Root] = Counter()
    for sequence in manager.open_sequences:
        sequences[sequence.root] += 1
        if sequence.locked:
            holds.update(sequence.cursor.path())
        if sequence.soft:
            soft_holds[sequence.cursor] += 1
            if sequence.source_slot >= 0:
                sources[sequence.source_slot] += 1
    for run in runs:
        name = f"run {run.start}..{run.end}"
        _expect(run.holds == holds[run], f"{name} is held {run.holds} times, by {holds[run]} sequences")
        _expect(
            run.soft_holds == soft_holds[run], f"{name}: {run.soft_holds} soft holds, by {soft_holds[run]} sequences"
        )
    for root in manager.store.roots.values():
        _expect(
            root.num_sequences == sequences[root],
            f"{root.scope}: {root.num_sequences} sequences, {sequences[root]} open",
        )
    if manager.store.snapshots is not None:
        held = manager.store.snapshots.held_sources
        _expect(held == dict(sources), f"held sources {held}, expected {dict(sources)}")


def _check_queues(manager: KVCacheManager, runs: list[Run]) -> None:
    """What may go has one entry in its queue, and that is no younger than it is."""
    store = manager.store
    entries: Counter[Segment] = Counter(store.page_queue.segments())
    if store.snapshots is not None:
        entries.update(store.snapshots.queue.segments())
    for run in runs:
        segments: list[Segment] = list(run.snapshots)
        if run.pages is not None:
            segments.append(run.pages)
        for segment in segments:
            name = f"a segment of run {run.start}..{run.end}"
            _expect(entries[segment] == segment.queued, f"{name}: {entries[segment]} entries, queued {segment.queued}")
            _expect(segment.queued or not segment.may_go(), f"{name} may go, but is not in the queue")
