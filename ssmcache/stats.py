"""What a manager tells about itself: frozen records that compare by value."""

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from ssmcache.units import format_size, plural


class ReuseMatch(NamedTuple):
    """Of the tokens asked for, in full blocks: known to the tree, with KV, and really reusable (a state exists)."""

    tree_tokens: int
    attention_tokens: int
    usable_tokens: int


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a resume or resize was refused.

    `reason`: "utilization" (others hold more than `max_util_for_resume` of the pool), "slots" (not enough are free or
    evictable), "io" (a tier below could not be written, or not be read where
    others have something) or "lost" (a page cannot be read back: a sequence that was
    resumed before must be closed, one that was not may be resumed again, with a shorter match). Counts are slots of the
    pool of the layer group in the tier, and of all that share it: needed by the call, free, evictable, and held.
    """

    reason: str
    layer_group: int
    tier: str
    needed: int
    free: int
    evictable: int
    held: int


@dataclass(frozen=True, slots=True)
class Transfers:
    """Slots of one layer group that were copied from one tier to another, or within one, and their bytes."""

    layer_group: int
    source_tier: str
    tier: str
    num_slots: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts since the manager was made. Tokens and slots; a sequence counts as a lookup at its first resume.

    `usable_tokens_by_tier` says where the pages of the usable tokens lay when they were asked for (without attention
    layers: the states). Evicted is what left the last tier; `transfers` tells of moves between tiers and of copies.
    Superseded are snapshots that their own sequence gave up for a later one (admission `last`).

    Blocks are those of the prompts that were looked up, the last one counted even if it is not full: found in full
    (`blocks_full`) or in part (`blocks_partial`, partial reuse), the rest missed. Allocated are the pages that
    sequences took for blocks of their own, of every layer group with attention.
    """

    lookups: int
    lookup_tokens: int
    tree_tokens: int
    attention_tokens: int
    usable_tokens: int
    usable_tokens_by_tier: tuple[int, ...]
    snapshots_taken: int
    snapshots_reused: int
    snapshots_evicted: int
    snapshots_evicted_unused: int
    snapshots_skipped_crossed: int
    snapshots_skipped_no_room: int
    snapshots_skipped_not_admitted: int
    snapshots_skipped_history: int
    snapshots_superseded: int
    pages_evicted: int
    window_pages_evicted: int
    copied_states: int
    copied_bytes: int
    transfers: tuple[Transfers, ...]
    blocks_full: int
    blocks_partial: int
    blocks_missed: int
    blocks_allocated: int

    def __repr__(self) -> str:
        share = f" ({self.usable_tokens / self.lookup_tokens:.2%})" if self.lookup_tokens else ""
        skipped = (
            self.snapshots_skipped_crossed
            + self.snapshots_skipped_no_room
            + self.snapshots_skipped_not_admitted
            + self.snapshots_skipped_history
        )
        lines = [
            f"CacheStats: {plural(self.lookups, 'lookup')} of {plural(self.lookup_tokens, 'token')}",
            f"  reusable: {self.usable_tokens:,} tokens{share}; with KV {self.attention_tokens:,}, "
            f"known {self.tree_tokens:,}",
            f"  snapshots: {self.snapshots_taken:,} taken, {plural(self.snapshots_reused, 'reuse')}, "
            f"{self.snapshots_evicted:,} evicted ({self.snapshots_evicted_unused:,} unused), {skipped:,} skipped",
            f"  blocks: {self.blocks_full:,} full, {self.blocks_partial:,} partial, {self.blocks_missed:,} missed, "
            f"{self.blocks_allocated:,} allocated; pages evicted: {self.pages_evicted:,}, of windows "
            f"{self.window_pages_evicted:,}",
            *(
                f"  layer group {each.layer_group}, {each.source_tier} to {each.tier}: "
                f"{plural(each.num_slots, 'slot')}, {format_size(each.num_bytes)}"
                for each in self.transfers
            ),
        ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class LayerGroupUsage:
    """Slots of one layer group in one tier. `num_slots` is None where the quota is unlimited.

    Layer groups with the same `pool` share it: `num_slots` and `peak_slots` are those of the pool.
    """

    layer_group: int
    kind: str
    tier: str
    slot_bytes: int
    num_slots: int | None
    used_slots: int
    cached_slots: int
    peak_slots: int
    pool: int


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Memory by tier and layer group."""

    tiers: tuple[tuple[LayerGroupUsage, ...], ...]

    def __repr__(self) -> str:
        lines = ["MemoryUsage:"]
        for usage in (usage for tier in self.tiers for usage in tier):
            total = None if usage.num_slots is None else usage.num_slots * usage.slot_bytes
            lines.append(
                f"  {usage.tier}, layer group {usage.layer_group} ({usage.kind}): "
                f"{format_size(usage.used_slots * usage.slot_bytes)} of {format_size(total)}, "
                f"{plural(usage.used_slots, 'slot')} in use, {usage.cached_slots:,} of them for reuse"
            )
        return "\n".join(lines)

    @property
    def groups(self) -> tuple[LayerGroupUsage, ...]:
        """The layer groups on the GPU."""
        return self.tiers[0]

    @property
    def used_bytes(self) -> int:
        """Bytes in use on the GPU."""
        return sum(group.used_slots * group.slot_bytes for group in self.groups)


class Counters:
    """The counts that the sequences of a manager write as they go. `copied`: slots by (layer group, source tier)."""

    __slots__ = (
        "attention_tokens", "blocks_full", "blocks_looked_up", "blocks_partial", "copied", "copied_states",
        "lookup_tokens", "lookups", "snapshots_reused", "snapshots_skipped_crossed", "snapshots_skipped_history",
        "snapshots_skipped_no_room", "snapshots_skipped_not_admitted", "snapshots_superseded", "snapshots_taken",
        "tree_tokens", "usable_tokens", "usable_tokens_below",
    )  # fmt: skip

    def __init__(self, num_tiers: int) -> None:
        self.attention_tokens = 0
        self.blocks_full = 0
        self.blocks_looked_up = 0
        self.blocks_partial = 0
        self.copied: defaultdict[tuple[int, int], int] = defaultdict(int)
        self.copied_states = 0
        self.lookup_tokens = 0
        self.lookups = 0
        self.snapshots_reused = 0
        self.snapshots_skipped_crossed = 0
        self.snapshots_skipped_history = 0
        self.snapshots_skipped_no_room = 0
        self.snapshots_skipped_not_admitted = 0
        self.snapshots_superseded = 0
        self.snapshots_taken = 0
        self.tree_tokens = 0
        self.usable_tokens = 0
        self.usable_tokens_below = [0] * (num_tiers - 1)  # the tiers below the GPU
