"""Traces of text: JSON lines with `timestamp` (microseconds since the epoch), `session_id`, `input` and `output`.

Text says what prompts share only once it is cut into tokens, and each tokenizer cuts differently: one must be named.
A prompt may be empty: it is a request of no tokens. Where outputs are asked for, one is cut into tokens by itself, as a
model generates it, and follows its prompt directly.
"""

from typing import NamedTuple

from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats.building import Outputs, RowColumns
from ssmcache_sim.formats.fields import int_field, parse_object, session_field, text_field, turn_field
from ssmcache_sim.formats.options import FirstRow, ReadOptions, TraceFormat
from ssmcache_sim.formats.source import SourceFile
from ssmcache_sim.formats.tokenizers import CHOICES, load_tokenizer
from ssmcache_sim.formats.tokens import DEFAULT_BLOCK, TokenBlocks
from ssmcache_sim.trace import Trace

NAME = "text-sessions"
_US_PER_MS = 1000


class _TextRow(NamedTuple):
    arrival_us: int
    prompt: str
    output: str
    session: str | None
    turn: int


def recognises(first: FirstRow) -> bool:
    """Whether a file opens with a prompt as text."""
    return isinstance(first.fields.get("input"), str) and "timestamp" in first.fields


def read(source: SourceFile, tokens_per_block: int | None, options: ReadOptions) -> Trace:
    """Reads all rows, in blocks of 16 tokens unless said otherwise, times from the first arrival on.

    Errors: TraceError with file and line, or without a tokenizer.
    """
    if options.tokenizer is None:
        raise TraceError(f"{source.name}: text: expected --tokenizer, {CHOICES}, got none")
    encode = load_tokenizer(options.tokenizer)
    block = DEFAULT_BLOCK if tokens_per_block is None else tokens_per_block
    columns, blocks = RowColumns(), TokenBlocks(block)
    first_us = None
    for line_number, row in source.rows(_parse):
        first_us = row.arrival_us if first_us is None else first_us  # small numbers keep the microseconds exact
        tokens, output = encode(row.prompt), encode(row.output)
        contents = blocks.contents_of_path(tokens, output) if options.outputs else blocks.contents(tokens)
        arrival_ms = (row.arrival_us - first_us) / _US_PER_MS
        columns.add(line_number, arrival_ms, len(tokens), len(output), contents, row.session, row.turn)
    reading = f"tokenizer {options.tokenizer}"
    outputs: Outputs = "recorded" if options.outputs else "none"
    return blocks.trace(source, columns, format_name=NAME, outputs=outputs, reading=reading, rebase=True)


def _parse(line: bytes) -> _TextRow:
    row = parse_object(line)
    return _TextRow(
        int_field(row, "timestamp", 0),
        text_field(row, "input"),
        text_field(row, "output"),
        session_field(row),
        turn_field(row),
    )


FORMAT = TraceFormat(NAME, recognises, read, frozenset({"tokenizer", "outputs"}))
