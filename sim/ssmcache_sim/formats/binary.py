"""Converted traces: the arrays of a `Trace` in a NumPy .npz file, read in a fraction of the time of the original.

Members of the archive, all without pickles:

- `header`: UTF-8 bytes of a JSON object: `format` ("ssmcache trace"), `version` (1), `name` and `sha256` of the
  original, `source_format`, `reading`, `tokens_per_block`, `num_keys`, `split_factor`, `repairs`, `num_broken`,
  `session_names`.
- `arrival_ms` float64, `prompt_tokens` int64, `output_tokens` int64, `partial_ids` int64: one for each request.
- `key_steps` int32 or int64: differences of the block keys of all prompts, the first one from 0. Keys mostly count up
  by one, and a row of ones is packed into nothing.
- `output_known` bool: one for each request, where the trace has outputs; then keys are those of whole paths.
- `session_index`, `session_turns` int64: one for each request, where `session_names` is not null.

A converted trace has the identity of its original: the same name, sha256 and reading. One with outputs is read with or
without them, as asked.
"""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ssmcache_sim.directories import whole_file
from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats.options import FirstRow, ReadOptions, TraceFormat
from ssmcache_sim.formats.source import SourceFile
from ssmcache_sim.scratch import new_ids, spans
from ssmcache_sim.trace import Int64Array, Sessions, Trace, offsets_of, path_lengths

NAME = "ssmcache-npz"
SUFFIX = ".npz"
_MAGIC = "ssmcache trace"
_VERSION = 1
_ZIP = b"PK\x03\x04"
_KEY_STEPS = "key_steps"
_PER_REQUEST = ("arrival_ms", "prompt_tokens", "output_tokens", "partial_ids")


def write_binary(trace: Trace, path: Path) -> None:
    """Writes a trace; the same trace gives the same bytes. Errors: OutputError."""
    sessions = trace.sessions
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
    """Reads a converted trace. Errors: TraceError for another archive, another version, or arrays that disagree."""
    try:
        with np.load(source.path, allow_pickle=False) as archive:
            header = json.loads(archive["header"].tobytes())
            if header["format"] != _MAGIC or header["version"] != _VERSION:
                found = f"{header['format']!r} version {header['version']!r}"
                raise TraceError(f"{source.name}: format: expected {_MAGIC!r} version {_VERSION}, got {found}")
            trace = _trace(archive, header, _keys(archive.zip))
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, TraceError):
            raise
        reason = " ".join(str(error).split())
        raise TraceError(f"{source.name}: expected a whole file of `ssmcache trace convert`, got: {reason}") from error
    if tokens_per_block not in (None, trace.tokens_per_block):
        expected = f"the {trace.tokens_per_block} tokens it was converted with"
        raise TraceError(f"{source.name}: trace block: expected {expected}, got {tokens_per_block}")
    if not options.outputs:
        return trace.without_outputs()
    if not trace.has_outputs:
        raise TraceError(f"{source.name}: --outputs: expected a trace that was converted with it, got prompts only")
    return trace


def _keys(archive: zipfile.ZipFile) -> Int64Array:
    """The keys of all blocks, from their differences, a piece at a time."""
    with archive.open(f"{_KEY_STEPS}.npy") as member:
        np.lib.format.read_magic(member)
        (size,), _, dtype = np.lib.format.read_array_header_1_0(member)
        if dtype not in (np.int32, np.int64):
            raise ValueError(f"key steps of {dtype}")
        keys, last = new_ids(size), 0
        for start, stop in spans(size):
            steps = np.frombuffer(member.read((stop - start) * dtype.itemsize), dtype)
            np.cumsum(steps, dtype=np.int64, out=keys[start:stop])
            keys[start:stop] += last
            last = int(keys[stop - 1])
        if member.read(1):
            raise ValueError("key steps after the last one")
    return keys


def _trace(archive: Any, header: dict[str, Any], keys: Int64Array) -> Trace:
    block = int(header["tokens_per_block"])
    has_outputs = "output_known" in archive
    columns = {name: archive[name] for name in (*_PER_REQUEST, *["output_known"] * has_outputs)}
    lengths = columns["prompt_tokens"], columns["output_tokens"]
    offsets = offsets_of((path_lengths(*lengths) if has_outputs else lengths[0]) // block)
    num_requests = columns["prompt_tokens"].shape
    if any(column.shape != num_requests for column in columns.values()) or keys.size != offsets[-1]:
        raise ValueError("arrays of different lengths")
    if keys.size and not 0 <= int(keys.min()) <= int(keys.max()) < header["num_keys"]:
        raise ValueError("keys beyond their number")
    return Trace(
        name=header["name"],
        sha256=header["sha256"],
        tokens_per_block=block,
        block_keys=keys,
        offsets=offsets,
        num_keys=header["num_keys"],
        repairs=tuple((what, count) for what, count in header["repairs"]),
        num_broken=header["num_broken"],
        split_factor=header["split_factor"],
        sessions=_sessions(archive, header["session_names"], num_requests),
        format_name=header["source_format"],
        reading=header["reading"],
        **columns,
    )


def _sessions(archive: Any, names: list[str] | None, shape: tuple[int, ...]) -> Sessions | None:
    if names is None:
        return None
    index: Int64Array = archive["session_index"]
    turns: Int64Array = archive["session_turns"]
    if not index.shape == turns.shape == shape:
        raise ValueError("arrays of different lengths")
    return Sessions(tuple(names), index, turns)


FORMAT = TraceFormat(NAME, recognises, read, frozenset({"outputs"}))
