"""Partial look-ups among many children find what looking at each would find, at a cost that their number leaves."""

from __future__ import annotations

import sys
from random import Random

import numpy as np
import pytest
from payload import Runner, Shape, run_at_random

from ssmcache import KVCacheManager, committing, match, tree
from ssmcache.siblings import Siblings
from ssmcache.tree import Run
from tests.core.test_match_brute_force import Searching
from tests.core.test_partial_blocks import common, leave, unlimited

WIDTH = 5


def edge_of(tokens: list[int]) -> bytes:
    return np.array(tokens, dtype=np.int64).tobytes()


def best_of(edges: dict[tuple[int, ...], bool], tail: list[int], usable: bool) -> tuple[tuple[int, ...], int] | None:
    """The first of those with most tokens in common: by looking at each, in order."""
    best = None
    for edge, has_pages in edges.items():
        length = common(list(edge), tail)
        if length and (has_pages or not usable) and (best is None or length > best[1]):
            best = edge, length
    return best


@pytest.mark.parametrize("num_tokens", [2, 3, 50])
def test_siblings_are_found_as_by_looking_at_each_while_they_come_and_go(num_tokens: int) -> None:
    random = Random(num_tokens)
    for _ in range(15):
        edges: dict[tuple[int, ...], bool] = {}
        siblings = Siblings([])
        share = random.choice((0.3, 0.5, 0.6))
        for step in range(600):
            action = random.random()
            if action < share:
                # negative tokens are ids of multimodal items; a partial block has fewer tokens
                size = random.choice((WIDTH, WIDTH, random.randint(1, WIDTH - 1)))
                edge = tuple(random.randint(-1, num_tokens - 2) for _ in range(size))
                if edge not in edges:
                    edges[edge] = True
                    siblings.add(edge_of(list(edge)))
            elif action < 0.75 and edges:
                edge = random.choice(list(edges)) if random.random() < 0.5 else next(iter(edges))
                del edges[edge]
                siblings.remove(edge_of(list(edge)))
            elif action < 0.9 and edges:
                edge = random.choice(list(edges))
                edges[edge] = not edges[edge]
                if edges[edge]:
                    siblings.regain(edge_of(list(edge)))
            tail = [random.randint(-1, num_tokens - 2) for _ in range(random.randint(1, WIDTH))]
            expected = best_of(edges, tail, usable=False)
            found = siblings.best(edge_of(tail))
            assert found == (expected and (edge_of(list(expected[0])), expected[1])), step
            pages = {edge_of(list(edge)): has_pages for edge, has_pages in edges.items()}
            expected = best_of(edges, tail, usable=True)
            found = siblings.best_usable(edge_of(tail), pages.__getitem__)
            assert found == (expected and (edge_of(list(expected[0])), expected[1])), step
            expected = [edge_of(list(edge)) for edge in edges if tuple(tail[: len(edge)]) == edge]
            assert siblings.prefixes(edge_of(tail)) == expected


def naive_match_partial(run: Run, depth: int, tail: np.ndarray, windows: object = ()) -> match.Partial | None:
    """By looking at each child, in order."""
    best = None
    candidates = [(run, depth)] if depth < run.end else [(child, child.start) for child in run.children.values()]
    for candidate, block in candidates:
        start = (block - candidate.start) * candidate.kind.width
        length = common(candidate.keys[start : start + tail.size].tolist(), tail.tolist())
        has_pages = all(block in store.ordinals_on(candidate, block) for store in windows)
        if length and has_pages and (best is None or length > best.num_tokens):
            best = match.Partial(candidate, block, length)
    return best


