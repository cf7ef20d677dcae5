"""What one setting gives on one trace, request by request: enough to say what it saves under any cost model.

From a replay it is exact for every setting that there is. From the grid's distances it is exact for admission `last`
where `last_needs_replay` of `grid_last.py` has no objection, and for attention alone on any tiers; elsewhere it is an
estimate, which `search.py` takes as no more than that:

- with admission `last` a snapshot keeps its slot though its KV went, and is there when the KV is back;
- the tiers below the GPU are one memory with it, in one order of use; what hits beyond the GPU's own share is lifted
  from the tiers below, each request's snapshot with it.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ssmcache import KVCacheManagerConfig
from ssmcache.config import Admission
from ssmcache.layout import DEFAULT_STEP, LayerGroupKind, layer_groups, split_tier
from ssmcache.models import ModelSpec
from ssmcache_sim.cost import PrefillCost
from ssmcache_sim.grid import UNLIMITED, StackDistances
from ssmcache_sim.grid_cells import GridCapacity
from ssmcache_sim.grid_last import LastBoundaries, last_usable
from ssmcache_sim.grid_tiers import tier_hits
from ssmcache_sim.hit_depth import hit_depths
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import ReplaySettings, build_config
from ssmcache_sim.trace import Int64Array, Trace


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Hits, copies and lifts of one setting.

    Attributes:
        start_tokens: [num_requests] that each request skips.
        step: tokens between the places that a request can resume from.
        snapshots_taken, snapshots_started_from: over the whole trace.
        hit_tokens_by_tier: from the GPU down; one entry for the GPU alone.
        host_bytes, disk_bytes: lifted to the GPU from each.
    """

    start_tokens: Int64Array
    step: int
    admission: Admission
    snapshots_taken: int
    snapshots_started_from: int
    hit_tokens_by_tier: tuple[int, ...]
    host_bytes: int
    disk_bytes: int

    @property
    def hit_tokens(self) -> int:
        return int(self.start_tokens.sum())

    def saved_ns(self, trace: Trace, cost: PrefillCost, front_tokens: int = 0) -> int:
        """Prefill time without a prefix cache less that with it, of all requests of the trace.

        Args:
            front_tokens: of each prompt, whose operations are neither time saved nor time spent.
        """
        prompts = trace.prompt_tokens
        saved = cost.plain_ns(prompts) - cost.prefill_ns(prompts, self.start_tokens, self.step, self.admission)
        saved -= cost.front_ns(np.minimum(self.start_tokens, front_tokens))
        copies = cost.snapshots_ns(self.snapshots_taken, self.snapshots_started_from)
        return int(saved.sum()) - copies - cost.lifts_ns(self.host_bytes, self.disk_bytes)


def measure_by_replay(trace: Trace, model: ModelSpec, settings: ReplaySettings) -> Measured:
    """One replay. Errors: those of `replay`."""
    result = replay(trace, build_config(model, settings), prefill=settings.prefill)
    totals = result.totals
    lifted = {
        tier: sum(each.num_bytes for each in totals.moved or () if (each.source_tier, each.tier) == (tier, "gpu"))
        for tier in ("host", "disk")
    }
    has_ssm = settings.ssm_reuse_interval is not None
    return Measured(
        start_tokens=result.usable,
        step=settings.ssm_reuse_interval or settings.tokens_per_block,
        admission=settings.admission or "every",
        snapshots_taken=totals.snapshots.taken if totals.snapshots and has_ssm else 0,
        snapshots_started_from=totals.snapshots.reused if totals.snapshots and has_ssm else 0,
        hit_tokens_by_tier=tuple(tokens.usable_hit_tokens for tokens in totals.tiers) or (totals.usable_hit_tokens,),
        host_bytes=lifted["host"],
        disk_bytes=lifted["disk"],
    )


