"""Runners over pools of exact numbers of slots, full of NaN before."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tiny_models import VOCABULARY, tiny_model

from ssmcache import GpuCacheTierConfig, HostCacheTierConfig, HostMemory, KVCacheManager
from ssmcache.config import SsmLayerConfig
from ssmcache.integrations.transformers import cache_config
from ssmcache.integrations.transformers_runner import SequenceRunner
from ssmcache.integrations.transformers_shapes import probe

BLOCK = 16
INTERVAL = 32
PROMPT_TOKENS = 100
REUSED = 96
CUTS = (32, 64, 96)
MAX_TOKENS = 256


@dataclass(frozen=True)
class Small:
    """A runner whose model was not checked, and its manager."""

    runner: SequenceRunner
    manager: KVCacheManager

    def all_logits(self, tokens: Any, reuse: bool = True, **settings: Any) -> tuple[int, torch.Tensor]:
        """(reused tokens, logits of all that were computed); the sequence is closed again."""
        run = self.runner.open(tokens, reuse=reuse, **settings)
        reused = run.num_tokens
        logits = self.runner.extend(run, tokens[reused:], cuts=CUTS, all_logits=True)
        self.runner.close(run)
        return reused, logits


def small_runner(
    model: Any, pages: int, states: int, *, host_factor: int = 0, state_dtype: str = "exact", **settings: Any
) -> Small:
    """`pages` and `states` slots on the GPU, and `host_factor` times as many on the host."""
    free = GpuCacheTierConfig(1)
    layers = cache_config(model, tokens_per_block=BLOCK, cache_tiers=[free], state_dtype=state_dtype).layers
    sizes = {True: 0, False: 0}
    for layer in layers:
        sizes[isinstance(layer, SsmLayerConfig)] += sum(buffer.size for buffer in layer.buffers)
    state_bytes, page_bytes = sizes[True], sizes[False]
    quota = pages * page_bytes + states * state_bytes
    tiers: list[Any] = [GpuCacheTierConfig(quota)]
    if host_factor:
        tiers.append(HostCacheTierConfig(quota * host_factor))
    config = cache_config(
        model,
        tokens_per_block=BLOCK,
        cache_tiers=tiers,
        state_dtype=state_dtype,
        ssm_reuse_interval=INTERVAL,
        ssm_fraction=states * state_bytes / quota if state_bytes else None,
    )
    manager = KVCacheManager(config, HostMemory())
    for group in manager.groups:
        manager.memory.view(group.pool)[:] = 0xFF
    return Small(SequenceRunner(model, manager, probe(model), max_tokens=MAX_TOKENS, **settings), manager)


def prompt(seed: int, num_tokens: int = PROMPT_TOKENS) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, num_tokens)


__all__ = [
    "BLOCK",
    "CUTS",
    "INTERVAL",
    "MAX_TOKENS",
    "PROMPT_TOKENS",
    "REUSED",
    "Small",
    "prompt",
    "small_runner",
    "tiny_model",
]
