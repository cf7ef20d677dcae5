"""Managers in the middle of their work, of which tests damage one thing or another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from payload import Request, Runner, Shape

from ssmcache import KVCacheManager


class Damages:
    """Functions that damage a manager, by name: a decorator that keeps them."""

    def __init__(self) -> None:
        self.calls: list[Callable[[KVCacheManager], Any]] = []

    def __call__(self, call: Callable[[KVCacheManager], Any]) -> Callable[[KVCacheManager], Any]:
        self.calls.append(call)
        return call


def serve(runner: Runner, tokens: list[int], end: int) -> Request:
    request = runner.create(tokens)
    assert runner.resume(request)
    for position in range(request.computed + 2, end + 1, 2):
        assert runner.compute(request, position, False)
    return request


def busy_manager(path: str) -> KVCacheManager:
    """Window, SSM and full attention in three tiers; one sequence ACTIVE, one parked on the host, one created."""
    runner = Runner(Shape(windows=((4, 2),), ssm=True, slots=(14, 8, 12)), path, event_buffer_size=1000)
    runner.close(serve(runner, [1] * 13, 12))
    parked = serve(runner, [2] * 13, 8)
    assert parked.kv.resize(13)
    runner.suspend(parked)
    runner.close(serve(runner, [3] * 13, 12))
    runner.close(serve(runner, [4] * 13, 12))
    active = serve(runner, [5] * 13, 8)
    assert active.kv.resize(13)
    runner.create([1] * 9)
    manager = runner.manager
    manager.check()
    assert {run.pages.tier for run in manager.store.all_runs()} == {0, 1, 2}
    assert parked.kv.parked is not None
    assert any(segment.tier for segment in parked.kv.parked.contents())
    return manager


def manager_with_partial_blocks() -> KVCacheManager:
    """Partial blocks on one tier: a leaf, a sequence that would copy it, and a suspended one."""
    runner = Runner(Shape(block=4, windows=((6, 0),), slots=(20,)))
    runner.close(serve(runner, [1] * 7, 6))
    runner.create([1] * 7)
    suspended = serve(runner, [2] * 9, 8)
    assert suspended.kv.resize(9)
    runner.suspend(suspended)
    runner.manager.check()
    return runner.manager


def sequence(manager: KVCacheManager, kind: str) -> Any:
    found = {
        "active": lambda kv: kv.status.value == "active",
        "parked": lambda kv: kv.parked is not None,
        "created": lambda kv: kv.soft,
        "suspended": lambda kv: kv.locked and kv.status.value == "suspended",
    }
    return next(kv for kv in manager.open_sequences if found[kind](kv))


def run_in(manager: KVCacheManager, tier: int) -> Any:
    return next(run for run in manager.store.all_runs() if run.pages.tier == tier)
