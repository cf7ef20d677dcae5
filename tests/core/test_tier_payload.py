"""Real bytes in one to three tiers, under pressure, calls in any order: nothing that is reused is ever wrong.

`payload.py` writes every token's bytes and checks all that a kernel would read after each call. That the check can fail
is shown first: a memory that forgets a single copy makes it fail.

`REFERENCE_CASES=20` in the environment runs 20 times as many seeds.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from payload import Runner, Shape, run_at_random

from ssmcache import DiskCacheTierConfig, HostMemory, sizing
from ssmcache.memory.base import SlotMoves

FACTOR = int(os.environ.get("REFERENCE_CASES", "1"))
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "hybrid": {"ssm": True},
    "ssm": {"full": False, "ssm": True},
    "windows": {"windows": ((4, 2), (7, 0))},
    "windows alone": {"full": False, "windows": ((4, 2),)},
    "windows and ssm": {"windows": ((5, 3),), "ssm": True},
    "full and window, one pool": {"windows": ((5, 3),), "shared": True},
    "hybrid, one pool": {"ssm": True, "shared": True},
    "all, one pool": {"windows": ((4, 2), (7, 0)), "ssm": True, "shared": True},
}
TIERS = {"gpu": (12,), "gpu and host": (8, 7), "three tiers": (7, 4, 6)}


def draw_shape(random: Random, kind: str, slots: tuple[int, ...]) -> Shape:
    settings = dict(KINDS[kind])
    block = random.choice((1, 2, 3, 4))
    if not settings.get("ssm"):
        settings["partly"] = random.random() < 0.6
    if kind == "ssm":  # a state for each sequence, not for each block
        slots = tuple(count // 3 for count in slots)
    return Shape(
        block=block,
        interval=block * random.choice((1, 2)),
        slots=tuple(count + random.randint(0, 1 if kind == "ssm" else 4) for count in slots),
        max_util=random.choice((0.5, 0.97, 1.0)),
        **settings,
    )


def run(kind: str, slots: tuple[int, ...], path: Path, seed: int, num_steps: int = 120) -> Runner:
    random = Random(seed)
    runner = Runner(draw_shape(random, kind, slots), str(path))
    run_at_random(runner, random, num_steps, longest=random.choice((8, 16, 24)))
    return runner


class ForgetfulMemory(HostMemory):
    """Leaves out the n-th slot of all that it is asked to copy."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.left = index

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        count = len(moves.sources)
        if 0 <= self.left < count:
            kept = [place for place in range(count) if place != self.left]
            sources, destinations = ([slots[place] for place in kept] for slots in (moves.sources, moves.destinations))
            moves = SlotMoves(moves.pool, moves.source_tier, sources, moves.destination_tier, destinations)
        self.left -= count
        super().copy(moves, stream)


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_notices_a_single_copy_that_was_not_made(kind: str, tmp_path: Path) -> None:
    """Not every copy is read again before it goes, but some of any ten are."""
    num_noticed = 0
    for index in range(0, 40, 4):
        random = Random(1)
        shape = draw_shape(random, kind, TIERS["gpu and host"])
        runner = Runner(shape, str(tmp_path), ForgetfulMemory(index))
        try:
            run_at_random(runner, random, 200, longest=16)
        except AssertionError as error:
            num_noticed += "holds something else" in str(error) or "state after" in str(error)
    assert num_noticed > 0


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_reused_holds_what_was_computed(kind: str, tiers: str, tmp_path: Path) -> None:
    num_checked = num_refused = 0
    for seed in range(6 * FACTOR):
        runner = run(kind, TIERS[tiers], tmp_path, seed)
        num_checked += runner.num_checked
        num_refused += runner.num_refused
    assert num_checked > 100
    assert num_refused > 0


@pytest.mark.parametrize("tiers", ["gpu and host", "three tiers"])
@pytest.mark.parametrize("kind", KINDS)
def test_moves_that_need_rounds_for_want_of_staging_room_leave_the_right_bytes(
    kind: str, tiers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "_STAGING_BYTES", 1)
    for seed in range(100, 100 + 6 * FACTOR):
        runner = run(kind, TIERS[tiers], tmp_path, seed)
        assert all(pool.staging == 1 for pools in runner.manager.pools for pool in pools[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_right_below_the_gpu_keeps_the_right_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("payload.HostCacheTierConfig", partial(DiskCacheTierConfig, path=str(tmp_path)))
    for seed in range(200, 200 + 6 * FACTOR):
        runner = run(kind, TIERS["gpu and host"], tmp_path, seed)
        assert runner.manager.tier_names == ("gpu", "disk")
