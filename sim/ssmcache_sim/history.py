"""When the KV and the snapshots on the paths of some requests came and went, as a replay's manager tells it."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from ssmcache import KVCacheManagerConfig, ReuseMatch
from ssmcache.layout import LayerGroupKind, layer_groups
from ssmcache.tree import Run
from ssmcache_sim.fates import BoundaryFates
from ssmcache_sim.trace import Int64Array, Trace

NOBODY = -1

Int32Array = np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True, eq=False)
class PathHistory:
    """What there was to know of one request's path when it came. Requests are numbers of requests; -1: none.

    Attributes:
        used_by: [num_blocks] the last served request before it whose prompt has the block.
        kv_gone: [num_blocks] during which request the block's page of full attention was evicted; -1: it was there, or
            never was.
        marks: [num_boundaries] what happened last to the snapshot at the end of each interval (`fates.MARKS`).
        taken: [num_boundaries] during which request it was taken last.
        ended: [num_boundaries] during which request it was evicted or skipped last.
    """

    used_by: Int32Array
    kv_gone: Int32Array
    marks: tuple[int, ...]
    taken: Int32Array
    ended: Int32Array


class History(BoundaryFates):
    """Remembers for each key of the trace who did what last, and copies that for the paths of some requests.

    Args:
        wanted: the requests whose paths are to be remembered, in `paths`.
    """

    def __init__(
        self, trace: Trace, config: KVCacheManagerConfig, kv_ceiling: Int64Array, wanted: Collection[int]
    ) -> None:
        super().__init__(trace, config, kv_ceiling, marks_all=True)
        kinds = [group.kind for group in layer_groups(config)]
        self.paths: dict[int, PathHistory] = {}
        self._page_group = kinds.index(LayerGroupKind.ATTENTION) if LayerGroupKind.ATTENTION in kinds else -1
        self._interval_blocks = self._factor if config.has_ssm else 0
        self._trace, self._block, self._kv_ceiling = trace, config.tokens_per_block, kv_ceiling
        self._wanted = sorted(set(wanted), reverse=True)
        self._used_by, self._kv_gone, self._taken, self._ended = (
            np.full(trace.num_keys, NOBODY, dtype=np.int32) for _ in range(4)
        )

    def look_up(self, request: int, keys: Int64Array, match: ReuseMatch) -> None:
        self.remember_up_to(request)
        super().look_up(request, keys, match)

    def remember_up_to(self, request: int) -> None:
        """Copy what is known of all wanted paths up to that of a request, which is about to be looked up; of those too
        large to be looked up, too.
        """
        self._used_by[self.keys] = self.request  # the request before is done
        while self._wanted and self._wanted[-1] <= request:
            wanted = self._wanted.pop()
            start = int(self._trace.offsets[wanted])
            shared = int(self._kv_ceiling[wanted]) // self._block
            self.paths[wanted] = self._path(self._trace.block_keys[start : start + shared])

    def _path(self, keys: Int64Array) -> PathHistory:
        factor = self._interval_blocks
        ends = keys[factor - 1 :: factor] if factor else keys[:0]
        marks = tuple(self.mark_at(int(key)) for key in ends)
        return PathHistory(self._used_by[keys], self._kv_gone[keys], marks, self._taken[ends], self._ended[ends])

    # -- told by the manager -----------------------------------------------------------------------------------------

    def stored(self, run: Run, num_blocks: int, layer_group: int | None) -> None:
        end = run.end - run.start
        self._kv_gone[run.key_buffer[end - num_blocks : end]] = NOBODY

    def added(self, cursor: Run, layer_group: int, ordinals: Iterable[int]) -> None:
        super().added(cursor, layer_group, ordinals)
        if layer_group == self.state_group:
            self._taken[self.keys[list(ordinals)]] = self.request

    def skipped(self, cursor: Run, layer_group: int, ordinal: int, reason: str) -> None:
        super().skipped(cursor, layer_group, ordinal, reason)
        self._ended[self.keys.item(ordinal)] = self.request

    def removed(self, layer_group: int, tier: int, run: Run, ordinals: Iterable[int]) -> None:
        super().removed(layer_group, tier, run, ordinals)
        if layer_group in (self.state_group, self._page_group):
            gone = self._ended if layer_group == self.state_group else self._kv_gone
            gone[run.key_buffer[[ordinal - run.start for ordinal in ordinals]]] = self.request
