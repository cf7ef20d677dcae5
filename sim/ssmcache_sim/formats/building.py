"""From the rows of a trace file to a `Trace`: the columns, the checks and the order that all formats share."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats.numbering import first_wrong_place, rows_that_agree
from ssmcache_sim.formats.outputs import with_revealed_outputs
from ssmcache_sim.formats.source import SourceFile
from ssmcache_sim.scratch import GrowingIds, dense, gather
from ssmcache_sim.trace import (
    MAX_TIME_MS,
    Float64Array,
    Int64Array,
    Sessions,
    Trace,
    offsets_of,
    path_lengths,
    reading_with_outputs,
)

Outputs = Literal["none", "revealed", "recorded"]
IdArray = npt.NDArray[np.int64] | npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Checked rows in file order.

    Attributes:
        ids: the block ids of all rows, `num_ids` how many each has.
        session: index into `session_names`, -1 without one; turn: 0 where it is not recorded.
        parent_lines: line number of the row that each goes on from, 0 for none; None: a format that does not say.
    """

    line_numbers: Int64Array
    arrival_ms: Float64Array
    prompt_tokens: Int64Array
    output_tokens: Int64Array
    ids: IdArray
    num_ids: Int64Array
    session: Int64Array
    turn: Int64Array
    session_names: tuple[str, ...]
    parent_lines: Int64Array | None = None

    def keep(self, kept: npt.NDArray[np.bool_]) -> "Rows":
        """The rows where `kept` is true."""
        per_row = ("line_numbers", "arrival_ms", "prompt_tokens", "output_tokens", "num_ids", "session", "turn")
        changes = {name: getattr(self, name)[kept] for name in per_row}
        parents = None if self.parent_lines is None else self.parent_lines[kept]
        starts = np.cumsum(self.num_ids) - self.num_ids
        ids = gather(self.ids, starts[kept], offsets_of(self.num_ids[kept]))
        return replace(self, ids=ids, parent_lines=parents, **changes)


class RowColumns:
    """Rows as they are read, in typed arrays that grow. `id_type`: "q" for signed ids, "Q" for unsigned ones."""

    def __init__(self, id_type: str = "q") -> None:
        self._ints = tuple(array("q") for _ in range(6))
        self._arrival_ms = array("d")
        self._ids = GrowingIds(id_type)
        self._sessions: dict[str, int] = {}

    def add(
        self,
        line_number: int,
        arrival_ms: float,
        prompt_tokens: int,
        output_tokens: int,
        ids: Sequence[int] | Int64Array,
        session: str | None = None,
        turn: int = 0,
    ) -> None:
        """Adds a row."""
        index = -1 if session is None else self._sessions.setdefault(session, len(self._sessions))
        self._arrival_ms.append(arrival_ms)
        values = (line_number, prompt_tokens, output_tokens, len(ids), index, turn)
        for column, value in zip(self._ints, values, strict=True):
            column.append(value)
        self._ids.extend(ids)

    def rows(self) -> Rows:
        """All rows, without a copy; nothing can be added afterwards."""
        lines, prompts, outputs, num_ids, session, turn = (np.frombuffer(column, np.int64) for column in self._ints)
        return Rows(
            line_numbers=lines,
            arrival_ms=np.frombuffer(self._arrival_ms, np.float64),
            prompt_tokens=prompts,
            output_tokens=outputs,
            ids=self._ids.all(),
            num_ids=num_ids,
            session=session,
            turn=turn,
            session_names=tuple(self._sessions),
        )


def check_id_counts(source: SourceFile, rows: Rows, tokens_per_block: int, field: str = "hash_ids") -> Rows:
    """Rows with one id for each block, or for each full block. Errors: TraceError, unless broken rows are skipped."""
    is_ceil, is_floor = fitting(rows, tokens_per_block)
    fits = is_ceil | is_floor
    for row in np.flatnonzero(~fits).tolist():
        num_tokens, num_ids = int(rows.prompt_tokens[row]), int(rows.num_ids[row])
        expected = expected_ids(num_tokens, tokens_per_block)
        source.reject(int(rows.line_numbers[row]), f"{field}: expected {expected}, got {num_ids}")
    return rows if fits.all() else rows.keep(fits)


def expected_ids(num_tokens: int, tokens_per_block: int) -> str:
    """How many ids a prompt should have, for messages."""
    full, ceil = num_tokens // tokens_per_block, -(-num_tokens // tokens_per_block)
    counts = f"{ceil}" if full == ceil else f"{ceil} (or {full}, full blocks only)"
    return f"{counts} ids for {num_tokens} tokens in blocks of {tokens_per_block}"


