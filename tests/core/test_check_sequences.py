"""`manager.check()` notices damage to what is parked, to ACTIVE sequences, to the tree and to partial blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from busy_managers import Damages, busy_manager, manager_with_partial_blocks, run_in, sequence

from ssmcache import KVCacheManager
from ssmcache.pools import int_array

damage, partial_damage = Damages(), Damages()


# -- what is parked ----------------------------------------------------------------------------------------------------


@damage
def parked_pages_that_are_forgotten(manager: KVCacheManager) -> None:
    sequence(manager, "parked").parked.root.children.clear()


@damage
def parked_states_that_are_forgotten(manager: KVCacheManager) -> None:
    sequence(manager, "parked").parked.states.items = ()


@damage
def parked_pages_in_the_slots_of_others(manager: KVCacheManager) -> None:
    run = sequence(manager, "parked").parked.page_runs()[0]
    run.pages.slots[0] = run_in(manager, run.pages.tier).pages.slots[0]


@damage
def a_suspended_sequence_that_parked_nothing(manager: KVCacheManager) -> None:
    sequence(manager, "parked").parked = None


@damage
def a_parked_pin_that_is_not_held(manager: KVCacheManager) -> None:
    kv = sequence(manager, "parked")
    pin = next(iter(kv.parked.pins()))
    store = next(store for store in manager.store.sparse_stores() if (pin.tier, pin.slot, pin) in store.pins.all())
    store.pins.count(pin, held=-1)


@damage
def a_live_state_that_is_parked_and_not(manager: KVCacheManager) -> None:
    sequence(manager, "parked").states.live_slot = 3


# -- what an ACTIVE sequence has ---------------------------------------------------------------------------------------


@damage
def a_live_state_that_is_lost(manager: KVCacheManager) -> None:
    states = sequence(manager, "active").states
    manager.pools[manager.state_group][0].give_back_one(states.give_up_live())


@damage
def private_pages_that_are_missing(manager: KVCacheManager) -> None:
    manager.pools[0][0].give_back(sequence(manager, "active").take_own_pages(1))


@damage
def a_window_page_that_is_missing(manager: KVCacheManager) -> None:
    window = sequence(manager, "active").windows[0]
    _, slot = window.own.popitem()
    window.store.gpu_pool.give_back(int_array((slot,)))


@damage
def a_window_pin_that_is_missing(manager: KVCacheManager) -> None:
    window = sequence(manager, "active").windows[0]
    window.store.pins.count(window.pins.popitem()[1], locked=-1)


@damage
def a_window_page_of_two_blocks(manager: KVCacheManager) -> None:
    own = sequence(manager, "active").windows[0].own
    first, *_, last = own
    own[first] = own[last]


# -- the tree ----------------------------------------------------------------------------------------------------------


@damage
def a_lost_root_among_those_that_are_not(manager: KVCacheManager) -> None:
    next(iter(manager.store.roots.values())).lost = True


@damage
def a_root_of_another_scope(manager: KVCacheManager) -> None:
    (scope,) = manager.store.roots
    manager.store.roots[scope._replace(salt=5)] = manager.store.roots.pop(scope)


@damage
def digests_that_are_too_few(manager: KVCacheManager) -> None:
    run = manager.store.all_runs()[0]
    run.digests = run.digests[1:]


@damage
def a_path_that_gets_warmer(manager: KVCacheManager) -> None:
    run = next(run for run in manager.store.all_runs() if run.children)
    child = next(iter(run.children.values()))
    run.pages.tier, child.pages.tier = 2, 0


@damage
def a_descendant_younger_than_its_ancestor(manager: KVCacheManager) -> None:
    run = next(run for run in manager.store.all_runs() if run.children and not run.holds)
    next(iter(run.children.values())).pages.stamp = run.pages.stamp + 100


@damage
def a_snapshot_known_as_used_where_none_is(manager: KVCacheManager) -> None:
    manager.store.snapshots.note_reuse(0, sequence(manager, "active").states.live_slot)


# -- partial blocks, one tier ------------------------------------------------------------------------------------------


def leaf_of(manager: KVCacheManager) -> Any:
    return next(run for run in manager.store.all_runs() if run.num_tokens)


@partial_damage
def a_partial_block_with_other_tokens(manager: KVCacheManager) -> None:
    leaf_of(manager).num_tokens -= 1


@partial_damage
def a_partial_block_that_has_children(manager: KVCacheManager) -> None:
    leaf, other = leaf_of(manager), sequence(manager, "suspended").cursor
    del other.parent.children[other.edge]
    leaf.children[other.edge], other.parent = other, leaf


@partial_damage
def a_partial_block_without_the_hold_of_who_would_copy_it(manager: KVCacheManager) -> None:
    leaf_of(manager).soft_holds -= 1


@partial_damage
def a_sequence_that_forgets_what_it_would_copy(manager: KVCacheManager) -> None:
    sequence(manager, "created").partial = None


@partial_damage
def a_window_page_of_a_partial_block_in_the_wrong_place(manager: KVCacheManager) -> None:
    leaf_of(manager).items[0].ordinals[0] += 1


@partial_damage
def a_suspended_sequence_that_lost_a_private_page(manager: KVCacheManager) -> None:
    sequence(manager, "suspended").own_pages = sequence(manager, "suspended").own_pages[1:]


@pytest.mark.parametrize("call", damage.calls, ids=lambda call: call.__name__)
def test_check_notices(call: Callable[[KVCacheManager], Any], tmp_path: Path) -> None:
    manager = busy_manager(str(tmp_path))
    call(manager)
    with pytest.raises(AssertionError):
        manager.check()


@pytest.mark.parametrize("call", partial_damage.calls, ids=lambda call: call.__name__)
def test_check_notices_with_partial_blocks(call: Callable[[KVCacheManager], Any]) -> None:
    manager = manager_with_partial_blocks()
    call(manager)
    with pytest.raises(AssertionError):
        manager.check()
