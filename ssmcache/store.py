"""The reusable blocks: the tree together with the slots that its pages and snapshots lie in.

Everything that changes the tree goes through here, so that the counts (cached, locked, free) and the eviction queues
always say the truth. A slot is *cached* while the tree owns it, *private* while a sequence does.
"""

from __future__ import annotations

from ssmcache.eviction import EvictionQueue
from ssmcache.keys import Int64Array, KeyKind, ReuseScope
from ssmcache.pools import IntArray, PagePool, SlotArray, StatePool
from ssmcache.recency import Clock
from ssmcache.snapshots import SnapshotStore
from ssmcache.tree import PageSegment, Root, Run


class PathHolder:
    """A sequence as far as the tree knows it: it holds the path of `cursor`, down to and with that run.

    Softly (`soft`) from creation to its first resume, together with the snapshot in `source_slot` (-1: none) that it
    would start from: such a hold is dropped when room is short and nothing else is left to go, and `cursor` is the
    root from then on. Locked (`locked`) from its first resume to its end.
    """

    __slots__ = ("cursor", "locked", "root", "soft", "source_slot")

    def __init__(self, root: Root) -> None:
        self.root = root
        self.cursor: Run = root
        self.source_slot = -1
        self.soft = False
        self.locked = False


class BlockStore:
    """Tree, pools and queues of one manager with one GPU tier.

    Args:
        page_pool: slots of the attention layer group, None for a model without attention.
        snapshot_pool: slots of the SSM layer group, None for a model without SSM layers.
    """

    def __init__(self, page_pool: PagePool | None, snapshot_pool: StatePool | None) -> None:
        self.roots: dict[ReuseScope, Root] = {}
        self.page_pool = page_pool
        self.page_queue = EvictionQueue()
        self.snapshots = None if snapshot_pool is None else SnapshotStore(snapshot_pool)
        self.clock = Clock()
        self.version = 0  # changes whenever a match could
        self.num_cached_pages = 0
        self.num_locked_pages = 0  # cached pages on the path of a resumed sequence
        self.soft_holders: dict[PathHolder, None] = {}  # oldest first
        self.num_evicted_pages = 0
        self._num_segments = 0

    # -- scopes ------------------------------------------------------------------------------------------------------

    def enter_scope(self, scope: ReuseScope, kind: KeyKind) -> Root:
        """The root of a scope, for one more open sequence. Errors: ValueError if the scope has another kind of keys."""
        root = self.roots.get(scope)
        if root is None:
            root = self.roots[scope] = Root(kind, scope)
        elif root.kind is not kind and root.kind != kind:
            raise ValueError(f"input_tokens in {scope}: expected {root.kind}, as before in this scope, got {kind}")
        root.num_sequences += 1
        return root

    def leave_scope(self, root: Root) -> None:
        root.num_sequences -= 1
        if not root.children:
            self._settle_leaf(root)

    # -- structure ---------------------------------------------------------------------------------------------------

    def split(self, run: Run, at: int) -> Run:
        """Cut a run before block `at`; returns the new upper part, which everybody who holds the run holds too."""
        parent = run.parent
        assert parent is not None
        assert run.start < at < run.end
        upper = Run(parent, run.kind, run.edge, run.start, at, run.split_keys(at))
        upper.holds = run.holds
        upper.children[run.edge] = run
        parent.children[upper.edge] = upper
        run.parent = upper
        if run.pages is not None:
            upper.pages = run.pages.split_upper(upper, at, self._serial())
        if run.snapshots:
            assert self.snapshots is not None
            self.snapshots.split(run, upper, at)
        return upper

    def append(self, run: Run, keys: Int64Array, num_blocks: int, slots: SlotArray | None) -> Run:
        """Continue the path of `run`, locked by the caller, with new blocks and the caller's pages; returns the new
        deepest run, locked too.

        A run that ends the tree and is held by the caller alone grows in place, so that decoding does not leave one
        run a block.
        """
        self.version += 1
        if run.holds == 1 and not run.soft_holds and not run.children:
            run.append_keys(keys, num_blocks)
            if slots is not None:
                assert run.pages is not None
                run.pages.extend(slots)
        else:
            start = run.end
            child = Run(run, run.kind, run.kind.edge_key(keys, 0), start, start + num_blocks, keys)
            child.holds = 1
            run.children[child.edge] = child
            if slots is not None:
                child.pages = PageSegment(child, 0, self._serial(), start, slots)
            run = child
        if slots is not None:
            self.num_cached_pages += num_blocks
            self.num_locked_pages += num_blocks
        return run

    def _absorb_parent(self, run: Run) -> None:
        """Join a run with the one above it, of which it is the only child. The lower one keeps its identity."""
        parent = run.parent
        assert parent is not None
        grandparent = parent.parent
        assert grandparent is not None
        run.prepend_keys(parent)
        if run.pages is not None:
            assert parent.pages is not None
            run.pages.prepend(parent.pages.slots)
        if parent.snapshots:
            assert self.snapshots is not None
            self.snapshots.move_all(parent, run)
        run.edge = parent.edge
        run.parent = grandparent
        grandparent.children[run.edge] = run
        if parent.pages is not None:
            self.page_queue.retire(parent.pages)

    def _drop_tail(self, run: Run, num_blocks: int) -> None:
        """Take the last blocks of an unheld leaf out of the tree, with all that lies on them."""
        self.version += 1
        new_end = run.end - num_blocks
        pages = run.pages
        if pages is not None:
            assert self.page_pool is not None
            self.page_pool.give_back(pages.drop_tail(num_blocks))
            self.num_cached_pages -= num_blocks
        if run.snapshots:
            assert self.snapshots is not None
            self.snapshots.drop_from(run, new_end)
        run.end = new_end
        if new_end > run.start:
            self._settle_leaf(run)
            return
        parent = run.parent
        assert parent is not None
        del parent.children[run.edge]
        if pages is not None:
            self.page_queue.retire(pages)
        self._settle_leaf(parent)

    def _settle_leaf(self, run: Run) -> None:
        """If the run is now an unheld leaf, its tail may go: by eviction, or at once if nothing lies on it."""
        if run.children or run.holds or run.soft_holds:
            return
        if run.pages is not None:
            self.page_queue.put(run.pages)
        elif isinstance(run, Root):
            if not run.num_sequences:
                del self.roots[run.scope]
        else:
            needed = max((segment.ordinals[-1] + 1 for segment in run.snapshots), default=run.start)
            if needed < run.end:
                self._drop_tail(run, run.end - needed)

    # -- holding and touching ----------------------------------------------------------------------------------------

    def hold_softly(self, holder: PathHolder, run: Run, depth: int, source_slot: int) -> None:
        """Hold the first `depth` blocks of the path of `run`, and a snapshot (-1: none), until others need the room.

        Takes the place of a soft hold that the holder has; the old one goes last, since the new path may depend on it.
        """
        old = (holder.cursor, holder.source_slot) if holder.soft else None
        if depth < run.end:
            run = self.split(run, depth)
        run.soft_holds += 1
        if source_slot >= 0:
            assert self.snapshots is not None
            self.snapshots.hold_source(source_slot)
        holder.cursor, holder.source_slot, holder.soft = run, source_slot, True
        self.soft_holders[holder] = None
        if old is not None:
            self._end_soft_hold(*old)

    def drop_soft_hold(self, holder: PathHolder) -> None:
        """Let go without a touch: the path is as old as it was."""
        del self.soft_holders[holder]
        old = holder.cursor, holder.source_slot
        holder.cursor, holder.source_slot, holder.soft = holder.root, -1, False
        self._end_soft_hold(*old)

    def _end_soft_hold(self, run: Run, source_slot: int) -> None:
        run.soft_holds -= 1
        if source_slot >= 0:
            assert self.snapshots is not None
            self.snapshots.release_source(source_slot)
        self._settle_leaf(run)

    def _drop_newest_soft_hold(self) -> None:
        """Make room: whoever was created last runs last, so it loses its match first."""
        assert self.soft_holders, "room was promised that does not exist"
        self.drop_soft_hold(next(reversed(self.soft_holders)))

    def lock(self, holder: PathHolder) -> None:
        """Turn a soft hold into a lock of the whole path. The source stays held until the caller releases it."""
        run = holder.cursor
        del self.soft_holders[holder]
        run.soft_holds -= 1
        holder.soft, holder.locked = False, True
        while run.parent is not None:
            if not run.holds and run.pages is not None:
                self.num_locked_pages += run.end - run.start
            run.holds += 1
            run = run.parent

    def lock_child(self, child: Run) -> None:
        """Hold one more run, below a path that the caller has locked."""
        if not child.holds and child.pages is not None:
            self.num_locked_pages += child.end - child.start
        child.holds += 1

    def touch(self, cursor: Run) -> None:
        """Stamp every page and snapshot of the path, the deepest as the oldest."""
        stamp = self.clock.touch(cursor.end)
        run = cursor
        while run.parent is not None:
            self._stamp(run, stamp)
            run = run.parent

    def touch_and_release(self, holder: PathHolder) -> None:
        """Touch the path and give the lock back; neighbours that nothing keeps apart any more become one run."""
        run = cursor = holder.cursor
        stamp = self.clock.touch(cursor.end)
        below: Run | None = None
        while run.parent is not None:
            parent = run.parent
            run.holds -= 1
            if not run.holds:
                if run.pages is not None:
                    self.num_locked_pages -= run.end - run.start
                if below is not None and len(run.children) == 1 and not run.soft_holds:
                    self._absorb_parent(below)
                    run = below
            if below is not None and run is not below:
                self._stamp(below, stamp)
            below = run
            run = parent
        if below is not None:
            self._stamp(below, stamp)
        holder.locked = False
        self._settle_leaf(cursor)

    def _stamp(self, run: Run, stamp: int) -> None:
        if run.pages is not None:
            run.pages.stamp = stamp
        if run.snapshots:
            if len(run.snapshots) > 1:
                assert self.snapshots is not None
                self.snapshots.join(run)
            run.snapshots[0].stamp = stamp

    # -- room --------------------------------------------------------------------------------------------------------

    @property
    def num_evictable_pages(self) -> int:
        return self.num_cached_pages - self.num_locked_pages

    def take_pages(self, count: int) -> SlotArray:
        """`count` slots for pages, [count] int32; evicts what is needed. The caller has checked free + evictable."""
        pool = self.page_pool
        assert pool is not None
        short = count - (pool.capacity - pool.used)
        while short > 0:
            segment = self.page_queue.oldest()
            if segment is None:
                self._drop_newest_soft_hold()
                continue
            run = segment.run
            assert run is not None
            num_blocks = min(short, run.end - run.start)
            self._drop_tail(run, num_blocks)
            self.num_evicted_pages += num_blocks
            short -= num_blocks
        return pool.take(count)

    def take_states(self, count: int, own: Run | None) -> IntArray:
        """`count` slots for states; evicts the oldest snapshots, none of the path of `own`, which is locked, and none
        that is held as a source. The caller has checked that so many can be had.
        """
        snapshots = self.snapshots
        assert snapshots is not None
        short = count - snapshots.pool.free
        if short > 0:
            self.version += 1
            while True:
                short, losers = snapshots.evict(short, own)
                for run in losers:
                    if run.pages is None:
                        self._settle_leaf(run)
                if short == 0:
                    break
                self._drop_newest_soft_hold()
        return snapshots.pool.take(count)

    def take_state(self, own: Run | None) -> int:
        """`take_states` for one."""
        assert self.snapshots is not None
        pool = self.snapshots.pool
        return pool.take_one() if pool.used < pool.capacity else self.take_states(1, own)[0]

    def add_snapshots(self, cursor: Run, ordinals: IntArray, slots: IntArray) -> None:
        """Attach states to blocks of the path of `cursor` that have none: ascending ordinals, a slot for each."""
        assert self.snapshots is not None
        self.version += 1
        self.snapshots.add(cursor, ordinals, slots, self.clock.touch(cursor.end))

    def take_over_snapshot(self, cursor: Run, slot: int) -> None:
        """Take a snapshot of the locked path of `cursor` out of the tree; its slot becomes the caller's."""
        assert self.snapshots is not None
        self.version += 1
        self.snapshots.take_over(cursor, slot)

    def all_runs(self) -> list[Run]:
        """Every run of every scope, parents before their children."""
        runs: list[Run] = []
        for root in self.roots.values():
            stack = list(root.children.values())
            while stack:
                run = stack.pop()
                runs.append(run)
                stack.extend(run.children.values())
        return runs

    def clear(self) -> None:
        """Take every block out of the tree. No sequence is open."""
        runs = self.all_runs()
        for run in runs:
            if run.pages is not None:
                assert self.page_pool is not None
                self.page_pool.give_back(run.pages.slots)
        if self.snapshots is not None:
            self.snapshots.clear(runs)
        self.page_queue = EvictionQueue()
        self.num_cached_pages = 0
        self.roots.clear()
        self.version += 1

    def _serial(self) -> int:
        self._num_segments += 1
        return self._num_segments
