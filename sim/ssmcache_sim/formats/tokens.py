"""Flat token traces: JSON lines with `arrival_time_ns`, `input_toks`, `output_toks` and the token ids of the prompt.

The keys are exact at any block size: blocks are told apart by their tokens, not by a hash.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ssmcache_sim.formats.building import RowColumns, build_trace
from ssmcache_sim.formats.fields import int_field, int_list_field, parse_object, session_field, turn_field
from ssmcache_sim.formats.numbering import fold_contents
from ssmcache_sim.formats.options import FirstRow, ReadOptions, TraceFormat
from ssmcache_sim.formats.source import RowError, SourceFile
from ssmcache_sim.trace import Trace

NAME = "flat-tokens"
DEFAULT_BLOCK = 16
_MAX_TOKEN = (1 << 31) - 1
_NS_PER_MS = 1_000_000


class TokenBlocks:
    """Numbers the contents of blocks of tokens, the last and partial one of a prompt too.

    Cost: memory grows with the different blocks that were seen, not with their number.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self._tokens_per_block = tokens_per_block
        self._block_bytes = tokens_per_block * np.dtype(np.int32).itemsize
        self._numbers: dict[bytes, int] = {}

    def contents(self, tokens: list[int]) -> list[int]:
        """A number for each block: equal for equal tokens, and only for these."""
        packed = np.array(tokens, dtype=np.int32).tobytes()
        numbers, step = self._numbers, self._block_bytes
        pieces = (packed[start : start + step] for start in range(0, len(packed), step))
        return [numbers.setdefault(piece, len(numbers)) for piece in pieces]

    def trace(
        self, source: SourceFile, columns: RowColumns, *, format_name: str, reading: str = "", rebase: bool = False
    ) -> Trace:
        """The trace of rows whose ids are contents of this numbering; the rest as of `build_trace`."""
        rows = columns.rows()
        ids, num_keys = fold_contents(rows.ids.astype(np.int64, copy=False), rows.num_ids, len(self._numbers))
        return build_trace(
            source,
            replace(rows, ids=ids),
            self._tokens_per_block,
            num_keys,
            format_name=format_name,
            reading=reading,
            rebase=rebase,
        )


class _TokenRow(NamedTuple):
    arrival_ms: float
    output_tokens: int
    tokens: list[int]
    session: str | None
    turn: int


def recognises(first: FirstRow) -> bool:
    """Whether a file opens with a row of token ids."""
    return "input_tok_ids" in first.fields


def read(source: SourceFile, tokens_per_block: int | None, options: ReadOptions) -> Trace:
    """Reads all rows, in blocks of 16 tokens unless said otherwise. Errors: TraceError with file and line."""
    block = DEFAULT_BLOCK if tokens_per_block is None else tokens_per_block
    columns, blocks = RowColumns(), TokenBlocks(block)
    for line_number, row in source.rows(_parse):
        contents = blocks.contents(row.tokens)
        columns.add(line_number, row.arrival_ms, len(row.tokens), row.output_tokens, contents, row.session, row.turn)
    return blocks.trace(source, columns, format_name=NAME)


def _parse(line: bytes) -> _TokenRow:
    row = parse_object(line)
    tokens = int_list_field(row, "input_tok_ids", _MAX_TOKEN)
    num_tokens = int_field(row, "input_toks", 0)
    if len(tokens) != num_tokens:
        raise RowError(f"input_tok_ids: expected {num_tokens} ids, as input_toks says, got {len(tokens)}")
    return _TokenRow(
        int_field(row, "arrival_time_ns", 0) / _NS_PER_MS,
        int_field(row, "output_toks", 0),
        tokens,
        session_field(row),
        turn_field(row),
    )


FORMAT = TraceFormat(NAME, recognises, read)
