"""What fails, in the memory, in an observer or in the caller's arguments: nobody else's pages change, a refusal gives
nothing up, and a manager whose state nobody knows says so at every call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from faulty_memory import FaultyMemory, at_random, once
from managers import make_manager
from payload import BYTES, Request, Runner, Shape, run_at_random
from pictures import deep_picture
from test_tier_payload import KINDS, TIERS, draw_shape

from ssmcache import (
    AttentionLayerConfig,
    BlockKeys,
    BrokenManagerError,
    BufferConfig,
    GpuCacheTierConfig,
    HostMemory,
    KVCache,
    KVCacheDesc,
    KVCacheManager,
    KVCacheManagerConfig,
    KVCacheStatus,
    ReuseScope,
    StateError,
)
from ssmcache.memory.base import SlotMoves

FACTOR = int(os.environ.get("REFERENCE_CASES", "1"))
GPU, HOST = 0, 1


# -- copies that fail ------------------------------------------------------------------------------------------------


def tables(kv: KVCache) -> list[list[int]]:
    """The block tables of a sequence, and what it has of its own in the windows."""
    groups = [group for group, layers in enumerate(kv.manager.groups) if layers.kind.value != "ssm"]
    return [kv.page_indices(group).tolist() for group in groups]


class WatchedRunner(Runner):
    """Holds every call to the rule that it leaves the tables of ACTIVE sequences alone, but for those of its own if it
    is granted.
    """

    def memory_of(self) -> FaultyMemory:
        memory = self.manager.memory
        assert isinstance(memory, FaultyMemory)
        return memory

    def _watch(self, request: Request, call: Callable[[], bool]) -> bool:
        before = {id(r): tables(r.kv) for r in self.requests if r.kv.status is KVCacheStatus.ACTIVE}
        lengths = request.kv.num_committed_tokens, request.kv.history_length, request.kv.capacity
        granted = call()
        for other in self.requests:
            if id(other) in before and not (other is request and granted):
                assert tables(other.kv) == before[id(other)], "a page table changed under a sequence that computes"
        if not granted and id(request) in before:
            after = request.kv.num_committed_tokens, request.kv.history_length, request.kv.capacity
            assert after == lengths
        return granted

    def resume(self, request: Request) -> bool:
        return self._watch(request, lambda: super(WatchedRunner, self).resume(request))

    def compute(self, request: Request, end: int, reserve: bool) -> bool:
        return self._watch(request, lambda: super(WatchedRunner, self).compute(request, end, reserve))


@pytest.mark.parametrize("tiers", [(6, 7), (5, 3, 6)], ids=["two tiers", "three tiers"])
@pytest.mark.parametrize("kind", KINDS)
def test_failing_copies_change_no_page_table_of_a_sequence_that_computes(
    kind: str, tiers: tuple[int, ...], tmp_path: Path
) -> None:
    num_failed = 0
    for seed in range(200, 200 + 8 * FACTOR):
        random = Random(seed)
        memory = FaultyMemory(at_random(random, random.choice((0.1, 0.3)), losses=True, writes=True))
        runner = WatchedRunner(draw_shape(random, kind, tiers), str(tmp_path), memory)
        run_at_random(runner, random, 160, longest=random.choice((8, 14)))
        num_failed += memory.num_failed
    assert num_failed > 2


def test_a_window_page_that_cannot_be_read_for_a_partial_block_leaves_the_path_of_others_alone() -> None:
    """The block's page of full attention is on the GPU, locked by another sequence; that of its window is not."""
    runner = WatchedRunner(Shape(block=4, windows=((5, 0),), slots=(12, 12)), memory=FaultyMemory())
    text = list(range(10, 22))
    serve(runner, text)
    busy = runner.create([*text, 1, 1, 1, 1, 1])
    assert runner.resume(busy)
    assert runner.compute(busy, 16, reserve=False)
    serve(runner, [3] * 16)
    other = runner.create([99, 99])
    assert runner.resume(other)
    assert other.kv.resize(32)  # pushes down the window pages of the text, and all of [3, 3, ...]
    runner.close(other)
    # its match ends inside block 2, of which `busy` has left the window
    request = runner.create([*text[:10], 5, 5])
    runner.memory_of().fault = once(HOST, GPU, (0,), layer_group=1, after=1)
    before = tables(busy.kv)
    assert not runner.resume(request), "the copy should have failed"
    assert request.kv.shortage is not None
    assert request.kv.shortage.reason == "lost"
    runner.manager.check()
    assert tables(busy.kv) == before
    runner.check_pages(busy, 16)
    assert runner.manager.probe_reuse(text).tree_tokens == 12
    runner.finish()


