"""Putting the blocks of a sequence into the tree."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from ssmcache.keys import Int64Array
from ssmcache.match import common_prefix, match_partial
from ssmcache.memory.base import GPU_TIER
from ssmcache.pools import SlotArray
from ssmcache.priority import Priority, rank_in
from ssmcache.segments import DEFAULT_RANK, SparseSegment, use_of, with_use
from ssmcache.sparse import SparseStore
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
        if sequence.priority is None:
            cursor = _append(sequence, cursor, keys, position - base, last - position, DEFAULT_RANK)
        else:
            for count, rank in _stretches(sequence, position, last):
                cursor = _append(sequence, cursor, keys, position - base, count, rank)
                position += count
    sequence.cursor = cursor
    if sequence.priority is not None:
        raise_priorities(store, cursor, start, sequence.priority)
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


def _stretches(sequence: SequenceCommits, first: int, last: int) -> Iterable[tuple[int, int]]:
    """Neighbouring blocks of equal priority: (number of blocks, rank) of each stretch."""
    pages, priority = sequence.store.pages, sequence.priority
    assert priority is not None
    if pages is None:
        return ((last - first, DEFAULT_RANK),)
    ranks = (priority.rank(pages.layer_group, block) for block in range(first, last))
    return [(len(list(same)), rank) for rank, same in groupby(ranks)]


def raise_priorities(store: BlockStore, cursor: Run, first: int, priority: Priority) -> None:
    """Blocks of the path from `first` on keep the highest priority that they were given."""
    run: Run = cursor
    while run.parent is not None and run.end > first:
        above = run.parent
        if store.pages is not None and run.pages is not None:
            _raise_pages(store, run, priority)
        run = above
    for sparse in store.sparse_stores():
        for holder in list(cursor.path()):
            for segment in list(sparse.on(holder)):
                _raise_sparse(sparse, segment, priority, first)
            sparse.join_like(holder)


def _raise_pages(store: BlockStore, run: Run, priority: Priority) -> None:
    """Give the blocks of a run, which may be cut for it, their priority."""
    assert store.pages is not None
    group = store.pages.layer_group
    while True:
        pages = run.pages
        assert pages is not None
        ranks = [max(pages.rank, priority.rank(group, block)) for block in range(run.start, run.end)]
        first_equal = len(ranks) - 1
        while first_equal > 0 and ranks[first_equal - 1] == ranks[-1]:
            first_equal -= 1
        if first_equal == 0:
            pages.rank = ranks[-1]
            return
        # the lower part keeps its identity, as a holder of this run expects
        run = store.split(run, run.start + first_equal)
        pages.rank = ranks[-1]


def _raise_sparse(store: SparseStore, segment: SparseSegment, priority: Priority, first: int) -> None:
    """Give the slots of blocks from `first` on their priority, as segments of their own."""
    by_rank: dict[int, list[int]] = {}
    for index, ordinal in enumerate(segment.ordinals):
        rank = priority.rank(store.layer_group, ordinal) if ordinal >= first else segment.rank
        rank = with_use(rank, use_of(segment.rank))
        if rank > segment.rank:
            by_rank.setdefault(rank, []).append(index)
    store.rerank(segment, by_rank)


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
