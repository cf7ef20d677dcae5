"""From the rows of a trace file to a `Trace`: the checks and the order that all formats share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssmcache_sim.errors import TraceError
from ssmcache_sim.trace import Float64Array, Int64Array, Trace


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A trace file in memory: its name for messages, the hash of its uncompressed content, and its lines."""

    name: str
    sha256: str
    lines: Sequence[bytes]

    def error(self, line_number: int, what: str) -> TraceError:
        return TraceError(f"{self.name}:{line_number}: {what}")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Checked rows in file order. `ids` holds the block ids of all rows, `num_ids` how many each has."""

    line_numbers: Int64Array
    arrival_ms: Float64Array
    prompt_tokens: Int64Array
    output_tokens: Int64Array
    ids: Int64Array
    num_ids: Int64Array


def build_trace(source: SourceFile, rows: Rows, tokens_per_block: int) -> Trace:
    """Checks that ids are unique per prefix, numbers them densely, sorts by arrival (stable).

    Every row has floor(prompt tokens / block) or one more ids.
    Errors: TraceError with the line of an id that follows two different ids.
    """
    starts = np.cumsum(rows.num_ids) - rows.num_ids
    distinct_ids, ids = np.unique(rows.ids, return_inverse=True)
    _check_unique_per_prefix(source, rows, starts, distinct_ids, ids)
    order = np.argsort(rows.arrival_ms, kind="stable")
    num_full = (rows.prompt_tokens // tokens_per_block)[order]
    offsets = np.concatenate(([0], np.cumsum(num_full)))
    # place of each full block in the file: where its row begins, plus its index within the row
    places = np.repeat(starts[order] - offsets[:-1], num_full) + np.arange(offsets[-1])
    partial_ids = np.full(order.size, -1, dtype=np.int64)
    has_partial = rows.num_ids[order] > num_full
    partial_ids[has_partial] = ids[(starts[order] + num_full)[has_partial]]
    num_late = int(np.count_nonzero(np.diff(rows.arrival_ms) < 0))
    return Trace(
        name=source.name,
        sha256=source.sha256,
        tokens_per_block=tokens_per_block,
        arrival_ms=rows.arrival_ms[order],
        prompt_tokens=rows.prompt_tokens[order],
        output_tokens=rows.output_tokens[order],
        block_keys=ids[places],
        offsets=offsets,
        partial_ids=partial_ids,
        num_keys=distinct_ids.size,
        repairs=(("rows earlier than the row before, sorted by arrival", num_late),) if num_late else (),
    )


def _check_unique_per_prefix(
    source: SourceFile, rows: Rows, starts: Int64Array, distinct_ids: Int64Array, ids: Int64Array
) -> None:
    """An id names a whole prefix, so the same id always follows the same id (or always opens a prompt)."""
    previous = np.empty_like(ids)
    previous[1:] = ids[:-1]
    previous[starts[rows.num_ids > 0]] = -1
    usual = np.empty(distinct_ids.size, dtype=np.int64)
    usual[ids[::-1]] = previous[::-1]  # back to front: the first place of each id stays
    wrong = np.flatnonzero(previous != usual[ids])
    if wrong.size == 0:
        return
    place = int(wrong[0])
    row = int(np.searchsorted(starts, place, side="right")) - 1

    def name(previous_id: int) -> str:
        return f"after {distinct_ids[previous_id]}" if previous_id >= 0 else "as the first of a prompt"

    raise source.error(
        int(rows.line_numbers[row]),
        f"hash_ids: expected ids that are unique per prefix, but id {distinct_ids[ids[place]]} comes "
        f"{name(int(previous[place]))} here and {name(int(usual[ids[place]]))} before",
    )
