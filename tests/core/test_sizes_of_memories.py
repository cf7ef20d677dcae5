"""Changes of size on a memory that has not enough, or cannot be written: all or nothing."""

from __future__ import annotations

from typing import Any

import pytest
from payload import Runner, Shape

from ssmcache import HostMemory
from ssmcache.memory.base import SlotMoves, TransferError
from tests.core.test_sizes import SLOT, close_one, compute_all, content_of


class Small(HostMemory):
    """Has so many bytes for all tiers together, at any time; may fail to write those below the GPU."""

    limit = 10**9
    fails = False

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        if self.fails and moves.destination_tier > 0:
            raise TransferError(moves.destination_tier, (), "no room")
        super().copy(moves, stream)

    def resize(self, tier: int, num_slots: Any) -> bool:
        present = list(self._num_slots[tier])
        wanted = sum(map(int.__mul__, num_slots, self._slot_bytes))
        rest = self.bytes_in_use - sum(map(int.__mul__, present, self._slot_bytes))
        return rest + wanted <= self.limit and super().resize(tier, num_slots)


@pytest.mark.parametrize("ssm", [False, True])
def test_a_memory_that_has_no_more_refuses_before_anything_is_dropped(ssm: bool) -> None:
    memory = Small()
    runner = Runner(Shape(ssm=ssm, slots=(12, 4)), memory=memory)
    for n in range(3):
        runner.close(compute_all(runner, [n] * 8))
    request = compute_all(runner, [7] * 4)
    runner.suspend(request)
    # the traffic seen asks for more pages and fewer states than there are now
    memory.limit = memory.bytes_in_use + 3 * SLOT
    before = content_of(runner.manager)
    assert not runner.manager.resize_tier(0, runner.manager.quotas[0] + 4 * SLOT)
    assert content_of(runner.manager) == before
    assert runner.manager.resize_tier(0, runner.manager.quotas[0] + 3 * SLOT)
    runner.manager.check()
    assert runner.resume(request)
    runner.finish()


def wanting_states(memory: Small, *slots: int) -> Runner:
    """A runner full of pages, whose traffic wants two states for each page."""
    runner = Runner(Shape(ssm=True, interval=2, slots=slots), memory=memory)
    for _ in range(300):
        close_one(runner.manager, 2)
    for n in range(3):
        runner.close(compute_all(runner, [n] * 8))
    memory.limit = memory.bytes_in_use
    return runner


def test_a_memory_that_has_no_more_refuses_a_trade_before_anything_is_dropped() -> None:
    memory = Small()
    runner = wanting_states(memory, 12)
    manager = runner.manager
    before = content_of(manager)
    assert manager.need_adjustment
    assert not manager.resize_tier(0, manager.quotas[0] + 3 * SLOT)
    assert content_of(manager) == before
    memory.limit += 3 * SLOT
    assert manager.resize_tier(0, manager.quotas[0] + 3 * SLOT)
    assert manager.pools[0][0].capacity < 12
    assert manager.stats().pages_evicted > before[-2].pages_evicted
    runner.finish()


def test_a_tier_that_cannot_be_written_leaves_sizes_and_memory_as_they_were() -> None:
    memory = Small()
    runner = wanting_states(memory, 12, 6)
    manager = runner.manager
    memory.limit += 3 * SLOT
    sizes = [pools[0].capacity for pools in manager.pools]
    quotas, num_bytes = list(manager.quotas), memory.bytes_in_use
    memory.fails = True
    assert not manager.resize_tier(0, quotas[0] + 3 * SLOT)
    manager.check()
    assert [pools[0].capacity for pools in manager.pools] == sizes
    assert (manager.quotas, memory.bytes_in_use) == (quotas, num_bytes)
    assert manager.pools[0][1].capacity == 0  # the tier takes no more, until it gets a size again
    memory.fails = False
    assert manager.resize_tier(1, quotas[1])
    assert manager.pools[0][1].capacity > 0
    assert memory.bytes_in_use <= num_bytes
    assert manager.resize_tier(0, quotas[0] + 3 * SLOT)
    assert manager.stats().pages_evicted == 0
    manager.check()
    runner.finish()


def test_pools_trade_places_within_what_the_memory_has() -> None:
    memory = Small()
    runner = Runner(Shape(ssm=True, slots=(16,)), memory=memory)
    memory.limit = memory.bytes_in_use
    runner.close(compute_all(runner, [1] * 24))
    assert runner.manager.adjust()
    assert [pools[0].capacity for pools in runner.manager.pools] == [
        21,
        12,
    ]  # 12 pages to 1 + 24 // 4 states of 44 bytes
    runner.manager.check()
    assert not runner.manager.adjust() or memory.bytes_in_use <= memory.limit
    request = runner.create([1] * 24 + [2])
    assert runner.resume(request)
    assert runner.compute(request, 25, False)
    runner.finish()
