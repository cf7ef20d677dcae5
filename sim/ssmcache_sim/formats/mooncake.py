"""Mooncake traces: JSON lines with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`.

One id per block of prompt tokens (512 as published; derived files use 16), unique per prefix; the last block is
usually partial. Files whose rows name full blocks only are read too. Rows may have `session_id` and `turn`.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats.building import (
    Outputs,
    RowColumns,
    Rows,
    build_trace,
    check_id_counts,
    check_not_empty,
    fitting,
    number_prefix_ids,
)
from ssmcache_sim.formats.fields import (
    MAX_ID,
    int_field,
    int_list_field,
    parse_object,
    session_field,
    tokens_field,
    turn_field,
)
from ssmcache_sim.formats.options import FirstRow, ReadOptions, TraceFormat
from ssmcache_sim.formats.source import SourceFile
from ssmcache_sim.trace import InferredBlock, Trace

NAME = "mooncake"
PUBLISHED_BLOCK = 512
# sizes that an unnamed block is looked for among: the published one first, then what derived files use
_BLOCK_SIZES = (PUBLISHED_BLOCK, 16, 64, 128, 256, 32, 1024, 8, 48, 96, 2048, 4096)
_FIELDS = frozenset({"timestamp", "input_length", "output_length", "hash_ids"})


class MooncakeRow(NamedTuple):
    """A checked row, in the order of `RowColumns.add`."""

    arrival_ms: int
    prompt_tokens: int
    output_tokens: int
    hash_ids: list[int]
    session: str | None
    turn: int


def recognises(first: FirstRow) -> bool:
    """Whether a file opens like a Mooncake trace. Rows of other formats with `hash_ids` name their chat or scope."""
    return len(_FIELDS & first.fields.keys()) >= 2 and not first.fields.keys() & {"chat_id", "requests"}


def read(source: SourceFile, tokens_per_block: int | None, options: ReadOptions) -> Trace:
    """Reads all rows. `tokens_per_block=None` finds the block size from the number of ids of each row.

    Errors: TraceError with file and line.
    """
    columns = RowColumns()
    for line_number, row in source.rows(_parse):
        columns.add(line_number, *row)
    rows = columns.rows()
    check_not_empty(source, rows)
    inferred = None
    if tokens_per_block is None:
        tokens_per_block = _find_block(source, rows)
        inferred = _inferred(rows, tokens_per_block)
    rows = check_id_counts(source, rows, tokens_per_block)
    rows, num_keys = number_prefix_ids(source, rows)
    outputs: Outputs = "revealed" if options.outputs else "none"
    trace = build_trace(source, rows, tokens_per_block, num_keys, format_name=NAME, outputs=outputs)
    return replace(trace, inferred_block=inferred)


def _parse(line: bytes) -> MooncakeRow:
    row = parse_object(line)
    return MooncakeRow(
        int_field(row, "timestamp", 0),
        tokens_field(row, "input_length", 1),
        tokens_field(row, "output_length", 0),
        int_list_field(row, "hash_ids", MAX_ID),
        session_field(row),
        turn_field(row),
    )


def _find_block(source: SourceFile, rows: Rows) -> int:
    """The block size that the number of ids of all rows agrees with; the closest one where a row is broken.

    The published size wins where it fits. Errors: TraceError where several others do.
    """
    num_fitting: dict[int, int] = {}
    ceil_sizes: list[int] = []
    for size in _BLOCK_SIZES:
        is_ceil, is_floor = fitting(rows, size)
        num_fitting[size] = int(np.count_nonzero(is_ceil | is_floor))
        if is_ceil.all():
            ceil_sizes.append(size)
    best = max(_BLOCK_SIZES, key=num_fitting.__getitem__)  # the first of equals
    if num_fitting[best] < rows.num_ids.size or best == PUBLISHED_BLOCK:
        return best
    sizes = ceil_sizes or [size for size in _BLOCK_SIZES if num_fitting[size] == rows.num_ids.size]
    if len(sizes) > 1:
        shown = ", ".join(map(str, sorted(sizes)))
        raise TraceError(f"{source.name}: block size: expected --trace-block, because {shown} all fit the ids")
    return sizes[0]


def _inferred(rows: Rows, tokens_per_block: int) -> InferredBlock | None:
    """What is to be said of a block size that was found; None where rows of several lengths agree."""
    fits = np.logical_or(*fitting(rows, tokens_per_block))
    lengths = rows.prompt_tokens[fits]
    if not lengths.size or (lengths != lengths[0]).any():
        return None
    return InferredBlock(tokens_per_block, lengths.size, PUBLISHED_BLOCK)


FORMAT = TraceFormat(NAME, recognises, read, frozenset({"outputs"}))
