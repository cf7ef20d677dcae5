"""Decoding in a replay: what a request generates goes into the cache as it would in an engine, in as few calls as that
takes.

An engine fills one page after the other, and offers each block for reuse as soon as it is full. A snapshot is a copy of
the live state at the moment when the sequence passes a wanted position, so a commit ends there. Between such positions
one commit does the same as one a block, with one exception: a block that the cache has already takes the place of the
new page, which is free again for the next block. Pages for many such blocks at once would push out what need not go. So
up to the last block that an earlier path had too, and with sliding windows, whose pages go stale meanwhile, there is
one commit a block.

The last generated token is not computed any more; the place for it is, as beyond every prompt, one token of room.
"""

from collections.abc import Callable, Mapping

from ssmcache import BlockKeys, KVCache, KVCacheManager
from ssmcache.layout import LayerGroupKind
from ssmcache_sim.ceilings import path_blocks_seen_before
from ssmcache_sim.trace import Trace

Compute = Callable[[KVCache, int, Mapping[int, int]], None]


class Decoder:
    """Decodes the outputs of one trace, in blocks of the manager.

    Args:
        compute: plays the model before each commit, as in `Runner`; None: nobody does.
    """

    def __init__(self, trace: Trace, manager: KVCacheManager, compute: Compute | None) -> None:
        self._compute = compute
        has_windows = any(group.kind is LayerGroupKind.WINDOW for group in manager.groups)
        by_block = trace.path_tokens if has_windows else path_blocks_seen_before(trace) * trace.tokens_per_block
        self._one_by_one_to: list[int] = by_block.tolist()

    def decode(self, kv: KVCache, index: int, path: BlockKeys) -> bool:
        """Goes on from the committed prompt to the end of the path of request `index`, and leaves room for one token.

        False, with `kv.shortage` set, where there is no room. Cost: a commit for each snapshot, and for each block that
        an earlier path had too.
        """
        block, one_by_one_to = path.tokens_per_block, self._one_by_one_to[index]
        position, end = kv.num_committed_tokens, path.stop
        while position < end:
            stop = end
            if position < one_by_one_to:
                stop = min(stop, position - position % block + block)
            point = kv.next_snapshot_point()
            if point is not None and point < stop:
                stop = point
            if not kv.resize(stop):
                return False
            if self._compute is not None:
                self._compute(kv, stop, {})
            kv.commit(path[position:stop])
            position = stop
        return kv.resize(end + 1)
