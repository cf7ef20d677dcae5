"""How fast the one-pass grid answers many cells of a trace, beside the same cells by replay. Prints one JSON object.

    python benchmarks/grid.py TRACE [--repeats 5]

A cell is one block size, interval, number of KV blocks and number of snapshots. CPU seconds after parsing, medians; the
replay is a sample of the cells, extrapolated to all of them. `split 32` divides each id of the trace into 32 blocks.
"""

import argparse
import json
import platform
import resource
import statistics
import time

import numpy as np

from ssmcache import (
    AttentionLayerConfig,
    BufferConfig,
    GpuCacheTierConfig,
    KVCacheManagerConfig,
    SsmLayerConfig,
)
from ssmcache_sim.formats import read_trace
from ssmcache_sim.grid import hybrid_hits, stack_distances
from ssmcache_sim.replay import replay
from ssmcache_sim.trace import Trace

FACTORS = (1, 2, 4, 8, 16, 32)
NUM_CAPACITIES = 38
NUM_SAMPLES = 3


def shapes(trace: Trace, split: int) -> list[tuple[int, int]]:
    """Block sizes up to the recorded block times 4, each with the intervals that it allows."""
    recorded = trace.tokens_per_block * split
    blocks = sorted({trace.tokens_per_block, recorded // 2, recorded, 2 * recorded, 4 * recorded})
    blocks = [block for block in blocks if block >= trace.tokens_per_block]
    return [(b, recorded * f) for b in blocks for f in FACTORS if recorded * f % b == 0]


def capacities(trace: Trace, size: int) -> list[int]:
    """Log-spaced stacks of blocks of one size, from the largest request on."""
    longest = int(trace.prompt_tokens.max()) // size + 1
    return np.unique(np.geomspace(longest, 400 * longest, NUM_CAPACITIES).astype(np.int64)).tolist()


def all_cells(trace: Trace, cells: list[tuple[int, int]]) -> tuple[int, int]:
    """(number of cells, sum of their hit tokens) of the whole plane of each shape."""
    distances = stack_distances(trace, {size for shape in cells for size in shape})
    count = total = 0
    for block, interval in cells:
        plane = hybrid_hits(distances, block, interval, capacities(trace, block), capacities(trace, interval))
        count += plane.size
        total += int(plane.sum())
    return count, total


def replay_seconds(trace: Trace, cells: list[tuple[int, int]]) -> float:
    """CPU seconds of one cell by replay: the mean of a few cells in the middle."""
    seconds = []
    for block, interval in cells[:: max(1, len(cells) // NUM_SAMPLES)][:NUM_SAMPLES]:
        pages = capacities(trace, block)[NUM_CAPACITIES // 2] + 1
        states = capacities(trace, interval)[NUM_CAPACITIES // 2] + 1
        layers = (AttentionLayerConfig(0, (BufferConfig("kv", 1),)), SsmLayerConfig(1, (BufferConfig("state", 1),)))
        tier = (GpuCacheTierConfig(pages + states),)
        config = KVCacheManagerConfig(block, layers, tier, interval, ssm_fraction=states / (pages + states))
        begin = time.process_time()
        replay(trace, config)
        seconds.append(time.process_time() - begin)
    return statistics.mean(seconds)


def main() -> None:
    """Measure both, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    recorded = read_trace(arguments.trace)
    report: dict[str, object] = {"python": platform.python_version(), "requests": recorded.num_requests}
    for name, trace, split in (("recorded blocks", recorded, 1), ("split 32", recorded.expanded(32), 32)):
        cells = shapes(trace, split)
        times = []
        for _ in range(arguments.repeats):
            begin = time.process_time()
            count, total = all_cells(trace, cells)
            times.append(time.process_time() - begin)
        each = replay_seconds(trace, cells)
        report[name] = {
            "cells": count,
            "shapes": len(cells),
            "grid_cpu_seconds": round(statistics.median(times), 3),
            "replay_cpu_seconds_a_cell": round(each, 3),
            "replay_cpu_seconds_extrapolated": round(each * count),
            "hit_tokens_of_all_cells": total,
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
