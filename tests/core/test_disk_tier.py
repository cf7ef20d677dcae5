"""The disk tier: its files are nobody else's and leave nothing behind; transfers go in bounded pieces."""

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk_caches import DISK, GPU, NUM_SLOTS, SLOT, Cache, fail_after, open_files

from ssmcache.config import DiskCacheTierConfig, GpuCacheTierConfig
from ssmcache.memory.base import TransferError
from ssmcache.memory.disk import MAX_STAGING_BYTES, DiskTier, staging_bytes
from ssmcache.memory.host import HostMemory
from ssmcache.memory.page_cache import forget_cached, num_cached_pages


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    cache = Cache(tmp_path)
    yield cache
    cache.memory.close()


# -- files -----------------------------------------------------------------------------------------------------------


def _refuse_unnamed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without_o_tmpfile(path: Any, flags: int, *args: Any, **keywords: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *args, **keywords)

    monkeypatch.setattr(os, "open", without_o_tmpfile)


@pytest.mark.parametrize("unnamed_files", [True, False], ids=["unnamed", "unlinked"])
def test_files_are_private_and_have_no_name(
    tmp_path: Path, unnamed_files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not unnamed_files:
        _refuse_unnamed_files(monkeypatch)
    cache = Cache(tmp_path)
    cache.store(list(range(NUM_SLOTS)))
    files = [os.fstat(descriptor) for descriptor in open_files(tmp_path)]
    assert [(oct(file.st_mode & 0o7777), file.st_nlink) for file in files] == [("0o600", 0)]
    assert files[0].st_size == NUM_SLOTS * SLOT
    assert not os.get_inheritable(open_files(tmp_path)[0])
    assert list(tmp_path.iterdir()) == []
    cache.memory.close()
    assert open_files(tmp_path) == []


CHILD = """
import sys
import numpy as np
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from disk_caches import Cache
cache = Cache(Path(sys.argv[2]))
cache.store(list(range(20)))
print("stored", flush=True)
sys.stdin.read()
"""


def start_child(folder: Path) -> "subprocess.Popen[bytes]":
    """Another process with a disk tier in that directory, and slots on it, that waits to be killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"stored\n"
    return child


def stop_child(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def test_a_killed_process_leaves_nothing_in_the_directory(tmp_path: Path) -> None:
    child = start_child(tmp_path)
    stop_child(child)
    assert list(tmp_path.iterdir()) == []
    cache = Cache(tmp_path)
    cache.store([1])
    assert (cache.on_disk([1]) == cache.content[[1]]).all()
    cache.memory.close()


def test_a_living_neighbour_and_files_of_strangers_are_not_touched(tmp_path: Path) -> None:
    strangers = {"ssmcache-1234": b"mine", "ssmcache-99999-0.pages": b"", "notes.txt": b"text"}
    for name, content in strangers.items():
        (tmp_path / name).write_bytes(content)
    first, child, second = Cache(tmp_path, seed=1), start_child(tmp_path), Cache(tmp_path, seed=2)
    slots = list(range(NUM_SLOTS))
    first.store(slots)
    second.store(slots[::-1])
    stop_child(child)
    assert (first.on_disk(slots) == first.content).all()
    second.memory.close()
    assert (first.on_disk(slots) == first.content).all()
    first.memory.close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == strangers


@pytest.mark.parametrize("what", ["missing", "a file"])
def test_a_directory_that_is_none_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "a file":
        path.write_text("")
    memory = HostMemory()
    with pytest.raises(ValueError, match="path of the disk tier: expected a directory to make files in, got") as caught:
        memory.open((GpuCacheTierConfig(1), DiskCacheTierConfig(1, str(path))), [SLOT])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert memory.bytes_in_use == 0


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after("open", 0, errno.EACCES, monkeypatch)
    with pytest.raises(ValueError, match=r"expected a directory to make files in, got .*: Permission denied"):
        DiskTier(1, str(tmp_path), [SLOT], np.empty(SLOT, dtype=np.uint8))


def test_when_the_second_file_cannot_be_made_the_first_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = iter([tempfile.TemporaryFile(buffering=0, dir=tmp_path)])  # noqa: SIM115

    def make(**_: Any) -> Any:
        for file in files:
            return file
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(tempfile, "TemporaryFile", make)
    assert len(open_files(tmp_path)) == 1
    with pytest.raises(ValueError, match="Too many open files") as caught:
        DiskTier(1, str(tmp_path), [SLOT, SLOT], np.empty(SLOT, dtype=np.uint8))
    assert open_files(tmp_path) == []
    assert (
        caught.value.__traceback__ is not None
    )  # and with it the tier is alive: no garbage collection closed the file


def test_opening_failing_and_closing_a_hundred_times_leaks_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(100):
        cache = Cache(tmp_path)
        assert len(open_files(tmp_path)) == 1
        cache.store([1, 2])
        with monkeypatch.context() as patch:
            fail_after("pwrite", 0, errno.EIO, patch)
            with pytest.raises(TransferError):
                cache.store([3])
        cache.memory.close()
    assert open_files(tmp_path) == []  # those of the process change as other things are collected


def test_a_file_that_fails_to_close_does_not_keep_the_others_open(tmp_path: Path) -> None:
    tier = DiskTier(1, str(tmp_path), [SLOT, SLOT], np.empty(SLOT, dtype=np.uint8))
    first, second = sorted(open_files(tmp_path))
    os.close(first)  # the tier will be told that the descriptor is bad
    tier.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(second)


# -- pieces ----------------------------------------------------------------------------------------------------------


def test_no_transfer_is_larger_than_the_staging_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, sizes = Cache(tmp_path, slot_bytes=3 << 20, num_slots=8), []
    pread, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(
        os, "preadv", lambda file, buffers, offset: (sizes.append(len(buffers[0])), pread(file, buffers, offset))[1]
    )
    monkeypatch.setattr(
        os, "pwrite", lambda file, data, offset: (sizes.append(len(data)), pwrite(file, data, offset))[1]
    )
    cache.store(list(range(8)))
    assert (cache.on_disk(list(range(8))) == cache.content).all()
    assert max(sizes) == 6 << 20  # two slots: a third would pass 8 MiB
    cache.memory.close()


def test_the_staging_buffer_is_bounded_but_has_room_for_one_slot_of_each_group() -> None:
    assert staging_bytes([100, 2000]) == MAX_STAGING_BYTES == 8 << 20
    assert staging_bytes([100, 52_000_000]) == 52_000_000


def test_neighbours_in_the_file_are_transferred_together(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    pread, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(
        os,
        "preadv",
        lambda file, buffers, offset: (calls.append((offset, len(buffers[0]))), pread(file, buffers, offset))[1],
    )
    monkeypatch.setattr(
        os, "pwrite", lambda file, data, offset: (calls.append((offset, len(data))), pwrite(file, data, offset))[1]
    )
    slots = [7, 2, 6, 5, 30]  # in any order: 2, 5 to 7, 30
    cache.store(slots)
    assert (cache.on_disk(slots) == cache.content[slots]).all()
    assert calls == [(2000, 1000), (5000, 3000), (30000, 1000)] * 2


def test_an_empty_batch_touches_no_file(cache: Cache, tmp_path: Path) -> None:
    cache.store([])
    cache.copy(DISK, [], GPU, [])
    cache.copy(DISK, [], DISK, [])
    assert os.fstat(open_files(tmp_path)[0]).st_size == 0


def test_a_file_that_the_system_has_been_asked_to_forget_has_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    with tempfile.TemporaryFile(dir=tmp_path, buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())
        forget_cached(file.fileno())
        assert os.pread(file.fileno(), len(content) + 1, 0) == content


def test_looking_at_what_the_system_keeps_of_a_file_brings_nothing_back(tmp_path: Path) -> None:
    num_pages = 256
    with tempfile.TemporaryFile(dir=tmp_path, buffering=0) as file:
        assert num_cached_pages(file.fileno()) == 0
        file.write(bytes(num_pages * mmap.PAGESIZE - 1))
        os.fsync(file.fileno())
        if not forget_cached(file.fileno()):
            pytest.skip("this file system keeps what it is asked to forget, or does not tell")
        for _ in range(3):
            assert num_cached_pages(file.fileno()) == 0
            time.sleep(0.001)
        os.pread(file.fileno(), 1, 0)
        assert num_cached_pages(file.fileno()) > 0
        assert not _is_forgotten_without_being_asked(file.fileno())
        os.pread(file.fileno(), num_pages * mmap.PAGESIZE, 0)
        assert num_cached_pages(file.fileno()) == num_pages


def _is_forgotten_without_being_asked(descriptor: int) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fadvise", lambda *arguments: None)
        return forget_cached(descriptor)


def test_a_system_that_cannot_tell_is_taken_to_keep_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    with tempfile.TemporaryFile(dir=tmp_path, buffering=0) as file:
        file.write(b"x" * 4096)
        os.fsync(file.fileno())
        with monkeypatch.context() as patch:
            patch.setattr(ctypes, "CDLL", lambda *arguments, **options: object())
            assert not forget_cached(file.fileno())
        with monkeypatch.context() as patch:
            patch.setattr(mmap, "mmap", refuse)
            assert not forget_cached(file.fileno())
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fadvise", refuse)
            assert not forget_cached(file.fileno())
            patch.delattr(os, "posix_fadvise")
            assert not forget_cached(file.fileno())


def test_a_file_system_in_memory_keeps_what_it_is_asked_to_forget() -> None:
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no file system in memory at /dev/shm")
    with tempfile.TemporaryFile(dir="/dev/shm", buffering=0) as file:
        file.write(b"x" * 4096)
        os.fsync(file.fileno())
        assert not forget_cached(file.fileno())
