"""The reusable blocks: who holds which path, what a touch stamps, and the room that all of it needs.

A slot is *cached* while the tree owns it or a suspended sequence has parked it, *private* while an ACTIVE one does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ssmcache.events import CacheObserver
from ssmcache.keys import ReuseScope
from ssmcache.layout import LayerGroup, LayerGroupKind
from ssmcache.memory.base import GPU_TIER, Copier
from ssmcache.pages import PageTiers
from ssmcache.places import PlaceTable
from ssmcache.pool_groups import PoolGroup
from ssmcache.pools import AnyPool, IntArray, SharedPages, StatePool
from ssmcache.segments import DEFAULT_RANK, PageSegment
from ssmcache.snapshots import SnapshotStore
from ssmcache.soft_holds import PathHolder, SoftHolds
from ssmcache.tiers import Tiers
from ssmcache.tree import Root, Run
from ssmcache.windows import Window, WindowStore


class BlockStore(SoftHolds):
    """Tree, pools and queues of one manager.

    Args:
        groups: the layer groups.
        pools: by tier, of each pool that layer groups have or share.
        tokens_per_block: for the windows among them.
        keeps_path: whether a touch reaches all snapshots of a path, see `SnapshotAdmission`.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        pools: Sequence[Sequence[AnyPool]],
        memory: Copier,
        tokens_per_block: int,
        events: CacheObserver | None,
        keeps_path: bool,
    ) -> None:
        super().__init__(tokens_per_block, len(pools[0]) > 1, events)
        self._keeps_path = keeps_path
        self.pages = None
        self.snapshots = None
        windows: list[WindowStore] = []
        self.pool_groups = tuple(PoolGroup(self, index, by_tier, memory) for index, by_tier in enumerate(pools))
        for index, group in enumerate(groups):
            pool_group, by_tier = self.pool_groups[group.pool], pools[group.pool]
            states = [pool for pool in by_tier if isinstance(pool, StatePool)]
            if group.kind is LayerGroupKind.ATTENTION:
                pages = [SharedPages(pool) if isinstance(pool, StatePool) else pool for pool in by_tier]
                self.pages = PageTiers(self, index, pool_group, pages)
            elif group.kind is LayerGroupKind.SSM:
                self.snapshots = SnapshotStore(self, index, pool_group, states)
            else:
                assert group.window_size is not None
                window = Window(group.window_size, group.num_sink_tokens, tokens_per_block)
                windows.append(WindowStore(self, index, pool_group, states, window))
        self.shares_pools = len(pools) < len(groups)
        self.windows = tuple(windows)
        self.places = PlaceTable(windows, self.snapshots, tokens_per_block) if windows else None
        groups_there = (self.pages, *windows, self.snapshots)
        self._all_tiers = tuple(tiers for tiers in groups_there if tiers is not None)
        # page counts by tier, which change with every hold
        self._locked = [] if self.pages is None else self.pages.locked
        self._held = [] if self.pages is None else self.pages.held

    # -- locks -------------------------------------------------------------------------------------------------------

    def lock(self, holder: PathHolder) -> None:
        """Turn a soft hold into a lock of the whole path. The caller ends the soft hold of source and partial block,
        and locks the pins. The holder keeps its place among `soft_holders` until it is certain that it goes on.
        """
        run = holder.cursor
        run.soft_holds -= 1
        holder.soft, holder.locked = False, True
        while run.parent is not None:
            self.lock_child(run)
            run = run.parent

    def unlock(self, holder: PathHolder) -> None:
        """Undo `lock`: the hold is soft again, and nothing was touched."""
        run = holder.cursor
        holder.soft, holder.locked = True, False
        run.soft_holds += 1
        while run.parent is not None:
            self.release(run)
            self.settle_leaf(run)
            run = run.parent

    def lock_child(self, child: Run) -> None:
        """One holder of a run more, who is ACTIVE; the caller has those above it locked, or is about to."""
        pages = child.pages
        if pages is not None and child.holds == child.idle_holds:
            self._locked[pages.tier] += pages.count
            if child.holds:
                self._held[pages.tier] -= pages.count
        child.holds += 1

    def release(self, run: Run) -> None:
        """One holder of a run less, which was not suspended."""
        run.holds -= 1
        pages = run.pages
        if pages is not None and run.holds == run.idle_holds:
            self._locked[pages.tier] -= pages.count
            if run.holds:
                self._held[pages.tier] += pages.count

    def set_idle(self, holder: PathHolder, idle: bool) -> None:
        """The holder is suspended: what it alone locks is merely held from now on; or the other way round."""
        holder.idle = idle
        change = 1 if idle else -1
        for run in list(holder.cursor.path()):
            was_locked = run.holds > run.idle_holds
            run.idle_holds += change
            is_locked = run.holds > run.idle_holds
            if run.pages is not None and was_locked != is_locked:
                num_blocks = run.end - run.start
                self._locked[run.pages.tier] += num_blocks if is_locked else -num_blocks
                self._held[run.pages.tier] -= num_blocks if is_locked else -num_blocks
                self.settle_leaf(run)

    def forget_holds(self, run: Run, holds: int, idle_holds: int) -> None:
        """Take so many holders off a path, which have lost what is below it."""
        for above in list(run.path()):
            was_locked, was_held = above.holds > above.idle_holds, above.holds > 0
            above.holds -= holds
            above.idle_holds -= idle_holds
            if above.pages is not None:
                tier, num_blocks = above.pages.tier, above.end - above.start
                is_locked, is_held = above.holds > above.idle_holds, above.holds > 0
                self._locked[tier] += num_blocks * (is_locked - was_locked)
                self._held[tier] += num_blocks * ((is_held and not is_locked) - (was_held and not was_locked))
            self.settle_leaf(above)

    def lifts(self, cursor: Run, tier: int = GPU_TIER) -> list[PageSegment]:
        """The pages of a path that lie below a tier, from the top of the path down."""
        found: list[PageSegment] = []
        for run in cursor.path():
            if run.pages is None or run.pages.tier <= tier:
                break  # above it nothing lies deeper
            found.append(run.pages)
        return found[::-1]

    # -- touches -----------------------------------------------------------------------------------------------------

    def touch(self, holder: PathHolder, num_private: int) -> int:
        """Stamp every page of the path and the snapshots that are touched with it, the deepest as the oldest; returns
        the stamp, which has room for so many private blocks below.
        """
        run = holder.cursor
        stamp = self.clock.touch(run.end + num_private)
        while run.parent is not None:
            if run.pages is not None:
                run.pages.stamp = stamp
            if run.items:
                self._stamp_items(run, stamp)
            run = run.parent
        own = () if self._keeps_path else holder.touch_own_snapshots(stamp)
        if self.windows:
            self._touch_windows(holder.cursor, stamp, own)
        return stamp

    def touch_and_release(self, holder: PathHolder, leaf: Run | None = None) -> None:
        """Touch the path, and a partial block below it, and give the lock back; neighbours that nothing keeps apart any
        more become one run.
        """
        run = cursor = holder.cursor
        stamp = self.clock.touch(cursor.end)
        below: Run | None = None
        if holder.idle:
            self.set_idle(holder, False)
        has_tiers = self.has_tiers
        parent = run.parent
        while parent is not None:
            self.release(run)
            pages = run.pages
            if pages is not None:
                pages.stamp = stamp
            if run.items:
                self._stamp_items(run, stamp)
            alone = below is not None and not run.holds and not run.soft_holds and len(run.children) == 1
            if alone and below is not None and self.can_absorb(below):
                self.absorb_parent(below)
                if below.items:
                    self._stamp_items(below, stamp)
                run = below
            if has_tiers and pages is not None:  # they may be the last of their tier now
                self.settle_leaf(run)
            below = run
            run = parent
            parent = run.parent
        holder.locked = False
        if leaf is not None:
            assert leaf.pages is not None
            leaf.pages.stamp = stamp
            self.settle_leaf(leaf)
        own = () if self._keeps_path else holder.touch_own_snapshots(stamp)
        if self.windows:
            self._touch_windows(cursor if leaf is None else leaf, stamp, own)
        self.settle_leaf(cursor)

    def _stamp_items(self, run: Run, stamp: int) -> None:
        """Stamp the snapshots of a run, where a touch reaches all of them."""
        items, snapshots = run.items, self.snapshots
        if not self._keeps_path:
            return
        if len(items) == 1 and items[0].store is snapshots:
            items[0].stamp = stamp
        elif snapshots is not None:
            snapshots.stamp(run, stamp)

    def _touch_windows(self, cursor: Run, stamp: int, own: Sequence[int]) -> None:
        """Stamp what a sequence needs that goes on at the end of the path, or where others part from it; in hybrids not
        there but at its snapshots: at all, or only at those of the blocks `own`.
        """
        block = self.tokens_per_block
        ends = [cursor.start * block + cursor.num_tokens if cursor.num_tokens else cursor.end * block]
        if self.snapshots is not None:
            touched = self.snapshots.ordinals_on(cursor, 0) if self._keeps_path else own
            ends += [(ordinal + 1) * block for ordinal in touched]
        else:
            ends += [run.end * block for run in cursor.path() if len(run.children) > 1]
        for store in self.windows:
            store.touch(cursor, stamp, ends)

    # -- taking ------------------------------------------------------------------------------------------------------

    def add_snapshots(self, cursor: Run, ordinals: IntArray, slots: IntArray, rank: int = DEFAULT_RANK) -> int:
        """Attach states to blocks of the path of `cursor` that have none: ascending ordinals, a slot for each. Returns
        their stamp.
        """
        assert self.snapshots is not None
        stamp = self.clock.touch(cursor.end)
        self.snapshots.add(cursor, ordinals, slots, stamp, rank)
        return stamp

    def all_tiers(self) -> tuple[Tiers[Any, Any], ...]:
        """Every layer group, in order."""
        return self._all_tiers

    def clear(self, scope: ReuseScope | None, holders: Iterable[PathHolder]) -> None:
        """Offer nothing of one scope, or of all, any more; `holders` are all that are open. Who holds a path softly
        loses it; who was resumed keeps it below a retired root, which is its root from now on.
        """
        by_root: dict[Root, list[PathHolder]] = {
            root: [] for root in self.roots.values() if scope is None or root.scope == scope
        }
        for holder in holders:
            if holder.root in by_root:
                by_root[holder.root].append(holder)
                if holder.soft:
                    self.drop_soft_hold(holder)
        for root, here in by_root.items():
            retired = self.retire(root)
            for holder in here:
                if holder.locked:
                    holder.root = retired
                    if holder.cursor is root:
                        holder.cursor = retired
                    root.num_sequences -= 1
                    retired.num_sequences += 1
            self.settle_leaf(root)
