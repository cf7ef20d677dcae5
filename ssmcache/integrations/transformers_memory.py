"""Managers for measuring and checking a model: with room for a batch, on the device where the model is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

from ssmcache.config import BatchDesc, KVCacheManagerConfig
from ssmcache.layout import layer_groups, step_slots
from ssmcache.manager import KVCacheManager
from ssmcache.memory.base import Memory
from ssmcache.memory.host import HostMemory

_GPU_BYTES = 64 << 20  # pools there are whole pages of 2 MiB


def memory_of(model: Any) -> Memory:
    """A real memory for a model: that of its GPU, or the host's."""
    if model.device.type != "cuda":
        return HostMemory()
    from ssmcache.memory.cuda import CudaMemory

    return CudaMemory(model.device)


@contextmanager
def manager_with_room(
    model: Any, room: BatchDesc, spare: float, config_of: Callable[[int], KVCacheManagerConfig]
) -> Iterator[KVCacheManager]:
    """A manager as long as the block lasts; it closes what is still open.

    Args:
        room: the batch that its memory is for, the typical step of the config.
        spare: memory as multiples of what the batch takes.
        config_of: the config for a quota of the GPU.
    """
    draft = config_of(1)
    step_bytes = sum(step_slots(group, room, draft) * group.slot_bytes for group in layer_groups(draft))
    quota = ceil(spare * step_bytes) + (_GPU_BYTES if model.device.type == "cuda" else 0)
    manager = KVCacheManager(config_of(quota), memory_of(model))
    try:
        yield manager
    finally:
        for sequence in list(manager.open_sequences):
            sequence.close()
        manager.shutdown()
