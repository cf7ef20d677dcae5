"""Prefix caching for Hugging Face models: `HybridRunner` runs an unmodified model over the pages of a manager.

    config = cache_config(model, tokens_per_block=32, cache_tiers=[GpuCacheTierConfig(8 << 30)])
    runner = HybridRunner(model, KVCacheManager(config, CudaMemory()), max_tokens=32768)
    run = runner.prefill(tokens)
    answer = runner.decode(run, 100)
    runner.close(run)

Needs torch and transformers >= 5.17 (extra `transformers`). States lie in slots of the pools and are written by the
model in place. KV is gathered from its pages once for a sequence, and written through to them after each pass.
"""

from __future__ import annotations

from typing import Any

from ssmcache.integrations.transformers_attention import Attention
from ssmcache.integrations.transformers_check import Resumability, check_resumable
from ssmcache.integrations.transformers_runner import SequenceRunner
from ssmcache.integrations.transformers_sequence import Prefilled
from ssmcache.integrations.transformers_shapes import NotResumableError, cache_config, probe
from ssmcache.manager import KVCacheManager

__all__ = [
    "HybridRunner",
    "NotResumableError",
    "Prefilled",
    "Resumability",
    "cache_config",
    "check_resumable",
]


class HybridRunner(SequenceRunner):
    """Batch-1 prefill and greedy decoding of a causal language model, with what a manager has of the prompt reused.

    Several sequences may be open and take turns. What they compute does not depend on where pages lie, or on whether a
    prefix was reused or computed in the same passes, to the bit. (KV that another prompt left beyond the snapshot was
    computed in a pass with another end: where a sequence reads it, after another one had its turn, rounding may
    differ.) All calls come from one thread, on one stream.

    Args:
        model: in evaluation mode, on the device of the manager's memory. It is not changed.
        manager: made with `cache_config` of the same model; the caller shuts it down.
        max_tokens: of one sequence; room for its KV is taken once, beside the pools.
        attention: "lower_right": no mask in memory, for plain causal attention; "model": the model's own.
        commit_decoded: whether decoded tokens are offered for reuse, too. A state reached by decoding differs from one
            reached by prefilling the same tokens by rounding, and in some families (Nemotron-H, Zamba2) by more.
        resumability: the result of `check_resumable` for this model; None: it is checked now.

    Errors: NotResumableError, naming what failed; ValueError if manager and model do not fit.
    """

    def __init__(
        self,
        model: Any,
        manager: KVCacheManager,
        *,
        max_tokens: int,
        attention: Attention = "lower_right",
        commit_decoded: bool = False,
        resumability: Resumability | None = None,
    ) -> None:
        if model.training:
            raise ValueError("model: expected one in evaluation mode, got one in training: call model.eval()")
        self.resumability = resumability or check_resumable(model, attention=attention)
        self.resumability.require()
        super().__init__(
            model, manager, probe(model), max_tokens=max_tokens, attention=attention, commit_decoded=commit_decoded
        )
