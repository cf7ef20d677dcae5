"""The match equals a search through every length for the longest at which everything needed exists: random trees that
several sequences grow under pressure, of all kinds of layers together, on one and on two tiers.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from payload import Request, Runner, Shape, run_at_random
from stored import Stored

from ssmcache import ReuseScope

SHAPES = {
    "full": Shape(slots=(10,)),
    "full, two tiers": Shape(slots=(8, 8)),
    "full and SSM": Shape(ssm=True, slots=(10,)),
    "full and SSM, two tiers": Shape(ssm=True, slots=(7, 6)),
    "SSM": Shape(ssm=True, full=False, slots=(6,)),
    "full and a window": Shape(windows=((4, 2),), slots=(12,)),
    "all in one pool": Shape(windows=((4, 2),), ssm=True, slots=(12,), shared=True),
    "full and two windows, two tiers": Shape(windows=((4, 2), (7, 0)), slots=(10, 8)),
    "three windows": Shape(full=False, windows=((3, 1), (6, 0), (9, 4)), slots=(13,)),
    "a window, two tiers": Shape(full=False, windows=((5, 3),), slots=(9, 8)),
    "a window of one token": Shape(windows=((1, 0), (2, 1)), slots=(12,)),
    "full, two windows and SSM": Shape(ssm=True, windows=((5, 1), (3, 0)), slots=(13,)),
    "full, a window and SSM, two tiers": Shape(ssm=True, windows=((5, 3),), slots=(9, 8)),
    "two windows and SSM": Shape(full=False, ssm=True, windows=((4, 1), (6, 3)), slots=(12,)),
    "a window and SSM, two tiers": Shape(full=False, ssm=True, windows=((6, 1),), slots=(9, 7)),
}  # fmt: skip
NUM_CASES = 12
SCOPE = ReuseScope()


class Searching(Runner):
    """Searches for every match that it gets, and for some that it only asks for."""

    def __init__(self, shape: Shape, random: Random) -> None:
        super().__init__(shape)
        self.random = random
        self.seen: Counter[str] = Counter()

    def create(self, tokens: list[int], scope: ReuseScope = SCOPE, **options: object) -> Request:
        stored = Stored(self.manager, scope)
        for _ in range(3):
            prompt = tuple(tokens[: self.random.randint(1, len(tokens))]) + tuple(self.random.choices(range(3), k=5))
            match = stored.match(prompt)
            assert self.manager.probe_reuse(prompt, scope) == match, f"{prompt} in {sorted(stored.full)}"
            self._note(match)
        match = stored.match(tuple(tokens[:-1]))
        request = super().create(tokens, scope, **options)
        assert request.kv.reuse_match == match
        self._check_adoption(request, stored)
        return request

    def resume(self, request: Request) -> bool:
        is_first = not request.kv.locked
        stored = Stored(self.manager, request.scope)
        granted = super().resume(request)
        if granted and is_first:
            match = stored.match(tuple(request.tokens[:-1]))
            if request.kv.reuse_match != match:  # no room for the copy of a block that matches in part: done without
                match = stored.match(tuple(request.tokens[:-1]), partly=False)
            assert request.kv.reuse_match == match
            self._check_adoption(request, stored)
        return granted

    def compute(self, request: Request, end: int, reserve: bool) -> bool:
        """Now and then history runs ahead of what is committed, so that pages go stale before the tree has them."""
        kv = request.kv
        if self.random.random() < 0.6 or not kv.resize(max(end, kv.capacity), kv.history_length):
            return super().compute(request, end, reserve)
        self.write_pages(request, max(request.computed, kv.num_attention_tokens), end)
        if self.shape.ssm:
            self.write_state(request, kv.ssm_slot(self.manager.state_group), end)
        assert kv.resize(kv.capacity, end)
        kv.commit(request.tokens[request.computed : end])
        request.computed = end
        self.check_pages(request, end)
        return True

    def _check_adoption(self, request: Request, stored: Stored) -> None:
        usable = request.kv.reuse_match.usable_tokens
        if usable % self.shape.block == 0:
            num_blocks = stored.adopted_blocks(tuple(request.tokens[:-1]), usable)
            assert request.kv.num_attention_tokens == num_blocks * self.shape.block
            self.seen["adopted"] += num_blocks * self.shape.block > usable
        else:
            assert request.kv.num_attention_tokens == usable

    def _note(self, match: tuple[int, int, int]) -> None:
        tree, attention, usable = match
        self.seen["usable"] += usable > 0
        self.seen["in part"] += usable % self.shape.block > 0
        self.seen["cut by windows"] += attention < tree
        self.seen["cut by states"] += usable < attention
        self.seen["cut to less, not to nothing"] += 0 < usable < tree


def search(shape: Shape, seed: int) -> Searching:
    random = Random(seed)
    block = random.choice((1, 2, 3, 4))
    settings = {name: getattr(shape, name) for name in ("full", "windows", "ssm")}
    varied = Shape(
        block=block,
        interval=block * random.choice((1, 2)),
        slots=tuple(count + random.randint(0, 5) for count in shape.slots),
        partly=random.choice((None, False)),
        max_util=random.choice((0.5, 0.97, 1.0)),
        **settings,
    )
    runner = Searching(varied, random)
    run_at_random(runner, random, 150, longest=random.choice((8, 16, 24)))
    return runner


@pytest.mark.parametrize("name", SHAPES)
def test_a_match_is_the_longest_length_at_which_everything_needed_exists(name: str) -> None:
    shape = SHAPES[name]
    seen: Counter[str] = Counter()
    for seed in range(NUM_CASES):
        seen += search(shape, seed).seen
    assert seen["usable"]
    assert bool(seen["in part"]) == (not shape.ssm)
    assert bool(seen["cut by states"]) == shape.ssm
    assert bool(seen["cut by windows"]) == (len(shape.windows) > 0)
    assert bool(seen["cut to less, not to nothing"]) == (shape.ssm or len(shape.windows) > 0)
    assert bool(seen["adopted"]) == shape.ssm


def test_a_commit_takes_up_the_right_page_of_a_known_block_while_it_adds_others() -> None:
    """Adding pages joins segments, after which a known page is in another place of its segment."""
    search(SHAPES["a window and SSM, two tiers"], 180)
