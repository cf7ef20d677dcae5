"""How memory is best divided between KV and snapshots: the plane of both sizes, and the splits of a given memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ssmcache import GpuCacheTierConfig, KVCacheManagerConfig
from ssmcache.layout import LayerGroupKind, layer_groups, split_quota
from ssmcache_sim.grid import StackDistances, hybrid_hits
from ssmcache_sim.grid_cells import GridCapacity, grid_capacity
from ssmcache_sim.trace import Float64Array, Int64Array, Trace

NUM_SIZES = 32  # of each axis of the plane
FRACTIONS = tuple(step / 40 for step in range(1, 40))


@dataclass(frozen=True, slots=True, eq=False)
class SplitPlane:
    """Usable hit tokens by the bytes of each pool, both of them logarithmically spaced.

    Attributes:
        kv_bytes, ssm_bytes: [num_sizes] of the KV pages, and of the snapshots and live states. From what the largest
            request takes up to the memory asked for.
        hit_tokens: [num_sizes, num_sizes], KV first.
    """

    kv_bytes: Int64Array
    ssm_bytes: Int64Array
    hit_tokens: Int64Array


@dataclass(frozen=True, slots=True)
class Split:
    """One division of one memory, as `ssm_fraction` makes it, and the bytes that the slots of each pool take."""

    memory_bytes: int
    ssm_fraction: float
    kv_bytes: int
    ssm_bytes: int
    hit_tokens: int


def split_plane(
    trace: Trace, distances: StackDistances, config: KVCacheManagerConfig, memory_bytes: int
) -> SplitPlane | None:
    """The plane up to `memory_bytes` for each pool; None where the largest request does not fit into one of them.

    Exact wherever the grid is: for a config with attention and SSM layers and a snapshot at every boundary.

    Args:
        distances: of the trace, with the block and the interval of the config.

    Cost: that of `hybrid_hits`, once.
    """
    page_bytes, state_bytes = _slot_bytes(config)
    longest = trace.longest_path
    # one slot more than what the request leaves behind: see `grid_capacity`
    kv_bytes = _sizes((longest // config.tokens_per_block + 1) * page_bytes, memory_bytes)
    ssm_bytes = _sizes((longest // config.ssm_reuse_interval + 1) * state_bytes, memory_bytes)
    if kv_bytes is None or ssm_bytes is None:
        return None
    hit_tokens = hybrid_hits(
        distances,
        config.tokens_per_block,
        config.ssm_reuse_interval,
        (kv_bytes // page_bytes - 1).tolist(),
        (ssm_bytes // state_bytes - 1).tolist(),
    )
    return SplitPlane(kv_bytes, ssm_bytes, hit_tokens)


def splits(
    trace: Trace, distances: StackDistances, config: KVCacheManagerConfig, memory_bytes: Sequence[int]
) -> list[Split]:
    """Every memory divided at each of `FRACTIONS`; those that the grid cannot do are left out.

    Each is exactly the cell of that memory and `ssm_fraction`. Cost: that of `hybrid_hits`, once.
    """
    page_bytes, state_bytes = _slot_bytes(config)
    found: list[tuple[int, float, GridCapacity]] = []
    for size in memory_bytes:
        for fraction in FRACTIONS:
            divided = replace(config, cache_tiers=(GpuCacheTierConfig(size),), ssm_fraction=fraction)
            capacity = _capacity(trace, divided)
            if capacity is not None:
                found.append((size, fraction, capacity))
    if not found:
        return []
    blocks = np.array([capacity.blocks for _, _, capacity in found], dtype=np.int64)
    snapshots = np.array([capacity.snapshots for _, _, capacity in found], dtype=np.int64)
    rows, row = np.unique(blocks, return_inverse=True)
    columns, column = np.unique(snapshots, return_inverse=True)
    plane = hybrid_hits(distances, config.tokens_per_block, config.ssm_reuse_interval, rows.tolist(), columns.tolist())
    return [
        Split(size, fraction, (capacity.blocks + 1) * page_bytes, ((capacity.snapshots or 0) + 1) * state_bytes, hits)
        for (size, fraction, capacity), hits in zip(found, plane[row, column].tolist(), strict=True)
    ]


def memory_steps(sizes: Sequence[int], count: int) -> list[int]:
    """The sizes given, and logarithmically spaced ones from the least to the largest of them, rising."""
    spaced = np.geomspace(min(sizes), max(sizes), count).round().astype(np.int64)[1:-1]
    return sorted({*sizes, *spaced.tolist()})


def _capacity(trace: Trace, config: KVCacheManagerConfig) -> GridCapacity | None:
    try:
        capacity = grid_capacity(trace, config)
    except ValueError:  # no room for a single state
        return None
    return None if isinstance(capacity, str) else capacity


def _slot_bytes(config: KVCacheManagerConfig) -> tuple[int, int]:
    by_kind = {group.kind: group.slot_bytes for group in layer_groups(config)}
    return by_kind[LayerGroupKind.ATTENTION], by_kind[LayerGroupKind.SSM]


def _sizes(least: int, most: int) -> Int64Array | None:
    if least >= most:
        return None
    spaced: Float64Array = np.geomspace(least, most, NUM_SIZES)
    sizes = spaced.round().astype(np.int64)
    sizes[0], sizes[-1] = least, most  # not what rounding makes of them
    return sizes


def used_bytes(config: KVCacheManagerConfig) -> tuple[int, int]:
    """Bytes of KV and of SSM slots that a config's memory is divided into. Errors: ValueError, as `split_quota`."""
    groups = layer_groups(config)
    kinds = (LayerGroupKind.ATTENTION, LayerGroupKind.SSM)
    slots = dict(zip((group.kind for group in groups), split_quota(groups, config), strict=True))
    page_bytes, state_bytes = _slot_bytes(config)
    return slots[kinds[0]] * page_bytes, slots[kinds[1]] * state_bytes
