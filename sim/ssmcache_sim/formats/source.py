"""A trace file as a stream of lines: decompressed, counted and hashed while it is read, never held as a whole."""

import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias, TypeVar

from ssmcache_sim.errors import TraceError

_CHUNK_BYTES = 1 << 20
_ZSTD_CHUNK_BYTES = 1 << 13  # packed; a few bytes may stand for 128 KiB, and all of a chunk is unpacked at once
_MAX_LINE_BYTES = 1 << 28  # a conversation of a million tokens a turn has a few megabytes
_GZIP, _XZ, _ZSTD = b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"

Row = TypeVar("Row")
ReadProgress: TypeAlias = Callable[[float], None]


class RowError(ValueError):
    """What is wrong with a row; the source adds the file and the line."""


def legal_text(text: str) -> str:
    r"""The text with each lone surrogate, which JSON and names of files may hold and UTF-8 cannot, written as `\udcff`.

    So that what is different stays so.
    """
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


class SourceFile:
    """One pass over a trace file.

    Args:
        path: plain, or compressed with gzip, xz or zstd: told by the first bytes.
        skip_broken: leave broken rows out and count them.
        progress: called with the share of the file that has been read, 0 to 1.

    Errors: TraceError when the file cannot be read, at once or while its lines are read.
    """

    def __init__(self, path: Path, skip_broken: bool, progress: ReadProgress | None) -> None:
        self.path = path
        self.name = legal_text(path.name)
        self.num_broken = 0
        self._skip_broken = skip_broken
        self._progress = progress
        self._hash = hashlib.sha256()
        self._lines = self._numbered_lines()
        self._peeked: list[tuple[int, bytes]] = []

    @property
    def sha256(self) -> str:
        """Of the uncompressed content that was read so far, in hex."""
        return self._hash.hexdigest()

    def peek(self) -> tuple[int, bytes] | None:
        """The next line that is not blank and was not peeked at, with its number; `rows` will begin before it."""
        line = next(self._lines, None)
        if line is not None:
            self._peeked.append(line)
        return line

    def rows(self, parse: Callable[[bytes], Row | None]) -> Iterator[tuple[int, Row]]:
        """Line number and parsed row of each line that is not blank; lines parsed to None are no rows.

        Errors: TraceError where `parse` raises RowError and broken rows are not skipped.
        """
        for line_number, line in self._all_lines():
            try:
                row = parse(line)
            except RowError as error:
                self.reject(line_number, str(error))
            else:
                if row is not None:
                    yield line_number, row

    def reject(self, line_number: int, what: str) -> None:
        """Counts a row as broken. Errors: TraceError, unless broken rows are skipped."""
        if not self._skip_broken:
            raise self.error(line_number, what)
        self.num_broken += 1

    def error(self, line_number: int, what: str) -> TraceError:
        return TraceError(f"{self.name}:{line_number}: {what}")

    def _all_lines(self) -> Iterator[tuple[int, bytes]]:
        yield from self._peeked
        yield from self._lines

    def _numbered_lines(self) -> Iterator[tuple[int, bytes]]:
        for line_number, line in enumerate(self._raw_lines(), start=1):
            if line and not line.isspace():
                yield line_number, line

    def _raw_lines(self) -> Iterator[bytes]:
        unfinished: list[bytes] = []
        num_bytes = 0
        for chunk in self._chunks():
            self._hash.update(chunk)
            first, *others = chunk.split(b"\n")
            unfinished.append(first)
            num_bytes += len(first)
            if num_bytes > _MAX_LINE_BYTES:
                raise TraceError(f"{self.name}: expected rows of at most {_MAX_LINE_BYTES:,} bytes, got a longer one")
            if others:
                yield b"".join(unfinished)
                yield from others[:-1]
                unfinished = [others[-1]]
                num_bytes = len(others[-1])
        yield b"".join(unfinished)

    def _chunks(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                num_bytes = max(os.fstat(file.fileno()).st_size, 1)
                for chunk in _content(file, self.name):
                    yield chunk
                    if self._progress is not None:
                        self._progress(min(file.tell() / num_bytes, 1.0))
        except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
            raise TraceError(f"{self.path}: expected whole compressed content, got: {error}") from error
        except OSError as error:
            raise TraceError(f"{self.path}: cannot read the trace: {error.strerror or error}") from error


def _content(file: BinaryIO, name: str) -> Iterator[bytes]:
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(_ZSTD):
        yield from _zstd_content(file, name)
        return
    stream: gzip.GzipFile | lzma.LZMAFile | BinaryIO = file
    if magic.startswith(_GZIP):
        stream = gzip.GzipFile(fileobj=file)
    elif magic.startswith(_XZ):
        stream = lzma.LZMAFile(file)  # noqa: SIM115  the caller closes the file below it
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _zstd_content(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Frame by frame: an end inside a frame is an error, which the package's own stream keeps quiet about."""
    try:
        import zstandard
    except ImportError:
        raise TraceError(f"{name}: expected the package zstandard to read zstd: pip install zstandard") from None
    frame = zstandard.ZstdDecompressor().decompressobj()
    in_frame = False
    packed = b""
    while packed := packed or file.read(_ZSTD_CHUNK_BYTES):
        try:
            yield frame.decompress(packed)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        packed, in_frame = frame.unused_data, not frame.eof
        if frame.eof:
            frame = zstandard.ZstdDecompressor().decompressobj()
    if in_frame:
        raise EOFError("the end of the file inside a zstd frame")
