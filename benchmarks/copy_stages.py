"""Where the host's time of a batch of copies within the GPU goes, stage by stage. Prints one JSON object.

    PYTHONPATH=. python benchmarks/copy_stages.py [--repeats 150]

Needs a CUDA device, torch, triton and cuda-bindings. "whole" is the call `CudaMemory.copy`; the stages are what it
does, called one by one on other batches. Medians in microseconds, with nothing under way.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator

import torch

from ssmcache.memory import kernels
from ssmcache.memory.cuda import CudaMemory
from ssmcache.memory.cuda_indices import NUMBER_BYTES
from ssmcache.memory.cuda_pools import access
from ssmcache.memory.cuda_timing import GPU, opened
from ssmcache.memory.slot_timing import RandomMoves

SLOT_BYTES = 64 << 10
WARM_UPS = 40  # more than there are lines, so that each has been written


def whole(memory: CudaMemory, moves: RandomMoves, stream: torch.cuda.Stream) -> float:
    batch = moves.next()
    torch.cuda.synchronize()
    start = time.perf_counter()
    memory.copy(batch, stream)
    return time.perf_counter() - start


def stages(
    memory: CudaMemory, moves: RandomMoves, num_slots: int, stream: torch.cuda.Stream
) -> Iterator[tuple[str, float]]:
    """(stage, when it was over), the first of which is the start."""
    copier, pool = memory._copier, memory._tiers[GPU].pools[0]  # type: ignore[union-attr]
    calls, lines = copier._calls, copier._lines
    assert calls is not None
    batch = moves.next()
    torch.cuda.synchronize()
    yield "start", time.perf_counter()
    sources, destinations = memory._check.slots(batch, 2 * num_slots, 2 * num_slots)
    yield "check", time.perf_counter()
    dtype, unit = access(pool.slot_bytes)
    shape = kernels.shape_of(pool.slot_bytes // dtype.itemsize, unit, dtype.itemsize)
    addresses = pool.address(0), pool.address(0)
    prepared = copier._prepared[dtype, unit, shape, *(address % 16 == 0 for address in addresses)]
    assert prepared is not None
    yield "kernel", time.perf_counter()
    line = lines.take()
    yield "take a line", time.perf_counter()
    second, total = line.fill(sources, destinations)
    yield "fill the line", time.perf_counter()
    with calls.current():
        yield "push the context", time.perf_counter()
        line.send_by(calls, total, stream)
        yield "send the line", time.perf_counter()
        slots = line.address, line.address + NUMBER_BYTES * second
        prepared.launch(shape.num_programs(num_slots), stream, *addresses, *slots, num_slots, shape.num_units)
        yield "launch", time.perf_counter()
    yield "pop the context", time.perf_counter()
    lines.give(line, stream)
    yield "event", time.perf_counter()


def measured(num_slots: int, repeats: int) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    stream = torch.cuda.Stream()
    with opened(SLOT_BYTES, 2 * num_slots) as memory:
        if memory._copier._calls is None:
            sys.exit("cuda-bindings: expected it, with a driver that has its calls, got none")
        moves = RandomMoves(GPU, GPU, num_slots)
        for _ in range(WARM_UPS):
            whole(memory, moves, stream)
        for _ in range(repeats):
            found.setdefault("whole", []).append(whole(memory, moves, stream))
            before = 0.0
            for name, at in stages(memory, moves, num_slots, stream):
                if name != "start":
                    found.setdefault(name, []).append(at - before)
                before = at
    return {name: round(statistics.median(seconds) * 1e6, 1) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=150)
    repeats = parser.parse_args().repeats
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(result | {f"{slots} slots": measured(slots, repeats) for slots in (64, 512, 4096)}, indent=1))


if __name__ == "__main__":
    main()
