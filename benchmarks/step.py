"""What the manager costs a model runner on the host: decode steps, and the first resume of a long hit. Prints one JSON
object.

    python benchmarks/step.py [--memory simulated|host|cuda] [--repeats 7]

A decode step makes room for one token more in each of 256 ACTIVE sequences (`kv.resize`); every 32nd crosses a block
and commits the 32 tokens before it. Times are CPU microseconds of the calling thread (thread_time) a sequence: medians
over the steps of a run, then over the runs; `crossing` includes the commit. A first resume is `create_kv_cache` and
`resume` of a prompt of 16,384 tokens that is cached; on a hybrid the copy of its snapshot is queued, too. The caches
of all memories are of one shape: a model of eight attention layers, and in hybrids eight SSM layers.
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
    SimulatedMemory,
    SsmLayerConfig,
)
from ssmcache.memory.base import Memory

BLOCK, INTERVAL = 32, 512
NUM_SEQUENCES, PROMPT_TOKENS, NUM_STEPS = 256, 1024, 512
HIT_TOKENS = 16_384
MODELS = ("attention", "hybrid", "window")
BARS_US = {"inside": 1.0, "crossing": {"attention": 8.0, "hybrid": 12.0}, "first_resume": 200.0}


def memory_of(kind: str) -> Memory:
    if kind == "cuda":
        from ssmcache.memory.cuda import CudaMemory

        return CudaMemory()
    return HostMemory() if kind == "host" else SimulatedMemory()


def manager_of(model: str, memory: Memory) -> KVCacheManager:
    """With room for everything: the question is what the calls cost, not the evictions."""
    window = 1024 if model == "window" else None
    layers: list[AttentionLayerConfig | SsmLayerConfig] = [
        AttentionLayerConfig(index, (BufferConfig("key", 64 * BLOCK), BufferConfig("value", 64 * BLOCK)))
        for index in range(8)
    ]
    if window:
        layers += [AttentionLayerConfig(8 + index, (BufferConfig("kv", 64 * BLOCK),), window) for index in range(8)]
    if model == "hybrid":
        layers += [SsmLayerConfig(16 + index, (BufferConfig("ssm_state", 4096),)) for index in range(8)]
    config = KVCacheManagerConfig(
        BLOCK,
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
        figures = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        figures["first_resume"] = statistics.median(resumes)
        report[model] = {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
