"""The sums of one replay, as a record that goes to tables, JSON and back."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from ssmcache.layout import LayerGroupKind
from ssmcache.units import plural
from ssmcache_sim.causes import SNAPSHOT_CAUSES, broken_promise, snapshot_columns
from ssmcache_sim.schemas import Positive, decode, hints_of, require_equal

GroupKind = Annotated[str, tuple(kind.value for kind in LayerGroupKind)]
TierName = Annotated[str, ("gpu", "host", "disk")]
_COUNTED = ("taken", "reused", "evicted", "evicted_unused")
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
        return {**{name: getattr(self, name) for name in _COUNTED}, "skipped": self.skipped()}

    def skipped(self) -> dict[str, int]:
        """Counts by reason."""
        return {reason: getattr(self, f"skipped_{reason}") for reason in SKIP_REASONS}


@dataclass(frozen=True, slots=True)
class LayerGroupPeak:
    """The most bytes that a layer group used at once, and the bytes of its pool (None: unlimited)."""

    layer_group: int
    kind: GroupKind
    peak_bytes: int
    pool_bytes: int | None


@dataclass(frozen=True, slots=True)
class TierTotals:
    """What one of several tiers did: usable hit tokens whose pages lay there when their request came (without attention
    layers: whose state lay there), and what it held at most. `tier`: gpu, host or disk.
    """

    tier: TierName
    usable_hit_tokens: int
    peaks: tuple[LayerGroupPeak, ...]


@dataclass(frozen=True, slots=True)
class MovedSlots:
    """Slots of a layer group that were copied from a tier to another, or within the GPU, their bytes, and how long that
    keeps the way between the tiers busy, by the bandwidths of the replay.
    """

    layer_group: int
    kind: GroupKind
    source_tier: TierName
    tier: TierName
    num_slots: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ReplayTotals:
    """Sums over all requests, also those too large to be served: every rate divides by all prompt tokens.

    Usable hits, the three losses, never seen and last block sum up to the prompt tokens; `lost_evicted_too_large` is
    part of `lost_evicted`, and `lost_snapshot_*` are all parts of `lost_snapshot`: see `causes.py`.

    `snapshots` is None and `peaks` is empty where tokens alone were counted, by the grid; `peaks` are those of the GPU.
    `tiers`, from the GPU down, and `moved`, by direction, are empty with the GPU alone; `moved` is None where nobody
    counted it.
    """

    requests: Positive
    too_large_requests: int
    prompt_tokens: Positive
    tree_hit_tokens: int
    attention_hit_tokens: int
    usable_hit_tokens: int
    kv_ceiling_hit_tokens: int
    ceiling_hit_tokens: int
    lost_evicted_tokens: int
    lost_alignment_tokens: int
    lost_snapshot_tokens: int
    lost_evicted_too_large_tokens: int
    lost_snapshot_evicted_tokens: int
    lost_snapshot_crossed_tokens: int
    lost_snapshot_no_room_tokens: int
    lost_snapshot_not_admitted_tokens: int
    lost_snapshot_history_tokens: int
    lost_snapshot_window_tokens: int
    never_seen_tokens: int
    last_block_tokens: int
    snapshots: SnapshotCounts | None
    peaks: tuple[LayerGroupPeak, ...]
    tiers: tuple[TierTotals, ...] = ()
    moved: tuple[MovedSlots, ...] | None = ()

    def __repr__(self) -> str:
        too_large = f", {self.too_large_requests:,} of them too large" if self.too_large_requests else ""
        return (
            f"ReplayTotals({plural(self.requests, 'request')}{too_large}; of {self.prompt_tokens:,} prompt tokens "
            f"usable {self.usable_token_hit_rate:.2%}, ceiling {self.rate(self.ceiling_hit_tokens):.2%}, "
            f"KV ceiling {self.rate(self.kv_ceiling_hit_tokens):.2%})"
        )

    def rate(self, tokens: int) -> float:
        """Share of all prompt tokens; of none, 0."""
        return tokens / max(self.prompt_tokens, 1)

    @property
    def lost_snapshot_by_cause(self) -> tuple[int, ...]:
        """Parts of `lost_snapshot_tokens`, in the order of `SNAPSHOT_CAUSES`."""
        return tuple(getattr(self, name) for name in snapshot_columns(SNAPSHOT_CAUSES))

    @property
    def usable_token_hit_rate(self) -> float:
        return self.rate(self.usable_hit_tokens)

    @property
    def peak_bytes(self) -> int:
        """Sum of the peaks of all pools on the GPU."""
        return sum(peak.peak_bytes for peak in self.peaks)

    def to_json(self) -> dict[str, Any]:
        """The published names: sums, rates, `peak_bytes` by kind of layer group, `tiers`, `moved`, `snapshots`."""
        sums = {name: value for name, value in asdict(self).items() if isinstance(value, int)}
        counts = self.snapshots
        return {
            **sums,
            "usable_token_hit_rate": self.usable_token_hit_rate,
            "attention_token_hit_rate": self.rate(self.attention_hit_tokens),
            "tree_token_hit_rate": self.rate(self.tree_hit_tokens),
            "kv_ceiling_token_hit_rate": self.rate(self.kv_ceiling_hit_tokens),
            "ceiling_token_hit_rate": self.rate(self.ceiling_hit_tokens),
            "peak_bytes": _by_kind(self.peaks),
            "layer_groups": [asdict(peak) for peak in self.peaks],
            "tiers": [self._tier_to_json(tier) for tier in self.tiers],
            "moved": None if self.moved is None else [asdict(moved) for moved in self.moved],
            "snapshots": None if counts is None else counts.to_json(),
        }

    def _tier_to_json(self, tier: TierTotals) -> dict[str, Any]:
        return {
            "tier": tier.tier,
            "usable_hit_tokens": tier.usable_hit_tokens,
            "usable_token_hit_rate": self.rate(tier.usable_hit_tokens),
            "peak_bytes": _by_kind(tier.peaks),
            "layer_groups": [asdict(peak) for peak in tier.peaks],
        }

    @classmethod
    def from_json(cls, published: Any) -> "ReplayTotals":
        """The reverse of `to_json`; keys that it does not write are left alone.

        Errors: ValueError, one line, for anything that `to_json` cannot have written.
        """
        try:
            counts = published["snapshots"]
            skipped = counts and {f"skipped_{reason}": counts["skipped"][reason] for reason in SKIP_REASONS}
            record = {
                **{name: published[name] for name in hints_of(cls, int)},
                "snapshots": counts and {**{name: counts[name] for name in _COUNTED}, **skipped},
                "peaks": published["layer_groups"],
                "tiers": [
                    {**{name: tier[name] for name in ("tier", "usable_hit_tokens")}, "peaks": tier["layer_groups"]}
                    for tier in published["tiers"]
                ],
                "moved": published["moved"],
            }
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"totals: expected those of a replay, got {error!r}") from error
        totals: ReplayTotals = decode(cls, record, "totals")
        wrong = broken_promise(asdict(totals))
        if (
            wrong is None
            and totals.tiers
            and sum(tier.usable_hit_tokens for tier in totals.tiers) != (totals.usable_hit_tokens)
        ):
            wrong = "usable_hit_tokens: expected the sum of all tiers, got another number"
        if wrong is not None:
            raise ValueError(f"totals: {wrong}")
        require_equal(totals.to_json(), published, "totals")
        return totals


def _by_kind(peaks: tuple[LayerGroupPeak, ...]) -> dict[str, int]:
    """Peak bytes by kind of layer group, and of all together; empty where none were counted."""
    by_kind: dict[str, int] = {}
    for peak in peaks:
        by_kind[peak.kind] = by_kind.get(peak.kind, 0) + peak.peak_bytes
    return {**by_kind, "total": sum(by_kind.values())} if by_kind else {}


def _peaks_from_json(published: dict[str, Any]) -> tuple[LayerGroupPeak, ...]:
    return tuple(LayerGroupPeak(**peak) for peak in published["layer_groups"])
