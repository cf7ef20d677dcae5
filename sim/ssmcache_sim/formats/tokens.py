"""Flat token traces: JSON lines with `arrival_time_ns`, `input_toks`, `output_toks` and the token ids of the prompt.

Outputs are recorded as well (`output_tok_ids`), and read where they are asked for.

The keys are exact at any block size: blocks are told apart by their tokens, not by a hash.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ssmcache_sim.formats.building import Outputs, RowColumns, build_trace
from ssmcache_sim.formats.fields import (
    int_field,
    int_list_field,
    parse_object,
    session_field,
    tokens_field,
    turn_field,
)
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

    def contents_of_path(self, prompt: list[int], output: list[int]) -> list[int]:
        """As `contents`, of the full blocks of a path: all but the last generated token."""
        tokens = prompt + output[:-1]
        return self.contents(tokens[: len(tokens) - len(tokens) % self._tokens_per_block])

    def trace(
        self,
        source: SourceFile,
        columns: RowColumns,
        *,
        format_name: str,
        outputs: Outputs,
        reading: str = "",
        rebase: bool = False,
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
            outputs=outputs,
            reading=reading,
            rebase=rebase,
        )


class _TokenRow(NamedTuple):
    arrival_ms: float
    output_tokens: int
    tokens: list[int]
    session: str | None
    turn: int
    output: list[int] | None = None


def recognises(first: FirstRow) -> bool:
    """Whether a file opens with a row of token ids."""
    return "input_tok_ids" in first.fields


def read(source: SourceFile, tokens_per_block: int | None, options: ReadOptions) -> Trace:
    """Reads all rows, in blocks of 16 tokens unless said otherwise. Errors: TraceError with file and line."""
    block = DEFAULT_BLOCK if tokens_per_block is None else tokens_per_block
    columns, blocks = RowColumns(), TokenBlocks(block)
    for line_number, row in source.rows(_parse_with_output if options.outputs else _parse):
        tokens = row.tokens
        contents = blocks.contents(tokens) if row.output is None else blocks.contents_of_path(tokens, row.output)
        columns.add(line_number, row.arrival_ms, len(tokens), row.output_tokens, contents, row.session, row.turn)
    return blocks.trace(source, columns, format_name=NAME, outputs="recorded" if options.outputs else "none")


def _parse(line: bytes) -> _TokenRow:
    return _token_row(parse_object(line))


def _parse_with_output(line: bytes) -> _TokenRow:
    row = parse_object(line)
    return _token_row(row)._replace(output=_ids(row, "output_tok_ids", "output_toks"))


def _token_row(row: dict[str, Any]) -> _TokenRow:
    return _TokenRow(
        int_field(row, "arrival_time_ns", 0) / _NS_PER_MS,
        tokens_field(row, "output_toks", 0),
        _ids(row, "input_tok_ids", "input_toks"),
        session_field(row),
        turn_field(row),
    )


def _ids(row: dict[str, Any], name: str, counted_by: str) -> list[int]:
    tokens = int_list_field(row, name, _MAX_TOKEN)
    num_tokens = tokens_field(row, counted_by, 0)
    if len(tokens) != num_tokens:
        raise RowError(f"{name}: expected {num_tokens} ids, as {counted_by} says, got {len(tokens)}")
    return tokens


FORMAT = TraceFormat(NAME, recognises, read, frozenset({"outputs"}))
