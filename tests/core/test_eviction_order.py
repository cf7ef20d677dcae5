"""Who goes first, on random requests one after the other, agrees with the oracle of `eviction_reference.py`: windows,
full attention and snapshots, with and without priorities.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from eviction_reference import EvictionReference, Model, Prefix, PriorityFunction
from payload import Shape, make_config
from stored import Stored

from ssmcache import KVCache, KVCacheManager, ReuseScope, SimulatedMemory

SCOPE = ReuseScope()
SHAPES = {
    "full": Shape(),
    "a window": Shape(full=False, windows=((5, 2),)),
    "full and two windows": Shape(windows=((4, 1), (9, 0))),
    "full and SSM": Shape(ssm=True),
    "full, a window and SSM": Shape(windows=((5, 3),), ssm=True),
    "a window and SSM": Shape(full=False, windows=((5, 1),), ssm=True),
    "full and a window, one pool": Shape(windows=((4, 1),), shared=True),
    "two windows, one pool": Shape(full=False, windows=((4, 1), (7, 0)), shared=True),
    "full and SSM, one pool": Shape(ssm=True, shared=True),
    "all, one pool": Shape(windows=((5, 3), (3, 0)), ssm=True, shared=True),
}


class Pair:
    """The manager and its oracle, given the same calls; after each of them they have the same things stored."""

    def __init__(self, shape: Shape, slots: list[int]) -> None:
        self.manager = KVCacheManager(make_config(shape, "."), SimulatedMemory())
        for pools, count in zip(self.manager.pools, slots, strict=True):
            # so that each layer group is short at its own time, unless they share a pool
            pools[0].capacity = sum(slots) if shape.shared else count
        first = int(shape.full)
        self.reference = EvictionReference(
            Model(
                shape.block,
                dict(enumerate(slots)),
                full=0 if shape.full else -1,
                windows=dict(enumerate(shape.windows, start=first)),
                ssm=len(slots) - 1 if shape.ssm else -1,
                interval=shape.interval,
                shared=shape.shared,
            )
        )
        self.seen: Counter[str] = Counter()

    def serve(self, text: Prefix, num_prompt: int, priority: PriorityFunction | None, random: Random) -> None:
        kv = self.manager.create_kv_cache(text[: num_prompt - 1], priority=priority)
        reused = self.reference.start(text, num_prompt, priority or (lambda group, block: 35))
        assert kv.resume()
        assert kv.num_committed_tokens == reused
        self.seen["reused"] += reused > 0
        self.compare()
        while kv.num_committed_tokens < len(text):
            if not self._step(kv, text, random):
                break
        kv.close()
        self.reference.close()
        self.compare()

    def _step(self, kv: KVCache, text: Prefix, random: Random) -> bool:
        end = random.randint(kv.num_committed_tokens + 1, len(text))
        capacity = max(kv.capacity, random.randint(end, len(text) + 2))
        granted = kv.resize(capacity, kv.history_length)
        assert granted == self.reference.extend(capacity, kv.history_length)
        self.seen["refused"] += not granted
        self.compare()
        if granted:
            kv.commit(text[kv.num_committed_tokens : end])
            self.reference.commit(end)
            self.compare()
        return granted

    def compare(self) -> None:
        self.manager.check()
        stored = Stored(self.manager, SCOPE)
        model, entries = self.reference.model, self.reference.entries
        for group, expected in entries.items():
            if group == model.full:
                found = {tokens for tokens, block in stored.full.items() if block.has_page}
            elif group == model.ssm:
                found = {tokens for tokens, block in stored.full.items() if block.has_snapshot}
            else:
                found = {tokens for tokens, block in stored.full.items() if group in block.windows}
            assert found == set(expected), f"layer group {group}"
            assert self.manager.pools[group][0].free == self.reference.free(group)


def priorities(random: Random) -> PriorityFunction:
    """Any for any, but the same when asked again."""
    table = [[random.choice((0, 10, 35, 35, 35, 80, 100)) for _ in range(60)] for _ in range(4)]
    if random.random() < 0.5:  # long stretches
        table = [[row[block // 4] for block in range(60)] for row in table]
    return lambda group, block: table[group][block]


def serve_at_random(shape: Shape, seed: int, with_priorities: bool) -> Pair:
    random = Random(seed)
    block = random.choice((1, 2, 3))
    settings = {name: getattr(shape, name) for name in ("full", "windows", "ssm", "shared")}
    interval = block * random.choice((1, 2))
    varied = Shape(block=block, interval=interval, slots=(40,), partly=False, **settings)
    num_groups = varied.full + len(varied.windows) + varied.ssm
    slots = [random.randint(12, 30) for _ in range(num_groups)]
    if varied.ssm:
        slots[-1] = random.randint(2, 9)
    pair = Pair(varied, slots)
    known: list[Prefix] = [()]
    for _ in range(25):
        start = random.choice(known)
        text = start[: random.randint(0, len(start))] + tuple(random.choices(range(2), k=random.randint(2, 10 * block)))
        text = text[: 12 * block]
        known.append(text)
        priority = priorities(random) if with_priorities and random.random() < 0.8 else None
        pair.serve(text, random.randint(1, len(text)), priority, random)
    return pair


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("with_priorities", [False, True], ids=["by age alone", "by priority and age"])
def test_the_lowest_priority_goes_first_then_the_oldest(name: str, with_priorities: bool) -> None:
    seen: Counter[str] = Counter()
    num_evicted: Counter[int] = Counter()
    for seed in range(14):
        pair = serve_at_random(SHAPES[name], seed, with_priorities)
        seen += pair.seen
        num_evicted += Counter(pair.reference.num_evicted)
    assert seen["reused"]
    assert all(num_evicted[group] > 20 for group in pair.reference.entries)
