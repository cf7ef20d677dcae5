"""The calls of the CUDA driver that are made for every batch, without what torch and Triton look up around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, addressof, byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

import torch

from ssmcache.memory.cuda_pools import say_once
from ssmcache.memory.cuda_vmm import CudaDriverError, NoMemoryError, results_of

_CUDA_12_4 = 12040  # the first with cuFuncGetParamInfo
_SIGNATURES = {
    "cuCtxPushCurrent": (c_void_p,),
    "cuCtxPopCurrent": (c_void_p,),
    "cuMemcpyAsync": (c_uint64, c_uint64, c_size_t, c_void_p),  # destination, source, bytes, stream
    "cuFuncGetParamInfo": (c_void_p, c_size_t, c_void_p, c_void_p),  # function, index, &offset, &bytes
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, c_void_p, c_void_p),
}
_WARP_THREADS = 32


class DriverCalls:
    """Calls by their address. Those that queue something are made inside `current`, from any thread.

    Args:
        driver: of cuda-bindings.
        device: with a context that is current.

    Errors: CudaDriverError if the driver does not have one of them.
    """

    def __init__(self, driver: Any, device: torch.device) -> None:
        self.device = device
        self._status = driver.CUresult
        self._context = int(results_of("cuCtxGetCurrent", driver.cuCtxGetCurrent()))
        self._calls = {}
        for name, arguments in _SIGNATURES.items():
            found = driver.cuGetProcAddress(name.encode(), _CUDA_12_4, 0)
            address = int(results_of("cuGetProcAddress", found)[0])
            if not address:
                raise CudaDriverError(f"the driver has no {name}")
            self._calls[name] = CFUNCTYPE(c_int, *arguments)(address)
        self._push, self._pop = self._calls["cuCtxPushCurrent"], self._calls["cuCtxPopCurrent"]
        self._memcpy, self._launch = self._calls["cuMemcpyAsync"], self._calls["cuLaunchKernel"]
        self._popped = c_void_p()

    @contextmanager
    def current(self) -> Iterator[None]:
        """The device's context is that of the thread inside."""
        self.check("cuCtxPushCurrent", self._push(self._context))
        try:
            yield
        finally:
            self._pop(byref(self._popped))

    def check(self, call: str, status: int) -> None:
        """Errors: NoMemoryError, CudaDriverError."""
        if status:
            results_of(call, (self._status(status),))

    def copy(self, source: int, destination: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
        """Queue a copy between addresses of the device or of pinned memory."""
        self.check("cuMemcpyAsync", self._memcpy(destination, source, num_bytes, stream.cuda_stream))

    def parameter_bytes(self, function: int) -> list[int]:
        """Sizes of the parameters of a kernel."""
        offset, size, found = c_size_t(), c_size_t(), list[int]()
        while not self._calls["cuFuncGetParamInfo"](function, len(found), byref(offset), byref(size)):
            found.append(size.value)
        return found

    def launch(
        self, function: int, num_programs: int, num_threads: int, shared_bytes: int, stream: torch.cuda.Stream,
        parameters: int,
    ) -> None:  # fmt: skip
        """Queue a kernel on a line of programs; `parameters`: the address of the addresses of its parameters."""
        status = self._launch(
            function, num_programs, 1, 1, num_threads, 1, 1, shared_bytes, stream.cuda_stream, parameters, None
        )
        self.check("cuLaunchKernel", status)


class PreparedKernel:
    """A kernel that Triton has compiled and launched once, to be launched again with other arguments.

    Args:
        compiled: what the launch returned.
        sizes: bytes of each of its parameters; the compiler adds pointers to scratch memory, which are none here.

    Errors: CudaDriverError for a kernel with other parameters.
    """

    def __init__(self, calls: DriverCalls, compiled: Any, sizes: tuple[int, ...]) -> None:
        found = calls.parameter_bytes(compiled.function)
        num_scratch = len(found) - len(sizes)
        if found != [*sizes, *(8,) * num_scratch]:
            raise CudaDriverError(f"a kernel of Triton: expected parameters of {list(sizes)} bytes, got {found}")
        self._calls = calls
        self._function = int(compiled.function)
        self._num_threads = _WARP_THREADS * int(compiled.metadata.num_warps)
        self._shared_bytes = int(compiled.metadata.shared)
        # each in 8 bytes: the driver reads the low ones of those that are shorter
        self._values = (c_uint64 * len(found))()
        first = addressof(self._values)
        self._addresses = (c_void_p * len(found))(*(first + 8 * index for index in range(len(found))))

    def launch(self, num_programs: int, stream: torch.cuda.Stream, *arguments: int) -> None:
        """Queue it. Errors: CudaDriverError."""
        for index, argument in enumerate(arguments):
            self._values[index] = argument
        self._calls.launch(
            self._function, num_programs, self._num_threads, self._shared_bytes, stream, addressof(self._addresses)
        )


def driver_calls(driver: Any, device: torch.device) -> DriverCalls | None:
    """The calls for a device; None where they cannot be made."""
    if driver is None:
        return None
    try:
        return DriverCalls(driver, device)
    except (CudaDriverError, NoMemoryError) as error:
        say_once(f"{error}: batches are queued by torch, at more time of the host")
        return None
