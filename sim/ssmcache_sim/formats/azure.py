"""Azure LLM inference traces: CSV with `TIMESTAMP` (UTC), `ContextTokens` and `GeneratedTokens`. Lengths only."""

from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np

from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats.building import RowColumns, all_repairs, arrivals, check_not_empty
from ssmcache_sim.formats.fields import shown
from ssmcache_sim.formats.options import FirstRow, ReadOptions, TraceFormat
from ssmcache_sim.formats.source import RowError, SourceFile
from ssmcache_sim.trace import MAX_TOKENS, LengthTrace

NAME = "azure-csv"
_HEADER = b"TIMESTAMP,ContextTokens,GeneratedTokens"
_SECOND = len("2023-11-16 18:15:46")
_TICKS_PER_SECOND = 10_000_000  # the seven decimals


class _LengthRow(NamedTuple):
    arrival_ticks: int
    prompt_tokens: int
    output_tokens: int


def recognises(first: FirstRow) -> bool:
    """Whether a file opens with the header line."""
    return first.line.strip() == _HEADER


def read(source: SourceFile, tokens_per_block: int | None, options: ReadOptions) -> LengthTrace:
    """Reads all rows, times from the first arrival on. Errors: TraceError with file and line."""
    if tokens_per_block is not None:
        raise TraceError(f"{source.name}: trace block: expected a trace with blocks, got lengths only ({NAME})")
    columns = RowColumns()
    first_ticks = None
    for line_number, row in source.rows(_parse):
        first_ticks = row.arrival_ticks if first_ticks is None else first_ticks
        arrival_ms = (row.arrival_ticks - first_ticks) * 1000 / _TICKS_PER_SECOND
        columns.add(line_number, arrival_ms, row.prompt_tokens, row.output_tokens, ())
    rows = columns.rows()
    check_not_empty(source, rows)
    order = np.argsort(rows.arrival_ms, kind="stable")
    return LengthTrace(
        name=source.name,
        sha256=source.sha256,
        format_name=NAME,
        arrival_ms=arrivals(source, rows, order, rebase=True),
        prompt_tokens=rows.prompt_tokens[order],
        output_tokens=rows.output_tokens[order],
        repairs=all_repairs(rows, (), ordered=True),
        num_broken=source.num_broken,
    )


def _parse(line: bytes) -> _LengthRow | None:
    line = line.strip()
    if line == _HEADER:
        return None
    cells = line.decode("utf-8", "replace").split(",")
    if len(cells) != 3:
        raise RowError(f"expected 3 cells ({_HEADER.decode()}), got {len(cells)}")
    time, prompt, output = cells
    return _LengthRow(_ticks(time), _tokens("ContextTokens", prompt), _tokens("GeneratedTokens", output))


def _ticks(text: str) -> int:
    """Ten-millionths of a second since the epoch, exact."""
    try:
        whole = datetime.strptime(text[:_SECOND], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
        fraction = text[_SECOND:]
        if fraction and not (fraction[0] == "." and fraction[1:].isdecimal() and len(fraction) <= 8):
            raise ValueError(fraction)
    except ValueError:
        expected = "a time such as 2023-11-16 18:15:46.6805900"
        raise RowError(f"TIMESTAMP: expected {expected}, got {shown(text)}") from None
    return int(whole.timestamp()) * _TICKS_PER_SECOND + int(fraction[1:].ljust(7, "0"))


def _tokens(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise RowError(f"{name}: expected a non-negative integer, got {shown(text)}")
    if len(text) > 15 or int(text) > MAX_TOKENS:
        raise RowError(f"{name}: expected a non-negative integer up to {MAX_TOKENS:,}, got {shown(text)}")
    return int(text)


FORMAT = TraceFormat(NAME, recognises, read)
