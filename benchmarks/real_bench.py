"""A real hybrid model on the cache, with a stopwatch: what the benchmarks of real models share."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

from ssmcache import GpuCacheTierConfig, KVCache, KVCacheManager
from ssmcache.integrations.transformers import cache_config
from ssmcache.integrations.transformers_memory import memory_of
from ssmcache.integrations.transformers_runner import SequenceRunner
from ssmcache.integrations.transformers_shapes import probe
from ssmcache_sim.first_tokens import first_token

_START = time.perf_counter()
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
        self.manager = KVCacheManager(config, memory_of(model))
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

    def keep(self, prefix: Any) -> None:
        """In the cache, with a snapshot at its end."""
        self.runner.close(self.runner.prefill(np.append(prefix, 0), cuts=(len(prefix),)))

    def first_token(self, prompt: Any, reuse: bool, decode: int = 0) -> tuple[Row, list[int]]:
        """A row of times of one prompt, and the tokens decoded after it."""
        copied, self.clock.seconds = self.manager.stats().copied_bytes, 0.0
        run, seconds = first_token(self.runner, prompt, reuse=reuse, cuts=self.last_cut(len(prompt)) if reuse else ())
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


def say(text: str) -> None:
    print(f"{time.perf_counter() - _START:6.1f} s  {text}", file=sys.stderr, flush=True)


def size(text: str) -> int:
    return int(text[:-3]) * UNITS[text[-3:]]
