"""The payload of pages and states on `CudaMemory`, by Triton kernels on the streams of the sequences. Needs torch."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch

from ssmcache_sim import payload_kernels as kernels
from ssmcache_sim.payload import Pages, PayloadBuffer, Step
from ssmcache_sim.trace import Int64Array


class _DevicePages(NamedTuple):
    slots: torch.Tensor
    seeds: torch.Tensor


class CudaKernels:
    """See `Kernels`. Nothing waits for the device but `wrong_bytes`: a request is queued while others still run."""

    word = torch.int64

    def __init__(self, device: torch.device, num_requests: int, num_buffers: int) -> None:
        self._device = device
        self._wrong = torch.zeros((num_requests, num_buffers), dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)  # other streams count in it

    def on(self, stream: Any) -> AbstractContextManager[object]:
        on: AbstractContextManager[object] = torch.cuda.stream(stream)
        return on

    def upload(self, pages: Pages) -> _DevicePages:
        return _DevicePages(self._to_device(pages.slots), self._to_device(pages.seeds.view(np.int64)))

    def write_pages(self, buffer: PayloadBuffer, pages: _DevicePages, start: int, stop: int) -> None:
        kernels.launch_pages(buffer.view, *pages, start, stop, buffer.seed, self._wrong, checking=False)

    def check_pages(self, buffer: PayloadBuffer, pages: _DevicePages, start: int, stop: int, request: int) -> None:
        place = self._wrong[request, buffer.number :]
        kernels.launch_pages(buffer.view, *pages, start, stop, buffer.seed, place, checking=True)

    def write_states(
        self, buffer: PayloadBuffer, live_slot: int, is_new: bool, steps: Sequence[Step], slots: Sequence[int]
    ) -> None:
        # the live state is read to the end before anything is written
        factors = self._numbers([step.factor for step in steps])
        addends = self._numbers([step.addend for step in steps])
        digests = torch.empty_like(factors)
        kernels.digests_kernel[(1,)](
            buffer.view, buffer.view.stride(0), live_slot, factors, addends, digests, len(steps), is_new=is_new
        )
        kernels.launch_states(buffer.view, self._slots(slots), digests, buffer.seed, self._wrong, checking=False)

    def check_state(self, buffer: PayloadBuffer, slot: int, digest: int, request: int) -> None:
        place = self._wrong[request, buffer.number :]
        digests = self._numbers([digest])
        kernels.launch_states(buffer.view, self._slots([slot]), digests, buffer.seed, place, checking=True)

    def wrong_bytes(self) -> Int64Array:
        torch.cuda.synchronize(self._device)
        counts: Int64Array = self._wrong.cpu().numpy()
        return counts

    def _numbers(self, values: Sequence[int]) -> torch.Tensor:
        return self._to_device(np.array(values, dtype=np.uint64).view(np.int64))

    def _slots(self, slots: Sequence[int]) -> torch.Tensor:
        return self._to_device(np.array(slots, dtype=np.int32))

    def _to_device(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        # what is not pinned has left the array when the call returns
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)