def pool_slots(config: KVCacheManagerConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Pages and SSM slots by tier, as a manager divides its tiers; without limit, more than any trace has.

    Errors: ValueError if it cannot.
    """
    groups, step = layer_groups(config), config.typical_step or DEFAULT_STEP
    kinds = [group.kind for group in groups]
    by_tier = [
        dict(zip(kinds, (min(count, UNLIMITED - 1) for count in slots), strict=True))
        for index, tier in enumerate(config.cache_tiers)
        for slots in (split_tier(groups, config, index, tier.quota, step, 1),)
    ]
    pages, slots = (
        tuple(tier.get(kind, 0) for tier in by_tier) for kind in (LayerGroupKind.ATTENTION, LayerGroupKind.SSM)
    )
    return pages, slots


def attention_on_tiers(
    trace: Trace, distances: StackDistances, config: KVCacheManagerConfig, page_bytes: int
) -> Measured:
    """Attention alone, exactly. Cost: O(segments)."""
    block = config.tokens_per_block
    pages, _ = pool_slots(config)
    blocks = (pages[0] - 1, *pages[1:])
    by_tier = tier_hits(distances, block, blocks).hit_tokens
    lifted = _by_name(config, tuple(tokens // block * page_bytes for tokens in by_tier))
    start = _every_usable(trace, distances, block, None, sum(blocks), 0)
    return Measured(start, block, "every", 0, 0, tuple(by_tier), *lifted)


def estimate(
    trace: Trace,
    distances: StackDistances,
    config: KVCacheManagerConfig,
    found: LastBoundaries | None,
    slot_bytes: tuple[int, int],
) -> Measured:
    """A hybrid by the grid's distances.

    Args:
        found: of its interval, for admission `last`; None for every boundary.
        slot_bytes: of a page and of a state.

    Cost: O(segments), and O(boundaries found) for admission `last`; once a tier.
    """
    block, interval = config.tokens_per_block, config.ssm_reuse_interval
    pages, slots = pool_slots(config)
    starts = []
    for blocks, snapshots in zip(accumulate(pages), accumulate(slots), strict=True):
        if found is None:
            starts.append(_every_usable(trace, distances, block, interval, blocks - 1, snapshots - 1))
        else:
            starts.append(last_usable(distances, found, block, blocks - 1, snapshots - 1, trace.num_requests))
    start = starts[-1]
    if found is None:
        # what a request finds of its own boundaries it does not take again
        taken = int((trace.path_tokens // interval).sum() - (start // interval).sum())
    else:
        taken = int((found.own_distance > sum(slots) - 1).sum())
        # what is decoded is nobody's yet
        taken += int((trace.path_tokens // interval - trace.prompt_tokens // interval).sum())
    above = [np.zeros_like(start), *starts[:-1]]
    gains = [np.maximum(deeper - less, 0) for less, deeper in zip(above, starts, strict=True)]
    hits = tuple(int(gain.sum()) for gain in gains)
    bytes_up = tuple(int(gain.sum()) // block * slot_bytes[0] + int((gain > 0).sum()) * slot_bytes[1] for gain in gains)
    host_bytes, disk_bytes = _by_name(config, bytes_up)
    return Measured(start, interval, config.admission, taken, int((start > 0).sum()), hits, host_bytes, disk_bytes)


def _by_name(config: KVCacheManagerConfig, by_tier: tuple[int, ...]) -> tuple[int, int]:
    """Of host and disk."""
    named = dict(zip(config.tier_names, by_tier, strict=True))
    return named.get("host", 0), named.get("disk", 0)


def _every_usable(
    trace: Trace, distances: StackDistances, block: int, interval: int | None, blocks: int, snapshots: int
) -> Int64Array:
    """[num_requests] hits with a snapshot at every boundary."""
    usable = np.zeros(trace.num_requests, dtype=np.int64)
    capacity = GridCapacity(blocks, None if interval is None else snapshots)
    usable[distances.request[distances.start == 0]] = hit_depths(distances, block, interval, capacity).hit_tokens
    return usable
