"""Making a sequence ACTIVE: what it needs is brought up to the GPU and locked, or nothing changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any, NamedTuple

from ssmcache.committing import raise_priorities
from ssmcache.keys import Int64Array
from ssmcache.match import find
from ssmcache.memory.base import GPU_TIER, TransferError
from ssmcache.parking import Parked, is_lost
from ssmcache.partial import can_take_over, copy_partial, protect_partial, release_windows, take_over_partial
from ssmcache.pins import Pin
from ssmcache.pool_groups import PoolGroup
from ssmcache.segments import PageSegment, SparseSegment
from ssmcache.sparse import SparseStore
from ssmcache.stats import Shortage
from ssmcache.tiers import Tiers

if TYPE_CHECKING:
    from ssmcache.sequence import KVCache
    from ssmcache.sequence_pages import SequencePages


class _Need(NamedTuple):
    """What is needed of one pool: segments to be brought up, and free slots beside them. `lifts` finds those anew each
    time, since bringing up the pages of full attention may cut runs, with all that lies on them. `tiers` is the first
    layer group that needs something there.
    """

    tiers: Tiers[Any, Any]
    lifts: Callable[[], list[Any]]
    beside: int

    def bring(self, sequence: KVCache, tier: int) -> None:
        """Errors: TransferError."""
        places = sequence.store.places
        if places is not None:  # which cuts segments, and must not while they are on their way
            places.settle()
        self.tiers.pool_group.bring(self.lifts(), tier, self.beside, sequence.stream)

    def leaving(self) -> list[int]:
        """By tier, slots that are about to move up."""
        leaving = [0] * len(self.tiers.pools)
        for segment in self.lifts():
            leaving[segment.tier] += len(segment.slots)
        return leaving

    def shortage(self, sequence: KVCache, tier: int) -> Shortage | None:
        leaving = self.leaving()
        needed = sum(leaving) + self.beside
        if not needed or self.tiers.obtainable(tier, leaving) >= needed:
            return None
        return sequence.manager.shortage("slots", self.tiers, needed, tier)


def _by_pool(needs: list[_Need]) -> list[_Need]:
    """The needs of layer groups as one for each pool."""
    pools: dict[PoolGroup, list[_Need]] = {}
    for need in needs:
        pools.setdefault(need.tiers.pool_group, []).append(need)
    return [_together(same) if len(same) > 1 else same[0] for same in pools.values()]


def _together(needs: list[_Need]) -> _Need:
    def lifts() -> list[Any]:
        return [segment for need in needs for segment in need.lifts()]

    return _Need(needs[0].tiers, lifts, sum(need.beside for need in needs))


def first_resume(
    sequence: KVCache, keys: Int64Array, num_blocks: int, num_tokens: int, partly: bool = True
) -> Shortage | None:
    """Lock what was found, start the live state, and copy a block that matches in part.

    If the tree has changed since creation the prompt is looked up again; a refusal leaves the old match as it was. A
    block that matches in part is done without (`partly`) rather than refuse for want of room for it and its copy.
    """
    manager, store, states = sequence.manager, sequence.store, sequence.states
    shortage = manager.gate(sequence)
    if shortage is not None:
        return shortage
    current = partly and sequence.soft and sequence.version == store.version
    found = None
    if not current:
        in_part = partly and sequence.partly
        found = find(store, sequence.root, keys, num_blocks, num_tokens, in_part, sequence.adopt)
    old = None if found is None else store.hold_softly(sequence, found)
    reuse = sequence.reuse_match if found is None else found[2]
    store.lock(sequence)
    needs: list[_Need] = []
    if store.has_tiers or sequence.partial is not None or sequence.windows:
        _lock_windows(sequence, reuse.usable_tokens)
        needs = _needs_of_first(sequence)
        shortage = _shortage(sequence, needs, GPU_TIER)
        if shortage is not None and can_take_over(sequence):
            needs[0] = needs[0]._replace(beside=0)
            shortage = _shortage(sequence, needs, GPU_TIER)
    if states is not None and shortage is None:
        own = 1 + (old is not None and old[1] is sequence.source)
        leaving, others = _needs_beside_state(sequence, needs)
        shortage = states.shortage_of_live_state(sequence.source, own, leaving, others)
    if shortage is not None:
        had_partial = sequence.partial is not None
        _undo_lock(sequence)
        if found is not None:
            store.take_up_again(sequence, old)
        return first_resume(sequence, keys, num_blocks, num_tokens, partly=False) if had_partial else shortage
    if found is not None:  # from here on the old match is not needed, and its room is
        if old is not None:
            store.end_soft_hold(old)
        sequence.apply(reuse)
    if needs or states is not None:
        shortage = _bring_first(sequence, needs)
        if shortage is not None:
            return shortage
    del store.soft_holders[sequence]
    raise_priorities(sequence, sequence.cursor, 0)
    return None


def _bring_first(sequence: KVCache, needs: list[_Need]) -> Shortage | None:
    """Bring up, copy and start what a first resume needs, for which there is room."""
    if sequence.store.has_tiers:
        sequence.usable_tokens_by_tier = _usable_tokens_by_tier(sequence)
    try:
        _bring_all(sequence, needs)
        if sequence.states is not None:
            sequence.states.start(sequence.cursor, sequence.source)
            sequence.source = None
        if sequence.partial is not None:
            if needs[0].beside:
                copy_partial(sequence, sequence.partial)
            else:
                take_over_partial(sequence, sequence.partial)
    except TransferError as error:
        _undo_lock(sequence)
        return _after_failure(sequence, error)
    return None


def _needs_beside_state(sequence: KVCache, needs: list[_Need]) -> tuple[list[int] | None, int]:
    """What is needed of the pool of the states beside a live one: the slots about to move up, by tier, and all."""
    snapshots = sequence.store.snapshots
    for need in needs:
        if snapshots is not None and need.tiers.pool_group is snapshots.pool_group:
            leaving = need.leaving()
            return leaving, sum(leaving) + need.beside
    return None, 0


def _bring_all(sequence: KVCache, needs: list[_Need]) -> None:
    """Bring up what is needed; the state that the sequence starts from, which may lie in the same pool, stays.

    Errors: TransferError.
    """
    source, snapshots = sequence.source, sequence.store.snapshots
    if source is not None and snapshots is not None:
        snapshots.pins.count(source, locked=1)
    try:
        for need in needs:
            need.bring(sequence, GPU_TIER)
    finally:
        if source is not None and snapshots is not None:
            snapshots.pins.count(source, locked=-1)


def _after_failure(sequence: KVCache, error: TransferError) -> Shortage:
    """A sequence that was not resumed yet lets go of what it found if some of that may be lost."""
    if error.lost:
        sequence.store.drop_soft_hold(sequence)
        sequence.store.free_lost()
    return transfer_shortage(sequence, error)


def _shortage(sequence: KVCache, needs: list[_Need], tier: int) -> Shortage | None:
    return next(filter(None, (need.shortage(sequence, tier) for need in needs)), None)


def _lock_windows(sequence: KVCache, usable_tokens: int) -> None:
    end = sequence.cursor.end
    num_blocks = end + (sequence.partial is not None)
    for window in sequence.windows:
        pins = {block: pin for store, block, pin in sequence.pins if store is window.store and block < end}
        window.lock(pins, usable_tokens, num_blocks)
    _share_activity(sequence)
    protect_partial(sequence, True)


def _undo_lock(sequence: KVCache) -> None:
    protect_partial(sequence, False)
    for window in sequence.windows:
        window.unlock_softly()
    sequence.store.unlock(sequence)


def _needs_of_first(sequence: KVCache) -> list[_Need]:
    """What a first resume needs beside the live state."""
    store = sequence.store
    beside = int(sequence.partial is not None)
    if not store.has_tiers and not beside:
        return []
    needs: list[_Need] = []
    if store.pages is not None:
        needs.append(_Need(store.pages, functools.partial(store.lifts, sequence.cursor), beside))
    for window in sequence.windows:
        pins: set[Pin | None] = set(window.pins.values())
        needs.append(
            _Need(window.store, functools.partial(_sparse_lifts, sequence, window.store, pins, GPU_TIER), beside)
        )
    return _by_pool(needs)


def _sparse_lifts(
    sequence: KVCache, sparse: SparseStore, pins: Container[Pin | None], tier: int
) -> list[SparseSegment]:
    runs = list(sequence.cursor.path())
    if sequence.parked is not None:
        runs.append(sequence.parked.states)
    return sparse.lifts(runs, pins, tier)


def _usable_tokens_by_tier(sequence: KVCache) -> tuple[int, ...]:
    """Where the pages of the reused tokens lie; without attention, where the state does."""
    store, partial, usable_tokens = sequence.store, sequence.partial, sequence.reuse_match.usable_tokens
    block = store.tokens_per_block
    tokens = [0] * len(sequence.manager.tier_names)
    if store.pages is None:
        tokens[0 if sequence.source is None else sequence.source.tier] = usable_tokens
        return tuple(tokens)
    for run in sequence.cursor.path():
        assert run.pages is not None
        tokens[run.pages.tier] += max(0, min(run.end * block, usable_tokens) - run.start * block)
    if partial is not None and partial.run.pages is not None:
        tokens[partial.run.pages.tier] += partial.num_tokens
    return tuple(tokens)


def resume_again(sequence: KVCache) -> Shortage | None:
    """Bring back what a suspended sequence holds, and lock it."""
    manager, parked = sequence.manager, sequence.parked
    if is_lost(sequence):
        return _lost(sequence)
    shortage = manager.gate(sequence)
    if shortage is not None:
        return shortage
    if parked is None:
        for window in sequence.windows:
            window.begin_activity()
        _share_activity(sequence)
        return None
    shortage = _bring_up_locked(sequence, parked, GPU_TIER)
    if shortage is None:
        parked.unpark()
        sequence.parked = None
    return shortage


def _bring_up_locked(sequence: KVCache, parked: Parked, tier: int) -> Shortage | None:
    """Bring up what a suspended sequence holds, which is locked from here on; a shortage makes it idle again."""
    _set_idle(sequence, parked, False)
    try:
        shortage = _bring_up(sequence, parked, tier)
    except TransferError as error:
        shortage = transfer_shortage(sequence, error)
    if shortage is not None:
        _set_idle(sequence, parked, True)
        if shortage.reason == "lost":
            sequence.store.free_lost()
    return shortage


def _set_idle(sequence: KVCache, parked: Parked, idle: bool) -> None:
    sequence.store.set_idle(sequence, idle)
    parked.set_idle(idle)
    for window in sequence.windows:
        window.set_idle(idle)
    _share_activity(sequence)


def _share_activity(sequence: KVCache) -> None:
    """Pages of several windows that may be compared, being in one pool, have one time for one activity."""
    if sequence.store.shares_pools:
        for window in sequence.windows:
            window.stamp = sequence.windows[-1].stamp


def _bring_up(sequence: KVCache, parked: Parked | None, tier: int) -> Shortage | None:
    """Bring a sequence's pages and states up to a tier; it protects them."""
    store = sequence.store
    needs: list[_Need] = []
    own_pins: set[Pin] = set() if parked is None else parked.pins()
    if store.pages is not None:
        needs.append(_Need(store.pages, functools.partial(_page_lifts, sequence, parked, tier), 0))
    for window in sequence.windows:
        pins = own_pins.union(window.pins.values(), (pin for _, _, pin in sequence.pins))
        needs.append(_Need(window.store, functools.partial(_sparse_lifts, sequence, window.store, pins, tier), 0))
    if store.snapshots is not None:
        pins = own_pins if sequence.source is None else own_pins | {sequence.source}
        needs.append(_Need(store.snapshots, functools.partial(_sparse_lifts, sequence, store.snapshots, pins, tier), 0))
    needs = _by_pool(needs)
    shortage = _shortage(sequence, needs, tier)
    if shortage is None:
        for need in needs:
            need.bring(sequence, tier)
    return shortage


