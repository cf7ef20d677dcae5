"""The oracle of tiers: what `KVCacheManager` with several tiers must do, slot by slot, from the rules of the design.

Like `reference.py` it shares no idea with the code: every page and state is an entry with a tier and a time, locks and
holds are found by going through all open sequences, and a victim is found by looking at every entry. The rules:

- A tier has room: what is free, what leaves it upward, what nobody resumed depends on, and what only suspended
  sequences hold as far as there is that much of the former in all tiers below.
- Where room is needed, as much as the tiers below can have goes there, the oldest first; of pages, only what is the
  deepest of its tier on each path through it. It goes to the next tier; if that cannot have so much although all of
  its own goes on, the oldest go to the tier after it. What the tiers below cannot have is dropped before anything
  moves, the oldest first, a page with all that lies below it; the last tier drops everything. What a sequence found
  that was not resumed yet is dropped after all else, that of the newest sequence first, but it moves like all else.
- What comes up from the tiers below comes up all at once, and its old slots count as free.
- A live state is taken beside the snapshot that it starts from, which stays where it is until it is copied. Is that
  on the GPU and all that could go, and nobody else waits for it, it becomes the live state itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.core.reference import Prefix, own_boundaries

GPU = 0


@dataclass(frozen=True)
class TierSetup:
    """Slots by tier. `pages=()`: no attention layer; `states=()`: no SSM layer."""

    block: int
    pages: tuple[int, ...]
    states: tuple[int, ...] = ()
    interval: int = 0
    max_util: float = 0.97
    admission: str = "every"

    @property
    def num_tiers(self) -> int:
        return len(self.pages or self.states)


class Refusal(NamedTuple):
    reason: str
    kind: str
    tier: int
    needed: int


@dataclass(eq=False)
class TierSequence:
    """One sequence. `path`: its blocks in the tree; held softly while it is created, then locked or held. `private`
    pages and the live state are on the GPU while it is active, and entries of their own while it is suspended.
    """

    number: int
    blocks: list[Prefix]  # of its whole text, also of what it will decode
    known_blocks: int  # how many of them a look-up knows
    known_tokens: int
    status: str = "created"
    holding: bool = True
    path: list[Prefix] = field(default_factory=list)
    source: Prefix | None = None
    hits: tuple[int, int, int] = (0, 0, 0)
    by_tier: tuple[int, ...] = ()
    private: int = 0
    reserved: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    committed: int = 0
    history: int = 0
    capacity: int = 0
    stopped: bool = False

    @property
    def prompt_tokens(self) -> int:
        return self.known_tokens + 1

    def parked_pages(self) -> list[Prefix]:
        """Names of its private pages while suspended: here, too, a name less its last part is the page above."""
        return [("parked", self.number, *range(count)) for count in range(1, self.private + 1)]

    def parked_state(self) -> Prefix:
        return ("parked", self.number)


@dataclass(eq=False)
class Entry:
    tier: int
    time: int = 0
    used: bool = False
    taken_by: TierSequence | None = None  # unless another one has touched it since


@dataclass(eq=False)
class Kind:
    """Pages or states: capacity by tier, all entries, and what is protected for the time of a call."""

    name: str
    capacity: tuple[int, ...]
    entries: dict[Prefix, Entry] = field(default_factory=dict)
    guarded: set[Prefix] = field(default_factory=set)

    def at(self, tier: int) -> set[Prefix]:
        return {item for item, entry in self.entries.items() if entry.tier == tier}


class ReferenceTiers:
    """What lies where, and the calls are in `ReferenceTierCache` below."""

    def __init__(self, setup: TierSetup) -> None:
        self.setup = setup
        self.pages, self.states = Kind("attention", setup.pages), Kind("ssm", setup.states)
        self.kinds = [kind for kind in (self.pages, self.states) if kind.capacity]
        self.last = setup.num_tiers - 1
        self.tree: set[Prefix] = set()
        self.open: list[TierSequence] = []  # in order of creation
        self.clock = 0
        self.counts: Counter[str] = Counter()
        self.moves: Counter[tuple[str, int, int]] = Counter()
        self.reached: Counter[str] = Counter()  # that the tests reach rare cases, too

    # -- derived -----------------------------------------------------------------------------------------------------

    def resumed(self) -> list[TierSequence]:
        return [sequence for sequence in self.open if sequence.status != "created"]

    def holders(self) -> list[TierSequence]:
        return [sequence for sequence in self.open if sequence.status == "created" and sequence.holding]

    def private(self, kind: Kind) -> int:
        active = [sequence for sequence in self.open if sequence.status == "active"]
        if kind is self.pages:
            return sum(sequence.private for sequence in active)
        return sum(1 + len(sequence.reserved) for sequence in active)

    def locked(self, kind: Kind) -> set[Prefix]:
        active = [sequence.path for sequence in self.open if sequence.status == "active" and kind is self.pages]
        return kind.guarded.union(*active)

    def held(self, kind: Kind) -> set[Prefix]:
        """By resumed sequences: moves, but does not go."""
        paths = [sequence.path for sequence in self.resumed() if kind is self.pages]
        return {item for item in kind.entries if item[0] == "parked"}.union(*paths)

    def found(self, kind: Kind) -> set[Prefix]:
        """By sequences that were not resumed yet."""
        if kind is self.pages:
            return set().union(*(sequence.path for sequence in self.holders()))
        return {sequence.source for sequence in self.holders() if sequence.source}

    def free(self, kind: Kind, tier: int) -> int:
        return kind.capacity[tier] - len(kind.at(tier)) - (self.private(kind) if tier == GPU else 0)

    def room(self, kind: Kind, tier: int, leaving: set[Prefix] = frozenset()) -> int:
        here, locked, held = kind.at(tier), self.locked(kind), self.held(kind)
        room = self.free(kind, tier) + len(here & leaving) + len(here - locked - held)
        return room + min(len(here & held - locked), self.room_below(kind, tier, leaving))

    def room_below(self, kind: Kind, tier: int, leaving: set[Prefix] = frozenset()) -> int:
        kept = self.locked(kind) | self.held(kind)
        below = range(tier + 1, self.last + 1)
        return sum(self.free(kind, low) + len(kind.at(low) & leaving) + len(kind.at(low) - kept) for low in below)

    # -- going -------------------------------------------------------------------------------------------------------

    def deepest_of_tier(self, kind: Kind, items: set[Prefix]) -> set[Prefix]:
        """Those with nothing below them among them; states do not depend on each other."""
        return items if kind is self.states else items - {item[:-1] for item in items}

    def oldest(self, kind: Kind, items: set[Prefix]) -> Prefix:
        return min(items, key=lambda item: kind.entries[item].time)

    def drop(self, kind: Kind, tier: int, count: int) -> None:
        for _ in range(count):
            while not (victims := self.victims(kind, tier)):
                self.holders()[-1].holding = False
                self.reached["dropped holds"] += 1
            self.remove(kind, self.oldest(kind, victims))
            self.reached["dropped above the last tier"] += tier < self.last

    def victims(self, kind: Kind, tier: int) -> set[Prefix]:
        kept = self.locked(kind) | self.held(kind) | self.found(kind)
        return self.deepest_of_tier(kind, kind.at(tier)) - kept

    def remove(self, kind: Kind, victim: Prefix) -> None:
        if kind is self.states:
            entry = kind.entries.pop(victim)
            self.counts["snapshots_evicted"] += 1
            self.counts["snapshots_evicted_unused"] += not entry.used
            return
        for item in [item for item in kind.entries if item[: len(victim)] == victim]:
            del kind.entries[item]
            self.tree.remove(item)
            self.counts["pages_evicted"] += 1
            if item in self.states.entries:
                self.remove(self.states, item)

    def make_room(self, kind: Kind, tier: int, count: int, leaving: set[Prefix]) -> tuple[dict[Prefix, int], int]:
        """What moves down, and whereto, so that there is room for `count` more in a tier after all moves, and how many
        of them have to go on to the next tier all the same; what is dropped goes at once.
        """
        short = count - self.free(kind, tier) - len(kind.at(tier) & leaving)
        if short <= 0:
            return {}, 0
        below = min(short, self.room_below(kind, tier, leaving))
        self.drop(kind, tier, short - below)
        if not below:
            return {}, 0
        moves, num_through = self.make_room(kind, tier + 1, below, leaving)
        movable = len(kind.at(tier) - self.locked(kind))
        for index in range(min(below, movable)):
            staying = kind.at(tier) - moves.keys()
            item = self.oldest(kind, self.deepest_of_tier(kind, staying) - self.locked(kind))
            moves[item] = tier + 2 if index < num_through else tier + 1
            self.reached["moved through a tier"] += index < num_through
        return moves, max(0, below - movable)

    def bring(self, kind: Kind, items: set[Prefix], tier: int, beside: int = 0) -> None:
        """Items that lie below a tier come up to it, and `beside` more of its slots are free then."""
        moves, _ = self.make_room(kind, tier, len(items) + beside, items)
        for item, target in [*moves.items(), *((item, tier) for item in items)]:
            self.moves[kind.name, kind.entries[item].tier, target] += 1
            kind.entries[item].tier = target

    def lifts(self, kind: Kind, items: list[Prefix], tier: int) -> set[Prefix]:
        return {item for item in items if kind.entries[item].tier > tier}

    def shortage(self, kind: Kind, items: set[Prefix], tier: int, beside: int = 0) -> Refusal | None:
        needed = len(items) + beside
        if needed and self.room(kind, tier, items) < needed:
            return Refusal("slots", kind.name, tier, needed)
        return None

    def touch(self, sequence: TierSequence, parked: list[Prefix]) -> None:
        """The deepest is the oldest. Of the snapshots all, or only those at the last boundaries of the sequence."""
        own = own_boundaries(self.setup, sequence)
        for depth, item in reversed(list(enumerate([*sequence.path, *parked], start=1))):
            self.clock += 1
            for kind in self.kinds:
                if item in kind.entries:
                    is_snapshot = kind is self.states and item not in parked
                    if is_snapshot and self.setup.admission == "last" and depth * self.setup.block not in own:
                        continue
                    entry = kind.entries[item]
                    entry.time = self.clock
                    entry.taken_by = sequence if entry.taken_by is sequence else None

    def prune(self) -> None:
        """Without pages, a block stays only for a snapshot at or below it, or for a sequence whose path it is on."""
        if not self.setup.pages:
            needed = {item for sequence in self.resumed() + self.holders() for item in sequence.path}
            for item in self.states.entries:
                needed |= {item[:end] for end in range(2, len(item) + 1)}
            self.tree &= needed