@pytest.mark.parametrize(
    "shape",
    [
        Shape(slots=(30,)),
        Shape(slots=(14, 14)),
        Shape(windows=((4, 2),), slots=(20,)),
        Shape(windows=((4, 0), (7, 3)), slots=(12, 10)),
        Shape(full=False, windows=((3, 1), (6, 0)), slots=(16,)),
    ],
    ids=str,
)
def test_every_partial_match_is_that_of_looking_at_each_child(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (match, committing, tree):  # every family counts as large
        monkeypatch.setattr(module, "FEW", 0)
    seen = []

    def compared(*arguments: object) -> match.Partial | None:
        found = indexed(*arguments)
        assert found == naive_match_partial(*arguments)
        seen.append(found)
        return found

    indexed = match.match_partial
    monkeypatch.setattr(match, "match_partial", compared)
    monkeypatch.setattr(committing, "match_partial", compared)
    for seed in range(8):
        random = Random(seed)
        settings = {name: getattr(shape, name) for name in ("full", "windows", "slots")}
        runner = Searching(Shape(block=random.choice((1, 2, 4, 6)), **settings), random)
        run_at_random(runner, random, 120, longest=16)
    assert any(found is not None for found in seen)


# -- cost --------------------------------------------------------------------------------------------------------------


def num_steps(call: object) -> int:
    """Steps of the interpreter."""
    count = 0

    def trace(frame: object, event: str, _: object) -> object:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def users(manager: KVCacheManager, first: int, num: int, block: int, shared: int) -> None:
    """One system prompt, and users who go on differently: half a block of them is the same."""
    for user in range(first, first + num):
        leave_unchecked(manager, [*range(shared), *(1000 + user * block + token for token in range(block))])


def leave_unchecked(manager: KVCacheManager, text: list[int]) -> None:
    kv = manager.create_kv_cache(text[:-1])
    assert kv.resume()
    assert kv.resize(len(text))
    kv.commit(text[kv.num_committed_tokens :])
    kv.close()


@pytest.mark.parametrize("window", [None, 20], ids=["full attention", "a window"])
def test_a_look_up_and_a_request_cost_the_same_among_64_users_of_a_system_prompt_and_among_2048(
    window: int | None,
) -> None:
    block, shared = 8, 20  # the third block begins with the system prompt, and is another for each user
    manager = unlimited(block, window)
    prompt = [*range(shared), *range(10, 30)]
    known, costs = 0, []
    for num_users in (64, 2048):
        users(manager, known, num_users - known, block, shared)
        known = num_users
        manager.probe_reuse(prompt)
        probe = num_steps(lambda: manager.probe_reuse(prompt))
        assert manager.probe_reuse(prompt).usable_tokens == shared
        request = num_steps(lambda first=known: users(manager, first, 1, block, shared))
        known += 1
        costs.append((probe, request))
    (few_probe, few_request), (many_probe, many_request) = costs
    assert many_probe <= 1.2 * few_probe
    assert many_request <= 1.2 * few_request


def test_children_without_window_pages_are_looked_at_once_and_not_by_each_look_up() -> None:
    block, num_users = 4, 600
    runner = Runner(Shape(block=block, windows=((4, 0),), slots=(3 * num_users,)))
    manager = runner.manager
    manager.pools[1][0].capacity = 40  # window pages of some last users only
    text = lambda user: [7, 7, 7, user, *range(8)]  # noqa: E731
    for user in range(num_users):
        leave_unchecked(manager, text(100 + user))
    prompt = [7, 7, 7, 1, 2]
    assert manager.probe_reuse(prompt).tree_tokens == 3
    few = num_steps(lambda: manager.probe_reuse([1, *prompt]))
    assert num_steps(lambda: manager.probe_reuse(prompt)) < few + num_users
    manager.check()


def test_leaves_that_a_full_block_begins_with_go_though_there_are_many_siblings() -> None:
    manager = unlimited(8)
    for user in range(50):
        leave(manager, [1, 2, 3, 100 + user])
    leave(manager, [1, 2, 3, 100, 5, 6])
    assert manager.probe_reuse([1, 2, 3, 100, 5, 6]).usable_tokens == 6
    before = len(manager.store.all_runs())
    leave(manager, [1, 2, 3, 100, 5, 6, 7, 8, 9], [1, 2, 3, 100, 5, 6])
    assert len(manager.store.all_runs()) == before + 1  # a full block and its tail, for the leaf that it grew from
    assert manager.probe_reuse([1, 2, 3, 101]).usable_tokens == 4
