"""Putting the blocks of a sequence into the tree."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from ssmcache.keys import Int64Array
from ssmcache.match import common_prefix, match_partial
from ssmcache.memory.base import GPU_TIER
from ssmcache.pools import SlotArray
from ssmcache.priority import rank_in, stretches_in
from ssmcache.segments import DEFAULT_RANK, SparseSegment
from ssmcache.tree import Run

if TYPE_CHECKING:
    from ssmcache.sequence_commits import SequenceCommits
    from ssmcache.store import BlockStore


def commit_blocks(sequence: SequenceCommits, keys: Int64Array, base: int, first: int, last: int) -> None:
    """Put the blocks `first`..`last - 1` of a sequence into the tree; `keys` start from block `base`.

    Where a block is there already its page replaces the private one; on a tier below the GPU the private one, which is
    a copy, replaces it.
    """
    store, kind = sequence.store, sequence.kind
    cursor = sequence.cursor
    one_key = kind.width == 1
    start = position = cursor.end
    if position > first:
        _check_shared(sequence, keys, base, first, min(position, last))
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
    return sequence.store.append(cursor, keys[first * width : (first + count) * width], count, pages, rank)


def _drop_leaves_of(store: BlockStore, cursor: Run, block: Int64Array) -> None:
    """Partial blocks below `cursor` that a full one begins with, such as the one it grew from, are of no more use."""
    for leaf in [child for child in cursor.children.values() if child.num_tokens]:
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


def _check_shared(sequence: SequenceCommits, keys: Int64Array, base: int, first: int, last: int) -> None:
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
    if begin >= end or (priority is None and segment.rank >= DEFAULT_RANK):
        return False
    raised: dict[int, list[int]] = {}
    for start, stop, rank in stretches_in(priority, store.layer_group, begin, end):
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


def commit_tail(sequence: SequenceCommits) -> Run | None:
    """Offer the last, partial block of a sequence that closes as a leaf, unless a block that begins with the same
    tokens is there, or history is so far ahead that a window has passed it. Returns the run to be touched with the
    path, if there is one.
    """
    store, tail, cursor = sequence.store, sequence.pending, sequence.cursor
    block = cursor.end
    if not tail.size or store.pages is None or block * sequence.kind.width > sequence.num_committed_tokens:
        return None
    if any(block not in window.own for window in sequence.windows):
        return None
    known = match_partial(cursor, block, tail)
    if known is not None:
        if known.num_tokens == tail.size:
            if known.run.num_tokens:
                raise_priorities(sequence, known.run, block)
            if known.run.num_tokens == tail.size:
                for window in sequence.windows:
                    window.add_leaf(known.run)
            return known.run if known.run.num_tokens else None
        shorter = known.run
        if shorter.num_tokens == known.num_tokens and not (shorter.holds or shorter.soft_holds):
            with store.not_evicting():  # the longer one takes its place
                store.drop_tail(shorter, 1)
    rank = rank_in(sequence.priority, store.pages.layer_group, block)
    leaf = store.add_leaf(cursor, tail, sequence.take_own_pages(1), rank)
    for window in sequence.windows:
        window.add_leaf(leaf)
    return leaf
