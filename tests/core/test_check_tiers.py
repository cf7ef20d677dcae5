"""`manager.check()` notices damage to tiers, to pins, and to the counts of what is locked or held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from busy_managers import Damages, busy_manager, run_in, sequence

from ssmcache import KVCacheManager

damage = Damages()


# -- tiers -------------------------------------------------------------------------------------------------------------


@damage
def a_run_in_another_tier(manager: KVCacheManager) -> None:
    run_in(manager, 1).pages.tier = 2


@damage
def a_slot_of_windows_in_another_tier(manager: KVCacheManager) -> None:
    segment = next(item for run in manager.store.all_runs() for item in run.items if item.tier == 1)
    segment.tier = 0


@damage
def pages_that_do_not_know_of_the_tier_below(manager: KVCacheManager) -> None:
    run_in(manager, 0).pages.colder = False


@damage
def a_slot_lost_by_the_pool_of_a_lower_tier(manager: KVCacheManager) -> None:
    manager.pools[0][2].take(1)


@damage
def a_count_of_cached_slots_of_a_lower_tier(manager: KVCacheManager) -> None:
    manager.store.windows[0].cached[1] += 1


@damage
def slots_for_staging_left_in_use(manager: KVCacheManager) -> None:
    pool = manager.pools[0][1]
    pool.capacity, pool.staging = pool.used - 1, pool.staging + 1


@damage
def a_child_counted_as_warm(manager: KVCacheManager) -> None:
    run_in(manager, 0).warm_children += 1


@damage
def a_warm_child_not_counted(manager: KVCacheManager) -> None:
    next(run for run in manager.store.all_runs() if run.warm_children).warm_children = 0


@damage
def a_queue_of_a_lower_tier_without_what_may_go(manager: KVCacheManager) -> None:
    queue = manager.store.pages.queues[2]
    queue.take_out(queue.oldest())


@damage
def an_entry_in_the_queue_of_another_tier(manager: KVCacheManager) -> None:
    segment = manager.store.pages.queues[2].oldest()
    segment.queued = False
    manager.store.pages.queues[0].put(segment)


# -- counts of what is locked or held ----------------------------------------------------------------------------------


@damage
def locked_pages_counted_wrong(manager: KVCacheManager) -> None:
    manager.store.pages.locked[0] -= 1


@damage
def held_pages_counted_wrong(manager: KVCacheManager) -> None:
    manager.store.pages.held[1] += 1


@damage
def held_pages_counted_in_another_tier(manager: KVCacheManager) -> None:
    manager.store.pages.held[0], manager.store.pages.held[2] = 0, sum(manager.store.pages.held)


@damage
def locked_window_pages_counted_wrong(manager: KVCacheManager) -> None:
    manager.store.windows[0].pins.locked[0] += 1


@damage
def held_states_counted_wrong(manager: KVCacheManager) -> None:
    manager.store.snapshots.pins.held[1] += 1


@damage
def an_idle_hold_too_many(manager: KVCacheManager) -> None:
    sequence(manager, "parked").cursor.idle_holds += 1


@damage
def a_hold_too_few(manager: KVCacheManager) -> None:
    sequence(manager, "active").cursor.holds -= 1


@damage
def a_soft_hold_too_many(manager: KVCacheManager) -> None:
    run_in(manager, 2).soft_holds += 1


@damage
def a_soft_holder_that_is_forgotten(manager: KVCacheManager) -> None:
    manager.store.soft_holders.clear()


@damage
def a_soft_holder_that_holds_nothing(manager: KVCacheManager) -> None:
    manager.store.soft_holders[sequence(manager, "active")] = None


@damage
def active_sequences_counted_wrong(manager: KVCacheManager) -> None:
    manager.num_active += 1


@damage
def a_locked_run_in_a_lower_tier(manager: KVCacheManager) -> None:
    run = run_in(manager, 2)
    kv = sequence(manager, "active")
    while kv.cursor.parent is not None:
        manager.store.release(kv.cursor)
        kv.cursor = kv.cursor.parent
    kv.cursor = run
    for above in run.path():
        manager.store.lock_child(above)


# -- pins --------------------------------------------------------------------------------------------------------------


@damage
def a_pin_counted_twice(manager: KVCacheManager) -> None:
    window = sequence(manager, "active").windows[0]
    next(iter(window.pins.values())).locked += 1


@damage
def a_pin_of_the_wrong_kind(manager: KVCacheManager) -> None:
    window = sequence(manager, "active").windows[0]
    window.store.pins.count(next(iter(window.pins.values())), locked=-1, held=1)


@damage
def a_pin_that_the_layer_group_does_not_know(manager: KVCacheManager) -> None:
    manager.store.windows[0].pins.by_slot[0].clear()
    manager.store.windows[0].pins.locked[0] = 0
    manager.store.windows[0].pins.held[0] = 0


@damage
def a_pin_known_by_another_slot(manager: KVCacheManager) -> None:
    pins = manager.store.windows[0].pins.by_slot[0]
    slot, pin = pins.popitem()
    pins[slot + 1000] = pin


@damage
def a_pin_that_names_another_slot(manager: KVCacheManager) -> None:
    _, _, pin = manager.store.snapshots.pins.all()[0]
    pin.slot += 1


@damage
def a_pin_in_another_tier(manager: KVCacheManager) -> None:
    _, _, pin = manager.store.snapshots.pins.all()[0]
    pin.tier = (pin.tier + 1) % 3


@damage
def a_pin_that_nobody_has(manager: KVCacheManager) -> None:
    store = manager.store.snapshots
    segment = next(item for run in manager.store.all_runs() for item in run.items if item.store is store)
    store.pins.pin(segment.tier, segment.slots[0]).soft += 1


@pytest.mark.parametrize("call", damage.calls, ids=lambda call: call.__name__)
def test_check_notices(call: Callable[[KVCacheManager], Any], tmp_path: Path) -> None:
    manager = busy_manager(str(tmp_path))
    call(manager)
    with pytest.raises(AssertionError):
        manager.check()
