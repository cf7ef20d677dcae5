"""Up to four open sequences in two and three tiers, their calls in any order: `tier_pairs.py` compares the manager with
the oracle of `reference_tiers.py` after each.

`REFERENCE_CASES=20` in the environment makes 20 times as many random cases.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tier_pairs import TierPair

from ssmcache import KVCacheStatus
from tests.core.reference_tiers import TierSetup
from tests.core.test_concurrent_sequences import ADMISSIONS, SCOPES, Text, cases, points_to_reserve

MAX_OPEN = 4
CALLS = {
    "serve": 5, "create": 4, "resume": 5, "resize": 4, "reserve": 2, "commit": 5, "suspend": 3, "prefetch": 2,
    "decode": 2, "stop": 0.1, "close": 3,
}  # fmt: skip


class Step(NamedTuple):
    """A call, of which sequence that it fits, and a number to choose its arguments by."""

    call: str
    who: int
    amount: int


class Case(NamedTuple):
    """A cache, what it is asked for, and a series of calls."""

    setup: TierSetup
    known: list[Text]
    staging: int
    steps: list[Step]


def make_case(kind: str, num_tiers: int, seed: int, num_steps: int) -> Case:
    """From a seed: that fills caches better than many small draws. `num_steps` is what can shrink."""
    random = Random(seed)
    block, interval = random.randint(1, 3), random.randint(1, 3)
    pages = () if kind == "ssm" else tuple(random.randint(1 + 2 * (not tier), 7) for tier in range(num_tiers))
    states = () if kind == "attention" else tuple(random.randint(1, 5) for _ in range(num_tiers))
    setup = TierSetup(block, pages, states, block * interval, random.choice((0.5, 0.8, 1.0)))
    known: list[Text] = [()]
    for _ in range(random.randint(3, 8)):
        start = random.choice(known)[: random.randint(0, 4 * block)]
        known.append(start + (random.randint(0, 2),) * random.randint(1, 3 * block))
    calls, weights = list(CALLS), list(CALLS.values())
    steps = [
        Step(random.choices(calls, weights)[0], random.randrange(MAX_OPEN), random.randrange(256))
        for _ in range(num_steps)
    ]
    staging = random.choice((1, 1, 2, 100))
    return Case(replace(setup, admission=random.choice(ADMISSIONS)), known[1:], staging, steps)


class Driver:
    """Makes steps into calls that are allowed: a step that fits no open sequence is skipped."""

    def __init__(self, case: Case, ready: bool) -> None:
        self.case = case
        self.pair = TierPair(case.setup, ready, case.staging)
        self.texts: list[Text] = []  # of the open sequences

    def run(self) -> None:
        for step in self.case.steps:
            self.make(step)
        while self.pair.sequences:
            self.pair.close(0)
        self.pair.manager.clear_reusable_blocks()
        self.pair.manager.check()
        assert not any(pool.used for pools in self.pair.manager.pools for pool in pools)

    def make(self, step: Step) -> None:
        if step.call in ("create", "serve"):
            if len(self.texts) < MAX_OPEN:
                text = self.case.known[step.amount % len(self.case.known)]
                # prompts of all of the text, or of a part of it: the rest is decoded
                num_prompt = len(text) if step.amount % 3 else 1 + step.amount % len(text)
                self.pair.create(text, num_prompt, SCOPES[step.who])
                self.texts.append(text)
                if step.call == "serve":
                    self.serve(step.amount)
            return
        wanted = {
            "resume": [KVCacheStatus.SUSPENDED],
            "prefetch": [KVCacheStatus.SUSPENDED],
            "close": list(KVCacheStatus),
        }
        statuses = wanted.get(step.call, [KVCacheStatus.ACTIVE])
        fitting = [index for index, (kv, _, _) in enumerate(self.pair.sequences) if kv.status in statuses]
        if fitting:
            getattr(self, step.call)(fitting[step.who % len(fitting)], step.amount)

    def serve(self, amount: int) -> None:
        """The last sequence, from its first resume to its end, as far as there is room: that fills the tiers."""
        index = len(self.texts) - 1
        if self.pair.resume(index) and self.pair.resize(index, len(self.texts[index]) + 1):
            self.reserve(index, 1)
            self.commit(index, 0)
            self.close(index, amount)

    def resume(self, index: int, amount: int) -> None:
        self.pair.resume(index)

    def prefetch(self, index: int, amount: int) -> None:
        self.pair.prefetch(index, amount % self.case.setup.num_tiers)

    def resize(self, index: int, amount: int) -> None:
        kv = self.pair.sequences[index][0]
        room = max(0, len(self.texts[index]) + 2 - kv.history_length)
        capacity = kv.history_length + (room if amount % 4 else amount % (room + 1))
        ahead = amount % 5 == 0  # computed ahead of what is committed
        history = kv.history_length + amount % (capacity - kv.history_length + 1) if ahead else None
        self.pair.resize(index, capacity, history)

    def reserve(self, index: int, amount: int) -> None:
        self.pair.reserve(index, points_to_reserve(self.pair.sequences[index][0], amount))

    def commit(self, index: int, amount: int) -> None:
        kv, twin, _ = self.pair.sequences[index]
        most = min(kv.capacity, len(self.texts[index])) - kv.num_committed_tokens
        if most < 0 or twin.stopped:
            return
        point = kv.next_snapshot_point()
        to_point = most if point is None else point - kv.num_committed_tokens
        self.pair.commit(index, (most, min(most, to_point), amount % (most + 1))[amount % 3])

    def decode(self, index: int, amount: int) -> None:
        """All that is left, one boundary after the other."""
        kv, twin, _ = self.pair.sequences[index]
        if not twin.stopped and self.pair.resize(index, max(kv.capacity, len(self.texts[index]))):
            while kv.num_committed_tokens < len(self.texts[index]):
                point = min(kv.next_snapshot_point() or len(self.texts[index]), len(self.texts[index]))
                self.pair.commit(index, point - kv.num_committed_tokens)

    def suspend(self, index: int, amount: int) -> None:
        self.pair.suspend(index)

    def stop(self, index: int, amount: int) -> None:
        kv, twin, _ = self.pair.sequences[index]
        kv.stop_committing()
        twin.stopped = True
        self.pair.compare()

    def close(self, index: int, amount: int) -> None:
        del self.texts[index]
        self.pair.close(index)


@pytest.mark.parametrize("kind", ["attention", "hybrid", "ssm"])
@pytest.mark.parametrize("num_tiers", [2, 3])
@pytest.mark.parametrize("ready", [True, False], ids=["ready keys", "tokens"])
def test_any_order_of_calls_agrees_with_the_oracle_and_refusals_change_nothing(
    kind: str, num_tiers: int, ready: bool
) -> None:
    @cases(20)
    @given(seed=st.integers(0, 2**32 - 1), tens_of_steps=st.integers(1, 25))
    def run(seed: int, tens_of_steps: int) -> None:
        Driver(make_case(kind, num_tiers, seed, 10 * tens_of_steps), ready).run()

    run()


# by kind: what must not be left to luck, beside what all kinds reach
ALL_REACH = {
    "dropped above the last tier", "moved down", "moved up", "hit below", "resume slots", "resume utilization",
    "prefetch slots",
}  # fmt: skip
REACH = {
    "attention": {"dropped holds", "resize slots", "moved down twice", "pages_evicted"},
    "hybrid": {
        "dropped holds", "resize slots", "taken over", "snapshots_evicted", "snapshots_skipped_no_room", "superseded",
        "snapshots_skipped_not_admitted",
    },
    "ssm": {"taken over", "snapshots_evicted", "snapshots_skipped_no_room", "moved down twice", "superseded"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["attention", "hybrid", "ssm"])
def test_the_random_calls_reach_what_matters(kind: str) -> None:
    total: Counter[str] = Counter()
    for seed in range(40):
        driver = Driver(make_case(kind, 2 + seed % 2, seed, num_steps=200), ready=True)
        driver.run()
        reference = driver.pair.reference
        total.update(reference.reached)
        total.update(reference.counts)
        for (call, reason, _), count in driver.pair.refusals.items():
            total[f"{call} {reason}"] += count
        for (_, source, target), count in reference.moves.items():
            total["moved down"] += count * (target > source)
            total["moved down twice"] += count * (target > source > 0)
            total["moved up"] += count * (target < source)
        total["hit below"] += sum(reference.counts[f"usable_tokens_on_{tier}"] for tier in (1, 2))
    assert not [name for name in ALL_REACH | REACH[kind] if not total[name]]
