"""How fast the one-pass grid answers many cells of a trace, beside the same cells by replay. Prints one JSON object.

    python benchmarks/grid.py TRACE [--weka WEKA_TRACE] [--repeats 5]

A cell is one block size, interval, number of KV blocks and number of snapshots. CPU seconds after parsing, medians; the
replay is a sample of the cells, extrapolated to all of them. `split 32` divides each id of TRACE into 32 blocks. Of
WEKA_TRACE, if given: 8 intervals x 4 block sizes x 64 capacities of each pool. `last`: the same cells with a snapshot
at each request's last boundary only; `arena`: each shape with as many byte budgets as there are capacities.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

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
from ssmcache_sim.grid_arena import arena_hits
from ssmcache_sim.grid_last import last_boundaries, last_hits
from ssmcache_sim.replay import replay
from ssmcache_sim.trace import Trace

NUM_SAMPLES = 3
# of nemotron-h-8b
KV_BYTES_PER_TOKEN = 16_384
SNAPSHOT_BYTES = 102_137_856


@dataclass(frozen=True, slots=True)
class Case:
    """A trace and its cells: shapes are (block, interval) pairs, each with that many capacities of either pool."""

    trace: Trace
    shapes: list[tuple[int, int]]
    num_capacities: int

    def capacities(self, size: int) -> list[int]:
        """Log-spaced stacks of blocks of one size, from the largest request on."""
        longest = int(self.trace.prompt_tokens.max()) // size + 1
        return np.unique(np.geomspace(longest, 400 * longest, self.num_capacities).astype(np.int64)).tolist()


def recorded_case(trace: Trace, split: int) -> Case:
    """Block sizes up to the recorded block times 4, each with the intervals that it allows."""
    recorded = trace.tokens_per_block * split
    blocks = sorted({trace.tokens_per_block, recorded // 2, recorded, 2 * recorded, 4 * recorded})
    blocks = [block for block in blocks if block >= trace.tokens_per_block]
    intervals = [recorded * factor for factor in (1, 2, 4, 8, 16, 32)]
    return Case(trace, [(b, i) for b in blocks for i in intervals if i % b == 0], 38)


def many_case(trace: Trace) -> Case:
    """8 intervals x 4 block sizes x 64 capacities."""
    blocks = [trace.tokens_per_block << power for power in range(4)]
    return Case(trace, [(b, blocks[-1] << power) for b in blocks for power in range(8)], 64)


def all_cells(case: Case) -> tuple[int, int]:
    """(number of cells, sum of their hit tokens) of the whole plane of each shape."""
    distances = stack_distances(case.trace, {size for shape in case.shapes for size in shape})
    count = total = 0
    for block, interval in case.shapes:
        plane = hybrid_hits(distances, block, interval, case.capacities(block), case.capacities(interval))
        count += plane.size
        total += int(plane.sum())
    return count, total


def all_cells_of_last(case: Case) -> tuple[int, int]:
    """The same with admission `last`."""
    distances = stack_distances(case.trace, {block for block, _ in case.shapes})
    found = {interval: last_boundaries(case.trace, interval) for interval in {interval for _, interval in case.shapes}}
    count = total = 0
    for block, interval in case.shapes:
        of_block, of_interval = case.capacities(block), case.capacities(interval)
        plane = last_hits(distances, found[interval], block, of_block, of_interval)
        count += plane.size
        total += int(plane.sum())
    return count, total


def all_arenas(case: Case) -> tuple[int, int]:
    """The same with one budget of bytes for pages and snapshots."""
    distances = stack_distances(case.trace, {size for shape in case.shapes for size in shape})
    count = total = 0
    for block, interval in case.shapes:
        page_bytes = block * KV_BYTES_PER_TOKEN
        budgets = [
            blocks * page_bytes + snapshots * SNAPSHOT_BYTES
            for blocks, snapshots in zip(case.capacities(block), case.capacities(interval), strict=False)
        ]
        usable = arena_hits(distances, block, interval, page_bytes, SNAPSHOT_BYTES, budgets).usable
        count += usable.size
        total += int(usable.sum())
    return count, total


def replay_seconds(case: Case) -> float:
    """CPU seconds of one cell by replay: the mean of a few cells in the middle."""
    seconds = []
    for block, interval in case.shapes[:: max(1, len(case.shapes) // NUM_SAMPLES)][:NUM_SAMPLES]:
        pages = case.capacities(block)[case.num_capacities // 2] + 1
        states = case.capacities(interval)[case.num_capacities // 2] + 1
        layers = (AttentionLayerConfig(0, (BufferConfig("kv", 1),)), SsmLayerConfig(1, (BufferConfig("state", 1),)))
        tier = (GpuCacheTierConfig(pages + states),)
        config = KVCacheManagerConfig(block, layers, tier, interval, ssm_fraction=states / (pages + states))
        begin = time.process_time()
        replay(case.trace, config)
        seconds.append(time.process_time() - begin)
    return statistics.mean(seconds)


def measure(case: Case, repeats: int) -> dict[str, float]:
    """Both ways, for the report."""
    grid_seconds, count, total = timed(all_cells, case, repeats)
    grid_peak = peak_rss_mb()
    last_seconds, num_last, _ = timed(all_cells_of_last, case, repeats)
    arena_seconds, num_arenas, _ = timed(all_arenas, case, repeats)
    each = replay_seconds(case)
    return {
        "requests": case.trace.num_requests,
        "block_references": case.trace.block_keys.size,
        "cells": count,
        "shapes": len(case.shapes),
        "grid_cpu_seconds": grid_seconds,
        "grid_peak_rss_mb": grid_peak,
        "last_cells": num_last,
        "last_cpu_seconds": last_seconds,
        "arena_cells": num_arenas,
        "arena_cpu_seconds": arena_seconds,
        "replay_cpu_seconds_a_cell": round(each, 3),
        "replay_cpu_seconds_extrapolated": round(each * count),
        "hit_tokens_of_all_cells": total,
    }


def timed(work: Callable[[Case], tuple[int, int]], case: Case, repeats: int) -> tuple[float, int, int]:
    """(median CPU seconds, number of cells, sum of their hit tokens)."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        count, total = work(case)
        times.append(time.process_time() - begin)
    return round(statistics.median(times), 3), count, total


def peak_rss_mb() -> int:
    """Of this process so far, all that was read included."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--weka", help="weka_claude_code_main, or another trace with sessions of many turns")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    report: dict[str, object] = {"python": platform.python_version()}
    recorded = read_trace(arguments.trace)
    report["recorded blocks"] = measure(recorded_case(recorded, 1), arguments.repeats)
    report["split 32"] = measure(recorded_case(recorded.expanded(32), 32), arguments.repeats)
    if arguments.weka is not None:
        begin = time.process_time()
        case = many_case(read_trace(arguments.weka))
        reading = {"reading_cpu_seconds": round(time.process_time() - begin, 3), "reading_peak_rss_mb": peak_rss_mb()}
        report["weka"] = {**reading, **measure(case, arguments.repeats)}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
