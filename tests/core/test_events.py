"""Events: a mirror that replays them knows what the cache has, block by block and tier by tier."""

from __future__ import annotations

import errno
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest
from disk_caches import fail_after
from payload import Runner, Shape, random_text, run_at_random

from ssmcache import BlockKeys, KVCacheManager, ReuseScope
from ssmcache.events import CacheEvent, EventKind, matchable
from tests.core.managers import make_manager

SCOPE = ReuseScope()
Mirror = dict[tuple[int, bytes], int]  # (layer group, digest) -> tier
SHAPES = {
    "full, 1 tier": Shape(slots=(10,)),
    "full, 3 tiers": Shape(slots=(6, 5, 7)),
    "hybrid, 1 tier": Shape(ssm=True, slots=(9,)),
    "hybrid, 3 tiers": Shape(ssm=True, slots=(6, 4, 6)),
    "SSM alone, 2 tiers": Shape(ssm=True, full=False, slots=(4, 5)),
    "windows, 2 tiers": Shape(windows=((4, 2), (7, 0)), slots=(10, 8), partly=False),
    "a window alone, 2 tiers": Shape(full=False, windows=((4, 2),), slots=(9, 8), partly=False),
    "window and SSM, 3 tiers": Shape(windows=((5, 3),), ssm=True, slots=(8, 4, 5)),
}


def chain(tokens: list[int | bytes], block: int, scope: ReuseScope = SCOPE) -> list[bytes]:
    """The digests of the full blocks of a text, as documented."""
    digest = sha256(repr(scope).encode()).digest()
    digests = []
    for start in range(0, len(tokens) - block + 1, block):
        content = b""
        for token in tokens[start : start + block]:
            content += (-1).to_bytes(8, "little", signed=True) + token if isinstance(token, bytes) else b""
            content += token.to_bytes(8, "little", signed=True) if isinstance(token, int) else b""
        digest = sha256(digest + content).digest()
        digests.append(digest)
    return digests


def follow(mirror: Mirror, events: list[CacheEvent]) -> None:
    """Replay, and refuse what cannot be: twice stored, removed or moved from where it is not."""
    for event in events:
        assert len(event.digests) == len(event.parents) > 0
        for digest in event.digests:
            key = event.layer_group, digest
            if event.kind is EventKind.STORED:
                assert key not in mirror, "stored twice"
                mirror[key] = event.tier
            elif event.kind is EventKind.REMOVED:
                assert mirror.pop(key) == event.tier
            else:
                assert mirror[key] == event.source_tier != event.tier
                mirror[key] = event.tier


def content_of(manager: KVCacheManager) -> Mirror:
    """What the tree offers, from its keys alone. The partial are left out."""
    there: Mirror = {}
    for run in manager.store.all_runs():
        above, tokens = run, []
        while above.parent is not None:
            tokens = above.keys.tolist() + tokens
            above = above.parent
        if above.lost or above.retired or run.num_tokens:
            continue
        digests = chain(tokens, manager.tokens_per_block, above.scope)
        if run.pages is not None:
            for block in range(run.start, run.end):
                there[manager.page_group, digests[block]] = run.pages.tier
        for segment in run.items:
            for block in segment.ordinals:
                there[segment.store.layer_group, digests[block]] = segment.tier
    return there


def usable_by_mirror(manager: KVCacheManager, mirror: Mirror, tokens: list[int], scope: ReuseScope) -> int:
    """The longest prefix for which a mirror has all that a model needs, by brute force."""
    block = manager.tokens_per_block
    digests = chain(tokens, block, scope)
    for length in range(len(digests), 0, -1):
        needed = []
        for index, group in enumerate(manager.groups):
            history = length * block
            for ordinal in range(length):
                if group.window_size is not None:
                    sinks = -(-group.num_sink_tokens // block)
                    # the query at `history` sees the keys above history - window
                    seen = ordinal < sinks or (ordinal + 1) * block - 1 > history - group.window_size
                else:
                    seen = group.kind.value != "ssm" or ordinal == length - 1
                if seen:
                    needed.append((index, digests[ordinal]))
        if all(key in mirror for key in needed):
            return length * block
    return 0


@pytest.mark.parametrize("name", SHAPES)
def test_replayed_events_say_what_the_tree_has_and_where_and_what_a_probe_finds(name: str, tmp_path: Path):
    kinds = {event.kind for seed in range(8) for event in events_of_random_run(SHAPES[name], Random(seed), tmp_path)}
    assert kinds == set(EventKind) - ({EventKind.MOVED} if len(SHAPES[name].slots) == 1 else set())


def events_of_random_run(shape: Shape, random: Random, path: Path) -> list[CacheEvent]:
    runner = Runner(shape, str(path), event_buffer_size=10**6)
    manager = runner.manager
    mirror: Mirror = {}
    everything: list[CacheEvent] = []
    check = manager.check
    texts: list[list[int]] = []

    def check_and_follow() -> None:
        check()
        events = manager.take_events()
        everything.extend(events)
        follow(mirror, events)
        assert mirror == content_of(manager)
        scope = random.choice((ReuseScope(), ReuseScope(salt=0)))
        if not manager.partly:
            text = random_text(random, texts, 16)
            expected = usable_by_mirror(manager, mirror, text, scope)
            assert manager.probe_reuse(text, scope).usable_tokens == expected

    manager.check = check_and_follow  # type: ignore[method-assign]
    run_at_random(runner, random, 120)
    assert set(matchable(everything)) == set(mirror) == set()  # cleared at the end
    assert [event.id for event in everything] == list(range(len(everything)))
    return everything


def serve(manager: KVCacheManager, tokens: Any, scope: ReuseScope = SCOPE) -> None:
    kv = manager.create_kv_cache(tokens, scope)
    assert kv.resume()
    assert kv.resize(len(tokens))
    kv.commit(tokens[kv.num_committed_tokens :])
    kv.close()


def test_parents_chain_the_blocks_from_the_scope_on_whatever_run_they_lie_in():
    manager = make_manager(20, 10, block=2, interval=2, event_buffer_size=100)
    scope = ReuseScope(lora_id=3)
    serve(manager, [1, 2, 3, 4, 5, 6], scope)
    serve(manager, [1, 2, 3, 4, 9, 9, 8, 8], scope)
    parents = {}
    for event in manager.take_events():
        assert event.scope == scope
        parents.update(zip(event.digests, event.parents, strict=True))
    for text in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9, 8, 8]):
        digests = chain(text, 2, scope)
        assert [parents[digest] for digest in digests] == [sha256(repr(scope).encode()).digest(), *digests[:-1]]


