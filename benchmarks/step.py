"""What the manager costs a model runner on the host: decode steps, and the first resume of a long hit. Prints one JSON
object.

    python benchmarks/step.py [--memory simulated|host|cuda] [--repeats 7]

A decode step makes room for one token more in each of 256 ACTIVE sequences (`kv.resize`); every 32nd crosses a block
and commits the 32 tokens before it. Times are CPU microseconds of the calling thread (thread_time) a sequence: medians
over the steps of a run, then over the runs; `crossing` includes the commit. A first resume is `create_kv_cache` and
`resume` of a prompt of 16,384 tokens that is cached; on a hybrid the copy of its snapshot is queued, too. The caches
of all memories are of one shape: a model of eight attention layers, and in hybrids eight SSM layers.

`bound_rows`: a `resize` inside a block, and one that crosses into the next, of a sequence of so many blocks without and
with `bind_page_indices`. `priorities`: requests of 32,768 known tokens in blocks of 16, from creation to `close`,
without priorities, with ranges, with a callback, and without where others have used one. Both take turns in one
process: the ratios hold on a machine whose speed drifts.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from typing import Any

import numpy as np

from ssmcache import (
    AttentionLayerConfig,
    BufferConfig,
    GpuCacheTierConfig,
    HostMemory,
    KVCache,
    KVCacheManager,
    KVCacheManagerConfig,
    PriorityRange,
    SimulatedMemory,
    SsmLayerConfig,
)
from ssmcache.memory.base import Memory

BLOCK, INTERVAL = 32, 512
NUM_SEQUENCES, PROMPT_TOKENS, NUM_STEPS = 256, 1024, 512
HIT_TOKENS = 16_384
MODELS = ("attention", "hybrid", "window")
ROW_BLOCKS, NUM_ROW_STEPS = (16, 1024, 8192), 1024
PRIORITY_TOKENS, PRIORITY_BLOCK = 32_768, 16
BARS_US = {"inside": 1.0, "crossing": {"attention": 8.0, "hybrid": 12.0}, "first_resume": 200.0, "bound_row": 1.0}


def memory_of(kind: str) -> Memory:
    if kind == "cuda":
        from ssmcache.memory.cuda import CudaMemory

        return CudaMemory()
    return HostMemory() if kind == "host" else SimulatedMemory()


def manager_of(model: str, memory: Memory, block: int = BLOCK) -> KVCacheManager:
    """With room for everything: the question is what the calls cost, not the evictions."""
    window = 1024 if model == "window" else None
    layers: list[AttentionLayerConfig | SsmLayerConfig] = [
        AttentionLayerConfig(index, (BufferConfig("key", 64 * block), BufferConfig("value", 64 * block)))
        for index in range(8)
    ]
    if window:
        layers += [AttentionLayerConfig(8 + index, (BufferConfig("kv", 64 * block),), window) for index in range(8)]
    if model == "hybrid":
        layers += [SsmLayerConfig(16 + index, (BufferConfig("ssm_state", 4096),)) for index in range(8)]
    config = KVCacheManagerConfig(
        block,
        layers,
        [GpuCacheTierConfig(1 << 30)],
        ssm_reuse_interval=INTERVAL,
        ssm_fraction=0.1 if model == "hybrid" else None,
    )
    return KVCacheManager(config, memory)


def started(manager: KVCacheManager, prompt: np.ndarray[Any, Any]) -> KVCache:
    """An ACTIVE sequence whose prompt is computed and committed."""
    kv = manager.create_kv_cache(prompt[:-1])
    assert kv.resume()
    assert kv.resize(prompt.size)
    kv.reserve_snapshots(kv.snapshot_points(prompt.size))
    kv.commit(prompt[kv.num_committed_tokens :])
    return kv


def microseconds(start: float) -> float:
    return (time.thread_time() - start) * 1e6


def decode(model: str, kind: str) -> dict[str, float]:
    """Medians of one run, microseconds a sequence."""
    manager = manager_of(model, memory_of(kind))
    tokens = np.random.default_rng(1).integers(0, 1 << 20, (NUM_SEQUENCES, PROMPT_TOKENS + NUM_STEPS + 1))
    sequences = [started(manager, row[:PROMPT_TOKENS]) for row in tokens]
    inside, crossing, snapshots, spent_at_crossing = [], [], [], 0.0
    gc.collect()
    for step in range(1, NUM_STEPS + 1):
        length = PROMPT_TOKENS + step
        start = time.thread_time()
        for kv in sequences:
            kv.resize(length, length - 1)
        spent = microseconds(start)
        if length % BLOCK == 0:
            pieces = [row[length - BLOCK : length] for row in tokens]
            start = time.thread_time()
            for kv, piece in zip(sequences, pieces, strict=True):
                kv.commit(piece)
            (snapshots if length % INTERVAL == 0 else crossing).append(microseconds(start) + spent_at_crossing)
        elif length % BLOCK == 1:
            spent_at_crossing = spent  # the page for the tokens that the next commit offers
        else:
            inside.append(spent)
    for kv in sequences:
        kv.close()
    manager.check()
    manager.shutdown()
    found = {"inside": inside, "crossing": crossing, "crossing_with_snapshot": snapshots}
    return {name: statistics.median(times) / NUM_SEQUENCES for name, times in found.items()}


def first_resume(model: str, kind: str) -> float:
    """Median microseconds of one run."""
    manager = manager_of(model, memory_of(kind))
    prompt = np.random.default_rng(2).integers(0, 1 << 20, HIT_TOKENS + 1)
    started(manager, prompt).close()
    times = []
    for _ in range(50):
        start = time.thread_time()
        kv = manager.create_kv_cache(prompt[:-1])
        resumed = kv.resume()
        times.append(microseconds(start))
        assert resumed
        assert kv.num_committed_tokens == HIT_TOKENS, (model, kv.num_committed_tokens)
        kv.close()
    manager.shutdown()
    return statistics.median(times)


def bound_rows(model: str, kind: str, num_blocks: int) -> dict[str, float]:
    """Medians of one run, microseconds a `resize`, with the rows of all layer groups of attention bound and without."""
    manager = manager_of(model, memory_of(kind))
    times: dict[tuple[str, bool], list[float]] = {}
    sequences = []
    for is_bound in (False, True):
        kv = manager.create_kv_cache()
        assert kv.resume()
        assert kv.resize(num_blocks * BLOCK, num_blocks * BLOCK)
        if is_bound:
            for group in range(len(manager.groups)):
                if group != manager.state_group:
                    kv.bind_page_indices(group, np.zeros(num_blocks + NUM_ROW_STEPS // BLOCK + 1, np.int32))
        sequences.append((is_bound, kv))
    gc.collect()
    for step in range(1, NUM_ROW_STEPS + 1):
        length = num_blocks * BLOCK + step
        place = "crossing" if length % BLOCK == 1 else "inside"
        for is_bound, kv in sequences:
            start = time.thread_time_ns()
            kv.resize(length, length - 1)
            times.setdefault((place, is_bound), []).append((time.thread_time_ns() - start) / 1e3)
    for _, kv in sequences:
        kv.close()
    manager.shutdown()
    return {f"{place}, {'bound' if bound else 'unbound'}": statistics.median(t) for (place, bound), t in times.items()}


def priorities(model: str, kind: str) -> dict[str, float]:
    """Medians of one run, microseconds a request."""
    prompt = np.random.default_rng(3).integers(0, 1 << 20, PRIORITY_TOKENS + 1)
    ranges = (PriorityRange(0, 128, 80), PriorityRange(1920, None, 20))

    def callback(layer_group: int, block: int) -> int:
        return 80 if block < 128 else 20 if block >= 1920 else 35

    users = {"none": None, "ranges": ranges, "callback": callback, "none, after a callback": None}
    managers = {user: manager_of(model, memory_of(kind), PRIORITY_BLOCK) for user in users}
    times: dict[str, list[float]] = {user: [] for user in users}

    def request(user: str, priority: Any) -> float:
        start = time.thread_time()
        kv = managers[user].create_kv_cache(prompt[:-1], priority=priority)
        resumed = kv.resume() and kv.resize(prompt.size)
        kv.commit(prompt[kv.num_committed_tokens :])
        kv.close()
        assert resumed
        return microseconds(start)

    for user, priority in users.items():
        request(user, callback if "after" in user else priority)
    for _ in range(100):
        for user, priority in users.items():
            times[user].append(request(user, priority))
    for manager in managers.values():
        manager.shutdown()
    return {user: statistics.median(found) for user, found in times.items()}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=["simulated", "host", "cuda"], default="simulated")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "memory": options.memory,
        "bars_us": BARS_US,
    }
    for model in MODELS:
        runs = [decode(model, options.memory) for _ in range(options.repeats)]
        resumes = [first_resume(model, options.memory) for _ in range(options.repeats)]
        report[model] = medians(runs) | {"first_resume": round(statistics.median(resumes), 3)}
    report["bound_rows"] = {
        f"{model}, {num_blocks:,} blocks": medians(
            [bound_rows(model, options.memory, num_blocks) for _ in range(options.repeats)]
        )
        for model in ("attention", "window")
        for num_blocks in ROW_BLOCKS
    }
    report["priorities"] = {}
    for model in MODELS:
        runs = [priorities(model, options.memory) for _ in range(options.repeats)]
        ratios = [{f"{user} / none": run[user] / run["none"] for user in run if user != "none"} for run in runs]
        report["priorities"][model] = medians(runs) | medians(ratios)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
