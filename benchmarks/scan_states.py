"""A snapshot taken inside a pass, by cutting only the scan, beside one between two passes. Prints one JSON object.

    PYTHONPATH=. python benchmarks/scan_states.py [--shape qwen3.5-9b|olmo-hybrid-7b] [--repeats 20]
    PYTHONPATH=. python benchmarks/scan_states.py --shape tiny --device cpu --cases 128:200 --repeats 2

For each case BOUNDARY:TOKENS three ways to compute a prompt, taking turns, on fresh random tokens each time:
- "uncut": one pass, no state taken;
- "cut": a pass up to the boundary, a copy of the states, a pass over the rest, as `HybridRunner` does it;
- "inside": one pass in which each gated delta net runs its scan in two pieces, the second from the state of the first,
  which is copied; the convolution window is columns of the convolution's input. Layers beside the scan see one pass.

Times are the host's, to the first token on the host. States are compared byte by byte, and by their largest difference
relative to the largest element: what a layer is given may differ by rounding, since it comes from products of other
sizes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from real_bench import SHAPES, Bench, bound_kernels, build_model, say, size

from ssmcache.integrations.transformers_layers import SlotStateLayer

SCAN = "torch_chunk_gated_delta_rule"
Row = dict[str, Any]
States = list[torch.Tensor]


@contextmanager
def states_at(model: Any, boundary: int) -> Iterator[States]:
    """Passes of more tokens than that leave the states after `boundary` of them in the list: of each layer the window
    and then the recurrent state.
    """
    module = sys.modules[type(model).__module__]
    scan, update = getattr(module, SCAN), SlotStateLayer.update_conv_state
    taken: States = []

    def update_conv_state(self: Any, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        width = self.conv_kernel_size[0]
        taken.append(conv_states[..., boundary - width : boundary].clone())
        return update(self, conv_states, *args, **kwargs)

    def scan_in_pieces(*tensors: torch.Tensor, initial_state: Any = None, **kwargs: Any) -> tuple[Any, torch.Tensor]:
        named = {name: kwargs.pop(name) for name in ("g", "beta")}
        first = {name: tensor[:, :boundary] for name, tensor in named.items()}
        rest = {name: tensor[:, boundary:] for name, tensor in named.items()}
        head, state = scan(*(t[:, :boundary] for t in tensors), **first, initial_state=initial_state, **kwargs)
        taken.append(state.clone())
        tail, last = scan(*(t[:, boundary:] for t in tensors), **rest, initial_state=state, **kwargs)
        return torch.cat((head, tail), dim=1), last

    setattr(module, SCAN, scan_in_pieces)
    SlotStateLayer.update_conv_state = update_conv_state
    try:
        yield taken
    finally:
        setattr(module, SCAN, scan)
        SlotStateLayer.update_conv_state = update


class Ways:
    """The three ways, each [tokens] -> (logits of the last token, states at the boundary)."""

    def __init__(self, bench: Bench, model: Any, boundary: int) -> None:
        self._runner, self._model, self._boundary = bench.runner, model, boundary

    def uncut(self, tokens: np.ndarray[Any, Any]) -> tuple[torch.Tensor, States]:
        run = self._runner.prefill(tokens, reuse=False, cuts=())
        return self._finish(run), []

    def cut(self, tokens: np.ndarray[Any, Any]) -> tuple[torch.Tensor, States]:
        run = self._runner.prefill(tokens[: self._boundary], reuse=False, cuts=())
        live = self._runner.live_states(run)  # of each layer the recurrent state, then the window
        states = [state.clone() for pair in zip(live[1::2], live[::2], strict=True) for state in pair]
        self._runner.extend(run, tokens[self._boundary :], cuts=())
        return self._finish(run), states

    def inside(self, tokens: np.ndarray[Any, Any]) -> tuple[torch.Tensor, States]:
        with states_at(self._model, self._boundary) as states:
            run = self._runner.prefill(tokens, reuse=False, cuts=())
        return self._finish(run), states

    def _finish(self, run: Any) -> torch.Tensor:
        logits = run.logits
        int(logits.argmax())
        self._runner.close(run)
        return logits


def measure_case(bench: Bench, model: Any, boundary: int, num_tokens: int, repeats: int) -> Row:
    ways = Ways(bench, model, boundary)
    calls: dict[str, Callable[..., Any]] = {"uncut": ways.uncut, "cut": ways.cut, "inside": ways.inside}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-2, repeats):
        tokens = bench.tokens(num_tokens)
        for name, call in calls.items():
            bench.synchronize()
            start = time.perf_counter()
            call(tokens)
            if repeat >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    tokens = bench.tokens(num_tokens)
    (uncut, _), (cut, cut_states), (inside, inside_states) = (call(tokens) for call in calls.values())
    row: Row = {"boundary": boundary, "tokens": num_tokens}
    row |= {f"{name}_p50_ms": statistics.median(values) for name, values in times.items()}
    row |= {f"{name}_p95_ms": float(np.percentile(values, 95)) for name, values in times.items()}
    for kind, first in (("windows", 0), ("recurrent", 1)):
        pairs = list(zip(cut_states[first::2], inside_states[first::2], strict=True))
        row[f"{kind}_equal"] = sum(torch.equal(one, other) for one, other in pairs)
        row[f"{kind}_layers"] = len(pairs)
        row[f"{kind}_difference"] = max(
            float((one.float() - other.float()).abs().max() / one.float().abs().max()) for one, other in pairs
        )
    row["logits_inside_equal_uncut"] = torch.equal(inside, uncut)
    row["logits_inside_uncut_difference"] = float((inside.float() - uncut.float()).abs().max())
    row["logits_cut_uncut_difference"] = float((cut.float() - uncut.float()).abs().max())
    return row


def case(text: str) -> tuple[int, int]:
    boundary, num_tokens = map(int, text.split(":"))
    if not 8 <= boundary < num_tokens or boundary % 64:
        raise argparse.ArgumentTypeError(f"expected BOUNDARY:TOKENS, a multiple of 64 below the tokens, got {text}")
    return boundary, num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3.5-9b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", type=case, nargs="+", default=[(512, 576), (512, 1000), (3584, 4000), (7680, 8000)])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--gpu-memory", type=size, default=size("4GiB"))
    args = parser.parse_args()
    args.block, args.interval, args.ssm_fraction = 32, 512, 0.5
    on_gpu = args.device.startswith("cuda")
    model = build_model(args.shape, args.device, torch.bfloat16 if on_gpu else torch.float32)
    kernels = bound_kernels(model)
    if on_gpu and not all(name.startswith("fla.") for name in kernels.values()):
        raise SystemExit(f"kernels: expected flash-linear-attention's, got {kernels}")
    bench = Bench(model, args, max(num_tokens for _, num_tokens in args.cases))
    rows = []
    for boundary, num_tokens in args.cases:
        rows.append(measure_case(bench, model, boundary, num_tokens, args.repeats))
        say(", ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()))
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    print(json.dumps({"shape": args.shape, "device": device, "kernels": kernels, "cases": rows}, indent=1))


if __name__ == "__main__":
    main()