def test_digests_of_multimodal_items_do_not_depend_on_what_a_cache_saw_before():
    image, other = bytes(range(32)), bytes(32)
    for seen in ([], [other]):
        manager = make_manager(20, 0, block=2, event_buffer_size=100)
        manager.probe_reuse(seen)
        serve(manager, [5, image, image, 7])
        (event,) = manager.take_events()
        assert list(event.digests) == chain([5, image, image, 7], 2)


def test_ready_keys_are_chained_as_they_are():
    manager = make_manager(20, 0, block=16, event_buffer_size=100)
    serve(manager, BlockKeys([-7, 3], 16, 40))
    (event,) = manager.take_events()
    assert list(event.digests) == chain([-7, 3], 1)


def test_a_full_buffer_drops_the_oldest_events_and_ids_show_the_gap():
    manager = make_manager(20, 0, block=1, event_buffer_size=3)
    serve(manager, [0])
    assert [event.id for event in manager.take_events()] == [0]
    for token in range(1, 8):
        serve(manager, [token])
    events = manager.take_events()
    assert [event.id for event in events] == [5, 6, 7]
    assert [event.digests for event in events] == [tuple(chain([token], 1)) for token in (5, 6, 7)]
    assert manager.take_events() == []


def test_without_a_buffer_no_event_is_made_and_asking_is_refused():
    manager = make_manager(20, 5)
    serve(manager, list(range(64)))
    assert all(run.digests == () for run in manager.store.all_runs())
    with pytest.raises(RuntimeError, match="event_buffer_size > 0, got 0"):
        manager.take_events()


def test_calls_that_are_refused_or_only_ask_make_no_event_and_count_nothing():
    manager = make_manager(4, 3, block=2, interval=2, max_util_for_resume=0.5, event_buffer_size=100)
    serve(manager, [1, 1, 2, 2])
    first = manager.create_kv_cache([5, 5])
    assert first.resume()
    assert first.resize(6)
    manager.take_events()
    before = manager.stats()
    second = manager.create_kv_cache([1, 1, 7, 7])
    assert not second.resume()
    assert not first.resize(20)
    assert not second.resume()
    manager.probe_reuse([1, 1, 2, 2])
    second.close()
    assert manager.stats() == before
    assert manager.take_events() == []


def test_blocks_that_cannot_be_read_back_are_removed_at_once_though_somebody_holds_them(tmp_path: Path, monkeypatch):
    for windows, ssm in ((((4, 2),), False), ((), True)):
        shape = Shape(block=2, windows=windows, ssm=ssm, interval=2, slots=(4, 3, 9), partly=False)
        runner = Runner(shape, str(tmp_path), event_buffer_size=1000)
        manager, text = runner.manager, [1, 2, 3, 4, 5, 6]
        first, second = (runner.create(text) for _ in range(2))
        assert runner.resume(first)
        assert runner.compute(first, 6, False)
        runner.suspend(first)
        mirror: Mirror = {}
        for token in (7, 8, 9):
            other = runner.create([token] * 6)
            assert runner.resume(other)
            assert runner.compute(other, 6, False)
            runner.close(other)
        follow(mirror, manager.take_events())
        assert 2 in {mirror[key] for key in mirror if key[1] in chain(text, 2)}
        with monkeypatch.context() as patch:
            fail_after("preadv", 0, errno.EIO, patch)
            assert not first.kv.resume()
        assert first.kv.shortage is not None
        assert first.kv.shortage.reason == "lost"
        follow(mirror, manager.take_events())
        assert mirror == content_of(manager)
        runner.close(second)
        third = runner.create(text)  # the same blocks again, while the lost ones are still held
        assert runner.resume(third)
        assert runner.compute(third, 6, False)
        runner.close(first)
        runner.close(third)
        follow(mirror, manager.take_events())
        assert mirror == content_of(manager)
        assert set(chain(text, 2)) <= {digest for _, digest in mirror}
        runner.finish()