def fitting(rows: Rows, tokens_per_block: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Per row: whether the number of ids is ceil, and whether it is floor, of prompt tokens / block."""
    full = rows.prompt_tokens // tokens_per_block
    ceil = full + (rows.prompt_tokens % tokens_per_block > 0)
    return rows.num_ids == ceil, rows.num_ids == full


def number_prefix_ids(source: SourceFile, rows: Rows, field: str = "hash_ids") -> tuple[Rows, int]:
    """Ids that name prefixes, numbered densely, and how many there are.

    Errors: TraceError with the line of an id that follows two different ids, unless broken rows are skipped: then a
    row that contradicts the rows before it is left out.
    """
    distinct_ids, ids = dense(rows.ids)
    wrong = first_wrong_place(ids, rows.num_ids, distinct_ids.size)
    if wrong is not None:
        row = int(np.searchsorted(np.cumsum(rows.num_ids), wrong.place, side="right"))

        def after(previous_id: int) -> str:
            return f"after {distinct_ids[previous_id]}" if previous_id >= 0 else "as the first of a prompt"

        source.reject(
            int(rows.line_numbers[row]),
            f"{field}: expected ids that are unique per prefix, but id {distinct_ids[ids[wrong.place]]} comes "
            f"{after(wrong.previous)} here and {after(wrong.usual)} before",
        )
        kept = rows_that_agree(ids, rows.num_ids, distinct_ids.size)
        source.num_broken += int(np.count_nonzero(~kept)) - 1  # one is counted above
        return replace(rows, ids=ids).keep(kept), distinct_ids.size
    return replace(rows, ids=ids), distinct_ids.size


def build_trace(
    source: SourceFile,
    rows: Rows,
    tokens_per_block: int,
    num_keys: int,
    *,
    format_name: str,
    outputs: Outputs = "none",
    reading: str = "",
    repairs: Iterable[tuple[str, int]] = (),
    rebase: bool = False,
    ordered: bool = True,
) -> Trace:
    """Rows with dense ids, sorted by arrival (stable).

    Args:
        rows: each has floor(prompt tokens / block) or one more ids, 0 <= id < num_keys; with recorded outputs
            floor(path tokens / block).
        outputs: `recorded`: the ids cover whole paths; `revealed`: they do not, but later turns do.
        reading, repairs: see `Trace`; rows that were late are added.
        rebase: arrivals count from the first one.
        ordered: whether rows come in order of arrival, so that late ones are worth a word.

    Errors: TraceError without a row.
    """
    check_not_empty(source, rows)
    order = np.argsort(rows.arrival_ms, kind="stable")
    is_recorded = outputs == "recorded"
    path_tokens = path_lengths(rows.prompt_tokens, rows.output_tokens) if is_recorded else rows.prompt_tokens
    num_full = (path_tokens // tokens_per_block)[order]
    offsets = offsets_of(num_full)
    starts = (np.cumsum(rows.num_ids) - rows.num_ids)[order]
    partial_ids = np.full(order.size, -1, dtype=np.int64)
    has_partial = rows.num_ids[order] > num_full
    partial_ids[has_partial] = rows.ids[(starts + num_full)[has_partial]]
    readings = (reading, "without broken rows" if source.num_broken else "")
    trace = Trace(
        name=source.name,
        sha256=source.sha256,
        tokens_per_block=tokens_per_block,
        arrival_ms=arrivals(source, rows, order, rebase),
        prompt_tokens=rows.prompt_tokens[order],
        output_tokens=rows.output_tokens[order],
        block_keys=gather(rows.ids, starts, offsets),
        offsets=offsets,
        partial_ids=partial_ids,
        num_keys=num_keys,
        repairs=all_repairs(rows, repairs, ordered),
        num_broken=source.num_broken,
        sessions=_sessions(rows, order),
        format_name=format_name,
        reading=", ".join(filter(None, readings)),
        output_known=np.ones(order.size, dtype=np.bool_) if is_recorded else None,
    )
    if outputs == "none":
        return trace
    if outputs == "revealed":
        trace = with_revealed_outputs(trace, rows.turn[order] > 0, _parents(rows, order))
    return replace(trace, reading=reading_with_outputs(trace))


def _parents(rows: Rows, order: Int64Array) -> Int64Array | None:
    """[num_requests] the request that each one goes on from, in the order given; -1 for none."""
    if rows.parent_lines is None:
        return None
    parents = rows.parent_lines[order]
    by_line = np.argsort(rows.line_numbers[order])
    places = np.minimum(np.searchsorted(rows.line_numbers[order][by_line], parents), order.size - 1)
    found = by_line[places]
    return np.where(rows.line_numbers[order][found] == parents, found, -1)


def check_not_empty(source: SourceFile, rows: Rows) -> None:
    """Errors: TraceError without a row."""
    if not rows.prompt_tokens.size:
        broken = f", {source.num_broken} broken rows" if source.num_broken else ""
        raise TraceError(f"{source.name}: expected at least one request, got none{broken}")


def arrivals(source: SourceFile, rows: Rows, order: Int64Array, rebase: bool) -> Float64Array:
    """Times of arrival in that order. Errors: TraceError for what no clock counts to."""
    arrival_ms = rows.arrival_ms[order]
    if not arrival_ms[-1] <= MAX_TIME_MS:  # NaN comes last, too
        raise TraceError(f"{source.name}: arrivals: expected up to {MAX_TIME_MS:.0f} ms, got {arrival_ms[-1]:g}")
    return arrival_ms - arrival_ms[0] if rebase else arrival_ms


def all_repairs(rows: Rows, repairs: Iterable[tuple[str, int]], ordered: bool) -> tuple[tuple[str, int], ...]:
    """What was repaired, and how often, without zeros."""
    num_late = int(np.count_nonzero(np.diff(rows.arrival_ms) < 0)) if ordered else 0
    late = ("rows earlier than the row before, sorted by arrival", num_late)
    return tuple((what, count) for what, count in (*repairs, late) if count)


def _sessions(rows: Rows, order: Int64Array) -> Sessions | None:
    if not rows.session_names:
        return None
    index, turns = rows.session[order], rows.turn[order]
    by_session = np.argsort(index, kind="stable")  # within a session still by arrival
    _, firsts, counts = np.unique(index[by_session], return_index=True, return_counts=True)
    counted = np.empty_like(turns)
    counted[by_session] = np.arange(1, turns.size + 1) - np.repeat(firsts, counts)
    turns = np.where(index < 0, 0, np.where(turns == 0, counted, turns))
    return Sessions(rows.session_names, index, turns)
