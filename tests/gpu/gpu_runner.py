"""The model runner of tests/core over GPU memory, with sequences on several streams and copies that are late."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import count
from typing import Any

import numpy as np
import torch
from payload import Request, Runner, Shape

from ssmcache.memory.base import SlotMoves
from ssmcache.memory.cuda import CudaMemory

LATE_CYCLES = 500_000  # about a quarter of a millisecond


class Rows:
    """A tensor that gives and takes NumPy arrays by row, on torch's current stream."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.shape)

    def __len__(self) -> int:
        return len(self._tensor)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple) and isinstance(key[0], slice):
            return Rows(self._tensor[key])
        return self._tensor[int(key)].cpu().numpy()

    def __setitem__(self, key: Any, value: np.ndarray) -> None:
        row, *rest = key if isinstance(key, tuple) else (key,)
        self._tensor[(int(row), *rest)] = torch.from_numpy(np.array(value)).to(self._tensor.device)


class TightMemory(CudaMemory):
    """Pools of as many slots as were asked for, not of whole pages, so that they run full; views as `Rows`; and every
    copy late.
    """

    late = False

    def grain(self, tier: int) -> int:
        return 1

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        if self.late:
            with torch.cuda.stream(stream or torch.cuda.current_stream()):
                torch.cuda._sleep(LATE_CYCLES)
        super().copy(moves, stream)

    def view(self, layer_group: int) -> Any:
        return Rows(super().view(layer_group))


class GpuRunner(Runner):
    """Each sequence computes on a stream of its own choice: request i on stream i modulo their number."""

    def __init__(self, shape: Shape, path: str, num_streams: int, late: bool) -> None:
        memory = TightMemory()
        memory.late = late
        super().__init__(shape, path, memory)
        self._streams = [torch.cuda.Stream() for _ in range(num_streams)]
        self._numbers = count()
        self._stream_of: dict[Request, Any] = {}

    def stream_of(self, request: Request) -> Any:
        if not self._streams:
            return None
        if request not in self._stream_of:
            self._stream_of[request] = self._streams[next(self._numbers) % len(self._streams)]
        return self._stream_of[request]

    def _on(self, request: Request) -> Any:
        stream = self.stream_of(request)
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def resume(self, request: Request) -> bool:
        with self._on(request):
            return super().resume(request)

    def compute(self, request: Request, end: int, reserve: bool) -> bool:
        with self._on(request):
            return super().compute(request, end, reserve)
