"""Reading trace files: the format is told by the content, the compression (none, gzip, xz) by the first bytes.

A new format is a module with `recognises(first_row)` and `read(source, tokens_per_block)`, and a line in `_FORMATS`.
"""

import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats import mooncake
from ssmcache_sim.formats.building import SourceFile
from ssmcache_sim.trace import Trace


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """A kind of trace file: its name, whether a first row is one of its rows, and its reader."""

    name: str
    recognises: Callable[[dict[str, object]], bool]
    read: Callable[[SourceFile, int | None], Trace]


_FORMATS = (TraceFormat("mooncake", mooncake.recognises, mooncake.read),)


def read_trace(path: str | Path, tokens_per_block: int | None = None) -> Trace:
    """Reads a trace file of any known format, requests in order of arrival.

    Args:
        path: the file; may be compressed with gzip or xz.
        tokens_per_block: tokens that one recorded id stands for; None: told by the content.

    Errors: TraceError, one line, for anything wrong with the file or its rows.
    """
    if tokens_per_block is not None and tokens_per_block < 1:
        raise TraceError(f"trace block: expected a positive integer, got {tokens_per_block}")
    source = _open(Path(path))
    first_line = next((number for number, line in enumerate(source.lines, start=1) if line.strip()), None)
    if first_line is None:
        raise TraceError(f"{source.name}: expected at least one request, got an empty file")
    first_row = mooncake.parse_object(source, first_line, source.lines[first_line - 1])
    for trace_format in _FORMATS:
        if trace_format.recognises(first_row):
            return trace_format.read(source, tokens_per_block)
    known = ", ".join(trace_format.name for trace_format in _FORMATS)
    fields = ", ".join(sorted(first_row)) or "no fields"
    raise source.error(first_line, f"format: expected a row of one of: {known}; got an object with {fields[:200]}")


def _open(path: Path) -> SourceFile:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: cannot read the trace: {error.strerror or error}") from error
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        elif content[:6] == b"\xfd7zXZ\x00":
            content = lzma.decompress(content)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise TraceError(f"{path}: expected whole compressed content, got: {error}") from error
    return SourceFile(path.name, hashlib.sha256(content).hexdigest(), content.split(b"\n"))
