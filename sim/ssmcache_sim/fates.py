"""What became of the snapshots at the boundaries of a replay's prompts, as the manager tells it."""

from collections.abc import Iterable, Sequence

import numpy as np

from ssmcache import KVCacheManagerConfig, ReuseMatch
from ssmcache.layout import LayerGroupKind, layer_groups
from ssmcache.tree import Run
from ssmcache_sim.causes import SNAPSHOT_CAUSES
from ssmcache_sim.trace import Int64Array, Trace

_UNMARKED = 0
MARKS = {cause: mark for mark, cause in enumerate(SNAPSHOT_CAUSES, 1)}
# a snapshot that is there is a cause of its own: nothing but a window can be missing beside it
TAKEN, EVICTED = MARKS["window"], MARKS["evicted"]

SnapshotLosses = np.ndarray[tuple[int, int], np.dtype[np.int64]]


class BoundaryFates:
    """Observes the manager of a replay, and at each look-up finds the causes of the tokens that lack a snapshot.

    A mark for each key of the trace says what happened last to the boundary at the end of that block. The default
    admission wants each boundary of whoever passes it first: one without a snapshot that was not skipped was evicted.
    Then only what is skipped has to be marked, and a replay pays nothing for the rest. With windows a snapshot may be
    there and of no use, and where last boundaries alone are admitted most never had one: then all is marked.

    Args:
        trace: in blocks of the config.
        kv_ceiling: [num_requests] tokens that have KV where there are no attention layers to lack it.
        marks_all: also what is taken and evicted, whatever the config.
    """

    def __init__(
        self, trace: Trace, config: KVCacheManagerConfig, kv_ceiling: Int64Array, marks_all: bool = False
    ) -> None:
        kinds = [group.kind for group in layer_groups(config)]
        self.state_group = kinds.index(LayerGroupKind.SSM) if config.has_ssm else -1
        self.request = -1
        self.keys: Int64Array = trace.block_keys[:0]  # of the request that is served
        self.marks = bytearray(trace.num_keys)
        self._marks_all = marks_all or config.has_windows or config.admission == "last"
        self._marked = self._marks_all  # there may be marks
        self._interval = config.ssm_reuse_interval
        self._factor = config.ssm_reuse_interval // config.tokens_per_block
        self._kv_tokens: Sequence[int] | None = None if config.has_attention else kv_ceiling.tolist()
        self._found: list[tuple[int, int]] = []  # request and mark, for each boundary of another cause than the usual

    def look_up(self, request: int, keys: Int64Array, match: ReuseMatch) -> None:
        """The next request, before it changes anything: the keys of its full blocks, and what was found."""
        self.request, self.keys = request, keys
        if not self._marked or self.state_group < 0:
            return
        kv_tokens = match.attention_tokens if self._kv_tokens is None else self._kv_tokens[request]
        for boundary in range(match.usable_tokens // self._interval + 1, kv_tokens // self._interval + 1):
            self._found.append((request, self.mark_at(keys.item(boundary * self._factor - 1))))

    def mark_at(self, key: int) -> int:
        """What happened last to the boundary at the end of the block of a key."""
        mark = self.marks[key]
        if mark == _UNMARKED:
            return MARKS["not_admitted"] if self._marks_all else EVICTED
        return mark

    def losses(self, lost_snapshot: Int64Array) -> SnapshotLosses:
        """[num_causes, num_requests] tokens by `SNAPSHOT_CAUSES`, whose sums are those given."""
        found = np.array(self._found, dtype=np.int64).reshape(-1, 2)
        lost = np.zeros((len(SNAPSHOT_CAUSES), lost_snapshot.size), dtype=np.int64)
        np.add.at(lost, (found[:, 1] - 1, found[:, 0]), self._interval)
        lost[EVICTED - 1] += lost_snapshot - lost.sum(axis=0)  # nothing, where every boundary was looked up
        assert (lost >= 0).all()
        return lost

    # -- told by the manager -----------------------------------------------------------------------------------------

    def added(self, cursor: Run, layer_group: int, ordinals: Iterable[int]) -> None:
        if self._marked and layer_group == self.state_group:
            marks, key_of = self.marks, self.keys.item
            mark = TAKEN if self._marks_all else _UNMARKED
            for ordinal in ordinals:
                marks[key_of(ordinal)] = mark

    def skipped(self, cursor: Run, layer_group: int, ordinal: int, reason: str) -> None:
        self._marked = True
        self.marks[self.keys.item(ordinal)] = MARKS[reason]

    def removed(self, layer_group: int, tier: int, run: Run, ordinals: Iterable[int]) -> None:
        if self._marks_all and layer_group == self.state_group:
            marks, key_of, start = self.marks, run.key_buffer.item, run.start
            for ordinal in ordinals:
                marks[key_of(ordinal - start)] = EVICTED

    def stored(self, run: Run, num_blocks: int, layer_group: int | None) -> None:
        pass

    def moved(self, layer_group: int, source_tier: int, tier: int, run: Run, ordinals: Iterable[int]) -> None:
        pass

    def lost(self, run: Run, page_group: int | None) -> None:
        pass  # a real tier could not be read: counted as if it had been evicted
