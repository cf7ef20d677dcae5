"""Up to four open sequences, their calls in any order, on the manager and on the oracle of `reference.py`: after every
call all that can be seen from outside is equal, a refused call has changed nothing, and every shared slot holds what
was computed for it. `Pair` makes the calls; `test_against_reference.py` uses it too.

`REFERENCE_CASES=20` in the environment makes 20 times as many random cases.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from managers import make_manager

from ssmcache import (
    BlockKeys,
    KVCache,
    KVCacheManager,
    KVCacheStatus,
    ReuseScope,
    SimulatedMemory,
)
from ssmcache.memory.base import SlotMoves
from tests.core.reference import Prefix, ReferenceCache, ReferenceSequence, Setup

Text = tuple[int, ...]
Tokens = BlockKeys | np.ndarray
SCOPE = ReuseScope()
MAX_OPEN = 4
ADMISSIONS = ("every", "every", "last")
SCOPES = (ReuseScope(), ReuseScope(), ReuseScope(), ReuseScope(lora_id=0))
CALLS = {
    "create": 4, "resume": 4, "resize": 4, "reserve": 3, "commit": 5, "decode": 3, "suspend": 1, "stop": 0.2,
    "close": 3,
}  # fmt: skip


def cases(number: int) -> settings:
    """So many random cases, times REFERENCE_CASES."""
    factor = int(os.environ.get("REFERENCE_CASES", "1"))
    return settings(
        max_examples=number * factor,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class RecordingMemory(SimulatedMemory):
    """Knows what was computed last into each slot of each layer group, and copies that."""

    def __init__(self) -> None:
        super().__init__()
        self.contents: dict[tuple[int, int], Prefix | None] = {}

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        for source, destination in zip(moves.sources, moves.destinations, strict=True):
            self.contents[moves.pool, destination] = self.contents[moves.pool, source]
        super().copy(moves, stream)


def manager_of(setup: Setup, memory: SimulatedMemory) -> KVCacheManager:
    """The real thing, with exactly these numbers of slots."""
    return make_manager(
        setup.pages,
        setup.states,
        block=setup.block,
        interval=setup.interval or setup.block,
        memory=memory,
        max_util_for_resume=setup.max_util,
        enable_partial_reuse=False,
        admission=setup.admission,
    )


def look_at(sequence: KVCache) -> tuple[object, ...]:
    lengths = sequence.num_committed_tokens, sequence.history_length, sequence.capacity
    return sequence.status.value, *lengths, sequence.reuse_match, sequence.num_attention_tokens


class Pair:
    """The manager and its oracle, given the same calls. `ready`: prompts are `BlockKeys`, else integer tokens."""

    def __init__(self, setup: Setup, ready: bool) -> None:
        self.setup, self.ready = setup, ready
        memory = RecordingMemory()
        self.contents = memory.contents
        self.manager, self.reference = manager_of(setup, memory), ReferenceCache(setup)
        self.ids: dict[Prefix, int] = {}
        self.probes: dict[Prefix, tuple[Tokens, ReuseScope]] = {}
        self.sequences: list[tuple[KVCache, ReferenceSequence, Tokens]] = []
        self.reserved_slots: dict[ReferenceSequence, dict[int, int]] = {}
        self.seen: dict[str, object] = {}
        self.num_refused = 0
        self.compare()

    def prefixes(self, text: Text, scope: ReuseScope) -> list[Prefix]:
        prefixes: list[Prefix] = [(scope,)]
        for end in range(self.setup.block, len(text) + 1, self.setup.block):
            prefixes.append((*prefixes[-1], text[end - self.setup.block : end]))
        return prefixes[1:]

    def tokens(self, text: Text, blocks: list[Prefix]) -> Tokens:
        """What the manager is given for a text. Its blocks are looked for in every comparison from now on."""
        keys = [self.ids.setdefault(prefix, 7 * len(self.ids) + 3) for prefix in blocks]
        tokens = BlockKeys(keys, self.setup.block, len(text)) if self.ready else np.array(text, dtype=np.int64)
        for depth, prefix in enumerate(blocks, start=1):
            if prefix not in self.probes:
                self.probes[prefix] = tokens[: depth * self.setup.block], prefix[0]
        return tokens

    def create(self, text: Text, num_prompt: int, scope: ReuseScope = SCOPE) -> int:
        """A sequence of the first tokens of a text, which it may go on to decode; its place in `sequences`."""
        blocks = self.prefixes(text, scope)
        tokens = self.tokens(text, blocks)
        sequence = self.manager.create_kv_cache(tokens[: num_prompt - 1], scope)
        # the block that the last token of the prompt completes is known by its ready key, though not by its tokens
        known = (num_prompt if self.ready else num_prompt - 1) // self.setup.block
        self.sequences.append((sequence, self.reference.create(blocks, known, num_prompt - 1), tokens))
        self.compare()
        return len(self.sequences) - 1

    def resume(self, index: int) -> bool:
        sequence, twin, _ = self.sequences[index]
        is_first = twin.status == "created"
        granted = self.agreed(sequence, sequence.resume(), self.reference.resume(twin))
        if granted and is_first and self.setup.states and twin.committed:
            live_slot = self.manager.state_group, sequence.ssm_slot(self.manager.state_group)
            assert self.contents[live_slot] == twin.blocks[twin.committed // self.setup.block - 1]
        return granted

    def resize(self, index: int, capacity: int, history: int | None = None) -> bool:
        sequence, twin, _ = self.sequences[index]
        reason = self.reference.resize(twin, capacity, twin.history if history is None else history)
        return self.agreed(sequence, sequence.resize(capacity, history), reason)

    def agreed(self, sequence: KVCache, granted: bool, reason: str) -> bool:
        assert granted == (not reason)
        assert (sequence.shortage.reason if sequence.shortage else "") == reason
        before = self.seen
        self.num_refused += not granted
        self.compare()
        assert granted or self.seen == before, "a refused call changed something"
        return granted

    def reserve(self, index: int, points: list[int]) -> None:
        sequence, twin, _ = self.sequences[index]
        slots = sequence.reserve_snapshots(points)
        assert set(slots) == self.reference.reserve(twin, points)
        self.reserved_slots[twin] = slots
        self.compare()

    def commit(self, index: int, num_tokens: int) -> None:
        sequence, twin, tokens = self.sequences[index]
        self.compute(sequence, twin, twin.committed + num_tokens)
        sequence.commit(tokens[twin.committed : twin.committed + num_tokens])
        self.reference.commit(twin, num_tokens)
        self.compare()

    def compute(self, sequence: KVCache, twin: ReferenceSequence, end: int) -> None:
        """What a model runner does before it commits up to `end`: it writes what is the sequence's own."""
        block, page_group, state_group = self.setup.block, self.manager.page_group, self.manager.state_group
        if self.setup.pages:
            slots = sequence.page_indices(page_group).tolist()
            for depth in range(len(twin.path), end // block):
                self.contents[page_group, slots[depth]] = twin.blocks[depth]
        if self.setup.states:
            states = {point: self.reserved_slots[twin][point] for point in twin.reserved if point <= end}
            for point, slot in states.items():
                self.contents[state_group, slot] = twin.blocks[point // block - 1]
            is_ahead = twin.history > end or end % block or not end
            live_state = None if is_ahead else twin.blocks[end // block - 1]
            self.contents[state_group, sequence.ssm_slot(state_group)] = live_state

    def check_pages(self) -> None:
        """Whatever a sequence shares holds what was computed for it; what is its own is not shared: scribble there."""
        for sequence, twin, _ in self.sequences:
            if twin.status != "created":
                slots = sequence.page_indices(self.manager.page_group).tolist()
                assert len(slots) == -(-twin.capacity // self.setup.block)
                for depth, slot in enumerate(slots):
                    if depth < len(twin.path):
                        assert self.contents[self.manager.page_group, slot] == twin.path[depth]
                    else:
                        self.contents[self.manager.page_group, slot] = None

    def suspend(self, index: int) -> None:
        sequence, twin, _ = self.sequences[index]
        sequence.suspend()
        self.reference.suspend(twin)
        self.compare()

    def close(self, index: int) -> None:
        sequence, twin, _ = self.sequences.pop(index)
        sequence.close()
        self.reference.close(twin)
        self.compare()

    def compare(self) -> None:
        self.manager.check()
        self.seen = self.look()
        assert self.seen == self.reference.look()
        if self.setup.pages:
            self.check_pages()

    def look(self) -> dict[str, object]:
        """What can be seen of the manager: blocks and snapshots by probing for every block ever named."""
        blocks, snapshots, stats = set(), set(), self.manager.stats()
        for prefix, (tokens, scope) in self.probes.items():
            match = self.manager.probe_reuse(tokens, scope)
            length = (len(prefix) - 1) * self.setup.block
            if match.tree_tokens == length:
                blocks.add(prefix)
            if self.setup.states and match.usable_tokens == length:
                snapshots.add(prefix)
        return {
            "slots": [
                (group.kind, group.cached_slots, group.num_slots - group.used_slots)
                for group in self.manager.memory_usage().groups
            ],
            "blocks": blocks,
            "snapshots": snapshots,
            "counts": {name: getattr(stats, name) for name in self.reference.counts},
            "sequences": [look_at(sequence) for sequence, _, _ in self.sequences],
        }


class Step(NamedTuple):
    """A call, of which sequence that it fits, and a number to choose its arguments by."""

    call: str
    who: int
    amount: int


class Case(NamedTuple):
    """A cache, what it is asked for, and an endless series of calls, cut off."""

    setup: Setup
    known: list[Text]
    steps: list[Step]


def make_case(kind: str, seed: int, num_steps: int) -> Case:
    """From a seed: that fills caches better than many small draws. `num_steps` is what can shrink."""
    random = Random(seed)
    block, interval = random.randint(1, 4), random.randint(1, 3)
    pages = 0 if kind == "ssm" else random.randint(3, 14)
    states = 0 if kind == "attention" else random.randint(1, 6)
    setup = Setup(block, pages, states, block * interval, random.choice((0.4, 0.7, 0.97, 1.0)))
    known: list[Text] = [()]
    for _ in range(random.randint(3, 12)):
        start = random.choice(known)[: random.randint(0, 6 * block)]
        known.append(start + (random.randint(0, 2),) * random.randint(1, 5 * block))
    calls, weights = list(CALLS), list(CALLS.values())
    steps = [
        Step(random.choices(calls, weights)[0], random.randrange(MAX_OPEN), random.randrange(256))
        for _ in range(num_steps)
    ]
    return Case(replace(setup, admission=random.choice(ADMISSIONS)), known[1:], steps)


def points_to_reserve(sequence: KVCache, amount: int) -> list[int]:
    """All that are wanted, some of them, or boundaries that may not be wanted."""
    points = sequence.snapshot_points(sequence.capacity)
    if amount % 4 == 2 and sequence.manager.state_group >= 0:
        interval = sequence.manager.ssm_reuse_interval
        points = range(sequence.num_committed_tokens // interval * interval + interval, sequence.capacity + 1, interval)
    return list(points if amount % 2 else points[amount % 3 :: 2])


class Driver:
    """Makes steps into calls that are allowed: a step that fits no open sequence is skipped."""

    def __init__(self, setup: Setup, known: list[Text], ready: bool) -> None:
        self.pair = Pair(setup, ready)
        self.known = known
        self.texts: list[Text] = []  # of the open sequences

    def run(self, steps: list[Step]) -> None:
        for step in steps:
            self.make(step)
        while self.pair.sequences:
            self.pair.close(0)
        self.pair.manager.clear_reusable_blocks()
        self.pair.manager.check()

    def make(self, step: Step) -> None:
        if step.call == "create":
            if len(self.texts) < MAX_OPEN:
                self.create(step)
            return
        status = {"resume": [KVCacheStatus.SUSPENDED], "close": list(KVCacheStatus)}.get(step.call)
        fitting = [
            index
            for index, (sequence, _, _) in enumerate(self.pair.sequences)
            if sequence.status in (status or [KVCacheStatus.ACTIVE])
        ]
        if fitting:
            getattr(self, step.call)(fitting[step.who % len(fitting)], step.amount)

    def create(self, step: Step) -> None:
        text = self.known[step.amount % len(self.known)]
        # prompts of all of the text, or of a part of it: the rest is decoded
        num_prompt = len(text) if step.amount % 3 else 1 + step.amount % len(text)
        self.pair.create(text, num_prompt, SCOPES[step.who])
        self.texts.append(text)

    def resume(self, index: int, amount: int) -> None:
        self.pair.resume(index)

    def resize(self, index: int, amount: int) -> None:
        sequence = self.pair.sequences[index][0]
        room = max(0, len(self.texts[index]) + 2 - sequence.history_length)
        capacity = sequence.history_length + (room if amount % 4 else amount % (room + 1))
        history = None
        if amount % 5 == 0:  # computed ahead of what is committed
            history = sequence.history_length + amount % (capacity - sequence.history_length + 1)
        self.pair.resize(index, capacity, history)

    def reserve(self, index: int, amount: int) -> None:
        self.pair.reserve(index, points_to_reserve(self.pair.sequences[index][0], amount))

    def commit(self, index: int, amount: int) -> None:
        sequence, twin, _ = self.pair.sequences[index]
        most = min(sequence.capacity, len(self.texts[index])) - sequence.num_committed_tokens
        if most < 0 or twin.stopped:
            return
        point = sequence.next_snapshot_point()
        to_point = most if point is None else point - sequence.num_committed_tokens
        self.pair.commit(index, (most, min(most, to_point), amount % (most + 1))[amount % 3])

    def decode(self, index: int, amount: int) -> None:
        """All that is left, one boundary after the other."""
        sequence, twin, _ = self.pair.sequences[index]
        if not twin.stopped and self.pair.resize(index, max(sequence.capacity, len(self.texts[index]))):
            while sequence.num_committed_tokens < len(self.texts[index]):
                point = min(sequence.next_snapshot_point() or len(self.texts[index]), len(self.texts[index]))
                self.pair.commit(index, point - sequence.num_committed_tokens)

    def suspend(self, index: int, amount: int) -> None:
        self.pair.suspend(index)

    def stop(self, index: int, amount: int) -> None:
        sequence, twin, _ = self.pair.sequences[index]
        sequence.stop_committing()
        twin.stopped = True
        self.pair.compare()

    def close(self, index: int, amount: int) -> None:
        del self.texts[index]
        self.pair.close(index)


@pytest.mark.parametrize("kind", ["attention", "hybrid", "ssm"])
@pytest.mark.parametrize("ready", [True, False], ids=["ready keys", "tokens"])
def test_any_order_of_calls_agrees_with_the_oracle_and_refusals_change_nothing(kind: str, ready: bool) -> None:
    @cases(150)
    @given(seed=st.integers(0, 2**32 - 1), tens_of_steps=st.integers(1, 30))
    def run(seed: int, tens_of_steps: int) -> None:
        case = make_case(kind, seed, 10 * tens_of_steps)
        Driver(case.setup, case.known, ready).run(case.steps)

    run()


@pytest.mark.parametrize("kind", ["attention", "hybrid", "ssm"])
def test_the_random_calls_reach_what_matters(kind: str) -> None:
    """Refusals, evictions, dropped holds, snapshots taken over and skipped: nothing of it is left to luck."""
    total: Counter[str] = Counter()
    for seed in range(60):
        case = make_case(kind, seed, num_steps=200)
        driver = Driver(case.setup, case.known, ready=True)
        driver.run(case.steps)
        reference = driver.pair.reference
        total.update(reference.counts)
        total.update(refused=driver.pair.num_refused, dropped=reference.dropped_holds, over=reference.taken_over)
    without = {"attention": ("snapshots", "copied", "over"), "hybrid": (), "ssm": ("pages",)}[kind]
    assert not [name for name, count in total.items() if not count and not name.startswith(without)]


@pytest.mark.parametrize("kind", ["attention", "hybrid", "ssm"])
def test_eviction_queues_that_forget_dead_entries_at_once_decide_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small caches never have enough dead entries to be rid of, so the threshold goes."""
    monkeypatch.setattr("ssmcache.eviction._MIN_DEAD", 0)
    for seed in range(1000, 1060):
        case = make_case(kind, seed, num_steps=300)
        Driver(case.setup, case.known, ready=bool(seed % 2)).run(case.steps)


def test_a_match_that_only_its_holder_keeps_in_the_tree_is_still_there_at_its_first_resume() -> None:
    """Without pages and without a snapshot, the found block is in the tree for the sequence that found it alone."""
    pair = Pair(Setup(block=1, pages=0, states=1, interval=1), ready=True)
    pair.create((0, 0, 0), 3)
    assert pair.resume(0)
    assert pair.resize(0, 3)
    pair.commit(0, 1)
    pair.create((0, 0, 0), 3)
    pair.commit(0, 1)  # the tree changes, so that the second one looks again
    pair.close(0)
    assert pair.resume(0)
    assert pair.resize(0, 3)
    pair.commit(0, 3)
    pair.close(0)
