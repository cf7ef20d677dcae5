"""Reading trace files: the format is told by the content, the compression (none, gzip, xz, zstd) by the first bytes.

A new format is a module with a `TraceFormat`, and a place in `_FORMATS`.
"""

import json
import warnings
from operator import index
from pathlib import Path

from ssmcache_sim.errors import TraceError, TraceWarning
from ssmcache_sim.formats import azure, bailian, binary, dynamo, mooncake, text, tokens, weka
from ssmcache_sim.formats.fields import parse_object
from ssmcache_sim.formats.options import FirstRow, ReadOptions, TraceFormat
from ssmcache_sim.formats.source import ReadProgress, RowError, SourceFile
from ssmcache_sim.trace import MAX_BLOCK, LengthTrace, Trace

__all__ = ["ReadOptions", "ReadProgress", "format_names", "read_requests", "read_trace"]

# asked in this order; the mooncake format, which others have borrowed fields of, comes last
_FORMATS: tuple[TraceFormat, ...] = (
    binary.FORMAT,
    azure.FORMAT,
    weka.FORMAT,
    bailian.FORMAT,
    tokens.FORMAT,
    text.FORMAT,
    dynamo.FORMAT,
    mooncake.FORMAT,
)
_MAX_PEEKED = 100


def format_names() -> tuple[str, ...]:
    """All formats, by name."""
    return tuple(sorted(trace_format.name for trace_format in _FORMATS))


def read_trace(
    path: str | Path,
    tokens_per_block: int | None = None,
    options: ReadOptions | None = None,
    progress: ReadProgress | None = None,
) -> Trace:
    """Reads a trace file of any known format, requests in order of arrival.

    Args:
        path: the file; may be compressed with gzip, xz or zstd.
        tokens_per_block: tokens that one recorded id stands for, or that blocks of recorded tokens should have; None:
            told by the content.
        progress: called with the share of the file that has been read, 0 to 1.

    Errors: TraceError, one line, for anything wrong with the file or its rows, for a file that tells lengths only, and
    for one whose prompts are all empty.
    """
    requests = read_requests(path, tokens_per_block, options, progress)
    if isinstance(requests, LengthTrace):
        raise TraceError(
            f"{requests.name}: hit rates: expected a trace that tells what prompts share, got lengths only "
            f"({requests.format_name}); `ssmcache trace info` shows what there is"
        )
    return requests.with_tokens()


def read_requests(
    path: str | Path,
    tokens_per_block: int | None = None,
    options: ReadOptions | None = None,
    progress: ReadProgress | None = None,
) -> Trace | LengthTrace:
    """As `read_trace`, and reads files without hit rates, too. Warns (TraceWarning) of what it had to guess."""
    options = options or ReadOptions()
    if tokens_per_block is not None:
        tokens_per_block = _checked_block(tokens_per_block)
    source = SourceFile(Path(path), options.skip_broken, progress)
    trace_format = _tell_format(source) if options.format_name is None else _named_format(options.format_name)
    for name in options.given():
        if name not in trace_format.options:
            takers = ", ".join(taker.name for taker in _FORMATS if name in taker.options)
            flag = name.replace("_", "-")
            raise TraceError(f"--{flag}: expected a trace of the format {takers}, got {trace_format.name}")
    requests = trace_format.read(source, tokens_per_block, options)
    if isinstance(requests, Trace) and requests.inferred_block is not None and requests.inferred_block.warning:
        warnings.warn(f"{requests.name}: {requests.inferred_block.warning}", TraceWarning, stacklevel=3)
    return requests


def _checked_block(tokens_per_block: int) -> int:
    try:
        block = index(tokens_per_block)  # NumPy's integers are as good
    except TypeError:
        raise TraceError(f"trace block: expected a positive integer, got {tokens_per_block!r}") from None
    if not 1 <= block <= MAX_BLOCK:
        most = f" up to {MAX_BLOCK:,}" if block > MAX_BLOCK else ""
        raise TraceError(f"trace block: expected a positive integer{most}, got {block}")
    return block


def _named_format(name: str) -> TraceFormat:
    for trace_format in _FORMATS:
        if trace_format.name == name:
            return trace_format
    raise TraceError(f"format: expected one of {', '.join(format_names())}, got {name!r}")


def _tell_format(source: SourceFile) -> TraceFormat:
    """The format of the first row that can be read at all."""
    row = _first_row(source)
    for trace_format in _FORMATS:
        if trace_format.recognises(row):
            return trace_format
    fields = json.dumps(", ".join(sorted(row.fields)) or "no fields")[1:-1]  # names of fields may hold anything
    raise TraceError(
        f"{source.name}: format: expected a row of one of: {', '.join(format_names())}; "
        f"got an object with {fields[:200]}"
    )


def _first_row(source: SourceFile) -> FirstRow:
    for _ in range(_MAX_PEEKED):
        if (numbered := source.peek()) is None:
            break
        line_number, line = numbered
        if azure.recognises(FirstRow(line, {})) or binary.recognises(FirstRow(line, {})):
            return FirstRow(line, {})
        try:
            return FirstRow(line, parse_object(line))
        except RowError as error:
            source.reject(line_number, str(error))
            source.num_broken = 0  # the format's reader meets the line again
    raise TraceError(f"{source.name}: expected at least one request, got an empty file")
