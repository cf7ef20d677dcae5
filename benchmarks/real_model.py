"""Time to first token of a real hybrid model, with prefix reuse and without. Prints one JSON object; a table to stderr.

    PYTHONPATH=. python benchmarks/real_model.py [--shape qwen3.5-9b|olmo-hybrid-7b] [--repeats 20] [--out FILE]

Everything small, without a GPU:

    PYTHONPATH=. python benchmarks/real_model.py --shape tiny --device cpu --reused 0,64 --new 8,40 --interval 32 \
        --block 16 --system 64 --users 3 --turns 3 --repeats 2 --gpu-memory 8MiB

The model has its published shape, and random weights made on the device. First the kernels that it is bound to are
named (on CUDA, others than flash-linear-attention's end the run) and it is checked (`check_resumable`); every case has
run twice before it is timed.

Grid: prompts of `reused` cached and `new` random tokens. "hit" goes through the manager and ends a pass at its last
snapshot position; "miss" is one pass over the whole prompt without a manager. All cases take turns, in a new order each
time. Times are the host's, from the call to the first token on the host. "manager" is the time inside calls of the
manager and its sequences, closing included, of the time to the first token and of closing.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ssmcache import GpuCacheTierConfig, HostMemory, KVCache, KVCacheManager
from ssmcache.integrations.transformers import cache_config, check_resumable
from ssmcache.integrations.transformers_runner import SequenceRunner
from ssmcache.integrations.transformers_shapes import probe

Row = dict[str, Any]
UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}
TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5-9b": ("Qwen3_5TextConfig", {}),
    "olmo-hybrid-7b": ("OlmoHybridConfig", {}),
    "tiny": ("Qwen3_5TextConfig", TINY),
}
SCANS = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
MANAGER_CALLS = [(KVCacheManager, "create_kv_cache")] + [
    (KVCache, name) for name in ("resume", "resize", "commit", "close", "page_indices", "ssm_slot", "suspend")
]


def build_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    name, settings = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        config = getattr(transformers, name)(**settings)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def bound_kernels(model: Any) -> dict[str, str]:
    """Where the scan functions that the model calls come from, by name: transformers wraps what it has found."""
    module = sys.modules[type(model).__module__]
    found = {}
    for name in SCANS:
        function = getattr(module, name)
        while "implementation" not in function.__code__.co_freevars and hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        bound = cells["implementation"].cell_contents if "implementation" in cells else function
        found[name] = f"{bound.__module__}.{bound.__name__}"
    return found


class ManagerClock:
    """Host seconds inside calls of managers and their sequences."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        originals = [(owner, name, getattr(owner, name)) for owner, name in MANAGER_CALLS]
        for owner, name, call in originals:
            setattr(owner, name, self._timed(call))
        try:
            yield
        finally:
            for owner, name, call in originals:
                setattr(owner, name, call)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


