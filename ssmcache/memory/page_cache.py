"""What the system keeps of a file in its memory: dropped, and looked at, for whoever measures a disk."""

from __future__ import annotations

import ctypes
import mmap
import os


def forget_cached(descriptor: int) -> bool:
    """Have the system drop what it keeps of a synced file in its memory.

    False where any of it is still there, or the system does not tell: on a file system in memory, for instance. What
    keeps data below the file system (the disk itself, the host of a virtual machine) is not known to the system.
    The file must be open for reading and writing. Costs a byte and some nanoseconds for each page of the file.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return num_cached_pages(descriptor) == 0
    except OSError:
        return False


def num_cached_pages(descriptor: int) -> int:
    """How many pages of a file, open for reading and writing, the system has in its memory. Errors: OSError.

    A read that may not wait (RWF_NOWAIT) would tell as much of one place, but it makes the system read ahead there:
    looking would bring back what was dropped. mincore changes nothing.
    """
    mincore = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
    if mincore is None:
        raise OSError("this system does not tell which pages of a file it has in its memory")
    num_bytes = os.fstat(descriptor).st_size
    if num_bytes == 0:
        return 0
    pages = bytearray(-(-num_bytes // mmap.PAGESIZE))
    with mmap.mmap(descriptor, num_bytes) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        into = ctypes.c_char.from_buffer(pages)
        failed = mincore(ctypes.byref(first), ctypes.c_size_t(num_bytes), ctypes.byref(into))
        error = ctypes.get_errno()
        del first, into  # a map with views into it cannot be closed
    if failed:
        raise OSError(error, os.strerror(error))
    return sum(page & 1 for page in pages)  # the other bits mean nothing yet
