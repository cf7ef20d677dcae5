"""Converted traces: the arrays of a `Trace` in a NumPy .npz file, read in a fraction of the time of the original.

Members of the archive, all without pickles, in one dimension:

- `header`: UTF-8 bytes of a JSON object: `format` ("ssmcache trace"), `version` (1), `name` and `sha256` of the
  original, `source_format`, `reading`, `tokens_per_block`, `num_keys`, `split_factor`, `repairs`, `num_broken`,
  `session_names`; and `inferred_block` (null, or tokens, rows and usual tokens of an `InferredBlock`; may be absent).
- `arrival_ms` float64, `prompt_tokens` int64, `output_tokens` int64, `partial_ids` int64: one for each request.
- `key_steps` int32 or int64: differences of the block keys of all prompts, the first one from 0. Keys mostly count up
  by one, and a row of ones is packed into nothing.
- `output_known` bool: one for each request, where the trace has outputs; then keys are those of whole paths.
- `session_index`, `session_turns` int64: one for each request, where `session_names` is not null.

A converted trace has the identity of its original: the same name, sha256 and reading. One with outputs is read with or
without them, as asked. Nothing in a file is believed before it is checked, sizes included: `_HEADER` and `_ARRAYS` say
what each value may be, and no more is taken into memory than the file can hold.
"""

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ssmcache_sim.directories import whole_file
from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats.fields import shown
from ssmcache_sim.formats.numbering import first_wrong_place
from ssmcache_sim.formats.options import FirstRow, ReadOptions, TraceFormat
from ssmcache_sim.formats.source import SourceFile, legal_text
from ssmcache_sim.scratch import dense, new_ids, spans
from ssmcache_sim.trace import (
    MAX_BLOCK,
    MAX_TIME_MS,
    MAX_TOKENS,
    InferredBlock,
    Int64Array,
    Sessions,
    Trace,
    offsets_of,
    path_lengths,
)

NAME = "ssmcache-npz"
SUFFIX = ".npz"
_MAGIC = "ssmcache trace"
_VERSION = 1
_ZIP = b"PK\x03\x04"
_KEY_STEPS = "key_steps"
_PER_REQUEST = ("arrival_ms", "prompt_tokens", "output_tokens", "partial_ids")
_MAX_INT = (1 << 63) - 1
_MAX_DEFLATED = 1032  # bytes that a packed one can stand for
# what zipfile, NumPy and JSON raise for content that is none
_BROKEN = (
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    OSError,
    RuntimeError,
    MemoryError,
    zlib.error,
    zipfile.BadZipFile,
)


class _WrongError(Exception):
    """What is wrong with a file."""


def _wrong(what: str, expected: str, got: object) -> _WrongError:
    return _WrongError(f"{what}: expected {expected}, got {shown(got)}")


class _Field(NamedTuple):
    """What a value of the header may be, in words and as a check."""

    expected: str
    fits: Callable[[Any], bool]


def _whole(least: int, most: int = _MAX_INT) -> _Field:
    return _Field(f"an integer from {least} to {most:,}", lambda value: type(value) is int and least <= value <= most)


def _list_of(what: str, fits: Callable[[Any], bool]) -> _Field:
    return _Field(f"a list of {what}", lambda value: isinstance(value, list) and all(map(fits, value)))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and legal_text(value) == value


def _is_repair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_text(value[0]) and _whole(1).fits(value[1])


def _is_inferred(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 3 and all(map(_whole(1, MAX_BLOCK).fits, value)))


_TEXT = _Field("a string", _is_text)
_NAMES = _list_of("strings", _is_text)
_HEADER: Mapping[str, _Field] = {
    "name": _TEXT,
    "sha256": _Field("64 hex digits", lambda value: _is_text(value) and bool(re.fullmatch("[0-9a-f]{64}", value))),
    "source_format": _TEXT,
    "reading": _TEXT,
    "tokens_per_block": _whole(1, MAX_BLOCK),
    "num_keys": _whole(0),
    "split_factor": _whole(1, MAX_BLOCK),
    "repairs": _list_of("[what, how many] pairs", _is_repair),
    "num_broken": _whole(0),
    "session_names": _NAMES._replace(expected="null or a list of strings", fits=lambda v: v is None or _NAMES.fits(v)),
    "inferred_block": _Field("null or three positive integers", _is_inferred),
}


class _Array(NamedTuple):
    """What an array with an entry for each request may hold: numbers of one type, none below or above."""

    dtype: str
    least: float
    most: float


_ARRAYS: Mapping[str, _Array] = {
    "arrival_ms": _Array("float64", 0, MAX_TIME_MS),
    "prompt_tokens": _Array("int64", 0, MAX_TOKENS),
    "output_tokens": _Array("int64", 0, MAX_TOKENS),
    "partial_ids": _Array("int64", -1, _MAX_INT),
    "output_known": _Array("bool", 0, 1),
    "session_index": _Array("int64", -1, _MAX_INT),
    "session_turns": _Array("int64", 0, 1 << 53),
}