class Bench:
    """A runner, random tokens, and a stopwatch."""

    def __init__(self, model: Any, args: argparse.Namespace, max_tokens: int) -> None:
        config = cache_config(
            model,
            tokens_per_block=args.block,
            cache_tiers=[GpuCacheTierConfig(args.gpu_memory)],
            ssm_reuse_interval=args.interval,
            ssm_fraction=args.ssm_fraction,
        )
        if model.device.type == "cuda":
            from ssmcache.memory.cuda import CudaMemory

            self.manager = KVCacheManager(config, CudaMemory(model.device))
        else:
            self.manager = KVCacheManager(config, HostMemory())
        self.runner = SequenceRunner(model, self.manager, probe(model), max_tokens=max_tokens)
        self.interval = args.interval
        self.clock = ManagerClock()
        self._vocabulary = model.config.vocab_size
        self._rng = np.random.default_rng(0)
        self._on_gpu = model.device.type == "cuda"
        self.page_bytes = sum(group.slot_bytes for group in self.manager.groups if group.kind.value != "ssm")
        self.state_bytes = sum(group.slot_bytes for group in self.manager.groups if group.kind.value == "ssm")

    def tokens(self, count: int) -> np.ndarray[Any, Any]:
        return self._rng.integers(0, self._vocabulary, count)

    def last_cut(self, end: int) -> tuple[int, ...]:
        return (end - end % self.interval,)

    def first_token(self, prompt: Any, reuse: bool, decode: int = 0) -> tuple[Row, list[int]]:
        """A row of times of one prompt, and the tokens decoded after it."""
        self.synchronize()
        copied, self.clock.seconds = self.manager.stats().copied_bytes, 0.0
        start = time.perf_counter()
        run = self.runner.prefill(prompt, reuse=reuse, cuts=self.last_cut(len(prompt)) if reuse else ())
        assert run.logits is not None
        int(run.logits.argmax())
        seconds = time.perf_counter() - start
        if run.shortage is not None:
            raise SystemExit(f"--gpu-memory: expected room for a prompt of {len(prompt)} tokens, got {run.shortage}")
        manager_seconds = self.clock.seconds
        decoded = self.runner.decode(run, decode)
        self.clock.seconds = 0.0
        start_of_close = time.perf_counter()
        reused = run.num_reused_tokens
        self.runner.close(run)
        manager_seconds += self.clock.seconds
        row = {
            "reused": reused,
            "new": len(prompt) - reused,
            "seconds": seconds,
            "close_seconds": time.perf_counter() - start_of_close,
            "manager_seconds": manager_seconds,
            "copied_bytes": self.manager.stats().copied_bytes - copied,
            "gathered_bytes": reused // self.manager.tokens_per_block * self.page_bytes if reuse else 0,
        }
        return row, decoded

    def synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def grid(bench: Bench, reused: Sequence[int], new: Sequence[int], repeats: int) -> Iterator[list[Row]]:
    """The rows of all cases, after each round that counts."""
    prefixes = {count: bench.tokens(count) for count in reused}
    for count, prefix in prefixes.items():
        if count:
            bench.runner.close(bench.runner.prefill(np.append(prefix, 0), cuts=(count,)))
    cases = [(*point, kind) for point in product(reused, new) for kind in ("hit", "miss")]
    rows: dict[tuple[int, int, str], list[Row]] = {case: [] for case in cases}
    order = random.Random(0)
    for repeat in range(-2, repeats):  # two rounds to compile and to warm up
        say(f"round {repeat + 3} of {repeats + 2}")
        for case in order.sample(cases, len(cases)):
            num_reused, num_new, kind = case
            prompt = np.concatenate((prefixes[num_reused], bench.tokens(num_new)))
            row, _ = bench.first_token(prompt, reuse=kind == "hit")
            if row["reused"] != (num_reused if kind == "hit" else 0):
                raise SystemExit(f"{case}: expected {num_reused} reused tokens, got {row['reused']}: more --gpu-memory")
            if repeat >= 0:
                rows[case].append(row)
        if repeat >= 0:
            yield [summary(*case, rows[case]) for case in cases]


def summary(reused: int, new: int, kind: str, rows: list[Row]) -> Row:
    seconds = [row["seconds"] for row in rows]
    whole = sum(row["seconds"] + row["close_seconds"] for row in rows)
    p50, p95 = (float(np.percentile(seconds, q)) for q in (50, 95))
    return {
        "reused": reused, "new": new, "kind": kind, "p50_ms": p50 * 1e3, "p95_ms": p95 * 1e3,
        "ms": [second * 1e3 for second in seconds],
        "manager_ms": float(np.median([row["manager_seconds"] for row in rows])) * 1e3,
        "manager_share": sum(row["manager_seconds"] for row in rows) / whole,
        "copied_bytes": int(np.median([row["copied_bytes"] for row in rows])),
        "gathered_bytes": rows[0]["gathered_bytes"],
    }  # fmt: skip


def shared_prompt(bench: Bench, system: int, users: int, question: int) -> Row:
    """One system prompt, asked a question each by several users, with reuse and without."""
    prompts = [np.concatenate((tokens, bench.tokens(question))) for tokens in [bench.tokens(system)] * users]
    return both_ways(bench, [(prompt, 0) for prompt in prompts])


def conversation(bench: Bench, system: int, turns: int, question: int, answer: int) -> Row:
    """Each turn adds a question to everything before and decodes an answer; what was decoded is the next prompt's."""
    tokens = bench.tokens(system)
    prompts = []
    for _ in range(turns):
        tokens = np.concatenate((tokens, bench.tokens(question)))
        prompts.append((tokens, answer))
        _, decoded = bench.first_token(tokens, reuse=False, decode=answer)
        tokens = np.concatenate((tokens, decoded)).astype(np.int64)
    return both_ways(bench, prompts)


def second(scenario: Callable[[], Row]) -> Row:
    """What a scenario gives when it runs again, on other tokens: nothing is compiled then."""
    scenario()
    return scenario()


def both_ways(bench: Bench, prompts: list[tuple[Any, int]]) -> Row:
    hits, misses, first_tokens = [], [], True
    for prompt, _ in prompts:
        hit, with_reuse = bench.first_token(prompt, reuse=True, decode=1)
        miss, without = bench.first_token(prompt, reuse=False, decode=1)
        first_tokens &= with_reuse == without
        hits.append(hit)
        misses.append(miss)
    total = [sum(row["seconds"] for row in rows) for rows in (hits, misses)]
    return {
        "prompt_tokens": [len(prompt) for prompt, _ in prompts],
        "reused_tokens": [row["reused"] for row in hits],
        "hit_ms": [row["seconds"] * 1e3 for row in hits],
        "miss_ms": [row["seconds"] * 1e3 for row in misses],
        "speed_up": total[1] / total[0],
        "speed_up_after_the_first": sum(row["seconds"] for row in misses[1:]) / sum(row["seconds"] for row in hits[1:]),
        "copied_bytes": sum(row["copied_bytes"] for row in hits),
        "gathered_bytes": sum(row["gathered_bytes"] for row in hits),
        "manager_share": sum(row["manager_seconds"] for row in hits)
        / sum(row["seconds"] + row["close_seconds"] for row in hits),
        "same_first_tokens": first_tokens,
    }


