"""The tree together with what lies on it: every change of its shape, with the counts that follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ssmcache.events import CacheObserver
from ssmcache.keys import Int64Array, KeyKind, ReuseScope
from ssmcache.memory.base import GPU_TIER
from ssmcache.pages import PageTiers
from ssmcache.places import PlaceTable
from ssmcache.pools import SlotArray, fitting
from ssmcache.recency import Clock
from ssmcache.snapshots import SnapshotStore
from ssmcache.sparse import SparseStore
from ssmcache.tiers import Tiers
from ssmcache.tree import PartialRun, Root, Run, root_of, runs_below
from ssmcache.windows import WindowStore


class TreeStructure:
    """Roots, runs and the layer groups that have slots on them. `version` changes whenever a match could."""

    pages: PageTiers | None
    snapshots: SnapshotStore | None
    windows: tuple[WindowStore, ...]
    places: PlaceTable | None  # where there are windows

    def __init__(self, tokens_per_block: int, has_tiers: bool, events: CacheObserver | None) -> None:
        self.tokens_per_block = tokens_per_block
        self.has_tiers = has_tiers
        self.roots: dict[ReuseScope, Root] = {}
        self.clock = Clock()
        self.version = 0
        self.events = events
        self.detached: list[Root] = []  # lost or retired, with what is still held below

    # -- scopes ------------------------------------------------------------------------------------------------------

    def enter_scope(self, scope: ReuseScope, kind: KeyKind) -> Root:
        """The root of a scope, for one more open sequence with keys of its kind."""
        root = self.roots.get(scope)
        if root is None:
            root = self.roots[scope] = Root(kind, scope)
        root.num_sequences += 1
        return root

    def leave_scope(self, root: Root) -> None:
        root.num_sequences -= 1
        if not root.children:
            self.settle_leaf(root)

    # -- shape -------------------------------------------------------------------------------------------------------

    def split(self, run: Run, at: int) -> Run:
        """Cut a run before block `at`; returns the new upper part, which everybody who holds the run holds too."""
        parent = run.parent
        assert parent is not None
        assert run.start < at < run.end
        if self.places is not None:
            self.places.before_change(run)
        upper = Run(parent, run.kind, run.edge, run.start, at, run.split_keys(at))
        upper.holds, upper.idle_holds = run.holds, run.idle_holds
        upper.children[run.edge] = run
        parent.children[upper.edge] = upper
        run.parent = upper
        if run.pages is not None:
            assert self.pages is not None
            upper.pages = run.pages.split_upper(upper, at, self.pages.serial())
            upper.warm_children = 1
        if run.digests:
            count = at - upper.start
            upper.digests, run.digests = run.digests[:count], run.digests[count:]
        for segment in run.items:
            store = segment.store
            above = segment.split_upper(upper, at, store.serial())
            if above is not None:
                upper.items += (above,)
                chosen = store.pool_group.note_split(segment, above)
                if segment.queued or not chosen:
                    store.queues[above.tier].put(above)
                if not segment.slots:
                    store.queues[segment.tier].retire(segment)
                    run.items = tuple(other for other in run.items if other is not segment)
        if self.places is not None:
            self.places.split(upper, run)
        return upper

    def append(self, run: Run, keys: Int64Array, num_blocks: int, slots: SlotArray | None, rank: int) -> Run:
        """Continue the path of `run`, locked by the caller, with new blocks and the caller's pages, which are on the
        GPU; returns the new deepest run, locked too.

        A run that ends the tree and is held by the caller alone grows in place, so that decoding does not leave one
        run a block.
        """
        self.version += 1
        pages = run.pages
        alone = run.holds == 1 and not run.soft_holds and not run.children
        if alone and (pages is None or pages.rank == rank):
            run.append_keys(keys, num_blocks)
            if slots is not None:
                assert pages is not None
                pages.extend(slots)
        else:
            start = run.end
            child = Run(run, run.kind, run.kind.edge_key(keys, 0), start, start + num_blocks, keys)
            child.holds = 1
            run.add_child(child)
            if slots is not None:
                self._give_pages(child, GPU_TIER, slots, rank)
            if self.places is not None:
                self.places.note(run)
            run = child
        if self.places is not None:
            self.places.note(run)
        tiers = self.pages
        if tiers is not None:
            tiers.cached[GPU_TIER] += num_blocks
            tiers.locked[GPU_TIER] += num_blocks
        if self.events is not None:
            self.events.stored(run, num_blocks, None if tiers is None else tiers.layer_group)
        return run

    def _give_pages(self, run: Run, tier: int, slots: SlotArray, rank: int) -> None:
        """Put pages on a run without pages; those of its parent, if there are any, lie in no colder tier."""
        assert self.pages is not None
        run.pages = self.pages.new_segment(run, 0, rank, tier, slots)
        above = None if run.parent is None else run.parent.pages
        if self.has_tiers and run.parent is not None and above is not None and above.tier == tier:
            run.parent.warm_children += 1

    def add_leaf(self, run: Run, keys: Int64Array, tier: int, slots: SlotArray, rank: int) -> Run:
        """A partial block below `run`, held by nobody, with the tokens `keys` and one page; returns its run."""
        assert self.pages is not None
        self.version += 1
        leaf = PartialRun(run, keys)
        run.add_child(leaf)
        self._give_pages(leaf, tier, slots, rank)
        self.pages.cached[tier] += 1
        if self.places is not None:
            self.places.note(run)
            self.places.note(leaf)
        return leaf

    def can_absorb(self, run: Run) -> bool:
        """Whether a run and the one above it, of which it is the only child, could be one but for their holders and
        times.
        """
        parent = run.parent
        if parent is None or parent.parent is None or run.num_tokens:
            return False
        above, below = parent.pages, run.pages
        if above is None or below is None:
            return above is below
        return above.tier == below.tier and above.rank == below.rank

    def absorb_parent(self, run: Run) -> None:
        """Join a run with the one above it, of which it is the only child. The lower one keeps its identity."""
        parent = run.parent
        assert parent is not None
        grandparent = parent.parent
        assert grandparent is not None
        if self.places is not None:
            self.places.before_change(parent)
            self.places.before_change(run)
        run.prepend_keys(parent)
        if run.pages is not None:
            assert parent.pages is not None
            run.pages.prepend(parent.pages.slots)
        if parent.items:
            for segment in parent.items:
                segment.run = run
            run.items = parent.items + run.items
        run.digests = parent.digests + run.digests
        run.edge = parent.edge
        run.parent = grandparent
        grandparent.children[run.edge] = run
        if parent.pages is not None:
            assert self.pages is not None
            self.pages.queues[parent.pages.tier].retire(parent.pages)
        if self.places is not None:
            self.places.absorb(parent, run)

    # -- leaving -----------------------------------------------------------------------------------------------------

    def drop_tail(self, run: Run, num_blocks: int) -> None:
        """Take the last blocks of a leaf that nobody holds out of the tree, with all that lies on them; it counts as
        evicted.
        """
        self.version += 1
        new_end = run.end - num_blocks
        pages, tiers = run.pages, self.pages
        if pages is not None and tiers is not None:
            tier = pages.tier
            if self.events is not None:
                self.events.removed(tiers.layer_group, tier, run, range(new_end, run.end))
            tiers.pools[tier].give_back(pages.drop_tail(num_blocks))
            tiers.cached[tier] -= num_blocks
            tiers.num_evicted += num_blocks
        for segment in run.items:
            if segment.ordinals[-1] >= new_end:
                segment.store.drop_from(run, segment, new_end)
        run.end = new_end
        if run.digests:
            run.digests = run.digests[: new_end - run.start]
        if new_end > run.start:
            run.key_buffer = fitting(run.key_buffer, (new_end - run.start) * run.kind.width)
            if self.places is not None:
                self.places.note(run)
            if pages is None or not pages.queued:
                self.settle_leaf(run)
            return
        parent = run.parent
        assert parent is not None
        parent.remove_child(run)
        if self.places is not None:
            self.places.forget(run)
            self.places.note(parent)
        if pages is not None and tiers is not None:
            tiers.queues[tier].retire(pages)
            if self.has_tiers and parent.pages is not None and parent.pages.tier == tier:
                parent.warm_children -= 1
        self.settle_leaf(parent)

    def retire(self, root: Root) -> Root:
        """Offer nothing below a root any more: what no resumed sequence holds is dropped, the rest hangs below the
        returned root. Nobody holds anything there softly.
        """
        self.version += 1
        with self.not_evicting():
            for run in reversed(runs_below(root)):
                if not (run.children or run.holds) and run.end > run.start:
                    self.drop_tail(run, run.end - run.start)
            for run in runs_below(root):
                for sparse in self.sparse_stores():
                    sparse.drop_unpinned(run)
        retired = Root(root.kind, root.scope)
        retired.retired = True
        for run in list(root.children.values()):
            self._tell_lost(run)
            self._detach(run, retired)
        return retired

    def _detach(self, run: Run, root: Root) -> None:
        """Hang a run, with all below it, under a root that nobody looks below."""
        parent = run.parent
        assert parent is not None
        if self.places is not None:
            self.places.cut_off(run)
            self.places.note(parent)
        parent.remove_child(run)
        run.parent = root
        root.add_child(run)
        if len(root.children) == 1:
            self.detached.append(root)

    def _tell_lost(self, run: Run) -> None:
        if self.events is not None:
            self.events.lost(run, None if self.pages is None else self.pages.layer_group)

    @contextmanager
    def not_evicting(self) -> Iterator[None]:
        """What is dropped meanwhile does not go for want of room, and is not counted."""
        pages, snapshots = self.pages, self.snapshots
        tiers: Sequence[Tiers[Any, Any]] = [*self.sparse_stores(), *([] if pages is None else [pages])]
        counts = [group.num_evicted for group in tiers]
        num_unused = 0 if snapshots is None else snapshots.num_evicted_unused
        yield
        for group, count in zip(tiers, counts, strict=True):
            group.num_evicted = count
        if snapshots is not None:
            snapshots.num_evicted_unused = num_unused

    def take_over_leaf(self, run: Run) -> SlotArray:
        """Take a leaf of one block, which is on the GPU and which nobody holds, out of the tree; its page becomes the
        caller's.
        """
        assert self.pages is not None
        assert run.pages is not None
        slot = run.pages.slots[0]
        with self.not_evicting():
            self.drop_tail(run, 1)
        slots = self.pages.pools[GPU_TIER].take(1)
        assert slots[0] == slot, "the last slot that came back is the first to be handed out"
        return slots

    def settle_leaf(self, run: Run) -> None:
        """If the tail of the run may go now, by eviction, say so; drop what nothing lies on any more."""
        pages, tiers = run.pages, self.pages
        if pages is not None and tiers is not None:
            if self.has_tiers:
                if not pages.queued and pages.may_go():
                    tiers.queues[pages.tier].put(pages)
            elif not (run.children or run.holds or run.soft_holds or pages.queued):
                tiers.queues[pages.tier].put(pages)
        elif run.children or run.holds or run.soft_holds:
            return
        elif isinstance(run, Root):
            if not run.num_sequences and self.roots.get(run.scope) is run:
                del self.roots[run.scope]
        else:
            needed = max((segment.ordinals[-1] + 1 for segment in run.items), default=run.start)
            if needed < run.end:
                self.drop_tail(run, run.end - needed)

    def drop_subtree(self, run: Run, block: int) -> None:
        """Take the blocks of a run from `block` on, and all below them, out of the tree. No resumed sequence holds
        them; who was created only loses its match.
        """
        for child in list(run.children.values()):
            self.drop_subtree(child, child.start)
        if run.soft_holds:
            self.drop_soft_holds_of(run)
        if run.end > max(block, run.start):
            self.drop_tail(run, run.end - max(block, run.start))

    def drop_soft_holds_of(self, run: Run) -> None:
        raise NotImplementedError

    def lose(self, run: Run, block: int) -> None:
        """The page of a block cannot be read any more: it and all below it can never be used again.

        Whoever holds some of that, and is not ACTIVE, finds itself below a root that is lost, and holds nothing else.
        """
        self.version += 1
        root = root_of(run)
        if not root.retired and self.roots.get(root.scope) is not root:
            root.lost = True  # out of the tree already, or the pages that a suspended sequence parked
            return
        parent = run.parent
        assert parent is not None
        if run.start < block:
            parent = self.split(run, block)
        self._tell_lost(run)
        lost_root = Root(run.kind, root.scope)
        lost_root.lost = True
        lost_root.start = lost_root.end = run.start
        self.forget_holds(parent, run.holds, run.idle_holds)
        self._detach(run, lost_root)
        if parent.pages is not None and run.pages is not None and parent.pages.tier == run.pages.tier:
            parent.warm_children -= 1
        for below in (run, *runs_below(run)):  # out of the tree already: without a hold some of it may go at once
            if below.soft_holds:  # one that is being resumed just now keeps its own
                self.drop_soft_holds_of(below)
        self.settle_leaf(parent)
        self.free_lost()

    def forget_holds(self, run: Run, holds: int, idle_holds: int) -> None:
        raise NotImplementedError

    def free_lost(self) -> None:
        """Drop what is lost and held by nobody, and let what was locked above it come up again: whoever locked that
        does not find it from below any more. Cost: O(everything), for each loss.
        """
        with self.not_evicting():
            for run in [run for root in self.detached for run in reversed(runs_below(root))]:
                if not (run.children or run.holds or run.soft_holds) and run.end > run.start:
                    self.drop_tail(run, run.end - run.start)
        self.detached = [root for root in self.detached if root.children]
        for run in self.all_runs() if self.windows else ():
            for segment in run.items:
                segment.store.queues[segment.tier].put(segment)

    def free_path(self, cursor: Run) -> None:
        """The last holder of a path that is detached may have left: drop what nobody holds any more."""
        root = root_of(cursor)
        if not (root.lost or root.retired):
            return
        with self.not_evicting():
            for run in list(cursor.path()):
                if not (run.children or run.holds) and run.end > run.start:
                    self.drop_tail(run, run.end - run.start)
        if not root.children and root in self.detached:
            self.detached.remove(root)

    def all_runs(self) -> list[Run]:
        """Every run of every scope, parents before their children."""
        runs: list[Run] = []
        for root in (*self.roots.values(), *self.detached):
            runs += runs_below(root)
        return runs

    def sparse_stores(self) -> tuple[SparseStore, ...]:
        return self.windows if self.snapshots is None else (*self.windows, self.snapshots)
