"""Loads from the disk into host memory in the background: nobody waits but who needs a slot, and nothing gets wrong."""

import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_disk_queue import NUM_SLOTS, SLOT, Copied, Disk

from ssmcache.memory.base import TransferError
from ssmcache.memory.disk_loads import LoadedSlots

HOST_TIER, NUM_ROWS = 1, 32
READ = "preadv" if hasattr(os, "preadv") else "pread"


class Host:
    """A host tier beside a disk; `rows` is its pool. Disk slot i holds content i at first."""

    def __init__(self, folder: Path) -> None:
        self.disk = Disk(folder)
        self.rows = np.zeros((NUM_ROWS, SLOT), dtype=np.uint8)
        self.loaded = LoadedSlots(HOST_TIER, self.disk.queue, 1)
        self.loaded.resize([NUM_ROWS])
        self.disk.store(list(range(NUM_SLOTS)), list(range(NUM_SLOTS)))

    def load(self, slots: list[int], into: list[int], ready: Copied | None = None) -> None:
        wait = (lambda: None) if ready is None else ready.synchronize
        self.loaded.load(0, np.array(slots), self.rows, np.array(into), wait)

    def read(self, rows: list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        self.loaded.read(0, np.array(rows))
        return self.rows[rows]

    def content(self, slots: list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        return self.disk.content[slots]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.disk.queue.close()


class Gate:
    """Holds up all reads of files until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.num_reads = threading.Event(), 0
        real = getattr(os, READ)

        def read(*args: object) -> int:
            self.num_reads += 1
            assert self.opened.wait(20)
            count: int = real(*args)
            return count

        monkeypatch.setattr(os, READ, read)


@pytest.fixture
def gate(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    assert (host.disk.load([0]) == host.content([0])).all()  # what was stored is on the disk
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def test_a_load_does_not_wait_for_the_file_and_who_reads_it_does(host: Host, gate: Gate) -> None:
    start = time.monotonic()
    host.load([5, 6, 9], [3, 4, 0])
    host.load([7], [10])
    assert time.monotonic() - start < 5
    assert (host.read([1, 2]) == 0).all(), "rows that nothing is loaded into are not waited for"
    release = threading.Timer(0.1, gate.opened.set)
    release.start()
    assert (host.read([0, 3, 10, 4]) == host.content([9, 5, 7, 6])).all()
    release.join()


def test_a_row_that_a_copy_still_reads_is_not_filled_before(host: Host) -> None:
    host.rows[4] = 7
    seen = []
    host.load([5], [4], Copied(lambda: seen.append(host.rows[4].copy())))
    assert (host.read([4]) == host.content([5])).all()
    assert (seen[0] == 7).all()


def test_a_slot_that_is_stored_again_is_read_before(host: Host, gate: Gate) -> None:
    host.load([5], [4])
    host.disk.store([60], [5])
    time.sleep(0.05)  # for a writer that would not wait
    gate.opened.set()
    assert (host.read([4]) == host.content([5])).all()
    assert (host.disk.load([5]) == host.content([60])).all()


def test_a_slot_that_is_still_being_written_is_loaded_after(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *args: (time.sleep(0.05), real(*args))[1])
    host.disk.store([40], [5])
    host.load([5], [4])
    assert (host.read([4]) == host.content([40])).all()


def test_the_last_of_several_loads_into_a_row_counts(host: Host, gate: Gate) -> None:
    for slot in range(8):  # more than there are threads
        host.load([slot, 20], [4, 5 + slot])
    gate.opened.set()
    assert (host.read([4, 5, 12]) == host.content([7, 20, 20])).all()


def test_what_is_written_over_a_load_stays(host: Host, gate: Gate) -> None:
    host.load([5], [4])
    release = threading.Timer(0.05, gate.opened.set)
    release.start()
    host.loaded.overwrite(0, np.array([4]))
    host.rows[4] = 9
    time.sleep(0.05)
    assert (host.read([4]) == 9).all()
    release.join()


def test_resizing_and_moving_on_the_disk_wait_for_loads(host: Host, gate: Gate) -> None:
    release = threading.Timer(0.05, gate.opened.set)
    host.load([5, 50], [4, 5])
    release.start()
    host.disk.queue.move(0, np.array([7]), np.array([5]))
    assert host.disk.queue.resize([20])
    host.loaded.wait()
    assert (host.rows[[4, 5]] == host.content([5, 50])).all()
    assert (host.disk.load([5]) == host.content([7])).all()
    release.join()


def lost(host: Host, rows: list[int]) -> tuple[int, ...]:
    with pytest.raises(TransferError, match=r"^disk tier: cannot read \d of \d slots: ") as caught:
        host.read(rows)
    assert caught.value.tier == HOST_TIER
    return caught.value.lost


def test_a_read_that_fails_loses_its_rows_until_they_are_filled_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.disk.load([0])
    real = getattr(os, READ)

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= 6 * SLOT < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        count: int = real(descriptor, buffers, offset)
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, READ, broken)
        host.load([5, 6, 7], [3, 4, 5])
        assert lost(host, [5, 4, 3]) == (1,)
        host.load([6, 7], [10, 11])
        host.load([8], [10])
        assert (host.read([11, 10]) == host.content([7, 8])).all(), "the loss of a load that another has followed"
    assert (host.read([3, 5]) == host.content([5, 7])).all()
    assert lost(host, [4]) == (0,)
    host.loaded.wait()
    host.loaded.resize([NUM_ROWS])
    assert lost(host, [4]) == (0,)
    host.load([6], [4])
    assert (host.read([4]) == host.content([6])).all()


def test_a_lost_slot_a_failed_stream_and_overwritten_losses(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.disk.load([0])
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *args: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        host.disk.store([1], [5])
        host.load([5, 6], [3, 4])
        assert lost(host, [3, 4]) == (0,)

    def failed() -> None:
        raise RuntimeError("an illegal memory access")

    host.load([7, 8], [5, 6], Copied(failed))
    assert lost(host, [4, 5, 6]) == (1, 2)
    host.loaded.overwrite(0, np.array([5, 6]))
    host.rows[[5, 6]] = 1
    assert (host.read([5, 6]) == 1).all()


@pytest.mark.parametrize("seed", range(6))
def test_random_loads_stores_and_copies_leave_what_dicts_of_slots_hold(
    host: Host, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With reads and writes of files that take their time, and copies on a stream as late as they can be."""
    rng = random.Random(seed)
    delays = random.Random(seed)
    for name in (READ, "pwrite"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real: (time.sleep(delays.random() / 500), real(*args))[1])
    on_disk, on_host = dict(enumerate(range(NUM_SLOTS))), dict[int, int]()
    for _ in range(120):
        action = rng.random()
        count = rng.randint(1, 6)
        slots, rows = rng.sample(range(NUM_SLOTS), count), rng.sample(range(NUM_ROWS), count)
        if action < 0.4:
            seen: list[np.ndarray[tuple[int, int], np.dtype[np.uint8]]] = []
            known = [row for row in rows if row in on_host]
            host.loaded.read(0, np.array(known, dtype=np.int64))
            host.load(slots, rows, Copied(lambda k=known, s=seen: s.append(host.rows[k].copy())))
            before = [on_host[row] for row in known]
            on_host |= {row: on_disk[slot] for row, slot in zip(rows, slots, strict=True)}
            if rng.random() < 0.3:
                host.loaded.read(0, np.array(rows))
                assert (seen[0] == host.content(before)).all()
        elif action < 0.6:
            host.loaded.overwrite(0, np.array(rows))
            host.rows[rows] = host.content(slots)
            on_host |= dict(zip(rows, slots, strict=True))
        elif action < 0.8:
            contents = [rng.randrange(NUM_SLOTS) for _ in slots]
            host.disk.store(contents, slots)
            on_disk |= dict(zip(slots, contents, strict=True))
        elif on_host:
            known = rng.sample(sorted(on_host), min(count, len(on_host)))
            assert (host.read(known) == host.content([on_host[row] for row in known])).all()
    assert (host.read(sorted(on_host)) == host.content([on_host[row] for row in sorted(on_host)])).all()
    slots = sorted(on_disk)
    assert (host.disk.load(slots) == host.content([on_disk[slot] for slot in slots])).all()
