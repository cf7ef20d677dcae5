"""Attention for a tail of a sequence: no mask in memory, and keys and values that are not repeated for their heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from ssmcache.integrations.transformers_cache import AttentionInterface

Attention = Literal["lower_right", "model"]
_NAME = "ssmcache_lower_right"
_UNKNOWN = ("s_aux", "softcap", "position_bias", "head_mask")  # what some models ask for, and this does not do


def lower_right(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of the last n of T tokens, in the form of transformers' `AttentionInterface`.

    Args:
        query: [1, query heads, n, width]; key, value: [1, heads, T, width], where T may begin at the window of the
            first query.
    Returns [1, n, query heads, width of values].
    """
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown or attention_mask is not None or dropout:
        what = ", ".join(unknown) or ("a mask" if attention_mask is not None else "dropout")
        raise ValueError(f"attention: expected plain causal attention, got {what}: use attention='model'")
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask: torch.Tensor | None = None
    if sliding_window is not None and num_keys > sliding_window:
        mask = _band(num_queries, num_keys, sliding_window, query.device)
    elif num_queries > 1:
        mask = causal_lower_right(num_queries, num_keys)
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def _band(num_queries: int, num_keys: int, window: int, device: torch.device) -> torch.Tensor:
    """[n, T] bool: a query sees itself and the `window` - 1 tokens before it."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)
    return (keys <= queries) & (keys > queries - window)


# there is no mask of this name, so transformers makes none
AttentionInterface.register(_NAME, lower_right)


@contextmanager
def attention_of(config: Any, attention: Attention) -> Iterator[None]:
    """For the time of a pass the model attends with `attention`; otherwise padded batches of others would, too."""
    if attention == "model":
        yield
        return
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
