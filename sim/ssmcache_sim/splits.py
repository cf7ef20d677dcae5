"""All ways to split one memory between pages of KV and snapshots, from one pass over a trace.

More memory never hits less, so only splits that leave no room matter: for each number of SSM slots, all pages that fit
beside them. A boundary with the stack distances K in blocks and S in snapshots (see `grid.py`) is usable in a split of
N pages and M slots where K < N and S < M. N falls as M grows, so that is a range of M, and sums over the boundaries
are differences at its two ends, cumulated: all splits cost as much as one.

What a boundary is worth may depend on the request and on the place: usable boundaries are the first ones of a path, so
the time of a request is its time without any, plus a difference for each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ssmcache.config import Admission
from ssmcache_sim.cost import PrefillCost
from ssmcache_sim.grid import StackDistances
from ssmcache_sim.trace import Int64Array, Trace

_BOUNDARIES_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Splits:
    """SSM slots from `first` to `last`, each with all pages that fit beside them.

    Without SSM layers `slot_bytes` is 0 and there is one split, of no slots.
    """

    memory_bytes: int
    page_bytes: int
    slot_bytes: int
    first: int
    last: int

    @property
    def num_splits(self) -> int:
        return self.last - self.first + 1

    def num_pages(self, num_slots: int) -> int:
        return (self.memory_bytes - num_slots * self.slot_bytes) // self.page_bytes

    def most_slots(self, num_pages: Int64Array) -> Int64Array:
        """The most SSM slots beside so many pages; -1 where there is no room for the pages."""
        room = self.memory_bytes - num_pages * self.page_bytes
        if not self.slot_bytes:
            return np.where(room >= 0, 0, -1)
        return np.maximum(room // self.slot_bytes, -1)


def possible_splits(
    longest_path: int,
    step: int,
    memory_bytes: int,
    *,
    tokens_per_block: int,
    page_bytes: int,
    slot_bytes: int,
    admission: Admission = "every",
) -> Splits | int:
    """All splits that the grid is exact for, or the least memory that has one.

    Exact is a split that holds the largest request: its full blocks and one page more, and its snapshots, one every
    `step` tokens or (admission `last`) one at all, and one live state more.
    """
    pages = longest_path // tokens_per_block + 1
    snapshots = longest_path // step if admission == "every" else 1
    first = snapshots + 1 if slot_bytes else 0
    least = pages * page_bytes + first * slot_bytes
    if memory_bytes < least:
        return least
    last = (memory_bytes - pages * page_bytes) // slot_bytes if slot_bytes else 0
    return Splits(memory_bytes, page_bytes, slot_bytes, first, last)


@dataclass(frozen=True, slots=True, eq=False)
class SplitTotals:
    """[num_splits] each, in order of the SSM slots: tokens that hit, nanoseconds saved against no prefix cache, and
    snapshots taken. Time can be lost: then `saved_ns` is negative.
    """

    hit_tokens: Int64Array
    saved_ns: Int64Array
    snapshots_taken: Int64Array


def split_totals(
    trace: Trace,
    distances: StackDistances,
    tokens_per_block: int,
    step: int,
    splits: Splits,
    cost: PrefillCost,
    front_tokens: int = 0,
) -> SplitTotals:
    """Totals of every split. Cost: O(boundaries found + splits), in bounded memory.

    Args:
        distances: of the trace, with `tokens_per_block` and `step` among its sizes.
        step: tokens between snapshots, a multiple of the block; without SSM layers, the block.
        front_tokens: of each prompt, whose operations are neither time saved nor time spent.
    """
    prompts = trace.prompt_tokens
    nothing = np.zeros_like(prompts)
    hits, saved, found = (np.zeros(splits.num_splits + 1, dtype=np.int64) for _ in range(3))
    for boundary in _boundaries(distances, tokens_per_block, step):
        # a slot and a page are the live state's and the open block's
        low = np.maximum(boundary.snapshots + 1 if splits.slot_bytes else 0, splits.first)
        high = np.minimum(splits.most_slots(boundary.blocks + 1), splits.last)
        fits = np.flatnonzero(high >= low)
        low = np.broadcast_to(low, high.shape)[fits] - splits.first
        after = high[fits] + 1 - splits.first
        prompt, end = boundary.prompt_tokens[fits], boundary.ends[fits]
        gain = cost.reuse_ns(prompt, end - step, step) - cost.reuse_ns(prompt, end, step)
        if front_tokens:  # as far as the request skips them, which it cannot beyond its last token
            skipped = np.minimum(end, np.maximum(prompt - 1, 0) // step * step)
            before = np.minimum(end - step, skipped)
            fronts = (np.minimum(tokens, front_tokens) for tokens in (before, skipped))
            before_ns, skipped_ns = map(cost.front_ns, fronts)
            gain = gain - (skipped_ns - before_ns)
        gain[end > prompt] = 0  # a snapshot of the output: no prefill makes or uses it here
        for sums, worth in ((hits, (end < prompt) * step), (saved, gain), (found, np.ones_like(gain))):
            np.add.at(sums, low, worth)
            np.subtract.at(sums, after, worth)
    at_start = int((cost.plain_ns(prompts) - cost.reuse_ns(prompts, nothing, step)).sum())
    wanted = int((trace.path_tokens // step).sum())
    taken = wanted - found.cumsum()[:-1] if splits.slot_bytes else np.zeros_like(found[:-1])
    return SplitTotals(
        hit_tokens=hits.cumsum()[:-1],
        saved_ns=saved.cumsum()[:-1] + at_start,
        snapshots_taken=taken,
    )


def unlimited_totals(trace: Trace, distances: StackDistances, step: int, cost: PrefillCost) -> tuple[int, int]:
    """Tokens hit and nanoseconds saved with unlimited memory. Cost: O(requests + segments)."""
    prompts = trace.prompt_tokens
    # the segments of a request lie end to end from its first block on, so the last one ends what is known of it
    is_last = np.append(distances.start[1:] == 0, True)[: distances.start.size]
    known = distances.end[is_last] * distances.tokens_per_block // step * step
    found = distances.limit[is_last] + 1
    hit_tokens = np.minimum(known, distances.limit[is_last] // step * step).sum()
    saved_ns = (cost.plain_ns(prompts) - cost.reuse_ns(prompts, np.zeros_like(prompts), step)).sum()
    known = np.minimum(known, found // step * step)  # of an output nothing is prefilled
    saved_ns += (cost.reuse_ns(found, np.zeros_like(found), step) - cost.reuse_ns(found, known, step)).sum()
    return int(hit_tokens), int(saved_ns)


@dataclass(frozen=True, slots=True, eq=False)
class _Boundaries:
    """[num_boundaries] each: where they end on their path, the length of its prompt, and their distances."""

    ends: Int64Array
    prompt_tokens: Int64Array
    blocks: Int64Array
    snapshots: Int64Array


def _boundaries(distances: StackDistances, tokens_per_block: int, step: int) -> Iterator[_Boundaries]:
    """Multiples of the step that were on a path before, also at the very end of a path, a bounded number at once."""
    block_factor, factor = tokens_per_block // distances.tokens_per_block, step // distances.tokens_per_block
    first = distances.start // factor
    count = distances.end // factor - first
    some = np.flatnonzero(count > 0)
    first, count = first[some], count[some]
    later, start = distances.later_of(tokens_per_block)[some], distances.start[some]
    # distances of the boundary before a segment's first one; each further one adds a snapshot and its blocks
    blocks_later = later + first * factor // block_factor - start // block_factor
    snapshots_later = distances.later_of(step)[some]
    prompt_tokens = distances.limit[some] + 1
    ends = np.cumsum(count)
    begin = 0
    while begin < count.size:
        done = int(ends[begin - 1]) if begin else 0
        stop = max(begin + 1, int(np.searchsorted(ends, done + _BOUNDARIES_AT_ONCE, side="right")))
        part = np.repeat(np.arange(begin, stop), count[begin:stop])
        number = np.arange(done + 1, int(ends[stop - 1]) + 1) - (ends - count)[part]
        yield _Boundaries(
            ends=(first[part] + number) * step,
            prompt_tokens=prompt_tokens[part],
            blocks=blocks_later[part] + number * (factor // block_factor),
            snapshots=snapshots_later[part] + number,
        )
        begin = stop
