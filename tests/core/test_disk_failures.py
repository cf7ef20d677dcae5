"""The disk tier when the disk is full or broken: a failed write loses no page, a failed read says which are lost."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_caches import DISK, GPU, HOST, NUM_SLOTS, SLOT, Cache, fail_after, open_files

import ssmcache.memory.disk as disk_module
from ssmcache.memory.base import TransferError


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    cache = Cache(tmp_path)
    yield cache
    cache.memory.close()


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "successes", "code"),
    [
        ("posix_fallocate", 0, errno.ENOSPC),
        ("pwrite", 0, errno.ENOSPC),
        ("pwrite", 2, errno.ENOSPC),
        ("pwrite", 1, errno.EIO),
        ("fsync", 0, errno.EIO),
        ("fsync", 0, errno.ENOSPC),
    ],
)
@pytest.mark.parametrize("source", [GPU, HOST, DISK])
def test_a_failed_write_loses_nothing(
    cache: Cache, source: int, call: str, successes: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "ALLOCATION_BYTES", 1)
    cache.store([0, 1, 2, 3, 4, 5])
    cache.copy(GPU, [0, 1, 2, 3, 4, 5], HOST, [0, 1, 2, 3, 4, 5])
    sources = [1, 3, 4]
    with monkeypatch.context() as patch:
        fail_after(call, successes, code, patch)
        with pytest.raises(TransferError, match=f"cannot write: {os.strerror(code)}") as caught:
            cache.copy(source, sources, DISK, [20, 22, 24])
    assert (caught.value.tier, caught.value.lost) == (DISK, ())
    assert (cache.gpu == cache.content).all()
    assert (cache.on_disk([0, 1, 2, 3, 4, 5]) == cache.content[:6]).all()
    # the same batch again, now that there is room
    cache.copy(source, sources, DISK, [20, 22, 24])
    assert (cache.on_disk([20, 22, 24]) == cache.content[sources]).all()


def test_a_write_that_makes_no_progress_is_a_failure(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(TransferError, match="nothing was written"):
        cache.store([1])


def test_a_store_returns_only_when_the_disk_has_all_of_it(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("pwrite", "fsync"):
        real: Callable[..., Any] = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    cache.store([1, 5, 9])
    cache.copy(DISK, [1, 5], DISK, [20, 30])
    assert calls == ["pwrite"] * 3 + ["fsync"] + ["pwrite"] * 2 + ["fsync"]


LIMITED_CHILD = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ssmcache.memory.base import TransferError
from disk_caches import DISK, Cache
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
cache = Cache(Path(sys.argv[2]), slot_bytes=10_000, num_slots=8)
cache.store(list(range(8)))
assert cache.memory.resize(DISK, [100])
for _ in range(3):
    try:
        cache.copy(0, [4, 5, 6], DISK, [8, 9, 10])
    except TransferError as error:
        print(error.tier, error.lost, error)
assert (cache.gpu == cache.content).all()
assert (cache.on_disk(list(range(8))) == cache.content).all()
assert cache.memory.resize(DISK, [10])
cache.copy(0, [6, 7], DISK, [8, 9])
assert (cache.on_disk([8, 9]) == cache.content[6:]).all()
"""


def test_a_limit_of_the_system_on_file_sizes_is_a_failed_write_that_leaves_all_pages(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED_CHILD, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "2 () disk tier: cannot write: File too large\n" * 3


def test_space_is_allocated_ahead_in_chunks_and_never_beyond_the_pool(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "ALLOCATION_BYTES", 16_384)
    (descriptor,) = open_files(tmp_path)
    sizes = []
    for slot in (0, 3, 15, 16, 17, 39):
        cache.store([slot])
        sizes.append(os.fstat(descriptor).st_size)
        assert os.fstat(descriptor).st_blocks * 512 >= sizes[-1], "a file with holes can run out of space later"
    # slot 16 ends at byte 17,000, slot 39 with the pool at 40,000
    assert sizes == [16_384, 16_384, 16_384, 32_768, 32_768, 40_000]
    assert cache.memory.resize(DISK, [10])
    assert os.fstat(descriptor).st_size == 10_000
    assert (cache.on_disk([0, 3]) == cache.content[[0, 3]]).all()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, None])
