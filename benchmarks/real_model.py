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

Prediction: at the end the cost model of the simulator is fitted, as `ssmcache doctor --calibrate` does it, and judged
as `real_predict.py` says.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_bench import SHAPES, Bench, Row, bound_kernels, build_model, say, size
from real_predict import predictions

from ssmcache.integrations.transformers import check_resumable
from ssmcache.models import load_model
from ssmcache_sim.calibration import Calibration
from ssmcache_sim.first_tokens import calibrate_model, count_parameters


def grid(bench: Bench, reused: Sequence[int], new: Sequence[int], repeats: int) -> Iterator[list[Row]]:
    """The rows of all cases, after each round that counts."""
    prefixes = {count: bench.tokens(count) for count in reused}
    for count, prefix in prefixes.items():
        if count:
            bench.keep(prefix)
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


def calibrate(model: Any, longest: int) -> tuple[Row, Calibration]:
    """What `ssmcache doctor --calibrate` measures and fits, as a row with its errors."""
    told = -1

    def progress(share: float) -> None:
        nonlocal told
        if int(10 * share) > told:
            told = int(10 * share)
            say(f"calibration: {told}0%")

    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        found, errors = calibrate_model(model, load_model(folder), longest, progress)
    errors = np.abs(errors)
    return asdict(found) | {"median_error": float(np.median(errors)), "worst_error": float(errors.max())}, found


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
    for prediction in report["prediction"]:
        errors = (f"{key} {value:.3g}" for key, value in prediction.items() if key.endswith("error") and value)
        yield f"prediction by {prediction['by']}, {prediction['points']} points: {', '.join(errors)}"


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
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "counted_parameters": count_parameters(model), "kernels": kernels,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {name: version_of(name) for name in ("torch", "transformers", "triton", "fla-core", "numpy")},
        "settings": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "check": asdict(check), "page_bytes": bench.page_bytes, "state_bytes": bench.state_bytes,
        "calibration": None, "prediction": [],
    }  # fmt: skip
    save(report, args.out)
    with torch.no_grad(), bench.clock.running():
        for rows in grid(bench, args.reused, args.new, args.repeats):
            report["grid"] = rows
            save(report, args.out)
        report["shared_prompt"] = second(lambda: shared_prompt(bench, args.system, args.users, args.question))
        save(report, args.out)
        report["conversation"] = second(
            lambda: conversation(bench, args.system, args.turns, args.question, args.answer)
        )
        prompt = bench.tokens(args.interval + min(args.new))
        bench.keep(prompt[: args.interval])
        report["kernels_of_a_hit"] = kernels_of(lambda: bench.first_token(prompt, reuse=True))
    bench.manager.check()
    calibration = None
    if args.calibrate_tokens:
        report["calibration"], calibration = calibrate(model, args.calibrate_tokens)
    report["prediction"] = list(predictions(report, calibration))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3.5-9b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--reused", type=counts, default=[0, 2048, 8192, 32768], help="multiples of --interval")
    parser.add_argument("--new", type=counts, default=[64, 256, 1024, 4096, 8192])
    parser.add_argument(
        "--calibrate-tokens", type=int, default=32768, help="longest prompt that the cost model is fitted to; 0: none"
    )
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
