"""A memory with a disk tier and known contents, and ways to look at its files and to make them fail, for tests."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssmcache.config import DiskCacheTierConfig, GpuCacheTierConfig, HostCacheTierConfig
from ssmcache.memory.base import SlotMoves
from ssmcache.memory.host import HostMemory

GPU, HOST, DISK = 0, 1, 2
SLOT = 1000
NUM_SLOTS = 40


class Cache:
    """A memory with three tiers of one pool each; slot i of the GPU has content that no other slot has."""

    def __init__(self, folder: Path, slot_bytes: int = SLOT, num_slots: int = NUM_SLOTS, seed: int = 0) -> None:
        self.memory = HostMemory()
        tiers = (GpuCacheTierConfig(1), HostCacheTierConfig(1), DiskCacheTierConfig(1, str(folder)))
        self.memory.open(tiers, [slot_bytes])
        for tier in (GPU, HOST, DISK):
            assert self.memory.resize(tier, [num_slots])
        self.gpu = self.memory.view(0)
        self.gpu[:] = np.random.default_rng(seed).integers(0, 256, self.gpu.shape, dtype=np.uint8)
        self.content = self.gpu.copy()

    def copy(self, source: int, sources: list[int], destination: int, destinations: list[int]) -> None:
        self.memory.copy(SlotMoves(0, source, sources, destination, destinations), None)

    def store(self, slots: list[int]) -> None:
        """Slot i of the GPU to slot i of the disk."""
        self.copy(GPU, slots, DISK, slots)

    def on_disk(self, slots: list[int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """What the disk has in these slots, by way of the host tier. Leaves the GPU as it was."""
        kept, into = self.gpu.copy(), list(range(len(slots)))
        self.copy(DISK, slots, HOST, into)
        self.copy(HOST, into, GPU, into)
        found = self.gpu[: len(slots)].copy()
        self.gpu[:] = kept
        return found


def open_files(folder: Path) -> list[int]:
    """Descriptors that this process has open on files which are, or were, in a directory."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one of the listing itself
            continue
        if target.startswith(f"{folder}/"):
            found.append(int(name))
    return found


def fail_after(call: str, successes: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its n-th call on, a function of `os` fails."""
    real, count = getattr(os, call), 0

    def failing(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > successes:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, call, failing)
