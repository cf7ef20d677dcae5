"""What is evicted by: every slot that may go has a time of its own, and a touch makes what it reaches younger than all
that was there before.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from payload import Request, Runner, run_at_random
from test_tier_payload import KINDS, draw_shape

from ssmcache import KVCacheManager
from ssmcache.compaction import segments_of
from ssmcache.recency import Clock
from ssmcache.tiers import Tiers


@pytest.mark.parametrize("depths", [[0, 0, 0], [1, 1, 1], [5, 0, 3, 0], [0, 9, 2], [3, 3, 1 << 24, 0]])
def test_no_two_blocks_were_ever_touched_at_one_time(depths: list[int]) -> None:
    """Block i of a path was touched at the stamp less i, for a path of so many blocks and one below them."""
    clock = Clock()
    touches = [(stamp - depth, stamp) for depth in depths for stamp in [clock.touch(depth)]]
    for (_, before), (oldest, youngest) in zip([(0, 0), *touches], touches, strict=False):
        assert before < oldest <= youngest


def times_of(manager: KVCacheManager, tiers: Tiers) -> list[int]:
    """Of all slots of a layer group in the tree or parked, in any tier; but of pages that are locked, which cannot go
    and may have been added to a run since its last touch.
    """
    found = []
    for segment in segments_of(manager, tiers):
        if not segment.stamp or (tiers is manager.store.pages and segment.run.holds > segment.run.idle_holds):
            continue
        first = segment.tail + 1 - len(segment.slots)
        ordinals = getattr(segment, "ordinals", range(first, segment.tail + 1))
        found += [segment.stamp - ordinal for ordinal in ordinals]
    return found


class WatchedRunner(Runner):
    """Looks at all times after each call, and at what a suspend and a close have touched. A sequence is suspended with
    pages of its own, as far as there is room.
    """

    num_touched = 0

    def suspend(self, request: Request) -> None:
        request.kv.resize(request.kv.capacity + 4 * self.shape.block)
        self.touching(lambda: Runner.suspend(self, request))

    def close(self, request: Request) -> None:
        self.touching(lambda: Runner.close(self, request))

    def touching(self, call) -> None:
        store = self.manager.store
        before = [times_of(self.manager, tiers) for tiers in store.all_tiers()]
        call()
        for tiers, old in zip(store.all_tiers(), before, strict=True):
            times = times_of(self.manager, tiers)
            assert len(set(times)) == len(times), f"two slots of layer group {tiers.layer_group} with one time"
            if tiers not in store.windows:  # what goes stale is no younger than the resume before
                touched = set(times) - set(old)
                assert not touched or min(touched) > max(old, default=0)
                self.num_touched += len(touched)


@pytest.mark.parametrize("admission", ["every", "last"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [(24,), (14, 8, 8)])
def test_what_is_touched_is_younger_than_all_else_and_nothing_is_of_equal_age(
    kind: str, slots: tuple[int, ...], admission: str, tmp_path: Path
) -> None:
    num_touched = 0
    for seed in range(6):
        random = Random(seed)
        settings = {"admission": admission} if KINDS[kind].get("ssm") else {}
        runner = WatchedRunner(draw_shape(random, kind, slots), str(tmp_path), **settings)
        run_at_random(runner, random, num_steps=60, longest=random.choice((8, 16)))
        num_touched += runner.num_touched
    assert num_touched > 0 or not runner.manager.store.pages
