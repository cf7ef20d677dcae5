"""Moving what lies in the last slots of a pool to the front, so that the pool can shrink."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmcache.memory.base import GPU_TIER, SlotMoves
from ssmcache.pool_groups import PoolGroup
from ssmcache.pools import int_array
from ssmcache.segments import PageSegment, Segment, SparseSegment
from ssmcache.sparse import SparseStore
from ssmcache.tiers import Tiers

if TYPE_CHECKING:
    from ssmcache.manager import KVCacheManager


def compact(manager: KVCacheManager, group: PoolGroup, tier: int, limit: int, stream: Any) -> None:
    """Make all that lies in a pool lie in its first `limit` slots. No sequence is ACTIVE, and no more slots are in use
    than that.

    Errors: TransferError; nothing has changed then.
    """
    pool = group.pools[tier]
    segments = [[segment for segment in segments_of(manager, tiers) if segment.tier == tier] for tiers in group.members]
    slots = [
        [slot for segment in own for slot in segment.slots.tolist()]
        + (private_slots(manager, tiers) if tier == GPU_TIER else [])
        for tiers, own in zip(group.members, segments, strict=True)
    ]
    in_use = [slot for own in slots for slot in own]
    table = pool.plan_compaction(limit, in_use)
    if table:
        manager.streams.copy(SlotMoves(group.index, tier, list(table), tier, list(table.values())), stream)
        for tiers, own, own_slots in zip(group.members, segments, slots, strict=True):
            tiers.moved[tier][tier] += sum(slot in table for slot in own_slots)
            for segment in own:
                _renumber(tiers, segment, table)
            if tier == GPU_TIER:
                _renumber_private(manager, tiers, table)
    pool.compact(limit, [table.get(slot, slot) for slot in in_use])


def segments_of(manager: KVCacheManager, tiers: Tiers[Any, Any]) -> Iterator[Any]:
    """All segments of a layer group: in the tree, lost, and parked."""
    for run in manager.store.all_runs():
        if tiers is manager.store.pages:
            if run.pages is not None:
                yield run.pages
        else:
            yield from (segment for segment in run.items if segment.store is tiers)
    for sequence in manager.open_sequences:
        if sequence.parked is not None:
            for segment in sequence.parked.contents():
                store = segment.store if isinstance(segment, SparseSegment) else manager.store.pages
                if store is tiers:
                    yield segment


def private_slots(manager: KVCacheManager, tiers: Tiers[Any, Any]) -> list[int]:
    """GPU slots of a layer group that are a sequence's own, in none of the segments."""
    slots: list[int] = []
    for sequence in manager.open_sequences:
        if tiers is manager.store.pages:
            slots += sequence.own_pages.tolist()
        elif tiers is manager.store.snapshots:
            slots += [] if sequence.states is None else sequence.states.slots()
        else:
            slots += [slot for window in sequence.windows if window.store is tiers for slot in window.own.values()]
    return slots


def num_private_slots(manager: KVCacheManager, tiers: Tiers[Any, Any]) -> int:
    """The number of `private_slots`."""
    count = 0
    for sequence in manager.open_sequences:
        if tiers is manager.store.pages:
            count += sequence.num_own_pages
        elif tiers is manager.store.snapshots:
            count += 0 if sequence.states is None else len(sequence.states.slots())
        else:
            count += sum(len(window.own) for window in sequence.windows if window.store is tiers)
    return count


def _renumber(tiers: Tiers[Any, Any], segment: Segment, table: dict[int, int]) -> None:
    if isinstance(segment, SparseSegment):
        assert isinstance(tiers, SparseStore)
        for index, slot in enumerate(segment.slots):
            if slot in table:
                segment.slots[index] = table[slot]
                tiers.follow(segment.tier, int_array((slot,)), segment.tier, int_array((table[slot],)))
    else:
        assert isinstance(segment, PageSegment)
        segment.renumber(_mapped(segment.slots, table))


def _mapped(slots: Any, table: dict[int, int]) -> Any:
    return np.array([table.get(slot, slot) for slot in slots.tolist()], dtype=np.int32)


def _renumber_private(manager: KVCacheManager, tiers: Tiers[Any, Any], table: dict[int, int]) -> None:
    for sequence in manager.open_sequences:
        if tiers is manager.store.pages:
            sequence.own_pages = _mapped(sequence.own_pages, table)
        elif tiers is manager.store.snapshots:
            if sequence.states is not None:
                sequence.states.live_slot = table.get(sequence.states.live_slot, sequence.states.live_slot)
        else:
            for window in sequence.windows:
                if window.store is tiers:
                    window.own = {block: table.get(slot, slot) for block, slot in window.own.items()}
