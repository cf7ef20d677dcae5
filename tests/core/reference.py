"""The oracle: what `KVCacheManager` (one GPU tier) must do, block by block, written from the design's rules.

`ReferenceCache` shares no idea with the code: plain dicts and lists, every block and snapshot an entry of its own with
a time of its own, nothing counted that can be derived (free slots, locks and holds are found by going through all
open sequences), and a victim is found by looking at every block. A block is named by everything up to its end: the
tuple of its scope and the contents of all blocks so far. Slow, and meant to be read.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

Prefix = tuple[Hashable, ...]


@dataclass(frozen=True)
class Setup:
    """Sizes of one cache. `pages=0`: no attention layer; `states=0`: no SSM layer."""

    block: int
    pages: int
    states: int = 0
    interval: int = 0
    max_util: float = 0.97
    admission: str = "every"


@dataclass(eq=False)
class ReferenceSequence:
    """One sequence. `path`: its blocks in the tree; held softly while it is created, locked once it was resumed."""

    blocks: list[Prefix]  # of its whole text, also of what it will decode
    known_blocks: int  # how many of them a look-up knows
    known_tokens: int
    status: str = "created"
    holding: bool = True
    path: list[Prefix] = field(default_factory=list)
    source: Prefix | None = None
    hits: tuple[int, int, int] = (0, 0, 0)
    private: int = 0
    live: int = 0
    reserved: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    committed: int = 0
    history: int = 0
    capacity: int = 0
    stopped: bool = False

    @property
    def prompt_tokens(self) -> int:
        return self.known_tokens + 1


def own_boundaries(setup: Setup, sequence: ReferenceSequence) -> set[int]:
    """Positions of the snapshots that a sequence touches where it does not touch all of its path."""
    ends = (sequence.committed, min(sequence.committed, sequence.prompt_tokens)) if setup.states else ()
    return {end // setup.interval * setup.interval for end in ends}


def of_prompt(setup: Setup, sequence: ReferenceSequence) -> list[Prefix]:
    """The block at whose end the last boundary of the prompt is, if it is committed."""
    if not setup.states or sequence.prompt_tokens < setup.interval:
        return []
    depth = sequence.prompt_tokens // setup.interval * setup.interval // setup.block
    return sequence.path[depth - 1 : depth]


@dataclass(eq=False)
class Snapshot:
    """The state at the end of a block."""

    time: int = 0
    used: bool = False
    taken_by: ReferenceSequence | None = None  # unless another one has touched it since


class ReferenceCache:
    """See the module."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.blocks: dict[Prefix, int] = {}  # -> time of the last touch
        self.snapshots: dict[Prefix, Snapshot] = {}
        self.open: list[ReferenceSequence] = []  # in order of creation
        self.clock = 0
        self.dropped_holds = self.taken_over = 0  # that the tests reach these cases, too
        self.counts = {
            "lookups": 0,
            "lookup_tokens": 0,
            "tree_tokens": 0,
            "attention_tokens": 0,
            "usable_tokens": 0,
            "snapshots_taken": 0,
            "snapshots_reused": 0,
            "snapshots_evicted": 0,
            "snapshots_evicted_unused": 0,
            "snapshots_skipped_crossed": 0,
            "snapshots_skipped_no_room": 0,
            "snapshots_skipped_history": 0,
            "snapshots_skipped_not_admitted": 0,
            "snapshots_superseded": 0,
            "pages_evicted": 0,
            "copied_states": 0,
        }

    # -- derived -----------------------------------------------------------------------------------------------------

    def resumed(self) -> list[ReferenceSequence]:
        return [sequence for sequence in self.open if sequence.status != "created"]

    def holders(self) -> list[ReferenceSequence]:
        return [sequence for sequence in self.open if sequence.status == "created" and sequence.holding]

    def cached_pages(self) -> int:
        return len(self.blocks) if self.setup.pages else 0

    def free_pages(self) -> int:
        return self.setup.pages - self.cached_pages() - sum(sequence.private for sequence in self.open)

    def free_states(self) -> int:
        private = sum(sequence.live + len(sequence.reserved) for sequence in self.open)
        return self.setup.states - len(self.snapshots) - private

    def locked(self, sequences: list[ReferenceSequence]) -> set[Prefix]:
        return {prefix for sequence in sequences for prefix in sequence.path}

    # -- recency and eviction ----------------------------------------------------------------------------------------

    def touch(self, sequence: ReferenceSequence) -> None:
        own = own_boundaries(self.setup, sequence)
        for depth, prefix in reversed(list(enumerate(sequence.path, start=1))):
            self.clock += 1
            self.blocks[prefix] = self.clock
            if prefix in self.snapshots and (self.setup.admission == "every" or depth * self.setup.block in own):
                snapshot = self.snapshots[prefix]
                snapshot.time = self.clock
                snapshot.taken_by = sequence if snapshot.taken_by is sequence else None

    def protected(self, sequence: ReferenceSequence) -> set[Prefix]:
        """Whose snapshots are not given up for one more of a sequence."""
        return set(sequence.path if self.setup.admission == "every" else of_prompt(self.setup, sequence))

    def drop_newest_hold(self) -> None:
        self.holders()[-1].holding = False
        self.dropped_holds += 1

    def lose_snapshot(self, prefix: Prefix) -> None:
        snapshot = self.snapshots.pop(prefix)
        self.counts["snapshots_evicted"] += 1
        self.counts["snapshots_evicted_unused"] += not snapshot.used

    def evict_page(self) -> None:
        while True:
            kept = self.locked(self.resumed()) | self.locked(self.holders())
            parents = {prefix[:-1] for prefix in self.blocks}
            tails = [prefix for prefix in self.blocks if prefix not in parents and prefix not in kept]
            if tails:
                break
            self.drop_newest_hold()
        victim = min(tails, key=lambda prefix: self.blocks[prefix])
        del self.blocks[victim]
        self.counts["pages_evicted"] += 1
        if victim in self.snapshots:
            self.lose_snapshot(victim)

    def take_state(self, protected: set[Prefix]) -> None:
        """Make one SSM slot free; the caller knows that it can be done."""
        while self.free_states() < 1:
            kept = protected | {sequence.source for sequence in self.holders()}
            victims = [prefix for prefix in self.snapshots if prefix not in kept]
            if victims:
                self.lose_snapshot(min(victims, key=lambda prefix: self.snapshots[prefix].time))
            else:
                self.drop_newest_hold()

    def prune(self) -> None:
        """Without pages, a block stays only for a snapshot at or below it, or for a sequence whose path it is on."""
        if not self.setup.pages:
            needed = self.locked(self.resumed()) | self.locked(self.holders())
            for prefix in self.snapshots:
                needed |= {prefix[:end] for end in range(2, len(prefix) + 1)}
            self.blocks = {prefix: time for prefix, time in self.blocks.items() if prefix in needed}

    # -- calls -------------------------------------------------------------------------------------------------------

    def look_up(
        self, blocks: list[Prefix], num_tokens: int
    ) -> tuple[list[Prefix], Prefix | None, tuple[int, int, int]]:
        """The path found, the snapshot to start from, and the hits in tokens. Changes nothing."""
        path: list[Prefix] = []
        for prefix in blocks:
            if prefix not in self.blocks:
                break
            path.append(prefix)
        found = usable = min(len(path), num_tokens // self.setup.block)
        if self.setup.states:
            usable = max((depth for depth in range(1, found + 1) if path[depth - 1] in self.snapshots), default=0)
        source = path[usable - 1] if self.setup.states and usable else None
        return path, source, (found * self.setup.block, found * self.setup.block, usable * self.setup.block)

    def create(self, blocks: list[Prefix], known_blocks: int, known_tokens: int) -> ReferenceSequence:
        sequence = ReferenceSequence(blocks, known_blocks, known_tokens)
        self.adopt(sequence)
        self.open.append(sequence)
        return sequence

    def adopt(self, sequence: ReferenceSequence) -> None:
        known = sequence.blocks[: sequence.known_blocks]
        sequence.path, sequence.source, sequence.hits = self.look_up(known, sequence.known_tokens)
        sequence.committed = sequence.history = sequence.capacity = sequence.hits[2]
        sequence.holding = True

    def gate(self, sequence: ReferenceSequence) -> bool:
        """Whether the others leave enough to let this one in."""
        if not any(other.status == "active" for other in self.open):
            return True
        others = [other for other in self.resumed() if other is not sequence]
        pages = len(self.locked(others)) + sum(other.private for other in others) if self.setup.pages else 0
        states = sum(other.live + len(other.reserved) for other in others)
        return pages <= self.setup.max_util * self.setup.pages and states <= self.setup.max_util * self.setup.states

    def resume(self, sequence: ReferenceSequence) -> str:
        """Empty, or the reason of a refusal."""
        if not self.gate(sequence):
            return "utilization"
        if sequence.status == "created":
            _, source, _ = self.look_up(sequence.blocks[: sequence.known_blocks], sequence.known_tokens)
            others = set(self.snapshots) - {source}
            full = self.setup.states > 0 and self.free_states() < 1
            # somebody who computes will leave room; else those that are only created would wait for each other
            is_busy = any(other.status == "active" for other in self.open)
            held = is_busy and any(other.source == source for other in self.holders() if other is not sequence)
            if full and not others and (source is None or held):
                return "slots"
            self.first_resume(sequence, take_over=full and not others)
        sequence.status = "active"
        self.prune()
        return ""

    def first_resume(self, sequence: ReferenceSequence, take_over: bool) -> None:
        self.adopt(sequence)
        sequence.status = "resumed"
        self.counts["lookups"] += 1
        self.counts["lookup_tokens"] += sequence.known_tokens
        for name, hit in zip(("tree", "attention", "usable"), sequence.hits, strict=True):
            self.counts[f"{name}_tokens"] += hit
        if not self.setup.states:
            return
        if sequence.source is not None:
            self.counts["snapshots_reused"] += 1
            self.counts["copied_states"] += not take_over
            self.snapshots[sequence.source].used = True
        if take_over:
            for other in self.holders():
                if other is not sequence and other.source == sequence.source:
                    other.holding = False
            del self.snapshots[sequence.source]
            self.taken_over += 1
        else:
            self.take_state({sequence.source})
        sequence.live = 1

    def resize(self, sequence: ReferenceSequence, capacity: int, history: int) -> str:
        """Empty, or the reason of a refusal."""
        if self.setup.pages:
            own = max(0, -(-capacity // self.setup.block) - len(sequence.path))
            unlocked = len(self.blocks) - len(self.locked(self.resumed()))
            if own - sequence.private > self.free_pages() + unlocked:
                return "slots"
            while own - sequence.private > self.free_pages():
                self.evict_page()
            sequence.private = own
        sequence.capacity, sequence.history = capacity, history
        return ""

    def reserve(self, sequence: ReferenceSequence, points: list[int]) -> set[int]:
        """All points that the sequence has a slot for now."""
        own = self.protected(sequence)
        wanted = self.points(sequence, min(points, default=1) - 1, max(points, default=0))
        self.counts["snapshots_skipped_not_admitted"] += sum(point % self.setup.interval > 0 for point in points)
        for point in sorted(set(points) & set(wanted)):
            depth = point // self.setup.block
            if point in sequence.reserved or (
                depth <= len(sequence.path) and sequence.path[depth - 1] in self.snapshots
            ):
                continue
            if self.free_states() > 0 or set(self.snapshots) - own:
                self.take_state(own)
                sequence.reserved.add(point)
            else:
                sequence.refused.add(point)
        self.prune()
        return set(sequence.reserved)

    def commit(self, sequence: ReferenceSequence, num_tokens: int) -> None:
        old, new = sequence.committed, sequence.committed + num_tokens
        for prefix in sequence.blocks[len(sequence.path) : new // self.setup.block]:
            sequence.private -= self.setup.pages > 0  # into the tree, or free because the block is there already
            self.blocks.setdefault(prefix, 0)
            sequence.path.append(prefix)
        if self.setup.states:
            self.take_snapshots(sequence, old, new)
        sequence.committed, sequence.history = new, max(sequence.history, new)
        self.prune()

    def take_snapshots(self, sequence: ReferenceSequence, old: int, new: int) -> None:
        added = []
        points = self.points(sequence, old, new)
        num_boundaries = sum(position % self.setup.interval == 0 for position in range(old + 1, new + 1))
        self.counts["snapshots_skipped_not_admitted"] += num_boundaries - len(points)
        wanted = {point: sequence.path[point // self.setup.block - 1] for point in points}
        missing = {point: prefix for point, prefix in wanted.items() if prefix not in self.snapshots}
        sequence.reserved &= missing.keys()  # the other slots are free already when a copy looks for room
        for point, prefix in missing.items():
            if point in sequence.reserved or (point == new and self.copy_live_state(sequence, point)):
                sequence.reserved.discard(point)
                added.append(prefix)
                self.snapshots[prefix] = Snapshot()
                self.counts["snapshots_taken"] += 1
            elif point < new:
                reason = "no_room" if point in sequence.refused else "crossed"
                self.counts[f"snapshots_skipped_{reason}"] += 1
        self.give_back_reserved(sequence)
        if any(point > sequence.prompt_tokens and prefix in self.snapshots for point, prefix in wanted.items()):
            self.supersede(sequence)
        for prefix in reversed(added):
            self.clock += 1
            self.snapshots[prefix].time = self.clock
            if self.setup.admission == "last" and prefix not in of_prompt(self.setup, sequence):
                self.snapshots[prefix].taken_by = sequence

    def supersede(self, sequence: ReferenceSequence) -> None:
        """A sequence has its next decoded snapshot: that before goes unless it is of use to others."""
        for prefix, snapshot in list(self.snapshots.items()):
            if snapshot.taken_by is sequence:
                snapshot.taken_by = None
                if not snapshot.used and all(holder.source != prefix for holder in self.holders()):
                    del self.snapshots[prefix]
                    self.counts["snapshots_superseded"] += 1

    def copy_live_state(self, sequence: ReferenceSequence, point: int) -> bool:
        if sequence.history > point:
            self.counts["snapshots_skipped_history"] += 1
            return False
        if self.free_states() < 1 and point > sequence.prompt_tokens:
            self.supersede(sequence)
        own = self.protected(sequence)
        if self.free_states() < 1 and not set(self.snapshots) - own:
            self.counts["snapshots_skipped_no_room"] += 1
            return False
        self.take_state(own)
        self.counts["copied_states"] += 1
        return True

    def points(self, sequence: ReferenceSequence, old: int, new: int) -> list[int]:
        if not self.setup.states:
            return []
        boundaries = [point for point in range(1, new + 1) if point % self.setup.interval == 0]
        if self.setup.admission == "last":
            of_whole_prompt = range(0, sequence.prompt_tokens + 1, self.setup.interval)
            decoded = [point for point in boundaries if point > sequence.prompt_tokens]
            boundaries = [*of_whole_prompt[-1:], *decoded[-1:]]
        return [point for point in boundaries if old < point <= new]

    def give_back_reserved(self, sequence: ReferenceSequence) -> None:
        sequence.reserved, sequence.refused = set(), set()

    def suspend(self, sequence: ReferenceSequence) -> None:
        self.give_back_reserved(sequence)
        self.touch(sequence)
        sequence.status = "suspended"

    def close(self, sequence: ReferenceSequence) -> None:
        if sequence.status != "created":
            self.touch(sequence)
        self.open.remove(sequence)
        self.prune()

    # -- for comparison ----------------------------------------------------------------------------------------------

    def look(self) -> dict[str, object]:
        """Everything that can be seen from outside, in the words of the manager."""
        slots = [("attention", self.cached_pages(), self.free_pages())] * (self.setup.pages > 0)
        slots += [("ssm", len(self.snapshots), self.free_states())] * (self.setup.states > 0)
        return {
            "slots": slots,
            "blocks": set(self.blocks),
            "snapshots": set(self.snapshots),
            "counts": self.counts,
            "sequences": [self.look_at(sequence) for sequence in self.open],
        }

    def look_at(self, sequence: ReferenceSequence) -> tuple[object, ...]:
        status = "active" if sequence.status == "active" else "suspended"
        attention_tokens = len(sequence.path) * self.setup.block if sequence.holding else 0
        return status, sequence.committed, sequence.history, sequence.capacity, sequence.hits, attention_tokens
