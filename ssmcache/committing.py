"""Putting the blocks of a sequence into the tree."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from ssmcache.keys import Int64Array
from ssmcache.match import common_prefix, match_partial
from ssmcache.memory.base import GPU_TIER
from ssmcache.pages import PageTiers
from ssmcache.parking import is_lost
from ssmcache.pools import SlotArray, int_array
from ssmcache.priority import Priority, rank_in, stretches_in
from ssmcache.segments import DEFAULT_RANK, SparseSegment, use_of, with_use
from ssmcache.siblings import FEW
from ssmcache.tree import Run
from ssmcache.windows import WindowStore

if TYPE_CHECKING:
    from ssmcache.sequence_commits import SequenceCommits
    from ssmcache.store import BlockStore


def commit_blocks(sequence: SequenceCommits, keys: Int64Array, base: int, last: int) -> None:
    """Put the blocks of a sequence up to `last - 1` into the tree; `keys` start from block `base`.

    Where a block is there already its page replaces the private one; on a tier below the GPU the private one, which is
    a copy, replaces it.
    """
    store, kind = sequence.store, sequence.kind
    cursor = sequence.cursor
    one_key = kind.width == 1
    start = position = cursor.end
    if sequence.root.retired:  # they stay its own
        return
    while position < last:
        child = cursor.children.get(keys.item(position - base) if one_key else kind.edge_key(keys, position - base))
        if child is None:
            break
        comparable = min(child.end, last) - position
        num_blocks = kind.common_blocks(child.key_buffer, 0, keys, position - base, comparable)
        position += num_blocks
        if position < child.end:
            child = store.split(child, position)
        if store.pages is not None:
            rebase(store, child, sequence.take_own_pages(num_blocks))
        store.lock_child(child)
        cursor = child
    if position < last:
        reused, block = sequence.reuse_match.usable_tokens, store.tokens_per_block
        if reused % block and reused // block == position:
            first_key = (position - base) * kind.width
            _drop_leaves_of(store, cursor, keys[first_key : first_key + kind.width])
        if sequence.priority is None or store.pages is None:
            cursor = _append(sequence, cursor, keys, position - base, last - position, DEFAULT_RANK)
        else:
            for begin, end, rank in sequence.priority.stretches(store.pages.layer_group, position, last):
                cursor = _append(sequence, cursor, keys, begin - base, end - begin, rank)
    sequence.cursor = cursor
    raise_priorities(sequence, cursor, start)
    for window in sequence.windows:
        window.commit(cursor, start, last)


def _append(sequence: SequenceCommits, cursor: Run, keys: Int64Array, first: int, count: int, rank: int) -> Run:
    """Put `count` blocks, whose keys are those from block `first` of `keys` on, below a path where there are none."""
    width, own, pages = sequence.kind.width, sequence.own_pages, None
    if sequence.store.pages is not None:
        pages, sequence.own_pages = own[:count], own[count:]
    part = keys[first * width : (first + count) * width]
    if keys.base is None and not keys.flags.writeable:  # ready keys of this request alone: they are to go with it
        part = part.copy()
    return sequence.store.append(cursor, part, count, pages, rank)


def _drop_leaves_of(store: BlockStore, cursor: Run, block: Int64Array) -> None:
    """Partial blocks below `cursor` that a full one begins with, such as the one it grew from, are of no more use."""
    children = cursor.children
    if len(children) > FEW:
        children = {edge: children[edge] for edge in cursor.children_by_tokens().prefixes(block.tobytes())}
    for leaf in [child for child in children.values() if child.num_tokens]:
        is_held = leaf.holds or leaf.soft_holds
        if not is_held and common_prefix(leaf.keys, block) == leaf.num_tokens:
            store.drop_tail(leaf, 1)


def rebase(store: BlockStore, run: Run, own: SlotArray) -> None:
    """A run was computed again, below a path on the GPU: one set of its pages stays, on the GPU."""
    tiers, pages = store.pages, run.pages
    assert tiers is not None
    assert pages is not None
    if pages.tier == GPU_TIER:
        tiers.pools[GPU_TIER].give_back(own)
        return
    tier, num_blocks = pages.tier, len(own)
    tiers.pools[tier].give_back(tiers.settle(pages, GPU_TIER, own))
    tiers.cached[tier] -= num_blocks
    tiers.cached[GPU_TIER] += num_blocks


def check_shared(sequence: SequenceCommits, keys: Int64Array, base: int, first: int, last: int) -> None:
    """The shared pages of blocks `first`..`last - 1` must be those of the committed tokens."""
    run, kind = sequence.cursor, sequence.kind
    while run.end > first and run.parent is not None:
        begin, end = max(first, run.start), min(last, run.end)
        if begin < end:
            equal = kind.common_blocks(run.key_buffer, begin - run.start, keys, begin - base, end - begin)
            if equal < end - begin:
                raise ValueError(
                    f"commit: expected the tokens that the sequence was created with, up to token "
                    f"{sequence.num_attention_tokens}, got others"
                )
            if kind.prefix_unique:
                break  # equal here means equal above
        run = run.parent


def raise_priorities(sequence: SequenceCommits, cursor: Run, first: int) -> None:
    """The blocks of a path in the tree, from `first` on, keep the highest priority that they were given, by this
    sequence or before.

    Cost: O(runs from `first` on + stretches of priorities in them); what is raised pays once for each time.
    """
    manager, priority = sequence.manager, sequence.priority
    if priority is None and not manager.has_priorities:
        return
    group = manager.page_group
    starts, ranks = ((0,), (DEFAULT_RANK,)) if priority is None else priority.starts_and_ranks(group)
    run = cursor
    while run.parent is not None and run.end > first:
        above, pages = run.parent, run.pages
        if run.items:
            raised = [segment.store for segment in run.items if _raise_sparse(sequence, segment, first)]
            for store in dict.fromkeys(raised):
                store.join_like(run)
        if pages is not None:
            index = bisect_right(starts, run.start)
            is_one_stretch = index == len(starts) or starts[index] >= run.end
            if ranks[index - 1] > pages.rank or not is_one_stretch:
                _raise_pages(sequence.store, run, stretches_in(priority, group, max(first, run.start), run.end))
        run = above


def _raise_pages(store: BlockStore, run: Run, stretches: list[tuple[int, int, int]]) -> None:
    """Give the last blocks of a run, which may be cut for it, the priorities of stretches (first, end, rank)."""
    assert run.pages is not None
    known = run.pages.rank
    changes = [(run.start, known)] if stretches[0][0] > run.start else []  # where another rank begins
    for start, _, rank in stretches:
        if not changes or changes[-1][1] != max(rank, known):
            changes.append((start, max(rank, known)))
    for start, rank in reversed(changes):
        # the lower part keeps its identity, as a holder of this run expects
        upper = store.split(run, start) if start > run.start else run
        assert run.pages is not None
        run.pages.rank = rank
        run = upper


def _raise_sparse(sequence: SequenceCommits, segment: SparseSegment, first: int) -> bool:
    """Give the slots of blocks from `first` on their priority, where they differ as segments of their own; returns
    whether any was raised.
    """
    priority, store, ordinals = sequence.priority, segment.store, segment.ordinals
    begin, end = max(first, ordinals[0]), ordinals[-1] + 1
    use = use_of(segment.rank)
    if begin >= end or (priority is None and segment.rank >= with_use(DEFAULT_RANK, use)):
        return False
    raised: dict[int, list[int]] = {}
    for start, stop, given in stretches_in(priority, store.layer_group, begin, end):
        rank = with_use(given, use)
        if rank > segment.rank:
            indices = range(bisect_left(ordinals, start), bisect_left(ordinals, stop))
            if len(indices) == len(ordinals):
                segment.rank = rank
                return True
            if indices:
                raised.setdefault(rank, []).extend(indices)
    if raised:
        store.rerank(segment, raised)
    return bool(raised)


class TailPages:
    """The pages of the last, unfinished block of a sequence that closes, taken from it wherever they lie: of full
    attention (`page`), and of each window (`windows`), as (tier, slot). What nobody takes goes back.
    """

    __slots__ = ("page", "windows")

    def __init__(self, sequence: SequenceCommits, block: int) -> None:
        self.windows: dict[WindowStore, tuple[int, int]] = {}
        if sequence.parked is not None:
            self.page = sequence.parked.take_first_page()
            for window in sequence.windows:
                place = sequence.parked.take_slot(window.store, block)
                if place is not None:
                    self.windows[window.store] = place
        else:
            self.page = GPU_TIER, sequence.take_own_pages(1)
            for window in sequence.windows:
                if block in window.own:
                    self.windows[window.store] = GPU_TIER, window.own.pop(block)

    def offer_windows(self, leaf: Run, stamp: int, priority: Priority | None) -> None:
        """Give the leaf what it lacks of windows."""
        for store, (tier, slot) in list(self.windows.items()):
            if not store.ordinals_on(leaf, leaf.start):
                rank = rank_in(priority, store.layer_group, leaf.start)
                store.add(leaf, int_array((leaf.start,)), int_array((slot,)), stamp, rank, tier)
                del self.windows[store]

    def give_back(self, pages: PageTiers) -> None:
        tier, slots = self.page
        pages.pools[tier].give_back(slots)
        for store, (tier, slot) in self.windows.items():
            store.pools[tier].give_back(int_array((slot,)))


def commit_tail(sequence: SequenceCommits) -> Run | None:
    """Offer the last, partial block of a sequence that closes as a leaf, unless a block that begins with the same
    tokens is there, or history is so far ahead that a window has passed it. Returns the run to be touched with the
    path, if there is one.
    """
    store, tail, cursor = sequence.store, sequence.pending, sequence.cursor
    block = cursor.end
    if sequence.root.retired:
        return None
    if not tail.size or store.pages is None or block * sequence.kind.width > sequence.num_committed_tokens:
        return None
    if is_lost(sequence):
        return None
    parts = TailPages(sequence, block)
    leaf = _offer_tail(sequence, tail, parts)
    parts.give_back(store.pages)
    return leaf


def _offer_tail(sequence: SequenceCommits, tail: Int64Array, parts: TailPages) -> Run | None:
    store, cursor, priority = sequence.store, sequence.cursor, sequence.priority
    assert store.pages is not None
    tier, slots = parts.page
    is_below = cursor.pages is None or cursor.pages.tier <= tier  # along a path nothing lies in a warmer tier
    if len(parts.windows) < len(sequence.windows) or not is_below:
        return None
    stamp = store.clock.now
    known = match_partial(cursor, cursor.end, tail)
    if known is not None:
        if known.num_tokens == tail.size:
            if known.run.num_tokens:
                raise_priorities(sequence, known.run, cursor.end)
            if known.run.num_tokens == tail.size:
                parts.offer_windows(known.run, stamp, priority)
            return known.run if known.run.num_tokens else None
        shorter = known.run
        if shorter.num_tokens == known.num_tokens and not (shorter.holds or shorter.soft_holds):
            with store.not_evicting():  # the longer one takes its place
                store.drop_tail(shorter, 1)
    leaf = store.add_leaf(cursor, tail, tier, slots, rank_in(priority, store.pages.layer_group, cursor.end))
    parts.page = tier, slots[:0]
    parts.offer_windows(leaf, stamp, priority)
    return leaf
