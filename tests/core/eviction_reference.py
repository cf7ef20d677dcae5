"""The oracle of who goes first: one tier, sequences one after the other, every page and snapshot an entry of its own
with a priority and a time of its own. Written from the rules: lowest priority first, then window pages by their use,
then the oldest; pages of full attention from the tails of leaves only; a window touches its sinks and what is seen at
the path's end and at each snapshot, without SSM also where others part from the path, and what goes stale in between
keeps the time of its sequence's resume. Layer groups may share one pool: then the victim is the first of all, of one
block touched at one time the snapshot before window pages before the full page.

The use of a window page: 0 if nobody would read it who goes on at a kept snapshot (without SSM: where a path ends or
parts); 2 if somebody would who goes on where a path ends or parts, from the deepest snapshot above; 1 otherwise.

Partial blocks are off here, and prompts are tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

Prefix = tuple[int, ...]
PriorityFunction = Callable[[int, int], int]


@dataclass
class Entry:
    priority: int
    time: tuple[int, int] = (0, 0)

    @property
    def order(self) -> tuple[int, tuple[int, int]]:
        return self.priority, self.time


@dataclass
class Model:
    """Layer groups by number. `windows`: (size, sink tokens) of a group; `slots` of every group, or, if they are
    `shared`, of all of them together.
    """

    block: int
    slots: dict[int, int]
    full: int = -1
    windows: dict[int, tuple[int, int]] = field(default_factory=dict)
    ssm: int = -1
    interval: int = 0
    shared: bool = False


class EvictionReference:
    """See the module. One request at a time: `start`, `extend` and `commit` as often as wanted, `close`."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.entries: dict[int, dict[Prefix, Entry]] = {group: {} for group in model.slots}
        self.own: dict[int, set[int]] = {group: set() for group in model.slots}  # blocks of private pages
        self.pins: dict[int, set[int]] = {group: set() for group in model.windows}  # blocks of the path
        self.clock = 0
        self.path: list[Prefix] = []
        self.num_evicted = dict.fromkeys(model.slots, 0)

    # -- what is there -----------------------------------------------------------------------------------------------

    def members(self, group: int) -> list[int]:
        """The layer groups that have the same pool."""
        return list(self.model.slots) if self.model.shared else [group]

    def free(self, group: int) -> int:
        members = self.members(group)
        return sum(self.model.slots[m] - len(self.entries[m]) - len(self.own[m]) for m in members)

    def obtainable(self, group: int, kept: set[Prefix] = frozenset()) -> int:
        """`kept`: of this group."""
        droppable = [self.droppable(m, kept if m == group else set()) for m in self.members(group)]
        return self.free(group) + sum(map(len, droppable))

    def needed(self, group: int, history: int, num_blocks: int) -> set[int]:
        size, num_sinks = self.model.windows[group]
        block = self.model.block
        keys = range(num_blocks * block)
        return {key // block for key in keys if key > history - size or key // block * block < min(num_sinks, history)}

    def match(self, prompt: Prefix) -> tuple[int, int]:
        """Blocks that can be used, and that are taken up beyond them."""
        block = self.model.block
        known = 0
        while (known + 1) * block <= len(prompt) and self._is_known(prompt[: (known + 1) * block]):
            known += 1
        usable = next(n for n in range(known, -1, -1) if self._is_usable(prompt, n))
        adopted = usable
        while adopted < known and all(prompt[: (adopted + 1) * block] in self.entries[g] for g in self.model.windows):
            adopted += 1
        return usable, adopted

    def _is_known(self, prefix: Prefix) -> bool:
        """Without full attention a block is there as long as anything is, on it or below."""
        if self.model.full >= 0:
            return prefix in self.entries[self.model.full]
        return any(other[: len(prefix)] == prefix for entries in self.entries.values() for other in entries)

    def _is_usable(self, prompt: Prefix, num_blocks: int) -> bool:
        block = self.model.block
        if self.model.ssm >= 0 and num_blocks and prompt[: num_blocks * block] not in self.entries[self.model.ssm]:
            return False
        return all(
            prompt[: (b + 1) * block] in self.entries[group]
            for group in self.model.windows
            for b in self.needed(group, num_blocks * block, num_blocks)
        )

    # -- going -------------------------------------------------------------------------------------------------------

    def droppable(self, group: int, kept: set[Prefix]) -> list[Prefix]:
        entries = self.entries[group]
        if group == self.model.full:
            kept = kept | set(self.path)
        elif group in self.model.windows:
            kept = kept | {self.path[b] for b in self.pins[group] if b < len(self.path)}
        return [prefix for prefix in entries if prefix not in kept]

    def make_room(self, group: int, count: int, kept: set[Prefix] = frozenset()) -> bool:
        if count > self.obtainable(group, kept):
            return False
        while count > self.free(group):
            candidates = []
            places = self.places() if any(member in self.model.windows for member in self.members(group)) else {}
            for member in self.members(group):
                entries = self.entries[member]
                parents = {prefix[: -self.model.block] for prefix in entries} if member == self.model.full else set()
                last = 2 if member == self.model.full else 0 if member == self.model.ssm else 1
                candidates += [
                    (
                        entries[prefix].priority,
                        self.use(member, prefix, places) if member in self.model.windows else 2,
                        entries[prefix].time,
                        last,
                        member,
                        prefix,
                    )
                    for prefix in self.droppable(member, kept if member == group else set())
                    if prefix not in parents
                ]
            *_, member, victim = min(candidates)
            self._drop(member, victim)
        return True

    def known(self) -> set[Prefix]:
        """Every block of the tree."""
        block = self.model.block
        if self.model.full >= 0:
            return {*self.entries[self.model.full], *self.path}
        there = {prefix for entries in self.entries.values() for prefix in entries} | set(self.path)
        return {prefix[:end] for prefix in there for end in range(block, len(prefix) + 1, block)}

    def places(self) -> dict[Prefix, int]:
        """Where somebody can go on, and the use of what is read there."""
        known = self.known()
        num_children = Counter(prefix[: -self.model.block] for prefix in known)
        ends = [prefix for prefix in known if num_children[prefix] != 1]
        if self.model.ssm < 0:
            return dict.fromkeys(ends, 2)
        snapshots = self.entries[self.model.ssm]
        places = dict.fromkeys(snapshots, 1)
        for end in ends:
            above = [prefix for prefix in snapshots if end[: len(prefix)] == prefix]
            if above:
                places[max(above, key=len)] = 2
        return places

    def use(self, group: int, page: Prefix, places: dict[Prefix, int]) -> int:
        block = self.model.block
        uses = [0]
        for place, use in places.items():
            read = self.needed(group, len(place), len(place) // block)
            if place[: len(page)] == page and len(page) // block - 1 in read:
                uses.append(use)
        return max(uses)

    def _drop(self, group: int, victim: Prefix) -> None:
        self.num_evicted[group] += 1
        del self.entries[group][victim]
        is_sink = group in self.model.windows and len(victim) - self.model.block < self.model.windows[group][1]
        if group == self.model.full or is_sink:  # nothing from there on can be reached
            for entries in self.entries.values():
                for prefix in [prefix for prefix in entries if prefix[: len(victim)] == victim]:
                    del entries[prefix]

    # -- calls -------------------------------------------------------------------------------------------------------

    def start(self, text: Prefix, num_prompt: int, priority: PriorityFunction) -> int:
        """Create and resume; returns the reused tokens."""
        block, ssm = self.model.block, self.model.ssm
        self.text, self.priority = text, priority
        usable, adopted = self.match(text[: num_prompt - 1])
        self.path = [text[: (b + 1) * block] for b in range(adopted)]
        self.history = self.capacity = self.committed = usable * block
        self.clock += 1
        self.activity = self.clock
        for group in self.model.windows:
            self.pins[group] = self.needed(group, self.history, adopted)
        if ssm >= 0:
            source = set(self.path[usable - 1 : usable])
            if not self.make_room(ssm, 1, source):
                self.entries[ssm].pop(source.pop())  # it becomes the live state
            self.own[ssm] = {0}
        self._raise(0)
        return self.committed

    def _raise(self, first: int) -> None:
        for group, entries in self.entries.items():
            for b, prefix in enumerate(self.path):
                if b >= first and prefix in entries:
                    entries[prefix].priority = max(entries[prefix].priority, self.priority(group, b))

    def extend(self, capacity: int, history: int) -> bool:
        """`resize`."""
        num_blocks = -(-capacity // self.model.block)
        wanted = {} if self.model.full < 0 else {self.model.full: set(range(len(self.path), num_blocks))}
        for group in self.model.windows:
            wanted[group] = self.needed(group, history, max(num_blocks, len(self.path)))
        for group in wanted:
            change = 0
            for member in set(self.members(group)) & wanted.keys():
                held = self.own[member] | self.pins.get(member, set())
                change += len(wanted[member] - held) - len(held - wanted[member])
            if change > self.obtainable(group):
                return False
        for group, needed in wanted.items():
            self._keep(group, needed)
        for group, needed in wanted.items():
            missing = needed - self.own[group] - self.pins.get(group, set())
            assert self.make_room(group, len(missing))
            self.own[group] |= missing
        self.capacity, self.history = capacity, history
        return True

    def _keep(self, group: int, needed: set[int]) -> None:
        self.own[group] &= needed
        if group in self.pins:
            self.pins[group] &= needed

    def commit(self, end: int) -> None:
        block, first = self.model.block, len(self.path)
        self.path += [self.text[: (b + 1) * block] for b in range(first, end // block)]
        for group in self.entries:
            for b in sorted(self.own[group]) if group != self.model.ssm else ():
                if b < len(self.path):
                    self.own[group].discard(b)
                    entry = Entry(self.priority(group, b), (self.activity, -b))
                    self.entries[group].setdefault(self.path[b], entry)
                    if group in self.pins:
                        self.pins[group].add(b)
        self._raise(first)
        if self.model.ssm >= 0 and end % self.model.interval == 0 and end > self.committed:
            self._take_snapshot(self.path[end // block - 1])
        self.committed = end
        if end > self.history:
            self.history = end
            for group in self.model.windows:
                self._keep(group, self.needed(group, end, max(-(-self.capacity // block), len(self.path))))

    def _take_snapshot(self, prefix: Prefix) -> None:
        ssm = self.model.ssm
        if prefix not in self.entries[ssm] and self.make_room(ssm, 1, set(self.path)):
            self.clock += 1
            last = len(prefix) // self.model.block - 1
            self.entries[ssm][prefix] = Entry(self.priority(ssm, last), (self.clock, -last))

    def close(self) -> None:
        """Touch the path and let go."""
        block = self.model.block
        self.clock += 1
        ends = [len(self.path)]
        if self.model.ssm >= 0:
            ends += [b + 1 for b, prefix in enumerate(self.path) if prefix in self.entries[self.model.ssm]]
        else:
            num_children = Counter(prefix[:-block] for prefix in self.known())
            ends += [b + 1 for b, prefix in enumerate(self.path) if num_children[prefix] > 1]
        for group, entries in self.entries.items():
            touched = set(range(len(self.path)))
            if group in self.model.windows:
                touched = {b for end in ends for b in self.needed(group, end * block, end)}
            for b in touched:
                if self.path[b] in entries:
                    entries[self.path[b]].time = (self.clock, -b)
            self.own[group] = set()
        self.pins = {group: set() for group in self.model.windows}
        self.path = []
