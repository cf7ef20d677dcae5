"""The calls of the oracle of tiers; the rules of room and moves are in `reference_tiers.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.core.reference import Prefix, of_prompt
from tests.core.reference_tiers import GPU, Entry, Kind, ReferenceTiers, Refusal, TierSequence

Hits = tuple[int, int, int]


class ReferenceTierCache(ReferenceTiers):
    """Each call that can be refused returns why, or None."""

    @contextmanager
    def guarding(self, kind: Kind, items: list[Prefix]) -> Iterator[None]:
        """Nothing of this moves down or goes meanwhile."""
        kind.guarded = set(items)
        yield
        kind.guarded = set()

    # -- created -----------------------------------------------------------------------------------------------------

    def look_up(self, sequence: TierSequence) -> tuple[list[Prefix], Prefix | None, Hits]:
        """The path found, the snapshot to start from, and the hits in tokens. Changes nothing."""
        path: list[Prefix] = []
        for prefix in sequence.blocks[: sequence.known_blocks]:
            if prefix not in self.tree:
                break
            path.append(prefix)
        block = self.setup.block
        found = usable = min(len(path), sequence.known_tokens // block)
        source = None
        if self.setup.states:
            states = self.states.entries
            usable = max((depth for depth in range(1, found + 1) if path[depth - 1] in states), default=0)
            source = path[usable - 1] if usable else None
        return path, source, (found * block, found * block, usable * block)

    def create(self, number: int, blocks: list[Prefix], known_blocks: int, known_tokens: int) -> TierSequence:
        sequence = TierSequence(number, blocks, known_blocks, known_tokens)
        self.adopt(sequence)
        self.open.append(sequence)
        return sequence

    def adopt(self, sequence: TierSequence) -> None:
        sequence.path, sequence.source, sequence.hits = self.look_up(sequence)
        sequence.committed = sequence.history = sequence.capacity = sequence.hits[2]
        sequence.holding = True

    # -- becoming active ---------------------------------------------------------------------------------------------

    def gate(self, sequence: TierSequence) -> Refusal | None:
        """Whether the others leave enough to let this one in: what they need on the GPU, and what they hold there that
        the tiers below have no room for.
        """
        if not any(other.status == "active" for other in self.open):
            return None
        for kind in self.kinds:
            here, locked = kind.at(GPU), self.locked(kind)
            mine = set() if sequence.status == "created" else set(sequence.path) | set(sequence.parked_pages())
            if kind is self.states:
                mine = {sequence.parked_state()}
            shared = {item for other in self.resumed() if other is not sequence for item in other.path}
            idle = here & self.held(kind) - locked - (mine - shared)
            stuck = max(0, len(idle) - self.room_below(kind, GPU))
            if len(here & locked) + self.private(kind) + stuck > self.setup.max_util * kind.capacity[GPU]:
                return Refusal("utilization", kind.name, GPU, 0)
        return None

    def resume(self, sequence: TierSequence) -> Refusal | None:
        refusal = self.gate(sequence)
        if refusal is None:
            first = sequence.status == "created"
            refusal = self.first_resume(sequence) if first else self.bring_back(sequence, GPU)
        if refusal is None:
            for kind in self.kinds:
                for item in [item for item in kind.entries if item[:2] == sequence.parked_state()]:
                    del kind.entries[item]
            sequence.status = "active"
        self.prune()
        return refusal

    def first_resume(self, sequence: TierSequence) -> Refusal | None:
        path, source, _ = self.look_up(sequence)
        with self.guarding(self.pages, path):
            up = self.lifts(self.pages, path, GPU) if self.setup.pages else set()
            refusal = self.shortage(self.pages, up, GPU) if up else None
            if refusal is None and self.setup.states and not self.can_start(sequence, source):
                refusal = Refusal("slots", "ssm", GPU, 1)
            if refusal is not None:
                return refusal
            self.adopt(sequence)
            sequence.holding = False  # it is not the soft hold of the one that resumes that could be dropped
            self.count_lookup(sequence)
            self.bring(self.pages, up, GPU) if up else None
            if self.setup.states:
                self.start(sequence, source)
        return None

    def room_beside(self, source: Prefix | None) -> int:
        with self.guarding(self.states, [source] if source else []):
            return self.room(self.states, GPU)

    def can_start(self, sequence: TierSequence, source: Prefix | None) -> bool:
        if self.room_beside(source) > 0:
            return True
        is_busy = any(other.status == "active" for other in self.open)
        awaited = is_busy and any(other.source == source for other in self.holders() if other is not sequence)
        return source is not None and self.states.entries[source].tier == GPU and not awaited

    def start(self, sequence: TierSequence, source: Prefix | None) -> None:
        if source is not None:
            self.counts["snapshots_reused"] += 1
            if self.room_beside(source) < 1:
                for other in self.holders():
                    if other is not sequence and other.source == source:
                        other.holding = False
                del self.states.entries[source]
                self.reached["taken over"] += 1
                return
        with self.guarding(self.states, [source] if source else []):
            self.bring(self.states, set(), GPU, beside=1)
        if source is not None:
            entry = self.states.entries[source]
            entry.used = True
            self.counts["copied_states"] += 1
            self.moves["ssm", entry.tier, GPU] += 1

    def count_lookup(self, sequence: TierSequence) -> None:
        self.counts["lookups"] += 1
        self.counts["lookup_tokens"] += sequence.known_tokens
        for name, hit in zip(("tree", "attention", "usable"), sequence.hits, strict=True):
            self.counts[f"{name}_tokens"] += hit
        by_tier = [0] * self.setup.num_tiers
        if self.setup.pages:
            for prefix in sequence.path[: sequence.hits[2] // self.setup.block]:
                by_tier[self.pages.entries[prefix].tier] += self.setup.block
        elif sequence.source is not None:
            by_tier[self.states.entries[sequence.source].tier] += sequence.hits[2]
        sequence.by_tier = tuple(by_tier)
        for tier, tokens in enumerate(by_tier):
            self.counts[f"usable_tokens_on_{tier}"] += tokens

    def bring_back(self, sequence: TierSequence, tier: int) -> Refusal | None:
        """All that a sequence holds comes up to a tier."""
        if sequence.status == "created":
            pages, states = sequence.path, [sequence.source] if sequence.source else []
        else:
            pages, states = sequence.path + sequence.parked_pages(), [sequence.parked_state()]
        wanted = {self.pages: pages, self.states: states}
        up = {kind: self.lifts(kind, wanted[kind], tier) for kind in self.kinds}
        with self.guarding(self.pages, pages), self.guarding(self.states, states):
            for kind in self.kinds:
                refusal = self.shortage(kind, up[kind], tier)
                if refusal is not None:
                    return refusal
            for kind in self.kinds:
                self.bring(kind, up[kind], tier)
        return None

    def prefetch(self, sequence: TierSequence, tier: int) -> Refusal | None:
        if sequence.status == "created" and not sequence.holding:
            return None
        refusal = self.bring_back(sequence, tier)
        self.prune()
        return refusal

    # -- active ------------------------------------------------------------------------------------------------------

    def resize(self, sequence: TierSequence, capacity: int, history: int) -> Refusal | None:
        if self.setup.pages:
            own = max(0, -(-capacity // self.setup.block) - len(sequence.path))
            more = own - sequence.private
            if more > 0:
                refusal = self.shortage(self.pages, set(), GPU, beside=more)
                if refusal is not None:
                    return refusal
                self.bring(self.pages, set(), GPU, beside=more)
            sequence.private = own
        sequence.capacity, sequence.history = capacity, history
        return None

    def reserve(self, sequence: TierSequence, points: list[int]) -> set[int]:
        """All points that the sequence has a slot for now."""
        states, path = self.states.entries, sequence.path
        wanted = self.points(sequence, min(points, default=1) - 1, max(points, default=0))
        self.counts["snapshots_skipped_not_admitted"] += sum(point % self.setup.interval > 0 for point in points)
        missing = []
        for point in sorted(set(points) & set(wanted)):
            depth = point // self.setup.block
            has_snapshot = depth <= len(path) and path[depth - 1] in states
            if point not in sequence.reserved and not has_snapshot:
                missing.append(point)
        room = self.take_beside(sequence, len(missing)) if missing else 0
        sequence.reserved.update(missing[:room])
        sequence.refused.update(missing[room:])
        self.prune()
        return set(sequence.reserved)

    def take_beside(self, sequence: TierSequence, wanted: int) -> int:
        """Make as many states free as can be had while the snapshots that a sequence is to keep stay where they are."""
        kept = sequence.path if self.setup.admission == "every" else of_prompt(self.setup, sequence)
        with self.guarding(self.states, kept):
            count = min(wanted, self.room(self.states, GPU))
            self.bring(self.states, set(), GPU, beside=count)
        return count

    def commit(self, sequence: TierSequence, num_tokens: int) -> None:
        old, new = sequence.committed, sequence.committed + num_tokens
        for prefix in sequence.blocks[len(sequence.path) : new // self.setup.block]:
            self.tree.add(prefix)
            sequence.path.append(prefix)
            if self.setup.pages:  # the page is the tree's now; is there one already, the one on the GPU stays
                sequence.private -= 1
                self.pages.entries.setdefault(prefix, Entry(GPU)).tier = GPU
        if self.setup.states:
            self.take_snapshots(sequence, old, new)
        sequence.committed, sequence.history = new, max(sequence.history, new)
        self.prune()

    def take_snapshots(self, sequence: TierSequence, old: int, new: int) -> None:
        block, added = self.setup.block, []
        points = self.points(sequence, old, new)
        num_boundaries = sum(position % self.setup.interval == 0 for position in range(old + 1, new + 1))
        self.counts["snapshots_skipped_not_admitted"] += num_boundaries - len(points)
        missing = [point for point in points if sequence.path[point // block - 1] not in self.states.entries]
        sequence.reserved &= set(missing)  # the other slots are free already when a copy looks for room
        for point in missing:
            if point in sequence.reserved or (point == new and self.copy_live_state(sequence, point)):
                sequence.reserved.discard(point)
                added.append(sequence.path[point // block - 1])
                self.states.entries[added[-1]] = Entry(GPU)
                self.counts["snapshots_taken"] += 1
            elif point < new:
                reason = "no_room" if point in sequence.refused else "crossed"
                self.counts[f"snapshots_skipped_{reason}"] += 1
        sequence.reserved, sequence.refused = set(), set()
        decoded = [point for point in points if point > sequence.prompt_tokens]
        if any(sequence.path[point // block - 1] in self.states.entries for point in decoded):
            self.supersede(sequence)
        for prefix in reversed(added):
            self.clock += 1
            self.states.entries[prefix].time = self.clock
            if self.setup.admission == "last" and prefix not in of_prompt(self.setup, sequence):
                self.states.entries[prefix].taken_by = sequence

    def points(self, sequence: TierSequence, old: int, new: int) -> list[int]:
        if not self.setup.states:
            return []
        boundaries = [point for point in range(1, new + 1) if point % self.setup.interval == 0]
        if self.setup.admission == "last":
            of_whole_prompt = range(0, sequence.prompt_tokens + 1, self.setup.interval)
            decoded = [point for point in boundaries if point > sequence.prompt_tokens]
            boundaries = [*of_whole_prompt[-1:], *decoded[-1:]]
        return [point for point in boundaries if old < point <= new]

    def supersede(self, sequence: TierSequence) -> None:
        """A sequence has its next decoded snapshot: that before goes unless it is of use to others."""
        for prefix, entry in list(self.states.entries.items()):
            if entry.taken_by is sequence:
                entry.taken_by = None
                if not entry.used and all(holder.source != prefix for holder in self.holders()):
                    del self.states.entries[prefix]
                    self.counts["snapshots_superseded"] += 1
                    self.reached["superseded"] += 1

    def copy_live_state(self, sequence: TierSequence, point: int) -> bool:
        if sequence.history > point:
            self.counts["snapshots_skipped_history"] += 1
            return False
        tiers = [entry.tier for entry in self.states.entries.values() if entry.taken_by is sequence]
        if point > sequence.prompt_tokens and GPU in tiers and not self.free(self.states, GPU):
            self.supersede(sequence)
        if not self.take_beside(sequence, 1):
            self.counts["snapshots_skipped_no_room"] += 1
            return False
        self.counts["copied_states"] += 1
        self.moves["ssm", GPU, GPU] += 1
        return True

    # -- leaving -----------------------------------------------------------------------------------------------------

    def suspend(self, sequence: TierSequence) -> None:
        sequence.status = "suspended"
        sequence.reserved, sequence.refused = set(), set()
        parked = sequence.parked_pages() if self.setup.pages else []
        for item in parked:
            self.pages.entries[item] = Entry(GPU)
        if self.setup.states:
            self.states.entries[sequence.parked_state()] = Entry(GPU)
        self.touch(sequence, [*parked, sequence.parked_state()])

    def close(self, sequence: TierSequence) -> None:
        for kind in self.kinds:
            for item in [item for item in kind.entries if item[:2] == sequence.parked_state()]:
                del kind.entries[item]
        if sequence.status != "created":
            self.touch(sequence, [])
        self.open.remove(sequence)
        self.prune()
