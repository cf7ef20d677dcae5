"""An observer is told of every change, block by block: what it adds up to is what the cache holds."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import numpy as np
import pytest
from managers import make_manager

from ssmcache import BlockKeys, KVCacheManager, SimulatedMemory
from ssmcache.events import EventLog
from ssmcache.keys import TokenIds
from ssmcache.tree import Run

BLOCK, INTERVAL = 32, 64


class Mirror:
    """(layer group, key) of what there is, and the reasons of what was skipped."""

    def __init__(self) -> None:
        self.there: set[tuple[int, int]] = set()
        self.skips: list[tuple[int, str]] = []

    def stored(self, run: Run, num_blocks: int, layer_group: int | None) -> None:
        assert layer_group == 0
        self._add(layer_group, run, range(run.end - num_blocks, run.end))

    def added(self, cursor: Run, layer_group: int, ordinals: Iterable[int]) -> None:
        for ordinal in ordinals:
            (run,) = (run for run in cursor.path() if run.start <= ordinal < run.end)
            self._add(layer_group, run, [ordinal])

    def skipped(self, cursor: Run, layer_group: int, ordinal: int, reason: str) -> None:
        self.skips.append((ordinal, reason))

    def removed(self, layer_group: int, tier: int, run: Run, ordinals: Iterable[int]) -> None:
        self.there -= {(layer_group, run.key_buffer.item(ordinal - run.start)) for ordinal in ordinals}

    def moved(self, layer_group: int, source_tier: int, tier: int, run: Run, ordinals: Iterable[int]) -> None:
        raise AssertionError("one tier")

    def lost(self, run: Run, page_group: int | None) -> None:
        raise AssertionError("nothing is lost")

    def _add(self, layer_group: int, run: Run, ordinals: Iterable[int]) -> None:
        new = {(layer_group, run.key_buffer.item(ordinal - run.start)) for ordinal in ordinals}
        assert not new & self.there
        self.there |= new


def observed(pages: int | None, states: int | None) -> tuple[KVCacheManager, Mirror]:
    config, mirror = make_manager(pages, states, block=BLOCK, interval=INTERVAL).config, Mirror()
    return KVCacheManager(config, SimulatedMemory(), mirror), mirror


def contents(manager: KVCacheManager) -> set[tuple[int, int]]:
    there = set()
    for run in manager.store.all_runs():
        there |= {(0, int(key)) for key in run.keys}
        there |= {(1, int(run.keys[ordinal - run.start])) for items in run.items for ordinal in items.ordinals}
    return there


def prompt(path: list[int], num_tokens: int) -> BlockKeys:
    return BlockKeys(np.array(path), BLOCK, num_tokens)


@pytest.mark.parametrize("seed", range(20))
def test_what_was_told_adds_up_to_what_the_cache_holds(seed: int) -> None:
    random = Random(seed)
    manager, mirror = observed(14, 5)
    for _ in range(60):
        branch, num_blocks = random.randrange(4), random.randrange(1, 12)
        shared = random.randrange(num_blocks)
        path = [block if block <= shared else 100 * (branch + 1) + 1000 * shared + block for block in range(num_blocks)]
        text = prompt(path, BLOCK * num_blocks)
        sequence = manager.create_kv_cache(text[:-1])
        assert sequence.resume()
        assert sequence.resize(text.stop + 1)
        if random.random() < 0.7:
            sequence.reserve_snapshots(sequence.snapshot_points(text.stop))
        sequence.commit(text[sequence.num_committed_tokens :])
        sequence.close()
        assert mirror.there == contents(manager)
        manager.check()
    stats = manager.stats()
    assert stats.snapshots_evicted > 0
    assert stats.pages_evicted > 0
    reasons = [reason for _, reason in mirror.skips]
    assert reasons.count("crossed") == stats.snapshots_skipped_crossed > 0
    assert reasons.count("no_room") == stats.snapshots_skipped_no_room


def test_a_skipped_snapshot_is_told_with_its_block_and_the_reason() -> None:
    manager, mirror = observed(20, 3)
    text = prompt(list(range(9)), 300)
    sequence = manager.create_kv_cache(text[:-1])
    sequence.resume()
    sequence.resize(301)
    sequence.reserve_snapshots(sequence.snapshot_points(300))
    sequence.commit(text[:300])
    assert mirror.skips == [(5, "no_room"), (7, "no_room")]
    manager, mirror = observed(None, None)
    sequence = manager.create_kv_cache(text[:-1])
    sequence.resume()
    sequence.resize(301, history_length=100)
    sequence.commit(text[:64])
    sequence.commit(text[64:256])
    assert mirror.skips == [(1, "history"), (3, "crossed"), (5, "crossed")]


def test_a_decoded_snapshot_that_the_next_one_replaces_is_told_as_removed_and_not_admitted() -> None:
    mirror = Mirror()
    config = make_manager(40, 9, block=BLOCK, interval=INTERVAL, admission="last").config
    manager = KVCacheManager(config, SimulatedMemory(), mirror)
    text = prompt(list(range(9)), 288)
    sequence = manager.create_kv_cache(text[:99])  # a prompt of 100 tokens
    sequence.resume()
    sequence.resize(289)
    for end in (64, 128, 192, 256):
        sequence.commit(text[sequence.num_committed_tokens : end])
        assert mirror.there == contents(manager)
    assert mirror.skips == [(3, "not_admitted"), (5, "not_admitted")]
    assert manager.stats().snapshots_superseded == 2


def test_an_event_buffer_beside_an_observer_is_refused_and_a_skip_is_no_event() -> None:
    config = make_manager(None, None, event_buffer_size=10).config
    with pytest.raises(ValueError, match="event_buffer_size: expected 0 beside an observer, got 10"):
        KVCacheManager(config, SimulatedMemory(), EventLog(5, TokenIds()))
    manager = KVCacheManager(config, SimulatedMemory())
    sequence = manager.create_kv_cache(())
    sequence.resume()
    sequence.resize(100)
    sequence.commit(list(range(96)))  # passes 64 without a reservation
    assert manager.stats().snapshots_skipped_crossed == 1
    assert {event.kind.value for event in manager.take_events()} == {"stored"}
