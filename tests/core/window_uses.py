"""The oracle of what window pages are of use for, by brute force from the words: every place of the tree where somebody
can go on, and every key that is seen there or later.
"""

from __future__ import annotations

from ssmcache import KVCacheManager
from ssmcache.layout import LayerGroupKind
from ssmcache.tree import Run, runs_below

UNREAD, READ_BETWEEN, READ = range(3)


def blocks_seen(size: int, num_sink_tokens: int, block: int, length: int) -> set[int]:
    """Blocks of `length` tokens that who goes on there reads: with a key of the window, or with a sink in them."""
    return {
        key // block
        for key in range(length)
        if key > length - size or key // block * block < min(num_sink_tokens, length)
    }


def places_of(manager: KVCacheManager) -> dict[tuple[Run, int], int]:
    """Where somebody can go on: (run, length) -> use of what is read there."""
    store, block = manager.store, manager.tokens_per_block
    runs = [run for root in (*store.roots.values(), *store.detached) for run in runs_below(root)]
    ends = {run: run.start * block + run.num_tokens if run.num_tokens else run.end * block for run in runs}
    ends = {run: end for run, end in ends.items() if len(run.children) != 1}
    if store.snapshots is None:
        return dict.fromkeys(ends.items(), READ)
    snapshots = {
        (run, (ordinal + 1) * block)
        for run in runs
        for segment in store.snapshots.on(run)
        for ordinal in segment.ordinals
    }
    places = dict.fromkeys(snapshots, READ_BETWEEN)
    for end in ends:
        above = [(length, run) for run in end.path() for holder, length in snapshots if holder is run]
        if above:
            length, run = max(above, key=lambda pair: pair[0])
            places[run, length] = READ
    return places


def uses_of_blocks(manager: KVCacheManager, layer_group: int) -> dict[tuple[Run, int], int]:
    """(run, block) -> use of a page of it, where that is not `UNREAD`."""
    group, block = manager.groups[layer_group], manager.tokens_per_block
    assert group.kind is LayerGroupKind.WINDOW
    assert group.window_size is not None
    uses: dict[tuple[Run, int], int] = {}
    for (run, length), use in places_of(manager).items():
        seen = blocks_seen(group.window_size, group.num_sink_tokens, block, length)
        for above in run.path():
            for ordinal in range(above.start, above.end):
                if ordinal in seen:
                    uses[above, ordinal] = max(use, uses.get((above, ordinal), UNREAD))
    return uses
