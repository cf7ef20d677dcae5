"""Every invariant of a manager, in one place."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ssmcache.compaction import private_slots, segments_of
from ssmcache.memory.base import GPU_TIER
from ssmcache.pins import Pin
from ssmcache.pool_groups import PoolGroup
from ssmcache.segments import Segment, SparseSegment
from ssmcache.sparse_segments import SparseSegments
from ssmcache.tiers import Tiers
from ssmcache.tree import Root, Run, root_of, runs_below

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
    for root in (*store.roots.values(), *store.detached):
        _check_children(root)
    for run in runs:
        _check_run(run, has_pages=store.pages is not None, has_tiers=store.has_tiers)
    _check_roots(manager)
    _check_holds(manager, runs)
    _check_sequences(manager)
    _check_pins(manager)
    for group in store.pool_groups:
        _check_slots(manager, group)
    for tiers in store.all_tiers():
        _check_queues(manager, tiers)
    if store.pages is not None:
        _check_page_counts(manager)
    if store.places is not None:
        store.places.check(runs)
    if store.snapshots is not None:
        cached = {(segment.tier, slot) for segment in segments_of(manager, store.snapshots) for slot in segment.slots}
        _expect(store.snapshots.reused_slots() <= cached, "a slot that is no snapshot counts as a reused one")
        for segment in (segment for run in runs for segment in store.snapshots.on(run)):
            _check_snapshots(manager, segment)


def _check_snapshots(manager: KVCacheManager, segment: SparseSegment) -> None:
    """They lie where the admission policy can want them, and are touched together only where it says so."""
    admission, block = manager.admission, manager.tokens_per_block
    ends = [(ordinal + 1) * block for ordinal in segment.ordinals]
    _expect(not any(end % admission.interval for end in ends), f"snapshots at {ends}, interval {admission.interval}")
    together = admission.keeps_path or len(ends) == 1
    _expect(together, f"snapshots at {ends} were touched together, though each has a request of its own")


def _check_slots(manager: KVCacheManager, group: PoolGroup) -> None:
    """Each slot ever used is exactly one of: in the tree or parked, a sequence's own, free. Slots of layer groups that
    share a pool are in use by one of them.
    """
    for tier, pool in enumerate(group.pools):
        name = f"layer group {', '.join(str(tiers.layer_group) for tiers in group.members)}, tier {tier}"
        in_use: list[int] = []
        num_cached: dict[int, int] = {}
        for tiers in group.members:
            segments = [segment for segment in segments_of(manager, tiers) if segment.tier == tier]
            cached = [slot for segment in segments for slot in segment.slots.tolist()]
            num_cached[tiers.layer_group] = len(cached)
            in_use += cached + (private_slots(manager, tiers) if tier == GPU_TIER else [])
        everywhere = Counter(in_use + pool.returned_slots())
        twice = [slot for slot, count in everywhere.items() if count > 1]
        _expect(not twice, f"{name}: slots with two owners: {twice[:5]}")
        ever_used = set(range(pool.num_ever_used))
        _expect(set(everywhere) == ever_used, f"{name}: lost or made up: {sorted(set(everywhere) ^ ever_used)[:5]}")
        _expect(len(in_use) == pool.used, f"{name}: {len(in_use)} slots in use, counted {pool.used}")
        _expect(pool.used <= pool.capacity, f"{name}: {pool.used} slots in use of {pool.capacity}")
        counted = {tiers.layer_group: tiers.cached[tier] for tiers in group.members}
        _expect(num_cached == counted, f"{name}: {num_cached} cached, by layer group, counted {counted}")


def _check_page_counts(manager: KVCacheManager) -> None:
    pages = manager.store.pages
    assert pages is not None
    locked, held = [0] * len(pages.pools), [0] * len(pages.pools)
    for segment in segments_of(manager, pages):
        run = segment.run
        _expect(run is not None and run.pages is segment, "a page segment without its run")
        if run.holds > run.idle_holds:
            locked[segment.tier] += segment.count
        elif run.holds:
            held[segment.tier] += segment.count
    _expect(locked == pages.locked, f"{locked} locked pages by tier, counted {pages.locked}")
    _expect(held == pages.held, f"{held} held pages by tier, counted {pages.held}")


def _check_roots(manager: KVCacheManager) -> None:
    store = manager.store
    for scope, root in store.roots.items():
        is_in_place = root.scope == scope and not (root.lost or root.retired)
        _expect(is_in_place, f"the root of {scope} is lost, retired, or of another scope")
    _expect(all(root.lost or root.retired for root in store.detached), "a detached root that is not lost or retired")
    for root in store.detached:
        unheld = [run for run in runs_below(root) if not run.holds]
        _expect(not unheld, f"{len(unheld)} runs that nobody holds or can find")
    if manager.event_log is None:
        return
    for run in store.all_runs():
        *_, top = run.path()
        assert isinstance(top.parent, Root)
        expected = 0 if top.parent.lost or top.parent.retired or run.num_tokens else run.end - run.start
        _expect(len(run.digests) == expected, f"run {run.start}..{run.end} has {len(run.digests)} digests")


def _check_children(run: Run) -> None:
    known = run.siblings is None or run.siblings.edges == list(run.children)
    _expect(known, f"run {run.start}..{run.end} has children that a partial look-up does not know, or in another order")
    for edge, child in run.children.items():
        name = f"run {child.start}..{child.end}"
        _expect(child.parent is run, f"{name} does not know its parent")
        if child.num_tokens:
            _expect(not child.children and child.end == child.start + 1, f"{name} is partial, but not a single leaf")
            _expect(child.edge == edge == child.keys.tobytes(), f"{name}: wrong edge")
        else:
            _expect(child.edge == edge == child.kind.edge_key(child.keys, 0), f"{name}: wrong edge")
        is_lost = isinstance(run, Root) and run.lost  # what hangs there begins wherever a page could not be read
        _expect(child.start == run.end or is_lost, f"{name} below a run that ends at {run.end}")


def _check_run(run: Run, has_pages: bool, has_tiers: bool) -> None:
    name = f"run {run.start}..{run.end}"
    _expect(run.end > run.start, f"{name} is empty")
    num_keys = run.num_tokens or (run.end - run.start) * run.kind.width
    _expect(run.keys.size == num_keys, f"{name} has {run.keys.size} keys, expected {num_keys}")
    _check_children(run)
    _expect((run.pages is not None) == has_pages, f"{name}: pages where none belong, or none where they do")
    if run.pages is not None:
        _check_pages_of(run, name, has_tiers)
    by_store: dict[SparseSegments, list[int]] = {}
    for segment in run.items:
        _expect(segment.run is run, f"{name}: a sparse segment belongs to another run")
        _expect(len(segment.ordinals) == len(segment.slots) > 0, f"{name}: empty or uneven sparse segment")
        _expect(list(segment.ordinals) == sorted(segment.ordinals), f"{name}: slots out of order")
        by_store.setdefault(segment.store, []).extend(segment.ordinals)
    for ordinals in by_store.values():
        _expect(len(set(ordinals)) == len(ordinals), f"{name}: two slots for one block")
        _expect(all(run.start <= ordinal < run.end for ordinal in ordinals), f"{name}: a slot outside the run")


def _check_pages_of(run: Run, name: str, has_tiers: bool) -> None:
    pages = run.pages
    assert pages is not None
    _expect(pages.run is run, f"{name}: its pages belong to another run")
    _expect(pages.tier == GPU_TIER or run.holds == run.idle_holds, f"{name} is locked in tier {pages.tier}")
    covered = (pages.start, pages.start + pages.count)
    _expect(covered == (run.start, run.end), f"{name} has pages for {covered}")
    warm = 0
    for child in run.children.values():
        below = child.pages
        assert below is not None
        _expect(below.tier >= pages.tier, f"{name} lies in tier {pages.tier}, what is below it in {below.tier}")
        warm += below.tier == pages.tier
        older = below.stamp - child.start < pages.stamp - (run.end - 1)
        _expect(older or run.holds > 0, f"{name} is older than its descendant")
    counted = run.warm_children == warm or not has_tiers  # only then are they counted
    _expect(counted, f"{name} has {warm} children in its tier, counted {run.warm_children}")


def _check_holds(manager: KVCacheManager, runs: list[Run]) -> None:
    holds: Counter[Run] = Counter()
    idle_holds: Counter[Run] = Counter()
    soft_holds: Counter[Run] = Counter()
    sequences: Counter[Root] = Counter()
    for sequence in manager.open_sequences:
        sequences[sequence.root] += 1
        if sequence.locked:
            holds.update(sequence.cursor.path())
            if sequence.idle:
                idle_holds.update(sequence.cursor.path())
        if sequence.soft:
            soft_holds[sequence.cursor] += 1
            if sequence.partial is not None:
                soft_holds[sequence.partial.run] += 1
    for run in runs:
        name = f"run {run.start}..{run.end}"
        _expect(run.holds == holds[run], f"{name} is held {run.holds} times, by {holds[run]} sequences")
        _expect(run.idle_holds == idle_holds[run], f"{name}: {run.idle_holds} idle holds, by {idle_holds[run]}")
        _expect(run.soft_holds == soft_holds[run], f"{name}: {run.soft_holds} soft holds, by {soft_holds[run]}")
    for root in manager.store.roots.values():
        num_open = sequences[root]
        _expect(root.num_sequences == num_open, f"{root.scope}: {root.num_sequences} sequences, {num_open} open")


def _check_sequences(manager: KVCacheManager) -> None:
    """What an ACTIVE sequence needs is there; what a suspended one has lies where it says."""
    store, block = manager.store, manager.tokens_per_block
    num_active = 0
    for sequence in manager.open_sequences:
        name = f"sequence {sequence.id}"
        is_active = sequence.status.value == "active"
        num_active += is_active
        parks = sequence.locked and not is_active and store.has_tiers
        _expect((sequence.parked is not None) == parks == sequence.idle, f"{name}: parked, but not suspended, or back")
        _expect(sequence.soft == (sequence in store.soft_holders), f"{name}: a soft hold that is not registered")
        _expect(not (sequence.soft and sequence.locked), f"{name} holds softly what it has locked")
        has_own = sequence.locked and not parks
        if sequence.states is not None:
            _expect((sequence.states.live_slot >= 0) == has_own, f"{name}: a live state lost, or left")
        if is_active:
            _expect(root_of(sequence.cursor) is sequence.root, f"{name} computes below a page that was lost")
            num_blocks = -(-sequence.capacity // block)
            if store.pages is not None:
                missing = num_blocks - sequence.cursor.end - sequence.num_own_pages
                _expect(missing <= 0, f"{name} lacks {missing} pages")
            for window in sequence.windows:
                gone = window.incomplete(sequence.history_length, num_blocks)
                _expect(not gone, f"{name} lacks the window pages of blocks {gone[:5]}")
        elif not has_own:
            left = sequence.num_own_pages + sum(len(window.own) for window in sequence.windows)
            _expect(not left, f"{name} has {left} private pages, though it is not resumed")
    _expect(num_active == manager.num_active, f"{num_active} ACTIVE sequences, counted {manager.num_active}")
    _expect(set(store.soft_holders) <= set(manager.open_sequences), "a soft hold of a closed sequence")


def _check_pins(manager: KVCacheManager) -> None:
    """Each pin is counted by exactly the sequences that have it."""
    counts: dict[Pin, list[int]] = {}

    def count(pin: Pin | None, place: int) -> None:
        if pin is not None and pin.slot >= 0:
            counts.setdefault(pin, [0, 0, 0])[place] += 1

    for sequence in manager.open_sequences:
        if sequence.soft:
            count(sequence.source, 0)
            for _, _, pin in sequence.pins:
                count(pin, 0)
        for window in sequence.windows:
            for pin in window.pins.values():
                count(pin, 1 if sequence.idle else 2)
        if sequence.parked is not None:
            for pin in sequence.parked.pins():
                count(pin, 1)
    for store in manager.store.sparse_stores():
        places = {(segment.tier, slot) for segment in segments_of(manager, store) for slot in segment.slots}
        by_class = [[0, 0] for _ in store.pools]
        for tier, slot, pin in store.pins.all():
            _expect((pin.tier, pin.slot) == (tier, slot), f"the pin of slot {slot} of tier {tier} names another")
            if pin.locked or pin.held:
                by_class[pin.tier][not pin.locked] += 1
            _expect((pin.tier, pin.slot) in places, f"a pin of slot {pin.slot} of tier {pin.tier}, which has no block")
            found = [pin.soft, pin.held, pin.locked]
            _expect(found == counts.get(pin), f"a pin is counted {found} times, by {counts.get(pin)} sequences")
            _expect(not pin.locked or pin.tier == GPU_TIER, f"a locked slot in tier {pin.tier}")
            counts.pop(pin)
        counted = [list(counts) for counts in zip(store.pins.locked, store.pins.held, strict=True)]
        _expect(counted == by_class, f"locked and held slots by tier: {by_class}, counted {counted}")
    _expect(not counts, f"{len(counts)} pins that no layer group knows")


def _check_queues(manager: KVCacheManager, tiers: Tiers[Any, Any]) -> None:
    """What may go has one entry in its queue, and that is no younger than it is."""
    entries = [Counter[Segment](queue.segments()) for queue in tiers.queues]
    for segment in segments_of(manager, tiers):
        name = f"a segment of layer group {tiers.layer_group} in tier {segment.tier}"
        for tier, counted in enumerate(entries):
            expected = int(segment.queued and tier == segment.tier)
            _expect(counted[segment] == expected, f"{name}: {counted[segment]} entries in the queue of tier {tier}")
        is_colder = segment.tier < tiers.last_tier
        _expect(getattr(segment, "colder", is_colder) == is_colder, f"{name} takes it for another tier")
        _expect(segment.queued or not tiers.must_be_queued(segment), f"{name} may go, but is not in the queue")
