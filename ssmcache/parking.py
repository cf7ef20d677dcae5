"""Where the private pages and states of a suspended sequence are, so that they can move to a tier below."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmcache.keys import KeyKind, ReuseScope
from ssmcache.memory.base import GPU_TIER
from ssmcache.pins import Pin
from ssmcache.pools import NO_SLOTS, SlotArray, int_array
from ssmcache.segments import DEFAULT_RANK, PageSegment, SparseSegment
from ssmcache.sparse import SparseStore
from ssmcache.tree import Root, Run, root_of, runs_below

if TYPE_CHECKING:
    from ssmcache.sequence import KVCache
    from ssmcache.sequence_pages import SequencePages

_KIND = KeyKind(1, prefix_unique=True)
_PAGES, _STATES = 0, 1


class Parked:
    """A tree of its own: the private pages hang below its root as runs, held by their sequence alone, and on one more
    run lies what only some blocks have. So eviction treats them like everything else that is held.
    """

    def __init__(self, sequence: KVCache, stamp: int) -> None:
        self.root = Root(_KIND, ReuseScope())
        self._store = sequence.store
        self._sequence = sequence
        start = sequence.cursor.end
        self._pins: list[Pin] = []
        self._num_pages = sequence.num_own_pages
        if self._num_pages:
            self._park_pages(start, stamp)
        self.states = Run(self.root, _KIND, _STATES, start, start + self._num_pages, np.empty(0, dtype=np.int64))
        self.states.holds = self.states.idle_holds = 1
        for window in sequence.windows:
            self._pins += _park(window.store, self.states, window.own, stamp)
            window.own = {}
        if sequence.states is not None:
            assert self._store.snapshots is not None
            live = sequence.states.give_up_live()
            self._pins += _park(self._store.snapshots, self.states, {start + self._num_pages: live}, stamp)

    def _park_pages(self, start: int, stamp: int) -> None:
        tiers, count = self._store.pages, self._num_pages
        assert tiers is not None
        keys = np.zeros(count, dtype=np.int64)
        run = self.root.children[_PAGES] = Run(self.root, _KIND, _PAGES, start, start + count, keys)
        run.holds = run.idle_holds = 1
        run.pages = tiers.new_segment(run, stamp, DEFAULT_RANK, GPU_TIER, self._sequence.take_own_pages(count))
        tiers.cached[GPU_TIER] += count
        tiers.held[GPU_TIER] += count
        self._store.settle_leaf(run)

    def page_runs(self) -> list[Run]:
        """From the top down."""
        return runs_below(self.root)

    def is_lost(self) -> bool:
        return self.root.lost or any(pin.slot < 0 for pin in self._pins)

    def num_gpu_pages(self) -> int:
        segments = (run.pages for run in self.page_runs())
        return sum(segment.count for segment in segments if segment is not None and segment.tier == GPU_TIER)

    def num_gpu_slots(self, store: object) -> int:
        return sum(len(segment.slots) for segment in self.states.items if segment.store is store and not segment.tier)

    def set_idle(self, idle: bool) -> None:
        """Let it move, or keep it where it is and whence it is brought up."""
        change = 1 if idle else -1
        for run in self.page_runs():
            assert run.pages is not None
            assert self._store.pages is not None
            run.idle_holds += change
            self._store.pages.held[run.pages.tier] += change * run.pages.count
            self._store.pages.locked[run.pages.tier] -= change * run.pages.count
            self._store.settle_leaf(run)
        for segment in self.states.items:
            for pin in segment.store.pins.of(segment.tier, segment.slots):
                segment.store.pins.count(pin, held=change, locked=-change)
            segment.store.queues[segment.tier].put(segment)

    def page_lifts(self, tier: int) -> list[PageSegment]:
        return [run.pages for run in self.page_runs() if run.pages is not None and run.pages.tier > tier]

    def pins(self) -> set[Pin]:
        return set(self._pins)

    def take_first_page(self) -> tuple[int, SlotArray]:
        """The page of the first block, which is not parked any more: its tier and slot."""
        tiers, run = self._store.pages, self.page_runs()[0]
        assert tiers is not None
        if run.end - run.start > 1:
            run = self._store.split(run, run.start + 1)
        pages = run.pages
        assert pages is not None
        self.root.children = run.children
        for child in run.children.values():
            child.parent = self.root
        tiers.queues[pages.tier].retire(pages)
        tiers.held[pages.tier] -= 1
        tiers.cached[pages.tier] -= 1
        return pages.tier, pages.slots

    def take_slot(self, store: SparseStore, block: int) -> tuple[int, int] | None:
        """What a block has of windows, which is not parked any more: its tier and slot; None if it has nothing."""
        place = store.find(self.states, block, block + 1).get(block)
        if place is None:
            return None
        segment, index = place
        tier, slot = segment.tier, segment.slots[index]
        store.take_over(self.states, tier, slot)
        return tier, slot

    def unpark(self) -> None:
        """Give all back to its sequence; it is on the GPU, and locked."""
        store, sequence = self._store, self._sequence
        tiers = store.pages
        slots = []
        for run in self.page_runs():
            assert tiers is not None
            assert run.pages is not None
            slots.append(run.pages.slots)
            tiers.locked[GPU_TIER] -= run.pages.count
            tiers.cached[GPU_TIER] -= run.pages.count
            tiers.queues[GPU_TIER].retire(run.pages)
        sequence.own_pages = np.concatenate(slots) if slots else NO_SLOTS
        for window in sequence.windows:
            window.own = _unpark(window.store, self.states)
        if sequence.states is not None:
            assert store.snapshots is not None
            (sequence.states.live_slot,) = _unpark(store.snapshots, self.states).values()

    def discard(self) -> None:
        """Free everything, in whatever tier it is; it is idle."""
        tiers = self._store.pages
        for run in self.page_runs():
            assert tiers is not None
            pages = run.pages
            assert pages is not None
            count = pages.count
            tiers.pools[pages.tier].give_back(pages.drop_tail(count))
            tiers.held[pages.tier] -= count
            tiers.cached[pages.tier] -= count
            tiers.queues[pages.tier].retire(pages)
        for sparse in self._store.sparse_stores():
            _discard(sparse, self.states)

    def contents(self) -> Iterator[Any]:
        """Every segment, for checks."""
        yield from (run.pages for run in self.page_runs())
        yield from self.states.items


def _park(store: SparseStore, run: Run, own: dict[int, int], stamp: int) -> list[Pin]:
    """Put private GPU slots, by block, on a run of their own: from now on they may move."""
    if not own:
        return []
    segment = store.new_segment(run, stamp, DEFAULT_RANK, GPU_TIER, int_array(own.keys()), int_array(own.values()))
    pins = [store.pins.pin(GPU_TIER, slot) for slot in segment.slots]
    for pin in pins:
        store.pins.count(pin, held=1)
    store.cached[GPU_TIER] += len(pins)
    store.queues[GPU_TIER].put(segment)
    return pins


def _unpark(store: SparseStore, run: Run) -> dict[int, int]:
    """Take all slots off a parked run, which are on the GPU: {block: slot}."""
    own: dict[int, int] = {}
    for segment in list(store.on(run)):
        own.update(zip(segment.ordinals, segment.slots, strict=True))
        store.cached[segment.tier] -= len(segment.slots)
        _take_off(store, run, segment)
    return own


def _discard(store: SparseStore, run: Run) -> None:
    """Free all slots of a parked run, in whatever tier."""
    for segment in list(store.on(run)):
        store.give_back(segment.tier, segment.slots)
        _take_off(store, run, segment)


def _take_off(store: SparseStore, run: Run, segment: SparseSegment) -> None:
    for slot in segment.slots:
        store.pins.break_off(segment.tier, slot)
    store.queues[segment.tier].retire(segment)
    run.items = tuple(other for other in run.items if other is not segment)


def is_lost(sequence: SequencePages) -> bool:
    """Whether a page or state of a suspended sequence could not be read back."""
    if sequence.parked is None:
        return False
    cut_off = root_of(sequence.cursor) is not sequence.root
    return cut_off or sequence.parked.is_lost() or any(window.is_lost() for window in sequence.windows)
