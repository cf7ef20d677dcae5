"""The pages of full attention in the tree: a page for every block, victims from the tails of leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ssmcache.pool_groups import PoolGroup
from ssmcache.pools import SlotArray, SlotPool
from ssmcache.segments import PageSegment
from ssmcache.tiers import Tiers
from ssmcache.tree import Run, runs_below

if TYPE_CHECKING:
    from ssmcache.store import BlockStore


class PageTiers(Tiers[PageSegment, SlotArray]):
    """Pages by tier. Along every path they lie in the same tier or further down, since what goes from a tier is always
    the deepest of its pages, and what comes up comes with all that is above it.

    Attributes: `locked` and `held`, cached pages by tier that an ACTIVE sequence needs, or only suspended ones.
    """

    order_in_block = 2

    def __init__(
        self, store: BlockStore, layer_group: int, pool_group: PoolGroup, pools: Sequence[SlotPool[SlotArray]]
    ) -> None:
        super().__init__(layer_group, pool_group, pools)
        self.locked = [0] * len(pools)
        self.held = [0] * len(pools)
        self._store = store
        self._moved_down: list[Run] = []  # by the batch under way
        self._selected: set[PageSegment] = set()  # to move down, by the batch under way: nobody's warm child any more

    def num_droppable(self, tier: int) -> int:
        return self.cached[tier] - self.locked[tier] - self.held[tier]

    def num_held(self, tier: int) -> int:
        return self.held[tier]

    def new_segment(self, run: Run, stamp: int, rank: int, tier: int, slots: SlotArray) -> PageSegment:
        return PageSegment(run, stamp, rank, self.serial(), tier, tier < self.last_tier, run.start, slots)

    # -- going -------------------------------------------------------------------------------------------------------

    def drop_oldest(self, segment: PageSegment, count: int, from_block: int) -> bool:
        run, tier = segment.run, segment.tier
        assert run is not None
        if tier < self.last_tier:
            if run.holds or _is_softly_held(run):
                self.queues[tier].take_out(segment)
                return False
            for child in list(run.children.values()):  # in tiers below, and older
                self._store.drop_subtree(child, child.start)
        num_blocks = min(count, run.end - max(run.start, from_block))
        if run.items and self.pool_group.is_shared:  # which may be in the same pool, and enough with fewer pages
            deepest = max(item.ordinals[-1] for item in run.items)
            num_blocks = min(num_blocks, max(1, run.end - 1 - deepest))
        self._store.drop_tail(run, num_blocks)
        return True

    def select_oldest(self, segment: PageSegment, count: int, from_block: int) -> PageSegment:
        run, tier = segment.run, segment.tier
        assert run is not None
        self.queues[tier].take_out(segment)
        first = max(run.start, from_block, run.end - count)
        if first > run.start:
            self._store.split(run, first)
        self._selected.add(segment)
        parent = run.parent
        if parent is not None and _tier_of(parent) == tier:
            parent.warm_children -= 1
            self._store.settle_leaf(parent)
        return segment

    def put_back(self, segment: PageSegment) -> None:
        self.queues[segment.tier].put(segment)

    def unselect(self, segment: PageSegment) -> None:
        run = segment.run
        assert run is not None
        self._selected.discard(segment)
        parent = run.parent
        if parent is not None and _tier_of(parent) == segment.tier:
            parent.warm_children += 1
        elif parent is not None and _tier_of(parent) > segment.tier:
            self.pool_group.lost.append((segment, [0]))  # the rounds had to move the pages above it first: out of reach
        self.queues[segment.tier].put(segment)

    # -- moving ------------------------------------------------------------------------------------------------------

    def cut(self, segment: PageSegment, count: int, selected: bool) -> tuple[PageSegment, PageSegment]:
        run = segment.run
        assert run is not None
        upper = self._store.split(run, run.end - count if selected else run.start + count)
        assert upper.pages is not None
        if not selected:
            return upper.pages, segment
        upper.warm_children = 0  # the lower part is on its way already
        self._selected.add(upper.pages)
        return segment, upper.pages

    def settle(self, segment: PageSegment, tier: int, slots: SlotArray) -> SlotArray:
        run, old_tier = segment.run, segment.tier
        assert run is not None
        slots = np.asarray(slots, dtype=np.int32)  # those of a shared pool come in no array of NumPy
        old_slots = segment.slots
        num_blocks = segment.count
        self.queues[old_tier].retire(segment)
        run.pages = self.new_segment(run, segment.stamp, segment.rank, tier, slots)
        if self._store.events is not None:
            self._store.events.moved(self.layer_group, old_tier, tier, run, range(run.start, run.end))
        if run.holds > run.idle_holds:
            self.locked[old_tier] -= num_blocks
            self.locked[tier] += num_blocks
        elif run.holds:
            self.held[old_tier] -= num_blocks
            self.held[tier] += num_blocks
        if tier > old_tier:
            self._selected.discard(segment)
            below = [child.pages for child in run.children.values()]
            run.warm_children = sum(
                pages is not None and pages.tier == tier and pages not in self._selected for pages in below
            )
            self._moved_down.append(run)
        else:
            run.warm_children = 0
            parent = run.parent
            if parent is not None and _tier_of(parent) == tier:
                parent.warm_children += 1
        self._store.settle_leaf(run)
        return old_slots

    def join_moved(self) -> None:
        for run in self._moved_down:
            parent = run.parent
            if parent is None or parent.children.get(run.edge) is not run or len(run.children) != 1:
                continue  # one with another by now, or lost
            (child,) = run.children.values()
            if self._store.can_absorb(child) and _tail_of_one_touch(run, child):
                self._store.absorb_parent(child)
        self._moved_down.clear()

    def take_lost(self, segment: PageSegment, indices: list[int]) -> int:
        return segment.start + indices[0]  # with all that is below


def _is_softly_held(run: Run) -> bool:
    return run.soft_holds > 0 or any(below.soft_holds for below in runs_below(run))


def _tier_of(run: Run) -> int:
    return -1 if run.pages is None else run.pages.tier


def _tail_of_one_touch(run: Run, child: Run) -> bool:
    """Whether a run and its only child were one before some of it moved."""
    assert run.pages is not None
    assert child.pages is not None
    same_holders = run.holds == child.holds and run.idle_holds == child.idle_holds and not run.soft_holds
    return same_holders and run.pages.stamp == child.pages.stamp