def _page_lifts(sequence: KVCache, parked: Parked | None, tier: int) -> list[PageSegment]:
    return sequence.store.lifts(sequence.cursor, tier) + ([] if parked is None else parked.page_lifts(tier))


def prefetch(sequence: KVCache, tier: int) -> Shortage | None:
    """Bring what a sequence that is not ACTIVE holds up to a tier."""
    store, parked = sequence.store, sequence.parked
    if parked is not None:
        if is_lost(sequence):
            return _lost(sequence)
        shortage = _bring_up_locked(sequence, parked, tier)
        if shortage is None:
            _set_idle(sequence, parked, True)
        return shortage
    if not sequence.soft:
        return None
    pins: list[tuple[SparseStore, Pin]] = [(sparse, pin) for sparse, _, pin in sequence.pins]
    if sequence.source is not None and store.snapshots is not None:
        pins.append((store.snapshots, sequence.source))
    store.lock(sequence)
    protect_partial(sequence, True)
    for sparse, pin in pins:
        sparse.pins.count(pin, locked=1)
    failure: TransferError | None = None
    shortage = None
    try:
        shortage = _bring_up(sequence, None, tier)
    except TransferError as error:
        failure = error
    for sparse, pin in pins:
        sparse.pins.count(pin, locked=-1)
    protect_partial(sequence, False)
    store.unlock(sequence)
    release_windows(sequence, sequence.cursor if sequence.partial is None else sequence.partial.run)
    return shortage if failure is None else _after_failure(sequence, failure)


def suspend(sequence: KVCache) -> None:
    """Touch the path; with tiers below, let everything that the sequence has move there."""
    store = sequence.store
    # without full attention the blocks of its own are those of window pages
    num_blocks = -(-sequence.capacity // store.tokens_per_block)
    stamp = store.touch(sequence, max(sequence.num_own_pages, num_blocks - sequence.cursor.end))
    if store.has_tiers:
        store.set_idle(sequence, True)
        for window in sequence.windows:
            window.set_idle(True)
        sequence.parked = Parked(sequence, stamp)


def _lost(sequence: SequencePages) -> Shortage:
    return Shortage("lost", 0, sequence.manager.tier_names[-1], 0, 0, 0, 0)


def transfer_shortage(sequence: SequencePages, error: TransferError) -> Shortage:
    """A failed move as a reason. What others have lost is no reason to give up: the next call goes on without it."""
    name = sequence.manager.tier_names[error.tier]
    lost = bool(error.lost) and (not sequence.locked or is_lost(sequence))
    return Shortage("lost" if lost else "io", 0, name, 0, 0, 0, 0)
