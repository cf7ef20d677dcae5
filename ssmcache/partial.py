"""A last block that matches in part: its source is protected, and copied into pages of the sequence's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssmcache.match import Partial
from ssmcache.memory.base import GPU_TIER, TransferError
from ssmcache.sparse import SparseStore
from ssmcache.tiers import Tiers
from ssmcache.tree import Run

if TYPE_CHECKING:
    from ssmcache.sequence import KVCache
    from ssmcache.store import BlockStore


def protect_partial(sequence: KVCache, protected: bool) -> None:
    """Keep the block that is about to be copied where it is, or let it go as before."""
    if sequence.partial is None:
        return
    run = sequence.partial.run
    if protected:
        run.soft_holds -= 1
        sequence.store.lock_child(run)
    else:
        run.soft_holds += 1
        sequence.store.release(run)
        sequence.store.settle_leaf(run)
    for sparse, block, pin in sequence.pins:
        if block == sequence.partial.block:
            sparse.pins.count(pin, locked=1 if protected else -1)
    if not protected:
        release_windows(sequence, sequence.partial.run)


def release_windows(sequence: KVCache, deepest: Run) -> None:
    """Window pages of the path of `deepest` are not locked any more."""
    for window in sequence.windows:
        window.store.release(deepest)


def copy_partial(sequence: KVCache, partial: Partial) -> None:
    """Queue the copies of a block that matches in part into private pages, from the tiers where it lies.

    Errors: TransferError; nothing was taken then.
    """
    store = sequence.store
    copies: list[tuple[Tiers[Any, Any], int, int]] = []
    if store.pages is not None:
        pages = partial.run.pages
        assert pages is not None
        copies.append((store.pages, pages.tier, int(pages.slots[partial.block - partial.run.start])))
    copies += [(sparse, pin.tier, pin.slot) for sparse, block, pin in sequence.pins if block == partial.block]
    taken: list[tuple[Tiers[Any, Any], Any]] = []
    try:
        for tiers, tier, slot in copies:
            slots = tiers.take(1, sequence.stream)
            taken.append((tiers, slots))
            try:
                sequence.manager.copy_slot(tiers.layer_group, tier, slot, int(slots[0]), sequence.stream)
            except TransferError as error:
                if error.lost:
                    _end_partial(sequence, partial)
                    _lose_source(store, partial, tiers, tier, slot)
                raise
    except TransferError:
        for tiers, slots in taken:
            tiers.pools[GPU_TIER].give_back(slots)
        raise
    for tiers, slots in taken:
        if tiers is store.pages:
            sequence.own_pages = slots
        for window in sequence.windows:
            if window.store is tiers:
                window.own[partial.block] = slots[0]
    _end_partial(sequence, partial)


def _lose_source(store: BlockStore, partial: Partial, tiers: Tiers[Any, Any], tier: int, slot: int) -> None:
    """One slot of the block cannot be read: without its page of full attention it is cut off; else that slot goes."""
    if isinstance(tiers, SparseStore):
        tiers.lose_slot(partial.run, tier, slot)
    else:
        store.lose(partial.run, partial.block)


def _end_partial(sequence: KVCache, partial: Partial) -> None:
    protect_partial(sequence, False)
    for sparse, block, pin in sequence.pins:
        if block == partial.block:
            sparse.pins.end_soft(pin)
    sequence.pins = [entry for entry in sequence.pins if entry[1] != partial.block]
    sequence.partial = None
    partial.run.soft_holds -= 1
    sequence.store.settle_leaf(partial.run)


def can_take_over(sequence: KVCache) -> bool:
    """Whether the block that would be copied may become the sequence's own: nobody else has a use for it now."""
    partial = sequence.partial
    if partial is None or sequence.windows or partial.run.pages is None:
        return False
    run = partial.run
    alone = run.holds == 1 and not run.soft_holds and not run.children and run.end - run.start == 1
    return alone and partial.run.pages.tier == GPU_TIER


def take_over_partial(sequence: KVCache, partial: Partial) -> None:
    """There is no room for a copy: the page itself becomes the sequence's own."""
    _end_partial(sequence, partial)
    sequence.own_pages = sequence.store.take_over_leaf(partial.run)
