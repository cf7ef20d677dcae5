"""One sequence of a runner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from ssmcache.integrations.transformers_pools import Tensors
from ssmcache.keys import Int64Array
from ssmcache.sequence import KVCache
from ssmcache.stats import ReuseMatch, Shortage

TokenSequence: TypeAlias = Sequence[int] | Int64Array | torch.Tensor


class Prefilled:
    """A sequence of a runner: computed tokens and what they left. Made by the runner, which changes it.

    Attributes:
        num_tokens: computed so far; `tokens` are they.
        num_reused_tokens: of these, not computed but found in the cache.
        match: what the cache knew of the prompt: in its tree, with KV, and with a state (see `ReuseMatch`); None if it
            was not asked.
        logits: [vocabulary], of the last token; None before the first pass.
        shortage: why the sequence runs outside the cache; None if it does not, or was not meant to run in it.
    """

    def __init__(self, max_tokens: int) -> None:
        self.num_tokens = self.num_reused_tokens = 0
        self.match: ReuseMatch | None = None
        self.logits: torch.Tensor | None = None
        self.shortage: Shortage | None = None
        self.kv: KVCache | None = None
        self.own: Tensors | None = None
        self.stops: list[int] = []  # where each pass ended, those that were skipped included
        self.buffer: Int64Array = np.empty(max_tokens, dtype=np.int64)

    @property
    def tokens(self) -> Int64Array:
        return self.buffer[: self.num_tokens]

    @property
    def is_cached(self) -> bool:
        """Whether its KV and states are in the pools of the manager."""
        return self.kv is not None


def token_array(tokens: TokenSequence) -> Int64Array:
    """Ids as [n] int64, a copy. Errors: ValueError for anything else."""
    array = tokens.cpu().numpy() if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"tokens: expected ids in one dimension, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)
