"""What the memory of NumPy buffers does beyond the contract."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssmcache.config import CacheTierConfig, DiskCacheTierConfig, GpuCacheTierConfig, HostCacheTierConfig
from ssmcache.memory.base import SlotMoves
from ssmcache.memory.host import POISON, HostMemory

GPU, HOST, DISK = 0, 1, 2
MIB = 1 << 20


def open_memory(folder: Path, slot_bytes: int, num_slots: int) -> HostMemory:
    memory = HostMemory()
    tiers = (GpuCacheTierConfig(1), HostCacheTierConfig(1), DiskCacheTierConfig(1, str(folder)))
    memory.open(tiers, [slot_bytes])
    for tier in (GPU, HOST, DISK):
        assert memory.resize(tier, [num_slots])
    return memory


def test_new_slots_are_full_of_poison_in_the_gpu_and_the_host_tier(tmp_path: Path) -> None:
    memory = open_memory(tmp_path, 5, 3)
    memory.view(0)[:] = 1
    memory.resize(GPU, [6])
    assert memory.view(0).tolist() == [[1] * 5] * 3 + [[POISON] * 5] * 3
    memory.copy(SlotMoves(0, HOST, [2], GPU, [0]), None)
    assert memory.view(0)[0].tolist() == [POISON] * 5
    # a slot that went and came back does not show what was in it
    memory.resize(GPU, [2])
    memory.resize(GPU, [3])
    assert memory.view(0)[2].tolist() == [POISON] * 5


def test_a_pool_that_keeps_its_size_stays_where_it_is(tmp_path: Path) -> None:
    memory = open_memory(tmp_path, 5, 3)
    view = memory.view(0)
    memory.resize(GPU, [3])
    assert memory.view(0) is view


@pytest.mark.parametrize("tier", [GPU, HOST])
def test_a_resize_without_memory_changes_no_pool(tmp_path: Path, tier: int, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory()
    memory.open((GpuCacheTierConfig(1), HostCacheTierConfig(1)), [5, 7])
    assert memory.resize(tier, [2, 2])
    empty = np.empty

    def nearly_full(shape: tuple[int, int], dtype: Any) -> Any:
        if shape[1] == 7:
            raise MemoryError
        return empty(shape, dtype)

    monkeypatch.setattr(np, "empty", nearly_full)
    assert memory.resize(tier, [4, 4]) is False
    assert memory.bytes_in_use == 24
    monkeypatch.undo()
    assert memory.resize(tier, [4, 4])


@pytest.mark.parametrize("num_slots", [None, 10])
def test_an_unlimited_gpu_is_refused_before_anything_is_opened(tmp_path: Path, num_slots: int | None) -> None:
    memory = HostMemory()
    with pytest.raises(ValueError, match="quota of the GPU tier: expected bytes, got None"):
        memory.open((GpuCacheTierConfig(None), DiskCacheTierConfig(1, str(tmp_path / "none"))), [5])
    with pytest.raises(RuntimeError, match="expected an open memory"):
        memory.resize(GPU, [num_slots])


def test_a_second_disk_is_refused(tmp_path: Path) -> None:
    disk = DiskCacheTierConfig(1, str(tmp_path))
    tiers: tuple[CacheTierConfig, ...] = (GpuCacheTierConfig(1), disk, disk)
    with pytest.raises(ValueError, match="disk tiers: expected at most one, got 2"):
        HostMemory().open(tiers, [5])


@pytest.mark.parametrize(
    ("source", "destination"), [(GPU, GPU), (GPU, HOST), (HOST, GPU), (GPU, DISK), (DISK, HOST), (DISK, DISK)]
)
def test_a_large_batch_needs_no_memory_beside_the_pools_but_one_piece(
    tmp_path: Path, source: int, destination: int
) -> None:
    memory = open_memory(tmp_path, MIB, 64)
    slots = list(range(32))
    if source == DISK:
        memory.copy(SlotMoves(0, GPU, slots, DISK, slots), None)
    moves = SlotMoves(0, source, slots, destination, [slot + 32 for slot in reversed(slots)])
    tracemalloc.start()
    try:
        memory.copy(moves, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # the disk's staging buffer is there from the start
    assert peak < (0.5 if DISK in (source, destination) else 8.5) * MIB
    memory.close()