def test_a_system_that_cannot_allocate_ahead_still_stores(
    cache: Cache, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        fail_after("posix_fallocate", 0, code, monkeypatch)
    slots = [3, 2, 9, 20, 0]
    cache.store(slots)
    assert (cache.on_disk(slots) == cache.content[slots]).all()


def test_what_was_allocated_of_a_chunk_that_does_not_fit_is_given_back(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (descriptor,) = open_files(tmp_path)
    real = os.posix_fallocate

    def half(file: int, offset: int, size: int) -> None:
        real(file, offset, size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", half)
    with pytest.raises(TransferError, match="No space left"):
        cache.store([0])
    assert os.fstat(descriptor).st_blocks == 0


def test_a_pool_shrinks_even_if_its_space_cannot_be_given_back(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store([0, 39])
    fail_after("ftruncate", 0, errno.EIO, monkeypatch)
    assert cache.memory.resize(DISK, [10])
    assert cache.memory.resize(DISK, [NUM_SLOTS])
    cache.store([38])
    assert (cache.on_disk([0, 38]) == cache.content[[0, 38]]).all()


def test_a_resize_is_refused_where_the_file_system_has_no_space_for_it(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.store(list(range(NUM_SLOTS)))  # 40,000 bytes are allocated already
    values = list(os.statvfs(tmp_path))
    values[1], values[4] = 500, 100  # f_frsize, f_bavail: 50,000 bytes are left
    monkeypatch.setattr(os, "fstatvfs", lambda _: os.statvfs_result(values))
    assert cache.memory.resize(DISK, [91]) is False
    assert cache.memory.bytes_in_use == 3 * NUM_SLOTS * SLOT
    assert cache.memory.resize(DISK, [90])
    # a file system that says nothing about its space is believed to have some
    values[2] = values[4] = 0
    assert cache.memory.resize(DISK, [1000])
    fail_after("fstatvfs", 0, errno.EIO, monkeypatch)
    assert cache.memory.resize(DISK, [1001]) is False
    assert cache.memory.resize(DISK, [NUM_SLOTS])
    assert (cache.on_disk(list(range(NUM_SLOTS))) == cache.content).all()


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("destination", [GPU, HOST, DISK])
def test_a_file_that_was_cut_loses_exactly_the_slots_behind_the_cut(
    cache: Cache, tmp_path: Path, destination: int
) -> None:
    cache.store(list(range(20)))
    (descriptor,) = open_files(tmp_path)
    os.ftruncate(descriptor, 10 * SLOT + 1)  # one byte of slot 10 is left
    sources = [3, 12, 10, 9, 19, 0, 11]
    with pytest.raises(TransferError, match="cannot read 4 of 7 slots: the file ends before it") as caught:
        cache.copy(DISK, sources, destination, [30, 31, 32, 33, 34, 35, 36])
    assert (caught.value.tier, caught.value.lost) == (DISK, (1, 2, 4, 6))
    assert (cache.on_disk(list(range(10))) == cache.content[:10]).all()


@pytest.mark.parametrize("destination", [GPU, HOST, DISK])
@pytest.mark.parametrize("staged_slots", [1, 3, 1000])
def test_exactly_the_slots_on_bad_sectors_are_lost(
    tmp_path: Path, destination: int, staged_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "MAX_STAGING_BYTES", staged_slots * SLOT)
    cache = Cache(tmp_path)
    cache.store(list(range(20)))
    bad_bytes = (2 * SLOT, 6 * SLOT + 999, 7 * SLOT + 500)  # within slots 2, 6 and 7
    real = os.preadv

    def bad_sectors(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if any(offset <= byte < offset + len(buffers[0]) for byte in bad_bytes):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", bad_sectors)
    sources = [7, 1, 2, 3, 4, 5, 6, 8, 9, 0]
    with pytest.raises(TransferError, match="cannot read 3 of 10 slots: Input/output error") as caught:
        cache.copy(DISK, sources, destination, list(range(30, 40)))
    assert (caught.value.tier, caught.value.lost) == (DISK, (0, 2, 6))
    rest = [slot for slot in range(20) if slot not in (2, 6, 7)]
    assert (cache.on_disk(rest) == cache.content[rest]).all()
    cache.memory.close()


def test_a_batch_that_lost_a_slot_writes_no_more_and_still_tells_all_that_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "MAX_STAGING_BYTES", SLOT)
    cache = Cache(tmp_path)
    cache.store(list(range(20)))
    real = os.preadv

    def bad_sectors(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset // SLOT in (1, 3):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", bad_sectors)
    fail_after("pwrite", 1, errno.EIO, monkeypatch)  # slot 0 can be written, slots 2 and 4 could not
    with pytest.raises(TransferError) as caught:
        cache.copy(DISK, [0, 1, 2, 3, 4], DISK, [30, 31, 32, 33, 34])
    assert caught.value.lost == (1, 3)
    cache.memory.close()


def test_an_error_that_passes_loses_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(list(range(6)))
    real, failures = os.preadv, iter([True])

    def once(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        for _ in failures:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", once)
    assert (cache.on_disk(list(range(6))) == cache.content[:6]).all()


def test_short_reads_and_writes_are_taken_up_where_they_ended(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: pread(file, [buffers[0][:77]], offset))
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:191], offset))
    slots = [8, 3, 4, 5, 30, 39, 0]
    cache.store(slots)
    assert (cache.on_disk(slots) == cache.content[slots]).all()


def test_signals_in_the_middle_of_transfers_do_no_harm(tmp_path: Path) -> None:
    cache, slots = Cache(tmp_path, slot_bytes=100_000), list(range(NUM_SLOTS))
    count = 0

    def handler(*_: object) -> None:
        nonlocal count
        count += 1

    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for _ in range(5):
            cache.store(slots)
            assert (cache.on_disk(slots) == cache.content).all()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert count > 0
    cache.memory.close()