def kernels_of(call: Callable[[], object]) -> list[str]:
    """Kernels on the device during a call, the longest first, with their milliseconds."""
    if not torch.cuda.is_available():
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return [f"{event.self_device_time_total / 1e3:.3f} ms {event.count} x {event.key[:100]}" for event in events[:25]]


def table(report: Row) -> Iterator[str]:
    yield f"{'reused':>7} {'new':>6} {'hit p50':>9} {'p95':>9} {'miss p50':>9} {'p95':>9} {'speed-up':>8}  manager"
    rows = {(row["reused"], row["new"], row["kind"]): row for row in report["grid"]}
    for reused, new in dict.fromkeys((row["reused"], row["new"]) for row in report["grid"]):
        hit, miss = rows[reused, new, "hit"], rows[reused, new, "miss"]
        yield (
            f"{reused:7} {new:6} {hit['p50_ms']:6.1f} ms {hit['p95_ms']:6.1f} ms {miss['p50_ms']:6.1f} ms "
            f"{miss['p95_ms']:6.1f} ms {miss['p50_ms'] / hit['p50_ms']:7.2f}x {hit['manager_share']:8.2%}"
        )
    for name in ("shared_prompt", "conversation"):
        row = report[name]
        yield f"{name}: {row['speed_up_after_the_first']:.2f}x after the first, manager {row['manager_share']:.2%}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(args: argparse.Namespace) -> Row:
    on_gpu = args.device.startswith("cuda")
    model = build_model(args.shape, args.device, torch.bfloat16 if on_gpu else torch.float32)
    kernels = bound_kernels(model)
    say(f"kernels: {kernels}")
    if on_gpu and not all(name.startswith("fla.") for name in kernels.values()):
        raise SystemExit(f"kernels: expected flash-linear-attention's, got {kernels}")
    check = check_resumable(model)
    say(f"check: {check}")
    longest = max(max(args.reused) + max(args.new), args.system + args.turns * (args.question + args.answer))
    bench = Bench(model, args, longest + args.question + args.block)
    report: Row = {
        "shape": args.shape, "config": model.config.to_dict(), "dtype": str(model.dtype),
        "parameters": sum(parameter.numel() for parameter in model.parameters()), "kernels": kernels,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {name: version_of(name) for name in ("torch", "transformers", "triton", "fla-core", "numpy")},
        "settings": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "check": asdict(check), "page_bytes": bench.page_bytes, "state_bytes": bench.state_bytes,
    }  # fmt: skip
    with torch.no_grad(), bench.clock.running():
        for rows in grid(bench, args.reused, args.new, args.repeats):
            report["grid"] = rows
            save(report, args.out)
        report["shared_prompt"] = second(lambda: shared_prompt(bench, args.system, args.users, args.question))
        save(report, args.out)
        report["conversation"] = second(
            lambda: conversation(bench, args.system, args.turns, args.question, args.answer)
        )
        prompt = np.append(bench.tokens(args.interval), bench.tokens(min(args.new)))
        bench.first_token(prompt, reuse=True)
        report["kernels_of_a_hit"] = kernels_of(lambda: bench.first_token(prompt, reuse=True))
    bench.manager.check()
    report["peak_gpu_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else None
    save(report, args.out)
    return report


def save(report: Row, out: Path | None) -> None:
    """What there is so far: a run that is ended early leaves that."""
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def size(text: str) -> int:
    return int(text[:-3]) * UNITS[text[-3:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3.5-9b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--reused", type=counts, default=[0, 2048, 8192, 32768], help="multiples of --interval")
    parser.add_argument("--new", type=counts, default=[64, 256, 1024, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--interval", type=int, default=512)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--gpu-memory", type=size, default=size("16GiB"), help="for the pools, in MiB or GiB")
    parser.add_argument("--ssm-fraction", type=float, default=0.4)
    parser.add_argument("--system", type=int, default=8192, help="tokens of the system prompt")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--question", type=int, default=200)
    parser.add_argument("--answer", type=int, default=32, help="tokens decoded in a turn")
    parser.add_argument("--out", type=Path, help="write the JSON there too, after each round")
    report = measure(parser.parse_args())
    for line in table(report):
        say(line)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