def write_binary(trace: Trace, path: Path) -> None:
    """Writes a trace; the same trace gives the same bytes. Errors: OutputError."""
    trace = _numbered_densely(trace)
    sessions, inferred = trace.sessions, trace.inferred_block
    header = {
        "format": _MAGIC,
        "version": _VERSION,
        "name": trace.name,
        "sha256": trace.sha256,
        "source_format": trace.format_name,
        "reading": trace.reading,
        "tokens_per_block": trace.tokens_per_block,
        "num_keys": trace.num_keys,
        "split_factor": trace.split_factor,
        "repairs": trace.repairs,
        "num_broken": trace.num_broken,
        "session_names": None if sessions is None else sessions.names,
        "inferred_block": None if inferred is None else list(inferred),
    }
    arrays: dict[str, npt.NDArray[Any]] = {name: getattr(trace, name) for name in _PER_REQUEST}
    arrays["header"] = np.frombuffer(json.dumps(header, ensure_ascii=False).encode(), np.uint8)
    if trace.output_known is not None:
        arrays["output_known"] = trace.output_known
    if sessions is not None:
        arrays |= {"session_index": sessions.index, "session_turns": sessions.turns}
    dtype = np.dtype(np.int32 if trace.num_keys <= np.iinfo(np.int32).max else np.int64)
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in arrays.items():
            with _member(archive, name, values.dtype, values.size) as member:
                member.write(values.tobytes())
        with _member(archive, _KEY_STEPS, dtype, trace.block_keys.size) as member:
            for start, stop in spans(trace.block_keys.size):
                before = trace.block_keys[start - 1] if start else 0
                member.write(np.diff(trace.block_keys[start:stop], prepend=before).astype(dtype).tobytes())


def _numbered_densely(trace: Trace) -> Trace:
    """The trace, if it has no more keys than entries; a part of one has those of the whole, which is bad to read."""
    has_partial = trace.partial_ids >= 0
    if trace.num_keys <= trace.block_keys.size + np.count_nonzero(has_partial):
        return trace
    distinct, ids = dense(np.concatenate((trace.block_keys, trace.partial_ids[has_partial])))
    partial_ids = trace.partial_ids.copy()
    partial_ids[has_partial] = ids[trace.block_keys.size :]
    keys = ids[: trace.block_keys.size]
    return replace(trace, block_keys=keys, partial_ids=partial_ids, num_keys=distinct.size)


