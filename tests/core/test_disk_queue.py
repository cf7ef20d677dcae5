"""The disk tier behind streams: what was stored is loaded, or it is lost and says so, whatever is still under way."""

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk_caches import fail_after, open_files

import ssmcache.memory.disk_queue as queue_module
from ssmcache.memory.base import TransferError
from ssmcache.memory.batches import SlotArray
from ssmcache.memory.disk import DiskTier
from ssmcache.memory.disk_queue import DiskQueue
from ssmcache.memory.disk_ring import BufferRing, ring_shape

TIER, SLOT, NUM_SLOTS = 2, 1000, 64
BUFFER_SLOTS, NUM_BUFFERS = 4, 3


class Copied:
    """The event of a copy that is made when somebody waits for it, as late as a copy can be; or that fails."""

    def __init__(self, copy: Callable[[], None]) -> None:
        self._copy: Callable[[], None] | None = copy
        self._lock = threading.Lock()

    def synchronize(self) -> None:
        with self._lock:
            copy, self._copy = self._copy, None
            if copy is not None:
                copy()


class Disk:
    """A queue and the bytes of its slots; slot i of `content` has bytes that no other has."""

    def __init__(self, folder: Path, slot_bytes: int = SLOT) -> None:
        self.buffers = [np.zeros(BUFFER_SLOTS * slot_bytes, dtype=np.uint8) for _ in range(NUM_BUFFERS)]
        self.ring = BufferRing(self.buffers)
        self.files = DiskTier(TIER, str(folder), [slot_bytes], np.empty(8 << 20, dtype=np.uint8))
        self.queue = DiskQueue(self.files, self.ring, [slot_bytes])
        self.content = np.random.default_rng(0).integers(0, 256, (NUM_SLOTS, slot_bytes), dtype=np.uint8)
        assert self.queue.resize([NUM_SLOTS])

    def rows(self, buffer: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self.buffers[buffer].reshape(BUFFER_SLOTS, -1)[:count]

    def store(self, sources: list[int], slots: list[int]) -> None:
        """Content `sources[i]` to slot `slots[i]`."""

        def fill(positions: SlotArray, buffer: int) -> Copied:
            rows = self.content[np.array(sources)[positions]]
            return Copied(lambda: self.rows(buffer, len(rows)).__setitem__(slice(None), rows))

        self.queue.store(0, np.array(slots), fill)

    def load(self, slots: list[int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        found = np.zeros((len(slots), self.content.shape[1]), dtype=np.uint8)
        events = []

        def drain(positions: SlotArray, buffer: int) -> Copied:
            # read late: a buffer that is filled again before its event has happened would show
            event = Copied(lambda: found.__setitem__(positions, self.rows(buffer, positions.size)))
            events.append(event)
            return event

        self.queue.load(0, np.array(slots), drain)
        for event in events:
            event.synchronize()
        return found


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    yield disk
    disk.queue.close()


def test_random_batches_leave_what_a_dict_of_slots_holds(disk: Disk) -> None:
    rng = random.Random(0)
    model: dict[int, int] = {}
    for _ in range(150):
        slots = rng.sample(range(NUM_SLOTS), rng.randint(1, 30))
        action = rng.random()
        known = [slot for slot in slots if slot in model]
        if action < 0.5:
            sources = [rng.randrange(NUM_SLOTS) for _ in slots]
            disk.store(sources, slots)
            model |= dict(zip(slots, sources, strict=True))
        elif action < 0.8 and known:
            assert (disk.load(known) == disk.content[[model[slot] for slot in known]]).all()
        elif action < 0.9 and known:
            free = [slot for slot in range(NUM_SLOTS) if slot not in known][: len(known)]
            disk.queue.move(0, np.array(known[: len(free)]), np.array(free))
            model |= {new: model[old] for old, new in zip(known, free, strict=False)}
        elif action > 0.95:
            count = rng.randint(NUM_SLOTS // 2, NUM_SLOTS)
            assert disk.queue.resize([count])
            assert disk.queue.resize([NUM_SLOTS])
            model = {slot: source for slot, source in model.items() if slot < count}
    assert len(model) > NUM_SLOTS // 2


def test_storing_does_not_wait_for_the_file(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, real = threading.Event(), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *args: (may_write.wait(20), real(*args))[1])
    start = time.monotonic()
    disk.store([1, 2, 3], [10, 20, 30])
    disk.store([4], [40])
    elapsed = time.monotonic() - start
    release = threading.Timer(0.2, may_write.set)
    release.start()
    assert (disk.load([20, 40, 10]) == disk.content[[2, 4, 1]]).all()
    assert may_write.is_set(), "a slot was read before it was written"
    release.join()
    assert elapsed < 10


def test_a_batch_larger_than_the_ring_is_stored_and_loaded(disk: Disk) -> None:
    slots = random.Random(1).sample(range(NUM_SLOTS), 50)
    disk.store(slots, slots)
    assert (disk.load(slots) == disk.content[slots]).all()


def test_a_slot_that_is_stored_twice_has_what_came_last(disk: Disk) -> None:
    for source in range(20):
        disk.store([source], [7])
    assert (disk.load([7]) == disk.content[[19]]).all()


# -- failures --------------------------------------------------------------------------------------------------------


def lost_positions(call: Callable[[], Any]) -> tuple[int, ...]:
    with pytest.raises(TransferError, match="disk tier: cannot read") as caught:
        call()
    assert caught.value.tier == TIER
    return caught.value.lost


@pytest.mark.parametrize(
    ("call", "successes", "code"),
    [("pwrite", 0, errno.ENOSPC), ("pwrite", 2, errno.EIO), ("fsync", 0, errno.EIO)],
)
def test_a_write_that_fails_later_loses_its_batch_and_nothing_else(
    disk: Disk, call: str, successes: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.store([0, 1, 2], [0, 1, 2])
    disk.load([0])
    with monkeypatch.context() as patch:
        fail_after(call, successes, code, patch)
        disk.store([3, 4, 5, 6, 7, 8], [10, 12, 14, 16, 18, 20])
        assert lost_positions(lambda: disk.load([1, 12, 2, 20])) == (1, 3)
    assert (disk.load([2, 1, 0]) == disk.content[[2, 1, 0]]).all()
    # lost for good, until they are written again
    assert lost_positions(lambda: disk.load([10, 14])) == (0, 1)
    assert lost_positions(lambda: disk.queue.move(0, np.array([0, 14]), np.array([40, 41]))) == (1,)
    disk.store([3, 4], [10, 14])
    assert (disk.load([14, 10]) == disk.content[[4, 3]]).all()
    assert lost_positions(lambda: disk.load([18])) == (0,)


def test_the_reason_of_a_late_failure_is_told(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_after("pwrite", 0, errno.EIO, patch)
        disk.store([1], [1])
        with pytest.raises(TransferError, match=f"cannot write: {os.strerror(errno.EIO)}"):
            disk.load([1])


def test_a_full_disk_is_told_at_once_and_nothing_is_moved(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_after("posix_fallocate", 0, errno.ENOSPC, patch)
        with pytest.raises(TransferError, match="cannot write") as caught:
            disk.store([1, 2], [1, 2])
    assert caught.value.lost == ()
    disk.store([1, 2], [1, 2])
    assert (disk.load([1, 2]) == disk.content[[1, 2]]).all()


def test_a_read_that_fails_names_the_slots(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = list(range(20))
    disk.store(slots, slots)
    disk.load(slots)
    real = os.preadv if hasattr(os, "preadv") else os.pread

    def broken(descriptor: int, buffers: Any, offset: int, *rest: Any) -> int:
        size = sum(len(buffer) for buffer in buffers)
        for slot in (3, 11):
            if offset < (slot + 1) * SLOT and offset + size > slot * SLOT:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, real.__name__, broken)
        assert lost_positions(lambda: disk.load([11, 0, 1, 3, 5, 6, 7, 8, 9])) == (0, 3)
    assert (disk.load([11, 3]) == disk.content[[11, 3]]).all()


def test_a_copy_that_cannot_be_queued_loses_the_slots_and_blocks_nothing(disk: Disk) -> None:
    disk.store([5], [5])
    calls = []

    def fill(positions: SlotArray, buffer: int) -> Copied:
        calls.append(buffer)
        if len(calls) == 2:
            raise RuntimeError("no such kernel")
        return Copied(lambda: None)

    with pytest.raises(RuntimeError, match="no such kernel"):
        disk.queue.store(0, np.arange(4, 12), fill)
    assert lost_positions(lambda: disk.load([5, 6, 0])) == (0, 1)
    for _ in range(2 * NUM_BUFFERS):  # no buffer went with it
        disk.store(list(range(12)), list(range(12)))
        assert (disk.load(list(range(12))) == disk.content[:12]).all()


def test_a_copy_that_fails_on_its_stream_loses_the_slots(disk: Disk) -> None:
    def failing() -> None:
        raise RuntimeError("an illegal memory access")

    disk.queue.store(0, np.array([1, 2]), lambda positions, buffer: Copied(failing))
    assert lost_positions(lambda: disk.load([2, 1])) == (0, 1)
    disk.store([1], [1])
    assert (disk.load([1]) == disk.content[[1]]).all()


def test_a_drain_that_fails_gives_all_buffers_back(disk: Disk) -> None:
    slots = list(range(40))
    disk.store(slots, slots)

    def drain(positions: SlotArray, buffer: int) -> Copied:
        raise RuntimeError("no such kernel")

    for _ in range(2 * NUM_BUFFERS):
        with pytest.raises(RuntimeError, match="no such kernel"):
            disk.queue.load(0, np.array(slots), drain)
    assert (disk.load(slots) == disk.content[slots]).all()


# -- sizes and the end -----------------------------------------------------------------------------------------------


def test_what_is_lost_stays_lost_when_the_pool_is_resized(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_after("pwrite", 0, errno.EIO, patch)
        disk.store([1, 2], [1, 50])
        assert lost_positions(lambda: disk.load([1])) == (0,)
    assert disk.queue.resize([10])
    assert disk.queue.resize([1 << 60]) is False
    assert disk.queue.resize([NUM_SLOTS])
    assert lost_positions(lambda: disk.load([1])) == (0,)


def test_closing_finishes_the_writes_and_frees_the_files(disk: Disk, tmp_path: Path) -> None:
    written = []
    real = DiskTier.sync
    queue_module.DiskTier.sync = lambda self, group: (written.append(group), real(self, group))[1]  # type: ignore
    try:
        disk.store([1, 2], [1, 2])
        disk.queue.close()
        disk.queue.close()
    finally:
        queue_module.DiskTier.sync = real  # type: ignore[method-assign]
    assert written == [0]
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("slot_bytes", [[1], [1000, 64 << 10], [(9 << 20) + 1], [50 << 20, 7]])
def test_a_ring_holds_three_slots_of_any_kind_and_is_bounded(slot_bytes: list[int]) -> None:
    num_buffers, num_bytes = ring_shape(slot_bytes)
    assert num_buffers >= 3
    assert num_bytes >= max(slot_bytes)
    assert num_bytes % 4096 == 0, "the rows of a buffer must be aligned"
    assert num_buffers * num_bytes <= max(64 << 20, 3 * (max(slot_bytes) + 4096))
