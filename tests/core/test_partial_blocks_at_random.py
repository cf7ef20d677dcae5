"""Parts of blocks are reused while pages come and go, in any order of calls, and every byte is checked."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from payload import Request, Runner, Shape, run_at_random


class Counting(Runner):
    """Counts the first resumes that started inside a block."""

    seen: Counter[str]

    def resume(self, request: Request) -> bool:
        is_first = not request.kv.locked
        granted = super().resume(request)
        if granted and is_first:
            self.seen["in part"] += request.kv.num_committed_tokens % self.shape.block > 0
        return granted


@pytest.mark.parametrize("slots", [(7,), (6, 6), (6, 4, 5)], ids=["one tier", "two tiers", "three tiers"])
@pytest.mark.parametrize("windows", [(), ((5, 2),)], ids=["full attention", "with a window"])
def test_reused_parts_of_blocks_hold_what_was_computed_whatever_goes_in_between(
    slots: tuple[int, ...], windows: tuple[tuple[int, int], ...], tmp_path: object
) -> None:
    seen: Counter[str] = Counter()
    for seed in range(15):
        random = Random(seed)
        shape = Shape(block=random.randint(2, 6), slots=slots, windows=windows, max_util=random.choice((0.5, 1.0)))
        runner = Counting(shape, str(tmp_path))
        runner.seen = seen
        run_at_random(runner, random, 120, longest=random.choice((8, 16)))
    assert seen["in part"] > 50
