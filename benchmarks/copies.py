"""How fast `CudaMemory` copies slots, beside one plain copy of as many bytes in the same run. Prints one JSON object.

    PYTHONPATH=. python benchmarks/copies.py [--repeats 20] [--variants]

Needs a CUDA device, numpy and torch; triton and cuda-bindings if they are to be measured. About a minute; `--variants`
also times the kernel with other constants and both ways over the link for each size, alone and beside matrix products.

Rates are those of `ssmcache.memory.cuda_timing`; plain and slot copies take turns on fresh slots, and the figures are
medians. Host times are those of the `copy` call, with nothing under way. What was copied is compared at the end of each
case.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from itertools import product
from typing import Any

import numpy as np
import torch

from ssmcache.config import GpuCacheTierConfig
from ssmcache.memory import cuda_copies
from ssmcache.memory.base import SlotMoves
from ssmcache.memory.cuda import CudaMemory
from ssmcache.memory.cuda_timing import DISK, GPU, HOST, device_seconds, opened, timed_copies
from ssmcache.memory.slot_timing import RandomMoves, medians

KIB, MIB = 1 << 10, 1 << 20
WITHIN_GPU = [
    (64 * KIB, 4096, 0.70),
    (2 * MIB, 128, 0.85),
    (2 * MIB, 512, 0.85),
    (50 * MIB, 8, 0.85),
    (50 * MIB, 32, 0.85),
]
OVER_LINK = [(64 * KIB, 4096, 0.83), (2 * MIB, 128, 0.90), (50 * MIB, 8, None)]
MAX_HOST_US = 100
KERNEL_CASES = [(64 * KIB, 4096), (2 * MIB, 128)]
SIZES = [(size, 256 * MIB // size) for size in (16 * KIB, 64 * KIB, 256 * KIB, 512 * KIB, MIB, 2 * MIB)]
Row = dict[str, Any]


def within_gpu(slot_bytes: int, num_slots: int, repeats: int) -> Row:
    return beside_plain("gpu", GPU, GPU, slot_bytes, num_slots, repeats)


def over_link(source: int, destination: int, slot_bytes: int, num_slots: int, repeats: int) -> Row:
    kind = "to gpu" if destination == GPU else "to host"
    return beside_plain(kind, source, destination, slot_bytes, num_slots, repeats)


def beside_plain(kind: str, source: int, destination: int, slot_bytes: int, num_slots: int, repeats: int) -> Row:
    with timed_copies(source, destination, slot_bytes, num_slots) as copies:
        plain, slots = medians(repeats, device_seconds, copies.plain, copies.slots)
        copies.check()
        host_us = host_microseconds(copies.memory, copies.moves, repeats)
    return row(kind, slot_bytes, num_slots, plain, slots) | host_us


def row(kind: str, slot_bytes: int, num_slots: int, plain: float, slots: float) -> Row:
    total = slot_bytes * num_slots
    return {
        "kind": kind,
        "slot_kib": slot_bytes / KIB,
        "slots": num_slots,
        "plain_gb_s": round(total / plain / 1e9, 1),
        "slots_gb_s": round(total / slots / 1e9, 1),
        "ratio": round(plain / slots, 3),
    }


def host_microseconds(memory: CudaMemory, batches: RandomMoves, repeats: int) -> Row:
    """Median time of the call, with slots as arrays and as lists."""
    times: dict[str, list[float]] = {"host_us_arrays": [], "host_us_lists": []}
    for _ in range(max(20, repeats)):
        for name, found in times.items():
            moves = batches.next()
            if name == "host_us_lists":
                moves = moves._replace(
                    sources=np.asarray(moves.sources).tolist(), destinations=np.asarray(moves.destinations).tolist()
                )
            torch.cuda.synchronize()
            start = time.perf_counter()
            memory.copy(moves, None)
            found.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return {name: round(statistics.median(found) * 1e6, 1) for name, found in times.items()}


def host_times(repeats: int) -> Row:
    """Median time of the call within the GPU by the number of slots of 64 KiB, on a stream and on the current one."""
    rows = []
    stream = torch.cuda.Stream()
    for num_slots in (1, 64, 4096):
        with opened(64 * KIB, 2 * num_slots) as memory:
            batches = RandomMoves(GPU, GPU, num_slots)
            found: list[list[float]] = [[], []]
            for _ in range(10 + max(40, repeats)):
                for times, on in zip(found, (stream, None), strict=True):
                    moves = batches.next()
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    memory.copy(moves, on)
                    times.append((time.perf_counter() - start) * 1e6)
            torch.cuda.synchronize()
            rows.append([num_slots, *(round(statistics.median(times[10:]), 1) for times in found)])
    return {"columns": ["slots", "us_on_a_stream", "us_on_the_current_stream"], "rows": rows}


def mapping() -> Row:
    """Milliseconds for 256 pages: new ones, moved between pools, and given back."""
    memory = CudaMemory()
    memory.open([GpuCacheTierConfig(1)], [2 * MIB, 2 * MIB])
    times = {}
    for name, counts in (("new", [256, 0]), ("moved", [0, 256]), ("given back", [0, 0])):
        start = time.perf_counter()
        assert memory.resize(GPU, counts)
        times[name] = round((time.perf_counter() - start) * 1e3, 2)
    grain = memory.grain(GPU)
    memory.close()
    return {"ms_for_256_pages": times, "grain_bytes": grain}


def disk(slot_bytes: int = 2 * MIB, num_slots: int = 128) -> Row:
    """Seconds of the caller and until all is on the disk; reads may come from the system's cache."""
    with tempfile.TemporaryDirectory() as folder, opened(slot_bytes, num_slots, 1, folder) as memory:
        assert memory.resize(DISK, [num_slots])
        order = np.random.default_rng(0).permutation(num_slots)
        before = memory.view(0).clone()
        torch.cuda.synchronize()
        start = time.perf_counter()
        ring = max(1, 32 * MIB // slot_bytes)
        memory.copy(SlotMoves(0, GPU, order[:ring], DISK, order[:ring]), None)
        small = time.perf_counter() - start
        memory.copy(SlotMoves(0, GPU, order[ring:], DISK, order[ring:]), None)
        assert memory.resize(DISK, [num_slots])  # waits for the writes
        stored = time.perf_counter() - start
        memory.view(0).zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        memory.copy(SlotMoves(0, DISK, order, GPU, order), None)
        torch.cuda.synchronize()
        loaded = time.perf_counter() - start
        if not torch.equal(memory.view(0), before):
            sys.exit("what came from the disk is not what went there")
    total = slot_bytes * num_slots
    return {
        "slot_kib": slot_bytes / KIB,
        "slots": num_slots,
        "caller_ms_for_32_mib": round(small * 1e3, 2),
        "store_gb_s": round(total / stored / 1e9, 2),
        "load_gb_s": round(total / loaded / 1e9, 2),
    }


# -- variants --------------------------------------------------------------------------------------------------------


def kernel_constants(repeats: int) -> Row:
    """The kernel within the GPU with other piece sizes and numbers of warps, GB of payload a second."""
    from ssmcache.memory import kernels

    rows = []
    for slot_bytes, num_slots in KERNEL_CASES:
        with opened(slot_bytes, 2 * num_slots) as memory:
            moves = RandomMoves(GPU, GPU, num_slots).last
            sources = torch.from_numpy(np.asarray(moves.sources)).int().cuda()
            destinations = torch.from_numpy(np.asarray(moves.destinations)).int().cuda()
            elements = memory.view(0).view(-1).view(torch.int64)
            cases = product((4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB), (2, 4, 8), (2**31 - 1, 132 * 8, 132 * 16))
            for piece_bytes, num_warps, max_programs in cases:
                shape = kernels.shape_of(slot_bytes // 8, 2, 8, piece_bytes, num_warps)
                slots = (sources, destinations, num_slots, 2, shape, shape.num_programs(num_slots, max_programs))
                launch = partial(kernels.launch, elements, elements, *slots)
                (seconds,) = medians(repeats, device_seconds, launch)
                rate = round(slot_bytes * num_slots / seconds / 1e9)
                rows.append([slot_bytes // KIB, piece_bytes // KIB, num_warps, max_programs, rate])
    return {"columns": ["slot_kib", "piece_kib", "warps", "programs", "gb_s"], "rows": rows}


def ways_over_link(repeats: int) -> Row:
    """The kernel and the copy engines for each size of slots: alone, and beside matrix products on another stream; both
    take longer for it.
    """
    rows = []
    kept = cuda_copies.ENGINE_BYTES
    products = Products()
    try:
        for way, threshold in (("engine", 0), ("kernel", 1 << 62)):
            cuda_copies.ENGINE_BYTES = threshold
            for slot_bytes, num_slots in SIZES:
                for source, destination in ((HOST, GPU), (GPU, HOST)):
                    with opened(slot_bytes, num_slots, num_slots) as memory:
                        copy = next_copy(memory, RandomMoves(source, destination, num_slots))
                        (alone,) = medians(repeats, device_seconds, copy)
                        both = [(device_seconds(products.queue), *products.beside(copy)) for _ in range(5)]
                    undisturbed, beside, disturbed = map(statistics.median, zip(*both, strict=True))
                    gb = slot_bytes * num_slots / 1e9
                    direction = "to gpu" if destination == GPU else "to host"
                    lost = round((disturbed - undisturbed) * 1e3 / gb, 2)
                    rows.append([way, direction, slot_bytes // KIB, round(gb / alone, 1), round(gb / beside, 1), lost])
    finally:
        cuda_copies.ENGINE_BYTES = kept
    columns = ["way", "direction", "slot_kib", "gb_s", "gb_s_beside_products", "ms_of_products_lost_per_gb"]
    return {"columns": columns, "rows": rows}


def next_copy(memory: CudaMemory, batches: RandomMoves) -> Callable[[], None]:
    """Each call queues the next batch on the current stream."""
    return lambda: memory.copy(batches.next(), None)


class Products:
    """Matrix products that keep the GPU busy for some 40 ms, longer than any of the copies."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        self._into = torch.empty_like(self._matrix)
        self.queue()
        torch.cuda.synchronize()

    def queue(self) -> None:
        """On the current stream."""
        for _ in range(24):
            torch.matmul(self._matrix, self._matrix, out=self._into)

    def beside(self, copy: Callable[[], None]) -> tuple[float, float]:
        """Device seconds of a copy on the current stream, and of the products on another one."""
        start, copied, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        start.record()
        self._stream.wait_event(start)
        with torch.cuda.stream(self._stream):
            self.queue()
            end.record()
        copy()
        copied.record()
        torch.cuda.synchronize()
        return start.elapsed_time(copied) / 1e3, start.elapsed_time(end) / 1e3


def versions() -> Row:
    found = {}
    for name in ("torch", "triton", "cuda-bindings", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found | {
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
    }


def as_lines(result: Row) -> str:
    """JSON with a line for each entry of a list or table."""

    def value(found: Any) -> str:
        if isinstance(found, dict) and "rows" in found:
            found = [found["columns"], *found["rows"]]
        if isinstance(found, list):
            return "[\n  " + ",\n  ".join(map(json.dumps, found)) + "\n ]"
        return json.dumps(found)

    return "{\n " + ",\n ".join(f"{json.dumps(name)}: {value(found)}" for name, found in result.items()) + "\n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--variants", action="store_true")
    options = parser.parse_args()
    copies, bars = [], []
    for slot_bytes, num_slots, least in WITHIN_GPU:
        copies.append((within_gpu(slot_bytes, num_slots, options.repeats), least))
    for slot_bytes, num_slots, least_over_link in OVER_LINK:
        for source, destination in ((HOST, GPU), (GPU, HOST)):
            copies.append((over_link(source, destination, slot_bytes, num_slots, options.repeats), least_over_link))
    for copy, least_ratio in copies:
        name = f"{copy['kind']}, {copy['slots']} x {copy['slot_kib']:g} KiB"
        if least_ratio is not None:
            bars.append(
                {"bar": f"{name}: ratio >= {least_ratio}", "got": copy["ratio"], "met": copy["ratio"] >= least_ratio}
            )
        if copy["slots"] == 4096:
            got = copy["host_us_arrays"]
            bars.append({"bar": f"{name}: host < {MAX_HOST_US} us", "got": got, "met": got < MAX_HOST_US})
    result: Row = {"versions": versions(), "copies": [copy for copy, _ in copies]}
    result |= {"host_times": host_times(options.repeats), "mapping": mapping(), "disk": disk()}
    if options.variants:
        result["kernel_constants"] = kernel_constants(options.repeats)
        result["ways_over_link"] = ways_over_link(options.repeats)
    result["bars"] = bars
    print(as_lines(result))


if __name__ == "__main__":
    main()
