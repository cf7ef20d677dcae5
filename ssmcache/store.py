"""The reusable blocks: who holds which path, what a touch stamps, and the room that all of it needs.

A slot is *cached* while the tree owns it or a suspended sequence has parked it, *private* while an ACTIVE one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssmcache.events import EventLog
from ssmcache.layout import LayerGroup, LayerGroupKind
from ssmcache.match import Found, Partial
from ssmcache.memory.base import GPU_TIER, Memory
from ssmcache.pages import PageTiers
from ssmcache.pools import IntArray, PagePool, SlotPool, StatePool
from ssmcache.segments import DEFAULT_RANK, PageSegment
from ssmcache.snapshots import SnapshotStore
from ssmcache.sparse import Pin
from ssmcache.structure import TreeStructure
from ssmcache.tiers import Tiers
from ssmcache.tree import Root, Run
from ssmcache.windows import Window, WindowStore

Pins = list[tuple[WindowStore, int, Pin]]  # with the block of each


class PathHolder:
    """A sequence as far as the tree knows it: it holds the path of `cursor`, down to and with that run.

    Softly (`soft`) from creation to its first resume, together with the snapshot `source` that it would start from, the
    window pages `pins` that it needs, and the block `partial` that it would copy: such a hold is dropped when room is
    short and nothing else is left to go, and `cursor` is the root from then on. Locked (`locked`) from its first resume
    to its end, or merely held (`idle`, too) while it is suspended.
    """

    __slots__ = ("cursor", "idle", "locked", "partial", "pins", "root", "soft", "source")

    def __init__(self, root: Root) -> None:
        self.root = root
        self.cursor: Run = root
        self.source: Pin | None = None
        self.pins: Pins = []
        self.partial: Partial | None = None
        self.soft = False
        self.locked = False
        self.idle = False


SoftHold = tuple[Run, Pin | None, Pins, Partial | None]


class BlockStore(TreeStructure):
    """Tree, pools and queues of one manager.

    Args:
        groups: the layer groups, and `pools` their pools by tier, in the same order.
        tokens_per_block: for the windows among them.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        pools: Sequence[Sequence[SlotPool]],  # type: ignore[type-arg]  # of pages or states, as the group says
        memory: Memory,
        tokens_per_block: int,
        events: EventLog | None,
    ) -> None:
        super().__init__(tokens_per_block, events)
        self.pages = None
        self.snapshots = None
        windows: list[WindowStore] = []
        for index, (group, tiers) in enumerate(zip(groups, pools, strict=True)):
            pages = [pool for pool in tiers if isinstance(pool, PagePool)]
            states = [pool for pool in tiers if isinstance(pool, StatePool)]
            if group.kind is LayerGroupKind.ATTENTION:
                self.pages = PageTiers(self, index, pages, memory)
            elif group.kind is LayerGroupKind.SSM:
                self.snapshots = SnapshotStore(self, index, states, memory)
            else:
                assert group.window_size is not None
                window = Window(group.window_size, group.num_sink_tokens, tokens_per_block)
                windows.append(WindowStore(self, index, states, memory, window))
        self.windows = tuple(windows)
        groups_there = (self.pages, *windows, self.snapshots)
        self._all_tiers = tuple(tiers for tiers in groups_there if tiers is not None)
        self.has_tiers = len(pools[0]) > 1
        self.soft_holders: dict[PathHolder, None] = {}  # oldest first

    # -- soft holds --------------------------------------------------------------------------------------------------

    def hold_softly(self, holder: PathHolder, found: Found) -> SoftHold | None:
        """Hold what a look-up found until others need the room. Takes the place of a soft hold that the holder has,
        which is returned: the caller ends it, or takes it up again.
        """
        old = (holder.cursor, holder.source, holder.pins, holder.partial) if holder.soft else None
        source = None
        if found.snapshot is not None:  # before a split moves it to another segment
            assert self.snapshots is not None
            segment, position = found.snapshot
            source = self.snapshots.pin(segment.tier, segment.slots[position])
            self.snapshots.count_pin(source, soft=1)
        run, depth = found.run, found.depth
        while depth <= run.start and run.parent is not None:
            run = run.parent
        if depth < run.end:
            run = self.split(run, depth)
        partial = found.partial
        if partial is not None:
            if partial.block + 1 < partial.run.end:
                partial = partial._replace(run=self.split(partial.run, partial.block + 1))
            partial.run.soft_holds += 1
        run.soft_holds += 1
        pins = self._pin_windows(run if partial is None else partial.run, found) if self.windows else []
        holder.cursor, holder.source, holder.pins, holder.partial = run, source, pins, partial
        holder.soft = True
        self.soft_holders[holder] = None
        return old

    def _pin_windows(self, deepest: Run, found: Found) -> Pins:
        pins: Pins = []
        num_blocks = found.depth + (found.partial is not None)
        for store in self.windows:
            places = store.find(deepest, 0, num_blocks)
            for block in store.window.needed_blocks(found.reuse.usable_tokens, num_blocks):
                segment, position = places[block]
                pin = store.pin(segment.tier, segment.slots[position])
                store.count_pin(pin, soft=1)
                pins.append((store, block, pin))
        return pins

    def take_up_again(self, holder: PathHolder, old: SoftHold | None) -> None:
        """Put the soft hold back that `hold_softly` returned; the present one ends."""
        if old is None:
            self.drop_soft_hold(holder)
            return
        new = holder.cursor, holder.source, holder.pins, holder.partial
        holder.cursor, holder.source, holder.pins, holder.partial = old
        self.end_soft_hold(new)

    def drop_soft_hold(self, holder: PathHolder) -> None:
        """Let go without a touch: the path is as old as it was."""
        del self.soft_holders[holder]
        old = holder.cursor, holder.source, holder.pins, holder.partial
        holder.cursor, holder.source, holder.pins, holder.partial = holder.root, None, [], None
        holder.soft = False
        self.end_soft_hold(old)

    def end_soft_hold(self, hold: SoftHold) -> None:
        run, source, pins, partial = hold
        run.soft_holds -= 1
        if source is not None:
            assert self.snapshots is not None
            self.snapshots.count_pin(source, soft=-1)
        for store, _, pin in pins:
            store.count_pin(pin, soft=-1)
        if partial is not None:
            partial.run.soft_holds -= 1
            self.settle_leaf(partial.run)
        self.settle_leaf(run)

    def drop_newest_soft_hold(self) -> None:
        """Make room: whoever was created last runs last, so it loses its match first."""
        newest = next((holder for holder in reversed(self.soft_holders) if holder.soft), None)
        assert newest is not None, "room was promised that does not exist"
        self.drop_soft_hold(newest)

    def drop_soft_holds_of(self, run: Run) -> None:
        for holder in list(self.soft_holders):
            if holder.soft and run in (holder.cursor, _partial_run(holder)):
                self.drop_soft_hold(holder)

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
        """Hold one more run, below a path that the caller has locked."""
        pages = child.pages
        if pages is not None and child.holds == child.idle_holds:
            assert self.pages is not None
            num_blocks = child.end - child.start
            self.pages.locked[pages.tier] += num_blocks
            if child.holds:
                self.pages.held[pages.tier] -= num_blocks
        child.holds += 1

    def release(self, run: Run) -> None:
        """One holder of a run less, which was not suspended."""
        run.holds -= 1
        pages = run.pages
        if pages is not None and run.holds == run.idle_holds:
            assert self.pages is not None
            num_blocks = run.end - run.start
            self.pages.locked[pages.tier] -= num_blocks
            if run.holds:
                self.pages.held[pages.tier] += num_blocks

    def set_idle(self, holder: PathHolder, idle: bool) -> None:
        """The holder is suspended: what it alone locks is merely held from now on; or the other way round."""
        holder.idle = idle
        change = 1 if idle else -1
        for run in list(holder.cursor.path()):
            was_locked = run.holds > run.idle_holds
            run.idle_holds += change
            is_locked = run.holds > run.idle_holds
            if run.pages is not None and was_locked != is_locked:
                assert self.pages is not None
                num_blocks = run.end - run.start
                self.pages.locked[run.pages.tier] += num_blocks if is_locked else -num_blocks
                self.pages.held[run.pages.tier] -= num_blocks if is_locked else -num_blocks
                self.settle_leaf(run)

    def forget_holds(self, run: Run, holds: int, idle_holds: int) -> None:
        """Take so many holders off a path, which have lost what is below it."""
        for above in list(run.path()):
            was_locked, was_held = above.holds > above.idle_holds, above.holds > 0
            above.holds -= holds
            above.idle_holds -= idle_holds
            if above.pages is not None:
                assert self.pages is not None
                tier, num_blocks = above.pages.tier, above.end - above.start
                is_locked, is_held = above.holds > above.idle_holds, above.holds > 0
                self.pages.locked[tier] += num_blocks * (is_locked - was_locked)
                self.pages.held[tier] += num_blocks * ((is_held and not is_locked) - (was_held and not was_locked))
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
        """Stamp every page and snapshot of the path, the deepest as the oldest; returns the stamp, which has room for
        so many private blocks below.
        """
        run = holder.cursor
        stamp = self.clock.touch(run.end + num_private + 1)
        while run.parent is not None:
            self._stamp(run, stamp)
            run = run.parent
        if self.windows:
            self._touch_windows(holder.cursor, stamp)
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
        while run.parent is not None:
            parent = run.parent
            self.release(run)
            alone = not run.holds and below is not None and len(run.children) == 1 and not run.soft_holds
            if alone and below is not None and self.can_absorb(below):
                self.absorb_parent(below)
                run = below
            if below is not None and run is not below:
                self._stamp(below, stamp)
                self._settle_in_tier(below)
            below = run
            run = parent
        if below is not None:
            self._stamp(below, stamp)
            self._settle_in_tier(below)
        holder.locked = False
        if leaf is not None:
            assert leaf.pages is not None
            leaf.pages.stamp = stamp
            self.settle_leaf(leaf)
        if self.windows:
            self._touch_windows(cursor if leaf is None else leaf, stamp)
        self.settle_leaf(cursor)

    def _settle_in_tier(self, run: Run) -> None:
        """With tiers a run may be the last of its tier although others lie below it."""
        if self.has_tiers:
            self.settle_leaf(run)

    def _stamp(self, run: Run, stamp: int) -> None:
        if run.pages is not None:
            run.pages.stamp = stamp
        if run.items and self.snapshots is not None:
            self.snapshots.stamp(run, stamp)

    def _touch_windows(self, cursor: Run, stamp: int) -> None:
        """Stamp what a sequence needs that goes on at the end of the path, in hybrids also at its snapshots."""
        block = self.tokens_per_block
        ends = [cursor.start * block + cursor.num_tokens if cursor.num_tokens else cursor.end * block]
        if self.snapshots is not None:
            ends += [(ordinal + 1) * block for ordinal in self.snapshots.ordinals_on(cursor, 0)]
        for store in self.windows:
            store.touch(cursor, stamp, ends)

    # -- taking ------------------------------------------------------------------------------------------------------

    def add_snapshots(self, cursor: Run, ordinals: IntArray, slots: IntArray, rank: int = DEFAULT_RANK) -> None:
        """Attach states to blocks of the path of `cursor` that have none: ascending ordinals, a slot for each."""
        assert self.snapshots is not None
        self.snapshots.add(cursor, ordinals, slots, self.clock.touch(cursor.end), rank)

    def all_tiers(self) -> tuple[Tiers[Any, Any], ...]:
        """Every layer group, in order."""
        return self._all_tiers

    def clear(self) -> None:
        """Take every block out of the tree. No sequence is open."""
        with self.not_evicting():
            for child in [child for root in self.roots.values() for child in root.children.values()]:
                self.drop_subtree(child, child.start)
        assert not self.roots, "a scope without a sequence has lost all blocks"
        self.version += 1


def _partial_run(holder: PathHolder) -> Run | None:
    return None if holder.partial is None else holder.partial.run
