"""What a manager tells about itself: frozen records that compare by value."""

from dataclasses import dataclass
from typing import NamedTuple


class ReuseMatch(NamedTuple):
    """Of the tokens asked for, in full blocks: known to the tree, with KV, and really reusable (a state exists)."""

    tree_tokens: int
    attention_tokens: int
    usable_tokens: int


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a resume or resize was refused.

    `reason`: "utilization" (others lock more than `max_util_for_resume` of the pool) or "slots" (not enough are free
    or evictable). Counts are slots of the layer group in the tier: needed by the call, free, evictable, and held.
    """

    reason: str
    layer_group: int
    tier: str
    needed: int
    free: int
    evictable: int
    held: int


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts since the manager was made. Tokens and slots; a sequence counts as a lookup at its first resume."""

    lookups: int
    lookup_tokens: int
    tree_tokens: int
    attention_tokens: int
    usable_tokens: int
    snapshots_taken: int
    snapshots_reused: int
    snapshots_evicted: int
    snapshots_evicted_unused: int
    snapshots_skipped_crossed: int
    snapshots_skipped_no_room: int
    snapshots_skipped_not_admitted: int
    snapshots_skipped_history: int
    pages_evicted: int
    copied_states: int
    copied_bytes: int


@dataclass(frozen=True, slots=True)
class LayerGroupUsage:
    """Slots of one layer group on the GPU tier. `num_slots` is None where the quota is unlimited."""

    layer_group: int
    kind: str
    slot_bytes: int
    num_slots: int | None
    used_slots: int
    cached_slots: int
    peak_slots: int


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Memory by layer group."""

    groups: tuple[LayerGroupUsage, ...]

    @property
    def used_bytes(self) -> int:
        return sum(group.used_slots * group.slot_bytes for group in self.groups)


class Counters:
    """The counts that the sequences of a manager write as they go."""

    __slots__ = (
        "attention_tokens",
        "copied_states",
        "lookup_tokens",
        "lookups",
        "snapshots_reused",
        "snapshots_skipped_crossed",
        "snapshots_skipped_history",
        "snapshots_skipped_no_room",
        "snapshots_skipped_not_admitted",
        "snapshots_taken",
        "tree_tokens",
        "usable_tokens",
    )

    def __init__(self) -> None:
        self.attention_tokens = 0
        self.copied_states = 0
        self.lookup_tokens = 0
        self.lookups = 0
        self.snapshots_reused = 0
        self.snapshots_skipped_crossed = 0
        self.snapshots_skipped_history = 0
        self.snapshots_skipped_no_room = 0
        self.snapshots_skipped_not_admitted = 0
        self.snapshots_taken = 0
        self.tree_tokens = 0
        self.usable_tokens = 0
