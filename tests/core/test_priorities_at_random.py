"""Priorities of any kind on several tiers, in any order of calls: every invariant holds and every byte is right."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from payload import Request, Runner, Shape, run_at_random

from ssmcache import ReuseScope

SCOPE = ReuseScope()
SHAPES = {
    "full, three tiers": Shape(slots=(6, 5, 7)),
    "hybrid, three tiers": Shape(ssm=True, slots=(6, 4, 6)),
    "a window, two tiers": Shape(full=False, windows=((4, 2),), slots=(9, 8)),
    "a window, three tiers": Shape(full=False, windows=((4, 3),), slots=(8, 4, 4)),
    "a window and SSM, two tiers": Shape(full=False, ssm=True, windows=((5, 3),), slots=(8, 5)),
    "full, a window and SSM, three tiers": Shape(ssm=True, windows=((5, 3),), slots=(8, 4, 5)),
}


class SomePriorities(Runner):
    """Most sequences have a callback."""

    random: Random

    def create(self, tokens: list[int], scope: ReuseScope = SCOPE, **options: object) -> Request:
        table = [[self.random.choice((0, 10, 35, 35, 80, 100)) for _ in range(80)] for _ in self.manager.groups]
        if self.random.random() < 0.7:
            options["priority"] = lambda group, block: table[group][block]
        return super().create(tokens, scope, **options)


def run(shape: Shape, seed: int, path: Path) -> SomePriorities:
    random = Random(seed)
    block = random.choice((1, 2, 3, 4))
    varied = Shape(
        block,
        shape.full,
        shape.windows,
        shape.ssm,
        interval=block * random.choice((1, 2)),
        slots=tuple(count + random.randint(0, 5) for count in shape.slots),
        max_util=random.choice((0.5, 0.97, 1.0)),
    )
    runner = SomePriorities(varied, str(path))
    runner.random = Random(seed + 1)
    run_at_random(runner, random, 150, longest=random.choice((8, 16, 24)))
    return runner


@pytest.mark.parametrize("name", SHAPES)
def test_no_priority_breaks_an_invariant_or_a_byte(name: str, tmp_path: Path) -> None:
    runners = [run(SHAPES[name], seed, tmp_path) for seed in range(10)]
    assert sum(runner.num_checked for runner in runners) > 500
    assert sum(runner.num_refused for runner in runners) > 0


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("a window, two tiers", 31),
        ("a window, three tiers", 53),
        ("a window and SSM, two tiers", 49),
        ("full, a window and SSM, three tiers", 42),
    ],
)
def test_a_sink_page_dropped_from_a_tier_may_take_pages_of_the_tiers_above_along(
    name: str, seed: int, tmp_path: Path
) -> None:
    """Those were to move down for the room that they have left already."""
    run(SHAPES[name], seed, tmp_path)
