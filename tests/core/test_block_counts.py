"""Blocks of looked-up prompts, found in full, in part or not at all, and the pages that sequences took."""

from __future__ import annotations

from random import Random

import pytest
from payload import Runner, Shape

from ssmcache import KVCacheStatus


def counts(runner: Runner) -> tuple[int, int, int, int]:
    stats = runner.manager.stats()
    return stats.blocks_full, stats.blocks_partial, stats.blocks_missed, stats.blocks_allocated


def serve(runner: Runner, tokens: list[int]) -> None:
    request = runner.create(tokens)
    assert runner.resume(request)
    if request.computed < len(tokens):
        assert runner.compute(request, len(tokens), reserve=True)
    runner.close(request)


def test_blocks_found_in_full_in_part_and_missed() -> None:
    runner = Runner(Shape(block=4, slots=(20,)))
    serve(runner, [1] * 11)  # 10 tokens are asked for
    assert counts(runner) == (0, 0, 3, 3)
    serve(runner, [1] * 11)  # two blocks and a part of the third, which is copied
    assert counts(runner) == (2, 1, 3, 4)
    serve(runner, [1] * 6 + [2] * 7)  # a block, half of the next, and one that nobody knows
    assert counts(runner) == (3, 2, 4, 7)


def test_pages_of_windows_are_allocated_too() -> None:
    runner = Runner(Shape(block=2, windows=((4, 0),), slots=(20,)))
    serve(runner, [1] * 8)
    assert counts(runner)[3] == 8


@pytest.mark.parametrize("shape", [Shape(), Shape(windows=((3, 1),)), Shape(ssm=True), Shape(full=False, ssm=True)])
def test_the_blocks_of_all_prompts_are_found_or_missed(shape: Shape) -> None:
    random, expected = Random(3), [0, 0]
    runner = Runner(shape)
    for _ in range(60):
        tokens = [random.randrange(2) for _ in range(random.randint(2, 14))]
        request = runner.create(tokens)
        if not runner.resume(request):
            assert request.kv.status is KVCacheStatus.SUSPENDED
        else:
            usable = request.kv.reuse_match.usable_tokens
            expected[0] += usable // shape.block
            expected[1] += usable % shape.block > 0
            runner.compute(request, len(tokens), reserve=True)
        runner.close(request)
    full, partial, missed, allocated = counts(runner)
    assert [full, partial] == expected
    asked = runner.manager.stats().lookup_tokens
    assert asked <= (full + partial + missed) * shape.block < asked + 60 * shape.block
    assert (allocated > 0) == (shape.full or bool(shape.windows))
