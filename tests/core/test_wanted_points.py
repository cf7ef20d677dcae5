"""Where snapshots are wanted: what a sequence is told, from wherever it is and however long its prompt, is what the
words of `KVCacheManagerConfig.admission` say; and whoever follows what it is told keeps just that.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from managers import make_manager

from ssmcache import KVCache, KVCacheManager
from ssmcache.admission import admission_of

TOKENS = np.arange(1000, 1100)


def kept_of(name: str, interval: int, start: int, end: int, prompt_tokens: int) -> list[int]:
    """Of the positions after `start`, up to `end`, those where a sequence that went so far has a snapshot."""
    boundaries = [position for position in range(1, max(end, prompt_tokens) + 1) if position % interval == 0]
    if name == "last":
        of_prompt = [position for position in boundaries if position <= prompt_tokens][-1:]
        decoded = [position for position in boundaries if prompt_tokens < position <= end][-1:]
        boundaries = of_prompt + decoded
    return [position for position in boundaries if start < position <= end]


@pytest.mark.parametrize("name", ["every", "last"])
@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_points_are_what_a_sequence_keeps_that_goes_so_far_in_one_step(name: str, interval: int) -> None:
    admission = admission_of(name, interval)
    for prompt_tokens, start, end in product(range(1, 23), range(23), range(23)):
        points = admission.points(start, end, prompt_tokens)
        assert list(points) == kept_of(name, interval, start, end, prompt_tokens), (prompt_tokens, start, end)


@pytest.mark.parametrize("name", ["every", "last"])
@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_the_next_point_is_the_first_place_to_stop_at_where_a_snapshot_is_kept(name: str, interval: int) -> None:
    admission = admission_of(name, interval)
    for prompt_tokens, start in product(range(1, 23), range(23)):
        stops = (end for end in range(start + 1, 60) if end in kept_of(name, interval, start, end, prompt_tokens))
        assert admission.next_point(start, prompt_tokens) == next(stops), (prompt_tokens, start)


def started(manager: KVCacheManager, num_prompt: int) -> KVCache:
    sequence = manager.create_kv_cache(TOKENS[: num_prompt - 1])
    assert sequence.resume()
    assert sequence.resize(60)
    return sequence


def own_snapshots(manager: KVCacheManager) -> list[int]:
    """Tokens before each snapshot there is."""
    block = manager.tokens_per_block
    segments = [segment for run in manager.store.all_runs() for segment in run.items]
    return sorted((ordinal + 1) * block for segment in segments for ordinal in segment.ordinals)


@pytest.mark.parametrize("name", ["every", "last"])
@pytest.mark.parametrize(("block", "multiple"), [(1, 3), (2, 1), (2, 3)])
def test_who_stops_at_each_next_point_keeps_all_that_is_wanted_and_pays_for_no_other(
    name: str, block: int, multiple: int
) -> None:
    interval = block * multiple
    for num_prompt, end in product(range(1, 20), range(1, 30)):
        manager = make_manager(60, 40, block=block, interval=interval, admission=name)
        sequence = started(manager, num_prompt)
        stops = []
        while (point := sequence.next_snapshot_point()) is not None and point <= end:
            sequence.commit(TOKENS[sequence.num_committed_tokens : point])
            stops.append(point)
        sequence.commit(TOKENS[sequence.num_committed_tokens : end])
        assert own_snapshots(manager) == kept_of(name, interval, 0, end, num_prompt)
        stats = manager.stats()
        assert stats.copied_states == stats.snapshots_taken == len(stops)
        assert stats.snapshots_taken - stats.snapshots_superseded == len(own_snapshots(manager))
        in_prompt = [stop for stop in stops if stop <= num_prompt]
        assert in_prompt == kept_of(name, interval, 0, min(end, num_prompt), num_prompt)
        assert manager.probe_reuse(TOKENS).usable_tokens == max(own_snapshots(manager), default=0)


@pytest.mark.parametrize("name", ["every", "last"])
def test_points_of_what_is_left_are_told_after_any_commit(name: str) -> None:
    interval = 6
    for num_prompt, cut in product(range(1, 20), range(1, 25)):
        manager = make_manager(60, 40, block=2, interval=interval, admission=name)
        sequence = started(manager, num_prompt)
        sequence.commit(TOKENS[:cut])
        told = [list(sequence.snapshot_points(end)) for end in range(cut + 1, 40)]
        assert told == [kept_of(name, interval, cut, end, num_prompt) for end in range(cut + 1, 40)]
        firsts = [
            points[0] for points, end in zip(told, range(cut + 1, 40), strict=True) if points and points[0] == end
        ]
        assert sequence.next_snapshot_point() == firsts[0]
