"""What of transformers' caches is used here, and from which version on it can be used."""

import inspect
from typing import Any

import transformers
from transformers import cache_utils

OLDEST = (5, 17)


def check_version(version: str) -> None:
    """Errors: ImportError for a version whose hybrid caches cannot be continued."""
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        # before, several tokens after a restored state were computed from a state of zeros, without an error
        raise ImportError(
            f"ssmcache.integrations.transformers: expected transformers >= {'.'.join(map(str, OLDEST))}, got {version}"
        )


def cache_argument(model: Any) -> str:
    """The name by which a model takes its cache: `cache` from 5.24 on."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "cache_params") if name in parameters), "past_key_values")


check_version(transformers.__version__)

from transformers.cache_utils import (  # noqa: E402
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.modeling_utils import AttentionInterface  # noqa: E402

# what layers that keep nothing have from 5.23 on; before, they had states that nobody wrote
EMPTY_LAYERS: tuple[type, ...] = tuple(filter(None, (getattr(cache_utils, "DummyLayer", None),)))

__all__ = [
    "EMPTY_LAYERS",
    "OLDEST",
    "AttentionInterface",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionLayer",
    "cache_argument",
    "check_version",
]
