"""Arrays with an entry for each block reference of a trace, which may be more than memory has room for.

Large ones lie in files without a name in the system's folder for temporary files (`TMPDIR` names another): the system
keeps as much of a file in memory as there is room for, and frees it when nothing refers to the array any more, or this
process ends. What works on such arrays goes through them in pieces.
"""

import os
import tempfile
from array import array
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ssmcache.keys import Int64Array
from ssmcache_sim.errors import TraceError

LARGE = 1 << 23
"""Entries from which on an array is a file: 64 MiB of 8 bytes each."""

PIECE = 1 << 20
"""Entries that are worked on at once."""


def new_ids(size: int, dtype: npt.DTypeLike = np.int64) -> npt.NDArray[Any]:
    """[size] integers of 8 bytes and any content. Errors: TraceError where there is no room for a file."""
    if size < LARGE:
        return np.empty(size, dtype=dtype)
    with _new_file() as file:
        num_bytes = 8 * size
        try:
            # a hole that the disk has no room for later would end the process
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:
                file.truncate(num_bytes)
        except OSError as error:
            raise _no_room(num_bytes, error) from error
        return _mapped(file, dtype, size)


def spans(size: int) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of an array."""
    return [(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]


def gather(ids: npt.NDArray[Any], starts: Int64Array, offsets: Int64Array, step: int = 1) -> npt.NDArray[Any]:
    """Stretches of `ids`, one after the other.

    Args:
        starts: [n] where each begins; offsets: [n + 1] where each goes, and the end.
        step: only each so manieth entry, the first one included.
    """
    found = new_ids(int(offsets[-1]), ids.dtype)
    first = 0
    while first < starts.size:  # whole stretches that are a piece together, or one that is longer
        fitting = int(np.searchsorted(offsets, offsets[first] + PIECE, side="right")) - 1
        last = max(first + 1, fitting)
        begin, end = offsets[first], offsets[last]
        places = np.arange(0, (end - begin) * step, step, dtype=np.int64)
        places += np.repeat(
            starts[first:last] - (offsets[first:last] - begin) * step, np.diff(offsets[first : last + 1])
        )
        found[begin:end] = ids[places]
        first = last
    return found


class GrowingIds:
    """Ids that come one after the other. `id_type`: "q" for signed ones, "Q" for unsigned ones."""

    def __init__(self, id_type: str) -> None:
        self._ids: array[int] = array(id_type)
        self._file: IO[bytes] | None = None
        self._num_filed = 0

    def extend(self, ids: Any) -> None:
        """Adds a sequence of integers, or an int64 array. Errors: TraceError where a file has no room."""
        if isinstance(ids, np.ndarray):
            self._ids.frombytes(ids.tobytes())
        else:
            self._ids.extend(ids)
        if len(self._ids) >= LARGE:
            self._flush()

    def _flush(self) -> None:
        if self._file is None:
            self._file = _new_file()
        try:
            self._ids.tofile(self._file)
            self._file.flush()
        except OSError as error:
            raise _no_room(8 * (self._num_filed + len(self._ids)), error) from error
        self._num_filed += len(self._ids)
        del self._ids[:]

    def all(self) -> npt.NDArray[Any]:
        """All of them, writable; nothing can be added afterwards."""
        dtype = np.int64 if self._ids.typecode == "q" else np.uint64
        if self._file is None:
            return np.frombuffer(self._ids, dtype)
        self._flush()
        with self._file:
            return _mapped(self._file, dtype, self._num_filed)


def dense(ids: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], Int64Array]:
    """(distinct ids, ascending; for each id its place among them), as `np.unique` finds them."""
    if ids.size <= PIECE:
        distinct, inverse = np.unique(ids, return_inverse=True)
        return distinct, inverse
    distinct = _distinct(ids)
    places = new_ids(ids.size)
    for start, stop in spans(ids.size):
        few, inverse = np.unique(ids[start:stop], return_inverse=True)
        places[start:stop] = np.searchsorted(distinct, few)[inverse]
    return distinct, places


def _distinct(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The distinct ids, ascending. Joins what is of like size, so each is joined but a few times."""
    found: list[npt.NDArray[Any]] = []
    for start, stop in spans(ids.size):
        last = _ascending(ids[start:stop])
        while found and found[-1].size <= 2 * last.size:
            last = _ascending(found.pop(), last)
        found.append(last)
    while len(found) > 1:
        last = found.pop()
        found[-1] = _ascending(found[-1], last)
    return found[0]


def _ascending(*ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The distinct ones of all: `np.unique`, which would take a hash table of several times their size."""
    found = np.concatenate(ids)
    found.sort(kind="stable")  # linear for what is sorted already
    return found[np.concatenate(([True], found[1:] != found[:-1]))]


def _new_file() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(prefix="ssmcache-")
    except OSError as error:
        raise TraceError(
            f"block ids: expected a folder for temporary files to write to (TMPDIR names another), got: {error}"
        ) from error


def _mapped(file: IO[bytes], dtype: Any, size: int) -> npt.NDArray[Any]:
    # a plain array: what NumPy makes of a memmap is one again, also where it is in memory
    return np.asarray(np.memmap(file, dtype, "r+", shape=size))


def _no_room(num_bytes: int, error: OSError) -> TraceError:
    folder = tempfile.gettempdir()
    return TraceError(
        f"{folder}: expected room for {num_bytes:,} bytes of block ids (TMPDIR names another folder): {error.strerror}"
    )