def serve(runner: Runner, text: list[int]) -> None:
    """Compute, commit and leave a text."""
    request = runner.create([*text, 0])
    assert runner.resume(request)
    assert runner.compute(request, len(text), reserve=False)
    runner.close(request)


@pytest.mark.parametrize("windows", [((4, 0),), ((4, 2), (7, 0))], ids=["one window", "two windows"])
def test_a_resize_that_fails_keeps_window_pages_that_are_computed_and_not_committed(
    windows: tuple[tuple[int, int], ...],
) -> None:
    runner = WatchedRunner(Shape(block=2, windows=windows, slots=(7, 7)), memory=FaultyMemory())
    for token in (1, 2):
        serve(runner, [token] * 12)
    request = runner.create([7] * 40)
    assert runner.resume(request)
    assert request.kv.resize(8)
    runner.write_pages(request, 0, 8)
    before = tables(request.kv)
    num_refused = 0
    for group in range(1, 1 + len(windows)):
        runner.memory_of().fault = once(GPU, HOST, (), layer_group=group)
        granted = request.kv.resize(14, 8)
        num_refused += not granted
        runner.manager.check()
        if granted:
            break
        assert request.kv.shortage is not None
        assert request.kv.shortage.reason == "io"
        assert tables(request.kv) == before
        assert (request.kv.capacity, request.kv.history_length) == (8, 0)
    assert num_refused
    runner.memory_of().fault = None
    runner.check_pages(request, 8)
    request.kv.commit(request.tokens[:8])
    request.computed = 8
    runner.close(request)
    again = runner.create([7] * 9)
    assert again.kv.num_committed_tokens == 8
    assert runner.resume(again)  # which reads every byte
    runner.finish()


# -- what breaks off -------------------------------------------------------------------------------------------------


