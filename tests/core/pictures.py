"""What lies where in a manager, block by block, read from its tree: for tests that compare two states, or a state with
an oracle. Runs and segments do not show, since a call may split or join them without changing anything.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from ssmcache import KVCache, KVCacheManager
from ssmcache.tree import Run

Block = tuple[Hashable, ...]
"""A scope, and the keys of all blocks up to one: the tokens of each, or its ready key."""


def runs_of(manager: KVCacheManager) -> Iterator[tuple[Run, list[Block]]]:
    """Every run that can be reached from a scope, with its blocks."""
    stack: list[tuple[Run, Block]] = [(root, (scope,)) for scope, root in manager.store.roots.items()]
    while stack:
        run, above = stack.pop()
        for child in run.children.values():
            width, keys = child.kind.width, child.keys.tolist()
            blocks = []
            for start in range(0, len(keys), width):
                part = keys[start : start + width]
                above_block = blocks[-1] if blocks else above
                blocks.append((*above_block, part[0] if child.kind.prefix_unique else tuple(part)))
            yield child, blocks
            stack.append((child, blocks[-1]))


def page_tiers(manager: KVCacheManager) -> dict[Block, int]:
    """Every block of the tree and the tier of its page; 0 without full attention."""
    return {block: 0 if run.pages is None else run.pages.tier for run, blocks in runs_of(manager) for block in blocks}


def snapshot_tiers(manager: KVCacheManager) -> dict[Block, int]:
    """Every block with a snapshot, and its tier."""
    return {
        blocks[ordinal - run.start]: segment.tier
        for run, blocks in runs_of(manager)
        for segment in run.items
        if segment.store is manager.store.snapshots
        for ordinal in segment.ordinals
    }


def parked_tiers(sequence: KVCache) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Of a suspended sequence: tiers of its private pages, in order, and of its live state. None unless parked."""
    parked = sequence.parked
    if parked is None:
        return None
    pages = tuple(run.pages.tier for run in parked.page_runs() for _ in range(run.pages.count) if run.pages)
    states = (segment for segment in parked.states.items if segment.store is sequence.store.snapshots)
    return pages, tuple(segment.tier for segment in states)


def deep_picture(manager: KVCacheManager) -> dict[str, object]:
    """All that decides what a manager does next: each slot with its place, its age and who needs it, the order of the
    free slots, the counts, the sequences.
    """
    store = manager.store
    pages, sparse = {}, {}
    for run, blocks in runs_of(manager):
        for index, block in enumerate(blocks):
            if run.pages is not None:
                part = run.pages
                is_next = index == len(blocks) - 1 and part.may_go() and part.queued
                time = part.rank + part.stamp - run.start - index
                pages[block] = (part.tier, int(part.slots[index]), time, run.holds, run.idle_holds, is_next)
        for segment in run.items:
            group = segment.store.layer_group
            is_queued = segment.queued or not segment.store.must_be_queued(segment)
            for ordinal, slot in zip(segment.ordinals, segment.slots, strict=True):
                time = segment.rank + segment.stamp - ordinal
                sparse[group, blocks[ordinal - run.start]] = (segment.tier, slot, time, is_queued)
    pools = [
        (pool.capacity, pool.used, tuple(pool.returned_slots()), pool.num_ever_used)
        for pools in manager.pools
        for pool in pools
    ]
    counts = [
        (list(tiers.cached), [list(row) for row in tiers.moved], tiers.num_evicted) for tiers in store.all_tiers()
    ]
    held = [[tiers.num_held(tier) for tier in range(len(tiers.pools))] for tiers in store.all_tiers()]
    return {
        "pages": pages,
        "sparse": sparse,
        "pools": pools,
        "counts": counts,
        "held": held,
        "pins": sorted(
            (index, pin.tier, pin.slot, pin.soft, pin.held, pin.locked)
            for index, part in enumerate(store.sparse_stores())
            for _, _, pin in part.pins.all()
        ),
        "soft": [(sequence.id, sequence.cursor.end) for sequence in store.soft_holders],
        "sequences": [_look_at(sequence) for sequence in manager.open_sequences],
        "stats": manager.stats(),
        "memory": manager.memory_usage(),
        "num_active": manager.num_active,
    }


def _look_at(sequence: KVCache) -> tuple[object, ...]:
    lengths = sequence.num_committed_tokens, sequence.history_length, sequence.capacity
    parked = None
    if sequence.parked is not None:
        runs, states = sequence.parked.page_runs(), sequence.parked.states.items
        parked = (
            [(run.pages.tier, slot) for run in runs if run.pages for slot in run.pages.slots.tolist()],
            sorted((part.store.layer_group, part.tier, *part.slots) for part in states),
        )
    own = sequence.own_pages.tolist(), [sorted(window.own.items()) for window in sequence.windows]
    return sequence.status, *lengths, sequence.cursor.end, sequence.reuse_match, own, parked
