"""The sums of one replay, as a record that goes to tables, JSON and back."""

from dataclasses import asdict, dataclass, fields
from typing import Any

SKIP_REASONS = ("crossed", "no_room", "not_admitted", "history")


@dataclass(frozen=True, slots=True)
class SnapshotCounts:
    """How many snapshots were taken, used as the start of a request, evicted, and skipped by reason."""

    taken: int
    reused: int
    evicted: int
    evicted_unused: int
    skipped_crossed: int
    skipped_no_room: int
    skipped_not_admitted: int
    skipped_history: int

    def to_json(self) -> dict[str, Any]:
        """The published names."""
        names = ("taken", "reused", "evicted", "evicted_unused")
        return {**{name: getattr(self, name) for name in names}, "skipped": self.skipped()}

    def skipped(self) -> dict[str, int]:
        """Counts by reason."""
        return {reason: getattr(self, f"skipped_{reason}") for reason in SKIP_REASONS}


@dataclass(frozen=True, slots=True)
class LayerGroupPeak:
    """The most bytes that a layer group used at once, and the bytes of its pool (None: unlimited)."""

    layer_group: int
    kind: str
    peak_bytes: int
    pool_bytes: int | None


@dataclass(frozen=True, slots=True)
class ReplayTotals:
    """Sums over all requests, also those too large to be served: every rate divides by all prompt tokens.

    `snapshots` is None and `peaks` is empty where tokens alone were counted, by the grid.
    """

    requests: int
    too_large_requests: int
    prompt_tokens: int
    tree_hit_tokens: int
    attention_hit_tokens: int
    usable_hit_tokens: int
    kv_ceiling_hit_tokens: int
    ceiling_hit_tokens: int
    lost_evicted_tokens: int
    lost_alignment_tokens: int
    lost_snapshot_tokens: int
    snapshots: SnapshotCounts | None
    peaks: tuple[LayerGroupPeak, ...]

    def rate(self, tokens: int) -> float:
        """Share of all prompt tokens."""
        return tokens / self.prompt_tokens

    @property
    def usable_token_hit_rate(self) -> float:
        return self.rate(self.usable_hit_tokens)

    @property
    def peak_bytes(self) -> int:
        """Sum of the peaks of all pools."""
        return sum(peak.peak_bytes for peak in self.peaks)

    def to_json(self) -> dict[str, Any]:
        """The published names: sums, rates, `peak_bytes` by kind of layer group, `snapshots`."""
        sums = {name: value for name, value in asdict(self).items() if isinstance(value, int)}
        by_kind: dict[str, int] = {}
        for peak in self.peaks:
            by_kind[peak.kind] = by_kind.get(peak.kind, 0) + peak.peak_bytes
        counts = self.snapshots
        return {
            **sums,
            "usable_token_hit_rate": self.usable_token_hit_rate,
            "attention_token_hit_rate": self.rate(self.attention_hit_tokens),
            "tree_token_hit_rate": self.rate(self.tree_hit_tokens),
            "kv_ceiling_token_hit_rate": self.rate(self.kv_ceiling_hit_tokens),
            "ceiling_token_hit_rate": self.rate(self.ceiling_hit_tokens),
            "peak_bytes": {**by_kind, "total": self.peak_bytes} if self.peaks else {},
            "layer_groups": [asdict(peak) for peak in self.peaks],
            "snapshots": None if counts is None else counts.to_json(),
        }

    @classmethod
    def from_json(cls, published: dict[str, Any]) -> "ReplayTotals":
        """The reverse of `to_json`. Errors: KeyError, TypeError if something is missing."""
        counts = dict(published["snapshots"])
        skipped = counts.pop("skipped")
        plain = {field.name for field in fields(cls)} - {"snapshots", "peaks"}
        return cls(
            **{name: published[name] for name in plain},
            snapshots=SnapshotCounts(**counts, **{f"skipped_{reason}": skipped[reason] for reason in SKIP_REASONS}),
            peaks=tuple(LayerGroupPeak(**peak) for peak in published["layer_groups"]),
        )