class Breaking(HostMemory):
    """Raises what no contract names at the call of that number."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("the device is on fire")

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        self._count()
        super().copy(moves, stream)

    def record(self, stream: Any) -> None:
        self._count()

    def wait(self, stream: Any, event: Any) -> None:
        self._count()

    def resize(self, tier: int, num_slots: Any) -> bool:
        if self.left < 10**6:  # the pools are there
            self._count()
        return super().resize(tier, num_slots)


def every_call(manager: KVCacheManager, kv: KVCache) -> Iterator[tuple[str, Callable[[], object]]]:
    yield from {
        "create_kv_cache": lambda: manager.create_kv_cache([1]),
        "probe_reuse": lambda: manager.probe_reuse([1]),
        "stats": manager.stats,
        "memory_usage": manager.memory_usage,
        "need_adjustment": lambda: manager.need_adjustment,
        "adjust": manager.adjust,
        "resize_tier": lambda: manager.resize_tier(0, 10**6),
        "clear_reusable_blocks": manager.clear_reusable_blocks,
        "check": manager.check,
        "buffer": lambda: manager.buffer(0, "key"),
        "resume": kv.resume,
        "resize": lambda: kv.resize(1),
        "commit": lambda: kv.commit([1]),
        "reserve_snapshots": lambda: kv.reserve_snapshots([]),
        "page_indices": lambda: kv.page_indices(0),
        "suspend": kv.suspend,
        "prefetch": kv.prefetch,
        "close": kv.close,
    }.items()


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_memory_raises_closes_the_manager_with_one_clear_error(
    kind: str, tiers: str, tmp_path: Path
) -> None:
    num_broken = 0
    for seed in range(12 * FACTOR):
        random = Random(seed)
        memory = Breaking(10**9)
        runner = StreamRunner(draw_shape(random, kind, TIERS[tiers]), str(tmp_path), memory)
        kv = runner.manager.create_kv_cache([])
        memory.left = random.randint(1, 60)
        with suppress(RuntimeError):
            run_at_random(runner, random, 120)
        if memory.left > 0:
            continue
        num_broken += 1
        for name, call in every_call(runner.manager, kv):
            with pytest.raises(BrokenManagerError, match=rf"{name}: .*the device is on fire.*make another"):
                call()
        with kv:  # whoever closes behind the error adds no other to it
            pass
        runner.manager.shutdown()
        assert memory.bytes_in_use == 0
    assert num_broken > 2


class StreamRunner(Runner):
    """Each request computes on one of three streams."""

    def stream_of(self, request: Request) -> str:
        return "abc"[id(request) // 64 % 3]


def test_an_observer_that_raises_closes_the_manager_and_one_that_calls_it_is_refused() -> None:
    class Nosy:
        manager: KVCacheManager | None = None

        def __getattr__(self, name: str) -> Callable[..., None]:
            def told(*_: object) -> None:
                assert self.manager is not None
                self.manager.stats()

            return told

    observer = Nosy()
    config = KVCacheManagerConfig(
        tokens_per_block=2,
        layers=[AttentionLayerConfig(0, [BufferConfig("key", BYTES)])],
        cache_tiers=[GpuCacheTierConfig(10 * BYTES)],
    )
    manager = observer.manager = KVCacheManager(config, HostMemory(), observer)  # type: ignore[arg-type]
    kv = manager.create_kv_cache([])
    assert kv.resume()
    assert kv.resize(4)
    with pytest.raises(RuntimeError, match="stats: expected no call from within another one"):
        kv.commit([1, 2, 3, 4])
    with pytest.raises(BrokenManagerError):
        manager.check()


def test_an_interrupt_within_a_change_closes_the_manager() -> None:
    class Interrupted(HostMemory):
        def copy(self, moves: SlotMoves, stream: Any) -> None:
            raise KeyboardInterrupt

    runner = Runner(Shape(block=1, slots=(2, 2), partly=False), memory=Interrupted())
    first = runner.create([1, 2, 3])
    assert runner.resume(first)
    assert runner.compute(first, 2, reserve=False)
    runner.close(first)
    other = runner.create([5, 6])
    assert runner.resume(other)
    with pytest.raises(KeyboardInterrupt):
        other.kv.resize(2)
    with pytest.raises(BrokenManagerError, match="KeyboardInterrupt"):
        runner.manager.check()


def test_a_manager_and_a_sequence_are_contexts_that_close_themselves() -> None:
    with make_manager(8, 3) as manager:
        with manager.create_kv_cache([1, 2]) as kv:
            assert kv.resume()
        assert kv.status is KVCacheStatus.CLOSED
        left_open = manager.create_kv_cache(())
    assert left_open.status is KVCacheStatus.CLOSED
    with pytest.raises(RuntimeError, match="after shutdown"):
        manager.create_kv_cache(())


# -- arguments -------------------------------------------------------------------------------------------------------


class Handle:
    """What has the value of an integer but is none, like a tensor."""

    def __repr__(self) -> str:
        return "a handle"

    def __index__(self) -> int:
        return 40

    def __int__(self) -> int:
        return 40


NO_INTEGERS = [10.0, 1000.0, np.float64(40), "40", b"40", True, np.bool_(True), None, Handle(), [40], np.array([40])]


def active(manager: KVCacheManager) -> KVCache:
    kv = manager.create_kv_cache([])
    assert kv.resume()
    assert kv.resize(32)
    return kv


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_what_is_no_integer_is_refused_before_anything_is_touched(value: object) -> None:
    manager = make_manager(20, 10)
    kv, waiting = active(manager), manager.create_kv_cache([])
    calls: dict[str, Callable[[], object]] = {
        "resize": lambda: kv.resize(value),  # type: ignore[arg-type]
        "history": lambda: kv.resize(64, value if value is not None else 1.0),  # type: ignore[arg-type]
        "reserve_snapshots": lambda: kv.reserve_snapshots([64, value]),  # type: ignore[list-item]
        "snapshot_points": lambda: kv.snapshot_points(value),  # type: ignore[arg-type]
        "prefetch": lambda: waiting.prefetch(value),  # type: ignore[arg-type]
        "commit": lambda: kv.commit([1, value]),  # type: ignore[list-item]
        "prompt": lambda: manager.create_kv_cache([1, value]),  # type: ignore[list-item]
        "probe": lambda: manager.probe_reuse([1, value]),  # type: ignore[list-item]
        "keys": lambda: BlockKeys([1, value], 32, 64),  # type: ignore[list-item]
        "block": lambda: BlockKeys([1], value, 64),  # type: ignore[arg-type]
        "num_tokens": lambda: BlockKeys([1], 32, value),  # type: ignore[arg-type]
        "quota": lambda: GpuCacheTierConfig(value if value is not None else 1.0),  # type: ignore[arg-type]
        "size": lambda: BufferConfig("key", value),  # type: ignore[arg-type]
        "capacity": lambda: KVCacheDesc(value),  # type: ignore[arg-type]
    }
    before = deep_picture(manager)
    for name, call in calls.items():
        if name in ("commit", "prompt", "probe", "keys") and isinstance(value, bool | np.bool_):
            continue  # NumPy makes one array of integers of them
        if name in ("commit", "prompt", "probe", "keys") and isinstance(value, Handle):
            continue  # as above
        with pytest.raises((ValueError, TypeError)):
            call()
        assert deep_picture(manager) == before, name
    manager.check()
    kv.commit(range(32))
    waiting.close()
    kv.close()
    before = deep_picture(manager)
    for tier, quota in ((0, value), (value, 1000)):
        with pytest.raises(ValueError, match="resize_tier: expected"):
            manager.resize_tier(tier, quota)  # type: ignore[arg-type]
    assert deep_picture(manager) == before
    manager.check()


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8, np.uint64])
def test_integers_of_numpy_are_as_good_as_pythons_everywhere(kind: Callable[[int], Any]) -> None:
    config = KVCacheManagerConfig(
        tokens_per_block=kind(4),
        layers=[AttentionLayerConfig(kind(0), [BufferConfig("key", kind(16))])],
        cache_tiers=[GpuCacheTierConfig(kind(160))],
    )
    assert type(config.tokens_per_block) is int
    assert type(config.cache_tiers[0].quota) is int
    manager = KVCacheManager(config, HostMemory())
    kv = manager.create_kv_cache([kind(1), kind(2)], ReuseScope(lora_id=kind(3)))
    assert kv.resume()
    assert kv.resize(kind(12), kind(2))
    assert type(kv.capacity) is int
    kv.commit(np.arange(8, dtype=kind))
    assert kv.page_indices(kind(0)).size == 3
    kv.close()
    assert manager.probe_reuse(np.arange(8, dtype=kind), ReuseScope(lora_id=3)).usable_tokens == 8
    assert manager.resize_tier(kind(0), kind(200))
    assert type(manager.memory_usage().tiers[0][0].num_slots) is int
    manager.check()
    assert len(BlockKeys(np.arange(2, dtype=kind), kind(4), kind(8))) == 8


def test_lengths_that_no_sequence_can_have_are_refused_and_take_nothing() -> None:
    manager = make_manager(None, None)
    kv = active(manager)
    before = deep_picture(manager)
    for capacity in (10**14, 2**63, -1, 2**40):
        with pytest.raises(ValueError, match="resize: expected"):
            kv.resize(capacity)
    assert deep_picture(manager) == before
    manager.check()
    kv.close()
    assert manager.memory_usage().tiers[0][0].used_slots == 0


@pytest.mark.parametrize(
    "scope", [None, (None, None), 3, "lora", ReuseScope(True), ReuseScope(salt=1.0), ReuseScope(salt="a")], ids=repr
)
def test_what_is_no_scope_is_refused_and_leaves_none(scope: object) -> None:
    manager = make_manager(8, 3)
    for call in (manager.create_kv_cache, manager.probe_reuse):
        with pytest.raises(TypeError, match=r"scope|Scope"):
            call([1, 2], scope)  # type: ignore[operator]
    manager.check()
    assert not manager.store.roots


@pytest.mark.parametrize("stream", [[], {}, np.arange(3)], ids=["list", "dict", "array"])
def test_what_is_no_stream_is_refused_before_the_sequence_is_resumed(stream: object) -> None:
    manager = make_manager(8, 3)
    kv = manager.create_kv_cache([])
    before = deep_picture(manager)
    with pytest.raises(TypeError, match="resume: expected a hashable stream"):
        kv.resume(stream)
    assert deep_picture(manager) == before
    assert kv.resume("a stream")
    with pytest.raises(TypeError, match="set_stream: expected a hashable stream"):
        kv.set_stream(stream)
    assert kv.resize(32)
    kv.commit(range(32))
    manager.check()


def test_points_that_come_twice_are_reserved_once() -> None:
    manager = make_manager(20, 10)
    kv = active(manager)
    assert kv.resize(200)
    for _ in range(3):
        slots = kv.reserve_snapshots([128, 64, 64, np.int64(128)])
        assert sorted(slots) == [64, 128]
        manager.check()
    assert manager.memory_usage().tiers[0][1].used_slots == 3
    kv.close()
    assert manager.memory_usage().tiers[0][1].used_slots == 0
    manager.check()


def test_a_bound_row_that_cannot_be_written_is_refused() -> None:
    manager = make_manager(20, 10)
    kv = active(manager)
    row = np.zeros(20, dtype=np.int32)
    kv.bind_page_indices(0, row)
    row.flags.writeable = False
    before = deep_picture(manager)
    with pytest.raises(ValueError, match="read-only"):
        kv.resize(64)
    assert deep_picture(manager) == before
    row.flags.writeable = True
    assert kv.resize(64)
    manager.check()


# -- waiting for each other ------------------------------------------------------------------------------------------


def test_two_requests_that_would_start_from_the_only_slot_do_not_wait_for_each_other() -> None:
    manager = make_manager(8, 2)
    kv = active(manager)
    assert kv.resize(65)
    assert kv.reserve_snapshots([64])
    kv.commit(range(64))
    kv.close()
    away = active(manager)  # has one of the two slots, and keeps it while it is suspended
    away.suspend()
    first, second = (manager.create_kv_cache(range(70)) for _ in range(2))
    assert first.num_committed_tokens == second.num_committed_tokens == 64
    assert first.resume()
    assert first.num_committed_tokens == 64
    assert not second.resume()
    manager.check()
    first.close()
    assert second.resume()
    manager.check()


@pytest.mark.parametrize("tiers", [(4,), (3, 3), (4, 3, 3)], ids=["one tier", "two tiers", "three tiers"])
@pytest.mark.parametrize("kind", KINDS)
def test_while_nobody_computes_or_is_suspended_any_waiting_request_that_fits_alone_is_let_in(
    kind: str, tiers: tuple[int, ...], tmp_path: Path
) -> None:
    for seed in range(8 * FACTOR):
        random = Random(seed)
        runner = Runner(draw_shape(random, kind, tiers), str(tmp_path))
        texts = [[random.randint(0, 1) for _ in range(random.randint(2, 6))] for _ in range(4)]
        for _ in range(30):
            waiting = [runner.create(random.choice(texts)) for _ in range(random.randint(1, 4))]
            random.shuffle(waiting)
            for request in waiting:
                assert runner.resume(request), request.kv.shortage  # a prefix that was cached fitted alone
                if random.random() < 0.7:
                    runner.compute(request, len(request.tokens), random.random() < 0.5)
                runner.close(request)
                runner.manager.check()
        runner.finish()


# -- what a suspended sequence says ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiers", [(12,), (12, 12)], ids=["one tier", "two tiers"])
@pytest.mark.parametrize("num_pushed", [0, 11])
@pytest.mark.parametrize("windows", [(), ((6, 0),)], ids=["full", "window"])
def test_a_suspended_sequence_that_closes_offers_its_last_tokens_from_whatever_tier(
    tiers: tuple[int, ...], num_pushed: int, windows: tuple[tuple[int, int], ...]
) -> None:
    runner = Runner(Shape(block=4, windows=windows, slots=tiers))
    request = runner.create([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    assert runner.resume(request)
    assert runner.compute(request, 10, reserve=False)
    assert request.kv.resize(20)
    runner.suspend(request)
    if len(tiers) > 1:
        other = runner.create([99, 99])
        assert runner.resume(other)
        assert other.kv.resize(4 * num_pushed)
        runner.close(other)
    runner.close(request)
    runner.manager.check()
    again = runner.create([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12])
    assert again.kv.num_committed_tokens == 10
    assert runner.resume(again)
    runner.finish()


def test_block_tables_of_a_suspended_sequence_with_tiers_are_empty() -> None:
    runner = Runner(Shape(block=2, windows=((4, 0),), slots=(12, 12)))
    request = runner.create([1] * 7)
    assert runner.resume(request)
    assert runner.compute(request, 6, reserve=False)
    before = tables(request.kv)
    runner.suspend(request)
    assert tables(request.kv) == [[-1] * 3, [-1] * 3]
    out = np.full(9, 7, dtype=np.int32)
    assert request.kv.page_indices(0, out=out).tolist() == [-1] * 9
    assert runner.resume(request)
    assert tables(request.kv) == before
    runner.close(request)
    with pytest.raises(StateError, match="page_indices: expected a resumed sequence"):
        request.kv.page_indices(0)


def test_a_probe_keeps_nothing_of_what_it_is_asked() -> None:
    manager = make_manager(8, 0, block=2)
    items = [bytes([index]) * 32 for index in range(40)]
    kv = manager.create_kv_cache([])
    assert kv.resume()
    assert kv.resize(4)
    kv.commit([items[0], 1, items[1], 2])
    kv.close()
    known = len(manager._token_ids._digests)
    for item in items[2:]:
        assert manager.probe_reuse([items[0], 1, item, 2]).usable_tokens == 2
        assert manager.probe_reuse([item, item, item]).usable_tokens == 0
    assert manager.probe_reuse([items[0], 1, items[1], 2]).usable_tokens == 4
    assert len(manager._token_ids._digests) == known


def test_a_stale_window_page_that_is_used_again_at_once_is_no_longer_what_others_wait_for() -> None:
    runner = Runner(Shape(block=2, full=False, windows=((4, 0),), slots=(4,), partly=False))
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    serve(runner, text)
    busy = runner.create([*text, *range(30, 60)])
    assert runner.resume(busy)
    assert busy.kv.resize(12)
    waiting = runner.create([*text, 9])
    assert busy.kv.num_committed_tokens == waiting.kv.num_committed_tokens == 8
    assert busy.kv.resize(16, 12)  # there is no other room: the two new pages lie where those are that go stale
    runner.manager.check()
    assert runner.manager.probe_reuse(text).usable_tokens == 0
    runner.close(busy)
    assert runner.resume(waiting)  # reads all that it has
    runner.manager.check()
    assert waiting.kv.num_committed_tokens == 0
    runner.finish()
