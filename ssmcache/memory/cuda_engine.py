"""Batches of copies by the GPU's copy engines: one call of the driver, no kernel."""

from __future__ import annotations

from ctypes import CFUNCTYPE, c_int, c_size_t, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ssmcache.memory.cuda_pools import say_once
from ssmcache.memory.cuda_vmm import CudaDriverError, NoMemoryError, results_of

_CUDA_13 = 13000  # cuMemcpyBatchAsync has another signature before

_BatchCall = CFUNCTYPE(
    c_int, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_void_p, c_size_t, c_void_p
)  # destinations, sources, sizes, count, attributes, their first copies, number of attributes, stream

Addresses = npt.NDArray[np.uint64]


class CopyEngine:
    """`cuMemcpyBatchAsync` with arrays in place of the lists that cuda-bindings would make objects of.

    Args:
        driver: of cuda-bindings.
        device: with a context that is current.

    Errors: CudaDriverError if the driver does not have it.
    """

    def __init__(self, driver: Any, device: torch.device) -> None:
        found = driver.cuGetProcAddress(b"cuMemcpyBatchAsync", _CUDA_13, 0)
        address = int(results_of("cuGetProcAddress", found)[0])
        if not address:
            raise CudaDriverError("the driver has no cuMemcpyBatchAsync of CUDA 13")
        self._call = _BatchCall(address)
        # the struct is the driver's: kept here, its address handed on
        self._attributes = driver.CUmemcpyAttributes()
        self._attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        self._first = np.zeros(1, dtype=np.uint64)
        self._status = driver.CUresult
        # the call does not take the default stream
        self._own_stream = torch.cuda.Stream(device)

    def copy(
        self,
        sources: Addresses,
        destinations: Addresses,
        num_bytes: int,
        stream: torch.cuda.Stream,
    ) -> None:
        """Queue copies of so many bytes each, between addresses, [n]. No copy may need another one's result.

        Errors: CudaDriverError.
        """
        if stream.cuda_stream == 0:
            self._own_stream.wait_stream(stream)
            self._queue(sources, destinations, num_bytes, self._own_stream)
            stream.wait_stream(self._own_stream)
        else:
            self._queue(sources, destinations, num_bytes, stream)

    def _queue(self, sources: Addresses, destinations: Addresses, num_bytes: int, stream: torch.cuda.Stream) -> None:
        sizes = np.full(sources.size, num_bytes, dtype=np.uint64)
        status = self._call(
            destinations.ctypes.data,
            sources.ctypes.data,
            sizes.ctypes.data,
            sources.size,
            int(self._attributes.getPtr()),
            self._first.ctypes.data,
            1,
            stream.cuda_stream,
        )
        if status:
            results_of("cuMemcpyBatchAsync", (self._status(status),))


def copy_engine(driver: Any, device: torch.device) -> CopyEngine | None:
    """The engine of a device if it works there: tried once on a few bytes. None otherwise."""
    if driver is None:
        return None
    try:
        engine = CopyEngine(driver, device)
        host = torch.arange(64, dtype=torch.uint8).pin_memory()
        on_gpu = torch.zeros(64, dtype=torch.uint8, device=device)
        places = np.array([0, 32], dtype=np.uint64)
        stream = torch.cuda.current_stream(device)
        engine.copy(places + np.uint64(host.data_ptr()), places + np.uint64(on_gpu.data_ptr()), 32, stream)
        if not torch.equal(on_gpu.cpu(), host):
            raise CudaDriverError("cuMemcpyBatchAsync copied something else")
    except (CudaDriverError, NoMemoryError) as error:
        say_once(f"{error}: large slots go over the host link by a kernel")
        return None
    return engine