@contextmanager
def _member(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], size: int) -> Iterator[IO[bytes]]:
    """A member of an .npz to write the values of an array into."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(member, header)
        yield member


def recognises(first: FirstRow) -> bool:
    """Whether a file opens like a zip archive."""
    return first.line.startswith(_ZIP)


def read(source: SourceFile, tokens_per_block: int | None, options: ReadOptions) -> Trace:
    """Reads a converted trace. Errors: TraceError for another archive, another version, or values that cannot be."""
    try:
        with zipfile.ZipFile(source.path) as archive:
            trace = _Archive(archive, source.path.stat().st_size).trace()
    except TraceError:  # no room for what is read
        raise
    except _WrongError as error:
        raise TraceError(f"{source.name}: {error}") from error
    except _BROKEN as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise TraceError(f"{source.name}: expected a whole file of `ssmcache trace convert`, got: {reason}") from error
    if tokens_per_block not in (None, trace.tokens_per_block):
        expected = f"the {trace.tokens_per_block} tokens it was converted with"
        raise TraceError(f"{source.name}: trace block: expected {expected}, got {tokens_per_block}")
    if not options.outputs:
        return trace.without_outputs()
    if not trace.has_outputs:
        raise TraceError(f"{source.name}: --outputs: expected a trace that was converted with it, got prompts only")
    return trace


class _Archive:
    """The members of a file, each checked as it is read. Errors: _WrongError, and `_BROKEN`."""

    def __init__(self, archive: zipfile.ZipFile, num_packed_bytes: int) -> None:
        self._archive = archive
        self._most_bytes = _MAX_DEFLATED * num_packed_bytes

    def trace(self) -> Trace:
        """The whole trace."""
        header = self._header()
        block, num_keys, names = header["tokens_per_block"], header["num_keys"], header["session_names"]
        prompt_tokens = self._column("prompt_tokens")
        num_requests = prompt_tokens.size
        if not num_requests:
            raise _wrong("prompt_tokens", "at least one request", 0)
        arrival_ms = self._column("arrival_ms", num_requests)
        if (np.diff(arrival_ms) < 0).any():
            raise _wrong("arrival_ms", "times that do not fall", float(np.diff(arrival_ms).min()))
        output_tokens = self._column("output_tokens", num_requests)
        has_outputs = "output_known.npy" in self._archive.namelist()
        output_known = self._column("output_known", num_requests) if has_outputs else None
        partial_ids = self._column("partial_ids", num_requests)
        if (partial_ids[prompt_tokens % block == 0] >= 0).any():
            raise _wrong("partial_ids", "-1 for a prompt of full blocks", int(partial_ids.max()))
        offsets = offsets_of((path_lengths(prompt_tokens, output_tokens) if has_outputs else prompt_tokens) // block)
        keys = self._keys(int(offsets[-1]))
        most_keys = keys.size + int(np.count_nonzero(partial_ids >= 0))
        if num_keys > most_keys:  # whatever reads the trace takes memory for them
            raise _wrong("num_keys", f"at most {most_keys:,}, one for each block", num_keys)
        highest = max(int(keys.max(initial=0)), int(partial_ids.max()))
        if int(keys.min(initial=0)) < 0 or (num_keys <= highest and most_keys):
            raise ValueError("keys beyond their number")
        if first_wrong_place(keys, np.diff(offsets), num_keys) is not None:
            raise ValueError("a key that follows two different keys")
        inferred = header["inferred_block"]
        return Trace(
            name=header["name"],
            sha256=header["sha256"],
            tokens_per_block=block,
            arrival_ms=arrival_ms,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            block_keys=keys,
            offsets=offsets,
            partial_ids=partial_ids,
            num_keys=num_keys,
            repairs=tuple((what, count) for what, count in header["repairs"]),
            num_broken=header["num_broken"],
            split_factor=header["split_factor"],
            sessions=None if names is None else self._sessions(tuple(names), num_requests),
            format_name=header["source_format"],
            reading=header["reading"],
            output_known=output_known,
            inferred_block=None if inferred is None else InferredBlock(*inferred),
        )

    def _header(self) -> dict[str, Any]:
        with self._opened("header", "uint8") as (member, num_bytes, _):
            header = json.loads(_whole_content("header", member, num_bytes).decode())
        if not isinstance(header, dict):
            raise _wrong("header", "an object", header)
        magic, version = header.get("format"), header.get("version")
        if (magic, version) != (_MAGIC, _VERSION):
            found = f"{str(magic)[:40]!r} version {shown(version)}"
            raise _WrongError(f"format: expected {_MAGIC!r} version {_VERSION}, got {found}")
        for name, field in _HEADER.items():
            value = header.setdefault(name, None)
            if not field.fits(value):
                raise _wrong(name, field.expected, value)
        return header

    def _sessions(self, names: tuple[str, ...], num_requests: int) -> Sessions:
        index = self._column("session_index", num_requests, len(names) - 1)
        turns = self._column("session_turns", num_requests)
        if ((turns == 0) != (index < 0)).any():
            raise _wrong("session_turns", "0 for a request of no session and only there", int(turns.min()))
        return Sessions(names, index, turns)

    def _column(self, name: str, num_requests: int | None = None, most: float = _MAX_INT) -> npt.NDArray[Any]:
        """An array with an entry for each request, as `_ARRAYS` has it, and not above `most`."""
        array = _ARRAYS[name]
        most = min(array.most, most)
        with self._opened(name, array.dtype) as (member, size, dtype):
            if num_requests not in (None, size):
                raise ValueError("arrays of different lengths")
            values = np.frombuffer(_whole_content(name, member, size * dtype.itemsize), dtype)
        numbers = values.view(np.uint8) if dtype == np.bool_ else values
        wrong = ~((numbers >= array.least) & (numbers <= most))  # NaN is neither
        if wrong.any():
            raise _wrong(name, f"numbers from {array.least:,} to {most:,.0f}", numbers[wrong][0].item())
        return values

    def _keys(self, num_keys: int) -> Int64Array:
        """The keys of all blocks, from their differences, a piece at a time."""
        with self._opened(_KEY_STEPS, "int32", "int64") as (member, size, dtype):
            if size != num_keys:
                raise ValueError("arrays of different lengths")
            keys, last = new_ids(size), 0
            for start, stop in spans(size):
                steps = np.frombuffer(member.read((stop - start) * dtype.itemsize), dtype)
                np.cumsum(steps, dtype=np.int64, out=keys[start:stop])
                keys[start:stop] += last
                last = int(keys[stop - 1])
            if member.read(1):
                raise ValueError("key steps after the last one")
        return keys

    @contextmanager
    def _opened(self, name: str, *dtypes: str) -> Iterator[tuple[IO[bytes], int, np.dtype[Any]]]:
        """A member behind its header, how many values it has, and of which of the types they are."""
        member_info = self._archive.getinfo(f"{name}.npy")
        if member_info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _wrong(name, "a member stored or deflated", member_info.compress_type)
        with self._archive.open(member_info) as member:
            if np.lib.format.read_magic(member) != (1, 0):
                raise _wrong(name, "an array of NumPy format 1.0", "another one")
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            if dtype not in [np.dtype(each) for each in dtypes]:
                raise _wrong(name, " or ".join(dtypes), str(dtype))
            if len(shape) != 1 or shape[0] < 0:
                raise _wrong(name, "one dimension", str(shape))
            if shape[0] * dtype.itemsize > self._most_bytes:
                raise _wrong(name, f"at most the {self._most_bytes:,} bytes that fit into the file", shape[0])
            yield member, shape[0], dtype


def _whole_content(name: str, member: IO[bytes], num_bytes: int) -> bytes:
    content = member.read(num_bytes)
    if len(content) < num_bytes or member.read(1):
        raise ValueError(f"another number of values of {name} than it says")
    return content


FORMAT = TraceFormat(NAME, recognises, read, frozenset({"outputs"}))
