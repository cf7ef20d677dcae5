"""Sink pages that cannot be read, of models without full attention: what is below them goes, whoever waits for it, and
what was locked above is as free to go as before.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from faulty_memory import FaultyMemory, at_random
from payload import Runner, Shape, run_at_random


@pytest.mark.parametrize("full", [False, True], ids=["windows alone", "with full attention"])
@pytest.mark.parametrize("ssm", [False, True], ids=["no states", "states"])
def test_lost_sink_pages_leave_everything_whole_whoever_held_or_awaited_them(
    ssm: bool, full: bool, tmp_path: Path
) -> None:
    num_lost = 0
    for seed in range(40):
        random = Random(seed)
        block = random.randint(1, 2)
        window = random.randint(2, 4), random.randint(1, 6)
        slots = 6 + 2 * full, random.randint(2, 4), 4
        shape = Shape(block=block, full=full, windows=(window,), ssm=ssm, interval=2 * block, slots=slots, max_util=1.0)
        memory = FaultyMemory(at_random(random, 0.4, losses=True, writes=False))
        run_at_random(Runner(shape, str(tmp_path), memory), random, 100, longest=10)
        num_lost += memory.num_failed
    assert num_lost > 20
