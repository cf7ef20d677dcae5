"""A pytest plugin: torch's CPU plays a CUDA device, so that `CudaMemory` runs without one. Patches torch for good.

Whatever is queued is done at once, so it finds nothing about streams. Slots are copied by torch, in pools of torch.
"""

import contextlib
import sys
from typing import Any

import torch

from ssmcache.memory import cuda_vmm


class Stream:
    device = torch.device("cuda", 0)

    def wait_event(self, event: Any) -> None:
        assert isinstance(event, Event)


class Event:
    def __init__(self, blocking: bool = False) -> None:
        self.is_recorded = False

    def record(self, stream: Any = None) -> None:
        self.is_recorded = True

    def synchronize(self) -> None:
        assert self.is_recorded

    def query(self) -> bool:
        return self.is_recorded


class Properties:
    total_memory = 8 << 30


# what is installed of CUDA finds no driver, and is not asked
cuda_vmm.cuda_driver = lambda: None
sys.modules["ssmcache.memory.kernels"] = None  # type: ignore[assignment]

CURRENT = Stream()
real_empty = torch.empty


def empty(*shape: Any, **settings: Any) -> torch.Tensor:
    settings.pop("pin_memory", None)
    if torch.device(settings.get("device") or "cpu").type == "cuda":
        settings["device"] = "cpu"
    made: torch.Tensor = real_empty(*shape, **settings)
    return made


for name, value in {
    "Stream": Stream,
    "Event": Event,
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "current_stream": lambda device=None: CURRENT,
    "synchronize": lambda device=None: None,
    "get_device_properties": lambda device: Properties,
    "device": lambda device: contextlib.nullcontext(),
    "stream": lambda stream: contextlib.nullcontext(),
}.items():
    setattr(torch.cuda, name, value)
torch.empty = empty
torch.Tensor.cuda = lambda self, *args, **settings: self
