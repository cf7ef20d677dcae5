"""Batches that go to the CUDA driver directly, on a driver that plays on host memory: what a GPU is told, bit for bit.

A launch reads its parameters as the driver does, from the address of their addresses, and copies what they say at once.
"""

from contextlib import nullcontext
from ctypes import CFUNCTYPE, POINTER, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p, cast, memmove
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ssmcache.memory import cuda_copies, cuda_pools  # noqa: E402
from ssmcache.memory.cuda_copies import SlotBatch, SlotCopier  # noqa: E402
from ssmcache.memory.cuda_indices import MAX_SLOTS  # noqa: E402
from ssmcache.memory.cuda_pools import SlotPool  # noqa: E402
from ssmcache.memory.cuda_vmm import CudaDriverError, NoMemoryError  # noqa: E402

CONTEXT, FUNCTION = 0x1234, 0x5678
OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700
SIZES = [8, 8, 8, 8, 4, 4, 8, 8]  # of the kernel's parameters; the last two are the compiler's


class PlayedDriver:
    """Has the calls that batches are queued with, and refuses them outside of its context."""

    CUresult = int

    def __init__(self, sizes: list[int], missing: str = "") -> None:
        self.sizes = sizes
        self.unit_bytes = 16
        self.contexts: list[int] = []
        self.status = 0
        self.launches: list[tuple[int, int, int]] = []  # programs, threads, shared bytes
        sizes_at = POINTER(c_size_t)
        plays = {
            "cuCtxPushCurrent": (self.push, (c_void_p,)),
            "cuCtxPopCurrent": (self.pop, (POINTER(c_void_p),)),
            "cuMemcpyAsync": (self.memcpy, (c_uint64, c_uint64, c_size_t, c_void_p)),
            "cuFuncGetParamInfo": (self.parameter, (c_void_p, c_size_t, sizes_at, sizes_at)),
            "cuLaunchKernel": (self.launch, (c_void_p, *(c_uint,) * 7, c_void_p, POINTER(c_void_p), c_void_p)),
        }
        plays.pop(missing, None)
        self.calls = {name: CFUNCTYPE(c_int, *arguments)(play) for name, (play, arguments) in plays.items()}

    def cuCtxGetCurrent(self) -> tuple[int, int]:  # noqa: N802
        return 0, CONTEXT

    def cuGetProcAddress(self, name: bytes, version: int, flags: int) -> tuple[int, int, int]:  # noqa: N802
        call = self.calls.get(name.decode())
        return 0, (cast(call, c_void_p).value or 0) if call else 0, 0

    def push(self, context: int) -> int:
        self.contexts.append(context)
        return 0

    def pop(self, into: Any) -> int:
        into[0] = self.contexts.pop()
        return 0

    def memcpy(self, destination: int, source: int, num_bytes: int, stream: int | None) -> int:
        assert self.contexts == [CONTEXT]
        memmove(destination, source, num_bytes)
        return self.status

    def parameter(self, function: int, index: int, offset: Any, size: Any) -> int:
        assert function == FUNCTION
        if index >= len(self.sizes):
            return 1
        size[0] = self.sizes[index]
        return 0

    def launch(self, function: int, x: int, y: int, z: int, threads: int, *others: Any) -> int:
        assert (function, y, z, *others[:2]) == (FUNCTION, 1, 1, 1, 1)
        assert self.contexts == [CONTEXT]
        *_, shared_bytes, _, parameters, _ = others
        types = [{8: c_uint64, 4: c_uint32}[size] for size in self.sizes]
        values = [cast(parameters[index], POINTER(kind))[0] for index, kind in enumerate(types)]
        if self.status == 0:
            self.launches.append((x, threads, shared_bytes))
            run_kernel(*values[:6], self.unit_bytes)
            assert values[6:] == [0] * len(values[6:])
        return self.status


def run_kernel(
    source: int, destination: int, sources: int, destinations: int, num_moves: int, num_units: int, unit_bytes: int
) -> None:
    """What `kernels.copy_slots_kernel` does."""
    slot_bytes = num_units * unit_bytes
    numbers = [np.ctypeslib.as_array(cast(each, POINTER(c_uint32)), (num_moves,)) for each in (sources, destinations)]
    for reading, writing in zip(*(each.tolist() for each in numbers), strict=True):
        memmove(destination + writing * slot_bytes, source + reading * slot_bytes, slot_bytes)


class Event:
    def record(self, stream: Any) -> None:
        self.is_recorded = True

    def query(self) -> bool:
        return self.is_recorded


def first_launch(source: Any, destination: Any, sources: Any, destinations: Any, *others: Any) -> Any:
    num_moves, unit, shape, _ = others
    addresses = [each.data_ptr() for each in (source, destination, sources, destinations)]
    run_kernel(*addresses, num_moves, shape.num_units, unit * source.element_size())
    return SimpleNamespace(function=FUNCTION, metadata=SimpleNamespace(num_warps=4, shared=96))


class Shape(NamedTuple):
    num_units: int

    def num_programs(self, num_moves: int, most: int) -> int:
        return min(most, 10 * num_moves)


