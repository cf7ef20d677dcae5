"""Qwen-Bailian traces: JSON lines of chats, `timestamp` in seconds, an id for each 16 prompt tokens.

An id is a hash of the block's content alone, so equal ids at different places of prompts share nothing: the ids are
folded into ids of prefixes. A session is a chain of `parent_chat_id`, named by the chat that it began with.
"""

from array import array
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ssmcache_sim.formats.building import Outputs, RowColumns, build_trace, check_id_counts
from ssmcache_sim.formats.fields import (
    MAX_ID,
    int_list_field,
    parse_object,
    seconds_field,
    session_field,
    tokens_field,
    turn_field,
)
from ssmcache_sim.formats.numbering import fold_contents
from ssmcache_sim.formats.options import FirstRow, ReadOptions, TraceFormat
from ssmcache_sim.formats.source import SourceFile
from ssmcache_sim.scratch import dense
from ssmcache_sim.trace import Trace

NAME = "qwen-bailian"
_BLOCK = 16
_NO_PARENT = "-1"
_MS_PER_SECOND = 1000


class _ChatRow(NamedTuple):
    arrival_ms: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: list[int]
    chat: str | None
    parent: str | None
    turn: int


def recognises(first: FirstRow) -> bool:
    """Whether a file opens with a chat that names its parent."""
    return {"chat_id", "parent_chat_id"} <= first.fields.keys()


def read(source: SourceFile, tokens_per_block: int | None, options: ReadOptions) -> Trace:
    """Reads all rows; the block is 16 unless said otherwise. Errors: TraceError with file and line."""
    columns, parent_lines = RowColumns(), array("q")
    roots: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line_number, row in source.rows(_parse):
        session = row.chat
        if row.parent is not None and row.parent != _NO_PARENT:
            session = roots.get(row.parent, row.parent)
        if row.chat is not None and session is not None:
            roots[row.chat] = session
            lines[row.chat] = line_number
        parent_lines.append(lines.get(row.parent or _NO_PARENT, 0))
        columns.add(line_number, row.arrival_ms, row.prompt_tokens, row.output_tokens, row.hash_ids, session, row.turn)
    block = _BLOCK if tokens_per_block is None else tokens_per_block
    rows = replace(columns.rows(), parent_lines=np.frombuffer(parent_lines, np.int64))
    rows = check_id_counts(source, rows, block)
    distinct, contents = dense(rows.ids)
    ids, num_keys = fold_contents(contents, rows.num_ids, distinct.size)
    outputs: Outputs = "revealed" if options.outputs else "none"
    return build_trace(source, replace(rows, ids=ids), block, num_keys, format_name=NAME, outputs=outputs)


def _parse(line: bytes) -> _ChatRow:
    row = parse_object(line)
    return _ChatRow(
        seconds_field(row, "timestamp") * _MS_PER_SECOND,
        tokens_field(row, "input_length", 1),
        tokens_field(row, "output_length", 0),
        int_list_field(row, "hash_ids", MAX_ID),
        session_field(row, "chat_id"),
        session_field(row, "parent_chat_id"),
        turn_field(row),
    )


FORMAT = TraceFormat(NAME, recognises, read, frozenset({"outputs"}))
