"""Hit tokens where a request keeps only its own last boundary (admission `last`), for every capacity in one pass.

The rules: KV as in `grid.py`, path touch of all blocks. Of the snapshots a request touches only the one at the last
boundary of its prompt, the largest multiple of the interval up to its length, and in a trace with outputs that of its
path, if it is another one, as the older of the two: each is taken unless it is there already. The snapshot that the
request started from, if it is a third one, is not touched. Snapshots have a pool of their own, the oldest goes; one
whose KV went stays and keeps its slot until its own turn, and is usable again once a request has brought the KV back.
So the order of the snapshots is that of the requests whose last boundary they are, the trace alone decides it, and the
snapshot distance is the number of boundaries that were somebody's last one since then, itself included.

It does not grow along a path: a boundary is worth all tokens up to it if it is usable, whatever is missing above it.
So among boundaries that fit the same KV capacity the smallest snapshot distance from each one on decides: a suffix
minimum.

Exact under these rules where sizes are fixed, KV beyond the missing snapshot is adopted, requests come one at a time,
the KV capacity holds the largest request and there is room for one snapshot. Capacities are stacks: a pool of N pages
is N - 1 blocks, one of N states N - 1 snapshots.

A manager differs in two rules. It gives a snapshot up together with its KV, since nobody could start from it. The slot
that is free then may keep another one, so neither hits more in all cases. Where no snapshot loses its KV before its own
turn, both are the same: `snapshots_keep_their_kv` says so for a pair of capacities. And it keeps each boundary that it
decodes until the next one, in one slot of its own, which it does not need in the end where the last one is there
already. Where no output comes to a boundary that an earlier request kept, there is no such case: `outputs_are_new`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ssmcache_sim.grid import UNLIMITED, PackedCounts, StackDistances, segments_of
from ssmcache_sim.scratch import gather
from ssmcache_sim.trace import Int64Array, Trace, offsets_of


@dataclass(frozen=True, slots=True, eq=False)
class LastBoundaries:
    """The boundaries on the paths of requests that were the last one of an earlier request, and may hit.

    Attributes:
        ssm_reuse_interval: in tokens.
        request: [num_found] whose path it is, ascending; the boundaries of a path from the top on.
        boundary: [num_found] which multiple of the interval it is.
        distance: [num_found] snapshot distance.
        own_distance: [num_requests] that of the last boundary of a request's own prompt before it came; 0 where that
            has none, `UNLIMITED` where it is nobody's yet.
    """

    ssm_reuse_interval: int
    request: Int64Array
    boundary: Int64Array
    distance: Int64Array
    own_distance: Int64Array


class _Touches:
    """The last touches of all snapshots, by number, ascending: numbers grow with time. A touch costs O(snapshots)."""

    def __init__(self, most: int) -> None:
        self._order = np.empty(most, dtype=np.int32)
        self._num_snapshots = self._num_touches = 0

    def distance(self, touch: npt.ArrayLike) -> Int64Array:
        """Snapshots touched since a touch, or each of several; that one included."""
        distance: Int64Array = self._num_snapshots - np.searchsorted(self._order[: self._num_snapshots], touch)
        return distance

    def touch(self, before: int) -> int:
        """The number of a new touch of a snapshot that was touched last by `before`; -1: never."""
        order = self._order
        if before >= 0:
            place = int(np.searchsorted(order[: self._num_snapshots], before))
            order[place : self._num_snapshots - 1] = order[place + 1 : self._num_snapshots]
        else:
            self._num_snapshots += 1
        self._num_touches += 1
        order[self._num_snapshots - 1] = self._num_touches
        return self._num_touches


def last_boundaries(trace: Trace, ssm_reuse_interval: int) -> LastBoundaries:
    """One pass over the trace for one interval, a multiple of the trace's block.

    Cost: O(blocks / interval + boundaries found * log(snapshots)) NumPy work, and a move of up to all snapshots (4
    bytes each) a request.
    """
    assert ssm_reuse_interval % trace.tokens_per_block == 0, f"{ssm_reuse_interval} of {trace.tokens_per_block}"
    factor = ssm_reuse_interval // trace.tokens_per_block
    num_of_prompt = (trace.prompt_tokens // ssm_reuse_interval).tolist()
    num_usable = ((trace.prompt_tokens - 1) // ssm_reuse_interval).tolist()
    touched_by = np.full(trace.num_keys, -1, dtype=np.int32)  # numbers of touches
    touches = _Touches((2 if trace.has_outputs else 1) * trace.num_requests)
    boundaries: list[Int64Array] = []
    distances: list[Int64Array] = []
    own_distance = np.zeros(trace.num_requests, dtype=np.int64)
    begin = 0
    for request, stop in enumerate(trace.offsets[1:].tolist()):
        ends = trace.block_keys[begin + factor - 1 : stop : factor]
        begin = stop
        touched = touched_by[ends]
        usable = touched[: num_usable[request]]
        found = np.flatnonzero(usable >= 0)
        boundaries.append(found + 1)
        distances.append(touches.distance(usable[found]))
        of_prompt = num_of_prompt[request] - 1
        if of_prompt >= 0:
            is_known = touched[of_prompt] >= 0
            own_distance[request] = touches.distance(touched[of_prompt]) if is_known else UNLIMITED
        for boundary in sorted({ends.size - 1, of_prompt} - {-1}, reverse=True):
            touched_by[ends[boundary]] = touches.touch(touched[boundary])
    counts = [found.size for found in boundaries]
    return LastBoundaries(
        ssm_reuse_interval=ssm_reuse_interval,
        request=np.repeat(np.arange(trace.num_requests), counts),
        boundary=np.concatenate(boundaries),
        distance=np.concatenate(distances),
        own_distance=own_distance,
    )


def last_hits(
    distances: StackDistances,
    found: LastBoundaries,
    tokens_per_block: int,
    capacities: Sequence[int],
    snapshot_capacities: Sequence[int],
) -> Int64Array:
    """Usable hit tokens, [num_capacities, num_snapshot_capacities], in blocks and in snapshots, ascending.

    Args:
        distances: of the same trace, at least of the size `tokens_per_block`.

    Cost: O(boundaries found * log(capacities)), and O(snapshot capacities) for each that a larger one in reach of the
    same KV capacity does not make useless.
    """
    kv_distance = kv_distances(distances, found, tokens_per_block)
    fits_from = np.searchsorted(capacities, kv_distance)
    snapshot_fits_from = np.searchsorted(snapshot_capacities, found.distance)
    kept = _useful(found.request, fits_from, snapshot_fits_from)
    request, boundary = found.request[kept], found.boundary[kept]
    fits_from, snapshot_fits_from = fits_from[kept], snapshot_fits_from[kept]
    plane = np.empty((len(capacities), len(snapshot_capacities)), dtype=np.int64)
    for column in range(len(snapshot_capacities)):
        fits = snapshot_fits_from <= column
        deepest = boundary[fits]
        # with more KV a request comes from the boundary above, its own, to this one
        gain = deepest.copy()
        gain[1:] -= np.where(request[fits][1:] == request[fits][:-1], deepest[:-1], 0)
        gains = np.bincount(fits_from[fits], weights=gain, minlength=len(capacities) + 1)  # exact: below 2**53
        plane[:, column] = gains[:-1].astype(np.int64).cumsum()
    return plane * found.ssm_reuse_interval


def last_usable(
    distances: StackDistances,
    found: LastBoundaries,
    tokens_per_block: int,
    num_blocks: int,
    num_snapshots: int,
    num_requests: int,
) -> Int64Array:
    """[num_requests] usable hit tokens at one capacity; their sum is that of `last_hits`.

    Cost: O(boundaries found * log(segments)).
    """
    fits = (found.distance <= num_snapshots) & (kv_distances(distances, found, tokens_per_block) <= num_blocks)
    usable = np.zeros(num_requests, dtype=np.int64)
    # of several values for one index the last one stays: the deepest
    usable[found.request[fits]] = found.boundary[fits] * found.ssm_reuse_interval
    return usable


def last_evicted(
    distances: StackDistances,
    found: LastBoundaries,
    tokens_per_block: int,
    num_blocks: int,
    num_snapshots: int,
    num_requests: int,
) -> int:
    """Tokens of intervals that are lost because the snapshot at their end, which some request once kept, was evicted:
    the KV is there, and no deeper boundary is usable.

    Cost: as that of `last_usable`.
    """
    usable = last_usable(distances, found, tokens_per_block, num_blocks, num_snapshots, num_requests)
    has_kv = kv_distances(distances, found, tokens_per_block) <= num_blocks
    lost = has_kv & (found.boundary * found.ssm_reuse_interval > usable[found.request])
    return int(np.count_nonzero(lost)) * found.ssm_reuse_interval


def last_needs_replay(trace: Trace, ssm_reuse_interval: int, num_blocks: int, num_snapshots: int) -> str:
    """Why a pair of capacities must be replayed, in plain words, for people; empty where this is exact.

    Args:
        trace: in the blocks that are counted.

    Cost: as that of `snapshots_keep_their_kv`.
    """
    if not num_snapshots:
        return "no room for a snapshot beside the live state"
    if trace.has_outputs and num_snapshots < 2:
        return "no room for the snapshots of a prompt and its output beside the live state"
    if not outputs_are_new(trace, ssm_reuse_interval):
        return "last boundaries: an output comes to a boundary that an earlier request kept"
    if not snapshots_keep_their_kv(trace, ssm_reuse_interval, num_blocks, num_snapshots):
        return "last boundaries: a snapshot may lose its KV before its own turn, and goes with it"
    return ""


def snapshots_keep_their_kv(trace: Trace, ssm_reuse_interval: int, num_blocks: int, num_snapshots: int) -> bool:
    """Whether `num_blocks` of KV certainly hold that of every snapshot as long as `num_snapshots` hold the snapshot.

    Certain is what follows from counts: the KV below a snapshot is among the blocks touched since the oldest snapshot
    was, the request under way included. (A later request may have touched the KV alone; then fewer would do.)

    Args:
        trace: in the blocks that are counted.

    Cost: one pass over the trace, to the first place where it is not so.
    """
    factor = ssm_reuse_interval // trace.tokens_per_block
    touched_by = np.full(trace.num_keys, -1, dtype=np.int32)
    blocks = PackedCounts(trace.num_requests)  # by the request that touched them last
    snapshots: OrderedDict[int, int] = OrderedDict()  # key of the block that ends there -> the last touch, oldest first
    begin = 0
    num_of_prompt = (trace.prompt_tokens // ssm_reuse_interval).tolist()
    for request, (stop, of_prompt) in enumerate(zip(trace.offsets[1:].tolist(), num_of_prompt, strict=True)):
        path = trace.block_keys[begin:stop]
        begin = stop
        for start, end, touch in segments_of(touched_by[path]):
            blocks.add(touch, start - end)
        blocks.add(request, path.size)
        touched_by[path] = request
        if snapshots and blocks.total - blocks.up_to(next(iter(snapshots.values())) - 1) > num_blocks:
            return False
        for last in sorted({path.size // factor, of_prompt} - {0}, reverse=True):
            key = int(path[last * factor - 1])
            snapshots[key] = request
            snapshots.move_to_end(key)
        while len(snapshots) > num_snapshots:
            snapshots.popitem(last=False)
    return True


def outputs_are_new(trace: Trace, ssm_reuse_interval: int) -> bool:
    """Whether no request decodes up to a boundary that an earlier one kept. Cost: O(blocks / interval) NumPy work."""
    if not trace.has_outputs:
        return True
    factor = ssm_reuse_interval // trace.tokens_per_block
    of_prompt, of_path = trace.prompt_tokens // ssm_reuse_interval, np.diff(trace.offsets) // factor
    requests = np.arange(trace.num_requests)
    kept_first_by = np.full(trace.num_keys, trace.num_requests, dtype=np.int64)
    for last in (of_prompt, of_path):
        keepers = requests[last > 0]
        keys = trace.block_keys[trace.offsets[keepers] + last[keepers] * factor - 1]
        np.minimum.at(kept_first_by, keys, keepers)
    decoded = offsets_of(of_path - of_prompt)
    keys = gather(trace.block_keys, trace.offsets[:-1] + (of_prompt + 1) * factor - 1, decoded, factor)
    return bool((kept_first_by[keys] >= np.repeat(requests, np.diff(decoded))).all())


def kv_distances(distances: StackDistances, found: LastBoundaries, tokens_per_block: int) -> Int64Array:
    """[num_found] KV distance of the block that ends at the boundary."""
    end = found.boundary * (found.ssm_reuse_interval // distances.tokens_per_block)
    path = int(distances.end.max(initial=0)) + 1
    # whatever was a boundary of an earlier request lies in a segment
    segment = np.searchsorted(distances.request * path + distances.start, found.request * path + end - 1, "right") - 1
    factor = tokens_per_block // distances.tokens_per_block
    kv_distance: Int64Array = (
        distances.later_of(tokens_per_block)[segment] + end // factor - distances.start[segment] // factor
    )
    return kv_distance


def _useful(request: Int64Array, fits_from: Int64Array, snapshot_fits_from: Int64Array) -> Int64Array:
    """Boundaries without a deeper one on the same path that fits wherever they do: strict suffix minima of the snapshot
    distance among those of a request with the same KV capacity.
    """
    if not request.size:
        return np.empty(0, dtype=np.int64)
    group = np.cumsum((np.diff(request, prepend=-1) > 0) | (np.diff(fits_from, prepend=-1) != 0))
    ranked = group * (int(snapshot_fits_from.max()) + 1) + snapshot_fits_from  # all of a group above all before it
    smallest_from = np.minimum.accumulate(ranked[::-1])[::-1]
    return np.flatnonzero(np.append(ranked[:-1] < smallest_from[1:], True))