def shape_of(slot_elements: int, unit: int, element_bytes: int) -> Shape:
    return Shape(slot_elements // unit)


KERNELS = SimpleNamespace(
    MAX_PROGRAMS=1 << 30, LINK_PROGRAMS=64, PARAMETER_BYTES=tuple(SIZES[:6]), launch=first_launch, shape_of=shape_of
)
STREAM = SimpleNamespace(cuda_stream=0x99)


@pytest.fixture(autouse=True)
def _host_plays_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **kwargs: real_empty(*shape, **kwargs))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(cuda_copies, "_kernels", lambda: KERNELS)
    monkeypatch.setattr(cuda_copies, "copy_engine", lambda driver, device: None)
    cuda_pools.say_once.cache_clear()


def pool(num_slots: int, slot_bytes: int, seed: int, on_gpu: bool = True) -> SlotPool:
    rng = np.random.default_rng(seed)
    made = SlotPool.of(torch.from_numpy(rng.integers(0, 256, num_slots * slot_bytes, np.uint8)), num_slots, slot_bytes)
    return SlotPool(made.rows, made.elements, slot_bytes, on_gpu, made.first_address)


def copied(copier: SlotCopier, driver: PlayedDriver, slot_bytes: int, num_moves: int, seed: int) -> None:
    """Queues a random batch between two pools and compares every byte of both."""
    source, destination = pool(2 * num_moves, slot_bytes, seed), pool(3 * num_moves, slot_bytes, seed + 1)
    rng = np.random.default_rng(seed)
    reading = rng.permutation(2 * num_moves)[:num_moves].astype(np.int64)
    writing = rng.permutation(3 * num_moves)[:num_moves].astype(np.int64)
    before, expected = source.rows.clone(), destination.rows.clone()
    expected[torch.from_numpy(writing)] = before[torch.from_numpy(reading)]
    driver.unit_bytes = cuda_pools.access(slot_bytes)[0].itemsize * cuda_pools.access(slot_bytes)[1]
    copier.copy(SlotBatch(source, reading, destination, writing), STREAM)
    assert torch.equal(source.rows, before)
    assert torch.equal(destination.rows, expected)
    assert driver.contexts == []


@pytest.mark.parametrize("sizes", [SIZES, SIZES[:6]])
def test_every_byte_arrives_by_first_and_later_launches(sizes: list[int]) -> None:
    driver = PlayedDriver(sizes)
    copier = SlotCopier(torch.device("cpu"), driver)
    for seed, (slot_bytes, num_moves) in enumerate([(64, 5), (48, 33), (24, 7), (20, 3), (6, 2), (7, 4)] * 40):
        copied(copier, driver, slot_bytes, num_moves, seed)
    assert set(driver.launches) == {(10 * count, 128, 96) for count in (5, 33, 7, 3, 2, 4)}
    # the first launch of each size is Triton's; where a pool begins decides whether it is another kernel
    assert 6 * 40 - 6 * 4 <= len(driver.launches) <= 6 * 40 - 6


def test_batches_longer_than_a_line_take_several_launches() -> None:
    driver = PlayedDriver(SIZES)
    copier = SlotCopier(torch.device("cpu"), driver)
    copied(copier, driver, 16, MAX_SLOTS + 10, 0)
    copied(copier, driver, 16, 2 * MAX_SLOTS + 1, 1)
    assert [programs for programs, *_ in driver.launches][-3:] == [10 * MAX_SLOTS, 10 * MAX_SLOTS, 10]


def test_one_slot_is_one_copy_of_the_driver() -> None:
    driver = PlayedDriver(SIZES)
    copier = SlotCopier(torch.device("cpu"), driver)
    copied(copier, driver, 4096, 1, 0)
    assert driver.launches == []


@pytest.mark.parametrize(("status", "error"), [(OUT_OF_MEMORY, NoMemoryError), (ILLEGAL_ADDRESS, CudaDriverError)])
def test_a_call_that_fails_says_which_and_leaves_the_thread_s_context(status: int, error: type[Exception]) -> None:
    driver = PlayedDriver(SIZES)
    copier = SlotCopier(torch.device("cpu"), driver)
    for seed in range(8):
        copied(copier, driver, 64, 5, seed)
    assert driver.launches
    driver.status = status
    with pytest.raises(error, match="cuMemcpyAsync: CUDA"):
        copied(copier, driver, 64, 5, 0)
    assert driver.contexts == []


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (
            PlayedDriver(SIZES, missing="cuLaunchKernel"),
            "the driver has no cuLaunchKernel: batches are queued by torch",
        ),
        (PlayedDriver([8, 8, 8, 8, 4, 8]), "expected parameters of [8, 8, 8, 8, 4, 4] bytes, got [8, 8, 8, 8, 4, 8]"),
        (PlayedDriver(SIZES[:5]), "expected parameters of [8, 8, 8, 8, 4, 4] bytes, got [8, 8, 8, 8, 4]"),
    ],
)
def test_without_calls_or_with_another_kernel_triton_launches(
    driver: PlayedDriver, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    copier = SlotCopier(torch.device("cpu"), driver)
    for seed in range(8):
        copied(copier, driver, 64, 5, seed)
    assert driver.launches == []
    assert message in caplog.text
