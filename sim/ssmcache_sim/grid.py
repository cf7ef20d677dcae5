"""Hit tokens of every capacity, block size and interval in one pass over a trace.

Under the default recency (path touch, deepest first) a cache of C blocks holds the C most recent blocks, for every C at
once. So one number for each block of a request answers all capacities: its *stack distance*, the number of blocks that
are more recent, itself included. A block is hit where the distance is at most C.

All blocks of a touch keep their order, and a later touch takes a path from the top: what a request still finds of an
earlier touch is one *segment* of its own path. The q-th block of a segment has the distance (blocks of later touches) +
q, at any block size; only the counts differ. A snapshot at a boundary is as old as the block that ends there, so
snapshots of an interval are blocks of that size in a stack of their own.

In a trace with outputs a request touches its whole path, beyond the prompt as well, but looks up its prompt alone: no
block that ends behind the prompt's last token but one is a hit.

Exact where every boundary gets a snapshot, sizes are fixed, KV beyond the missing snapshot is adopted, and the capacity
holds the largest request: `grid_capacity` of `grid_cells.py` says so for a cell. What is given to a manager, N pages
and M states, holds N - 1 blocks and M - 1 snapshots: a request takes one of each beyond what it leaves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ssmcache_sim.trace import Int64Array, Trace

UNLIMITED = np.iinfo(np.int64).max // 2
_LANE_BYTES = 8
_BOUNDARIES_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class StackDistances:
    """The segments of a trace: what each request finds of each earlier touch.

    Attributes:
        tokens_per_block: of the trace, the unit of `start` and `end`.
        sizes: block sizes and intervals, in tokens, that can be asked for.
        request: [num_segments] whose path it is, ascending; the segments of a path from the top on.
        start, end: [num_segments] blocks of the request's path, from the first on that was touched then.
        limit: [num_segments] tokens of the request that may hit: all of its prompt but the last one.
        later: [num_segments, num_sizes] blocks of each size with a later touch.
    """

    tokens_per_block: int
    sizes: tuple[int, ...]
    request: Int64Array
    start: Int64Array
    end: Int64Array
    limit: Int64Array
    later: Int64Array

    def later_of(self, size: int) -> Int64Array:
        column: Int64Array = self.later[:, self.sizes.index(size)]
        return column

    def runs(self, size: int) -> "BlockRuns":
        """The blocks of one of `sizes` that may hit. Cost: O(segments)."""
        factor = size // self.tokens_per_block
        first = self.start // factor
        count = np.minimum(self.end // factor, self.limit // size) - first
        (segment,) = np.nonzero(count > 0)
        return BlockRuns(segment, first[segment], count[segment], self.later_of(size)[segment])


@dataclass(frozen=True, slots=True, eq=False)
class BlockRuns:
    """Blocks of one size that may hit, by segment; segments without any are left out.

    The n-th block of a run, n from 1 to `count`, has the distance `later` + n.

    Attributes:
        segment: [num_runs] which segment it is.
        first: [num_runs] number of the path's blocks before the run's first one.
        count: [num_runs].
        later: [num_runs] blocks with a later touch.
    """

    segment: Int64Array
    first: Int64Array
    count: Int64Array
    later: Int64Array


@dataclass(frozen=True, slots=True, eq=False)
class BoundaryRuns:
    """The boundaries of an interval that may hit, by segment.

    The n-th boundary of a run, n from 1 to `count`, has the snapshot distance `snapshots_later` + n and the KV
    distance `blocks_before` + n * `blocks_each`: that of the block that ends there.
    """

    count: Int64Array
    snapshots_later: Int64Array
    blocks_before: Int64Array
    blocks_each: int


def boundary_runs(distances: StackDistances, tokens_per_block: int, ssm_reuse_interval: int) -> BoundaryRuns:
    """Both distances of every boundary found, where each gets a snapshot. Cost: O(segments)."""
    blocks_each = ssm_reuse_interval // tokens_per_block
    runs = distances.runs(ssm_reuse_interval)
    # a run's first interval may begin above its segment: blocks of the segment before it count
    start_block = distances.start[runs.segment] // (tokens_per_block // distances.tokens_per_block)
    blocks_before = distances.later_of(tokens_per_block)[runs.segment] + runs.first * blocks_each - start_block
    return BoundaryRuns(runs.count, runs.later, blocks_before, blocks_each)


class PackedCounts:
    """Sums over the touches up to a given one (a Fenwick tree), for all sizes in one integer of 64-bit lanes.

    Adding such integers adds all lanes at once; no lane ever becomes negative, so none borrows from the next.
    """

    def __init__(self, num_touches: int) -> None:
        self._tree = [0] * (num_touches + 1)
        self.total = 0

    def add(self, touch: int, packed: int) -> None:
        self.total += packed
        tree, index = self._tree, touch + 1
        while index < len(tree):
            tree[index] += packed
            index += index & -index

    def up_to(self, touch: int) -> int:
        tree, index, packed = self._tree, touch + 1, 0
        while index > 0:
            packed += tree[index]
            index -= index & -index
        return packed


def stack_distances(trace: Trace, sizes: Iterable[int]) -> StackDistances:
    """One pass over the trace.

    Args:
        sizes: block sizes and intervals in tokens, multiples of the trace's block.

    Cost: O(blocks) NumPy work, and O(log(requests)) for each segment; segments grow with the branches of the traffic.
    """
    block = trace.tokens_per_block
    wanted = tuple(sorted(set(sizes)))
    assert all(size % block == 0 for size in wanted), f"sizes {wanted} of blocks of {block}"
    packer = _Packer([size // block for size in wanted])
    counts = PackedCounts(trace.num_requests)
    touched_by = np.full(trace.num_keys, -1, dtype=np.int32)
    segments: list[tuple[int, int, int]] = []  # request, start, end
    later: list[bytes] = []
    num_bytes = _LANE_BYTES * len(wanted)
    begin = 0
    for request, stop in enumerate(trace.offsets[1:].tolist()):
        path = trace.block_keys[begin:stop]
        begin = stop
        found = segments_of(touched_by[path])
        for start, end, touch in found:
            segments.append((request, start, end))
            later.append((counts.total - counts.up_to(touch)).to_bytes(num_bytes, "little"))
        # only now: the segments above the last one are more recent than it, and count for its distance
        for start, end, touch in found:
            counts.add(touch, -packer.between(start, end))
        counts.add(request, packer.between(0, path.size))
        touched_by[path] = request
    requests, starts, ends = np.array(segments, dtype=np.int64).reshape(-1, 3).T
    return StackDistances(
        tokens_per_block=block,
        sizes=wanted,
        request=requests.copy(),
        start=starts.copy(),
        end=ends.copy(),
        limit=trace.prompt_tokens[requests] - 1,
        later=np.frombuffer(b"".join(later), dtype="<i8").reshape(len(segments), len(wanted)),
    )


class _Packer:
    """Numbers of whole blocks of each size among the blocks of a path, as 64-bit lanes of one integer."""

    def __init__(self, factors: Sequence[int]) -> None:
        self._factors = factors
        self._packed: dict[int, int] = {}

    def between(self, start: int, end: int) -> int:
        return self._up_to(end) - self._up_to(start)

    def _up_to(self, end: int) -> int:
        packed = self._packed.get(end)
        if packed is None:
            lanes = ((end // factor) << (8 * _LANE_BYTES * lane) for lane, factor in enumerate(self._factors))
            packed = self._packed[end] = sum(lanes)
        return packed


def segments_of(touches: np.ndarray[tuple[int], np.dtype[np.int32]]) -> list[tuple[int, int, int]]:
    """(start, end, touch) of the stretches of a path that were last touched together; untouched blocks left out."""
    if touches.size == 0 or touches[0] < 0:
        return []
    changes = np.flatnonzero(touches[1:] != touches[:-1]) + 1
    starts = [0, *changes.tolist()]
    ends = [*starts[1:], touches.size]
    return [
        (start, end, touch)
        for start, end, touch in zip(starts, ends, touches[starts].tolist(), strict=True)
        if touch >= 0
    ]


def attention_hits(distances: StackDistances, tokens_per_block: int, capacities: Sequence[int]) -> Int64Array:
    """Hit tokens of attention alone, [num_capacities] for capacities in blocks. Cost: O(segments * capacities)."""
    runs = distances.runs(tokens_per_block)
    hits = [int(np.clip(capacity - runs.later, 0, runs.count).sum()) for capacity in capacities]
    return np.array(hits, dtype=np.int64) * tokens_per_block


def hybrid_hits(
    distances: StackDistances,
    tokens_per_block: int,
    ssm_reuse_interval: int,
    capacities: Sequence[int],
    snapshot_capacities: Sequence[int],
) -> Int64Array:
    """Usable hit tokens, [num_capacities, num_snapshot_capacities], where each boundary gets a snapshot.

    The capacities are in blocks and in snapshots, ascending. A boundary is usable where its KV distance and its
    snapshot distance fit; both grow along a path, so each usable boundary is worth one interval of tokens.

    Cost: O(boundaries found * log(capacities)) for the whole plane, in bounded memory.
    """
    runs = boundary_runs(distances, tokens_per_block, ssm_reuse_interval)
    shape = (len(capacities) + 1, len(snapshot_capacities) + 1)
    histogram = np.zeros(shape[0] * shape[1], dtype=np.int64)
    for part in _chunks(runs.count):
        number = _ordinals(runs.count[part])
        run = np.repeat(np.arange(part.start, part.stop), runs.count[part])
        fits_from = np.searchsorted(capacities, runs.blocks_before[run] + number * runs.blocks_each)
        snapshot_fits_from = np.searchsorted(snapshot_capacities, runs.snapshots_later[run] + number)
        histogram += np.bincount(fits_from * shape[1] + snapshot_fits_from, minlength=histogram.size)
    plane: Int64Array = histogram.reshape(shape).cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
    return plane * ssm_reuse_interval


def _chunks(count: Int64Array) -> Iterable[slice]:
    """Parts of the segments with a bounded number of boundaries each."""
    ends = np.cumsum(count)
    start = 0
    while start < count.size:
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _BOUNDARIES_AT_ONCE, side="right")))
        yield slice(start, stop)
        start = stop


def _ordinals(count: Int64Array) -> Int64Array:
    """1, 2, .. count[0], 1, 2, .. count[1], and so on."""
    ends = np.cumsum(count)
    ordinals: Int64Array = np.arange(1, int(ends[-1]) + 1) - np.repeat(ends - count, count)
    return ordinals
