"""How fast the manager replays a trace on one core, beside a block-by-block LRU of KV alone. Prints one JSON object.

    python benchmarks/replay.py TRACE [--repeats 5] [--cases 16-hybrid-1M,...]

Each measurement is a process of its own and the cases take turns, so that the ratios hold on a machine whose speed
drifts. Times are CPU seconds (process_time) of the serving loop; parsing is measured apart. Rates are requests a
second. The hits of each case are printed too: a fast replay of something else is no result.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable

from ssmcache import (
    AttentionLayerConfig,
    BlockKeys,
    BufferConfig,
    GpuCacheTierConfig,
    KVCacheManager,
    KVCacheManagerConfig,
    SimulatedMemory,
    SsmLayerConfig,
)
from ssmcache_sim.formats import read_trace
from ssmcache_sim.trace import Trace

INTERVAL = 1024
CAPACITIES = {"1M": 1_000_000, "10M": 10_000_000}
KINDS = ("attention", "hybrid", "chunked", "ordereddict")
CASES = ["parse"] + [f"{block}-{kind}-{size}" for block in (512, 16) for size in CAPACITIES for kind in KINDS]


def make_manager(block: int, kind: str, capacity_tokens: int) -> KVCacheManager:
    """One page more than the capacity, and one state more than a snapshot for each 1,024 tokens of it: what a single
    request takes beyond what it leaves.
    """
    pages, states = capacity_tokens // block + 1, capacity_tokens // INTERVAL + 1
    layers: list[AttentionLayerConfig | SsmLayerConfig] = [AttentionLayerConfig(0, (BufferConfig("kv", 1),))]
    quota, fraction = pages, None
    if kind != "attention":
        layers.append(SsmLayerConfig(1, (BufferConfig("state", 1),)))
        quota, fraction = pages + states, states / (pages + states)
    tiers = (GpuCacheTierConfig(quota),)
    config = KVCacheManagerConfig(block, tuple(layers), tiers, ssm_reuse_interval=INTERVAL, ssm_fraction=fraction)
    manager = KVCacheManager(config, SimulatedMemory())
    assert manager.pools[0][0].capacity == pages
    return manager


def serve(manager: KVCacheManager, prompts: Iterable[BlockKeys], kind: str) -> int:
    """Create, resume, resize, reserve, commit, close: the replay loop. Returns the usable hit tokens."""
    hits = 0
    for index, prompt in enumerate(prompts):
        length = prompt.stop
        kv = manager.create_kv_cache(prompt[:-1], id=index)
        if not (kv.resume() and kv.resize(length + 1)):
            raise RuntimeError(f"request {index} was refused: {kv.shortage}")
        hits += kv.num_committed_tokens
        if kind == "hybrid":
            kv.reserve_snapshots(kv.snapshot_points(length))
        elif kind == "chunked":
            for point in kv.snapshot_points(length):
                kv.commit(prompt[kv.num_committed_tokens : point])
        kv.commit(prompt[kv.num_committed_tokens :])
        kv.close()
    return hits


def serve_block_by_block(prompts: Iterable[BlockKeys], capacity_blocks: int) -> int:
    """LRU of KV blocks alone in an OrderedDict: no slots, no states, no locks. The yardstick."""
    blocks: OrderedDict[int, None] = OrderedDict()
    to_end = blocks.move_to_end
    hits = 0
    for prompt in prompts:
        keys = prompt.keys.tolist()
        found = 0
        for key in keys:
            if key not in blocks:
                break
            found += 1
        hits += min(found, (prompt.stop - 1) // prompt.tokens_per_block) * prompt.tokens_per_block
        for key in reversed(keys):
            if key in blocks:
                to_end(key)
            else:
                blocks[key] = None
        while len(blocks) > capacity_blocks:
            blocks.popitem(last=False)
    return hits


def measure(path: str, case: str) -> dict[str, float | int]:
    """One case, in this process."""
    begin = time.process_time()
    trace: Trace = read_trace(path)
    parse_seconds = time.process_time() - begin
    if case == "parse":
        return {"cpu_seconds": parse_seconds}
    block_name, kind, size = case.split("-")
    block, capacity = int(block_name), CAPACITIES[size]
    if block < trace.tokens_per_block:
        trace = trace.expanded(trace.tokens_per_block // block)
    begin = time.process_time()
    if kind == "ordereddict":
        hits = serve_block_by_block(trace.prompts(), capacity // block)
    else:
        hits = serve(make_manager(block, kind, capacity), trace.prompts(), kind)
    seconds = time.process_time() - begin
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rate = trace.num_requests / seconds
    return {"cpu_seconds": seconds, "requests_per_second": rate, "hit_tokens": hits, "peak_rss_mb": peak_mb}


def main() -> None:
    """Run the cases in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES), help="comma separated")
    parser.add_argument("--one", metavar="CASE", help="measure one case in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.trace, arguments.one)))
        return
    cases = arguments.cases.split(",")
    runs: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(arguments.repeats):
        for case in cases:
            command = [sys.executable, __file__, arguments.trace, "--one", case]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs[case].append(json.loads(output))
    medians = {
        case: {name: round(statistics.median(run[name] for run in results), 3) for name in results[0]}
        for case, results in runs.items()
    }
    ratios = {}
    for case in cases:
        yardstick = case.rsplit("-", 2)[0] + "-ordereddict-" + case.rsplit("-", 1)[-1]
        if case != yardstick and yardstick in medians:
            pairs = zip(runs[case], runs[yardstick], strict=True)
            ratio = statistics.median(b["cpu_seconds"] / a["cpu_seconds"] for a, b in pairs)
            ratios[f"{case} / {yardstick}"] = round(ratio, 2)
    for size in CAPACITIES:
        for kind in KINDS[:3]:
            fine, coarse = f"16-{kind}-{size}", f"512-{kind}-{size}"
            if fine in medians and coarse in medians:
                seconds = [medians[case]["cpu_seconds"] for case in (fine, coarse)]
                ratios[f"time {fine} / time {coarse}"] = round(seconds[0] / seconds[1], 2)
    machine = {"python": platform.python_version(), "processor": platform.processor() or platform.machine()}
    print(
        json.dumps({"machine": machine, "repeats": arguments.repeats, "medians": medians, "ratios": ratios}, indent=2)
    )


if __name__ == "__main__":
    main()
