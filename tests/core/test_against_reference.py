"""One request after another, as a replay serves them: on the manager and on the oracle of `reference.py`, after every
call compared by the `Pair` of `test_concurrent_sequences.py`; against stack distances; and on a real trace.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from managers import make_manager

from ssmcache import (
    BlockKeys,
    KVCacheManager,
)
from tests.core.reference import Setup
from tests.core.test_concurrent_sequences import Pair, Text, cases

MOONCAKE = Path(__file__).resolve().parents[3] / "shared" / "traces" / "mooncake_conversation.jsonl.gz"


# -- random traffic ----------------------------------------------------------------------------------------------------


@st.composite
def setups(draw: st.DrawFn, kinds: tuple[str, ...] = ("attention", "hybrid", "ssm"), min_block: int = 1) -> Setup:
    kind = draw(st.sampled_from(kinds))
    block = draw(st.integers(min_block, 4))
    pages = 0 if kind == "ssm" else draw(st.integers(1, 20))
    states = 0 if kind == "attention" else draw(st.integers(1, 7))
    interval = 0 if kind == "attention" else block * draw(st.integers(1, 3))
    max_util = draw(st.sampled_from((0.3, 0.6, 0.97, 1.0)))
    return Setup(block, pages, states, interval, max_util, draw(st.sampled_from(("every", "last"))))


def long_lists(elements: st.SearchStrategy, max_size: int) -> st.SearchStrategy[list]:
    """Lists of which many are long; those of `st.lists` are mostly short."""
    return st.sampled_from((1, max_size // 3, max_size)).flatmap(
        lambda least: st.lists(elements, min_size=least, max_size=max_size)
    )


@st.composite
def texts(draw: st.DrawFn, max_texts: int = 8) -> list[Text]:
    """Texts that share prefixes: each is a part of an earlier one, continued by one token over and over, so that
    equal blocks also lie at different places.
    """
    made: list[Text] = [()]
    pieces = st.tuples(st.integers(0, 7), st.integers(0, 30), st.integers(0, 3), st.integers(1, 20))
    for parent, cut, token, length in draw(long_lists(pieces, max_texts)):
        text = made[parent % len(made)][:cut] + (token,) * length
        made.append(text)
    return made[1:]


@st.composite
def traffic(draw: st.DrawFn, max_requests: int = 30) -> list[Text]:
    """Prompts in order of arrival, many of them repeated."""
    known = draw(texts())
    return [known[i % len(known)] for i in draw(long_lists(st.integers(0, 7), max_requests))]


def serve(pair: Pair, text: Text, cuts: list[int] | None = None) -> None:
    """One request as a replay makes it. With `cuts`: committed up to each of them in turn, and nothing is reserved."""
    request = pair.create(text, len(text))
    sequence = pair.sequences[request][0]
    if pair.resume(request) and pair.resize(request, len(text) + 1):
        if cuts is None:
            pair.reserve(request, sequence.snapshot_points(len(text)))
        for cut in sorted({*(cuts or ()), len(text)}):
            if cut > sequence.num_committed_tokens:
                pair.commit(request, cut - sequence.num_committed_tokens)
    pair.close(request)


# -- sequential replays ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attention", "hybrid", "ssm"])
@pytest.mark.parametrize("ready", [True, False], ids=["ready keys", "tokens"])
def test_a_replay_agrees_with_the_oracle_after_every_call(kind: str, ready: bool) -> None:
    @cases(100)
    @given(setups((kind,)), traffic())
    def replay(setup: Setup, prompts: list[Text]) -> None:
        pair = Pair(setup, ready)
        for prompt in prompts:
            serve(pair, prompt)

    replay()


@pytest.mark.parametrize("ready", [True, False], ids=["ready keys", "tokens"])
@cases(60)
@given(setup=setups(("hybrid", "ssm"), min_block=2), prompts=traffic(), cuts=st.lists(st.integers(1, 60)))
def test_commits_in_pieces_leave_the_same_tree_as_reserved_slots(
    ready: bool, setup: Setup, prompts: list[Text], cuts: list[int]
) -> None:
    whole, pieces, more_pieces = Pair(setup, ready), Pair(setup, ready), Pair(setup, ready)
    for prompt in prompts:
        text = prompt if ready or len(prompt) % setup.block else prompt[:-1]  # see the test of tokens and ready keys
        if not text:
            continue
        points = list(range(setup.interval, len(text) + 1, setup.interval))
        serve(whole, text)
        serve(pieces, text, points)
        serve(more_pieces, text, points + [cut for cut in cuts if cut < len(text)])
        assert pieces.seen == more_pieces.seen
        for what in ("blocks", "snapshots", "slots"):
            assert whole.seen[what] == pieces.seen[what]
        whole_counts, piece_counts = whole.reference.counts, pieces.reference.counts
        assert {**whole_counts, "copied_states": 0} == {**piece_counts, "copied_states": 0}


@cases(100)
@given(setup=setups(min_block=2), prompts=traffic())
def test_tokens_and_ready_keys_decide_alike_where_no_prompt_ends_with_a_block(
    setup: Setup, prompts: list[Text]
) -> None:
    """A prompt that ends with a block is known to its last block by ready keys only, so these are made longer."""
    ready, tokens = Pair(setup, True), Pair(setup, False)
    for prompt in prompts:
        text = prompt if len(prompt) % setup.block else (*prompt, 9)
        serve(ready, text)
        serve(tokens, text)
        assert ready.seen == tokens.seen


def test_the_block_that_the_last_token_ends_is_adopted_with_ready_keys_and_allocated_twice_with_tokens() -> None:
    """The documented difference: the hits are equal, the page is not."""
    text = (1, 1, 2, 2)
    free = {}
    for ready in (True, False):
        pair = Pair(Setup(block=2, pages=10), ready)
        serve(pair, text)
        again = pair.create(text, len(text))
        assert pair.resume(again)
        assert pair.resize(again, len(text) + 1)
        assert pair.sequences[again][0].reuse_match == (2, 2, 2)
        free[ready] = pair.reference.free_pages()
        pair.commit(again, 2)
        pair.close(again)
        assert pair.reference.free_pages() == 8
    assert free == {True: 7, False: 6}


# -- LRU as a stack algorithm ------------------------------------------------------------------------------------------


def move_to_front(stack: list, path: list) -> None:
    """Touch a path, deepest first: its first block ends up in front."""
    for item in reversed(path):
        if item in stack:
            stack.remove(item)
        stack.insert(0, item)


def stack_hits(prompts: list[Text], setup: Setup) -> list[int]:
    """Usable tokens of each request, from stack distances alone: a depth can be used if its block, and its snapshot
    if states are needed, are among the most recent ones. One slot of each kind is the running request's own.
    """
    blocks: list[Text] = []
    snapshots: list[Text] = []
    hits = []
    interval = setup.interval or setup.block
    for prompt in prompts:
        hit = 0
        for end in range(interval, len(prompt), interval):
            near = prompt[:end] in blocks[: setup.pages - 1]
            if near and (not setup.states or prompt[:end] in snapshots[: setup.states - 1]):
                hit = end
        hits.append(hit)
        move_to_front(blocks, [prompt[:end] for end in range(setup.block, len(prompt) + 1, setup.block)])
        move_to_front(snapshots, [prompt[:end] for end in range(interval, len(prompt) + 1, interval)])
    return hits


@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_a_replay_hits_what_stack_distances_say_if_it_holds_the_largest_request(kind: str) -> None:
    @cases(100)
    @given(setups((kind,)), traffic())
    def replay(setup: Setup, prompts: list[Text]) -> None:
        largest = max(len(prompt) for prompt in prompts)
        states = setup.states and setup.states + largest // setup.interval
        roomy = Setup(setup.block, setup.pages // 4 + largest // setup.block + 1, states, setup.interval)
        manager, found = Pair(roomy, ready=True), []
        for prompt in prompts:
            serve(manager, prompt)
            found.append(manager.reference.counts["usable_tokens"])
        assert np.diff([0, *found]).tolist() == stack_hits(prompts, roomy)

    replay()


# -- a real trace ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mooncake() -> list[tuple[np.ndarray, int]]:
    """Ids of the full blocks of 512 tokens, and prompt lengths, in order of arrival."""
    if not MOONCAKE.is_file():
        pytest.skip(f"no {MOONCAKE}")
    with gzip.open(MOONCAKE, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    rows.sort(key=lambda row: row["timestamp"])
    return [(np.array(row["hash_ids"], dtype=np.int64), row["input_length"]) for row in rows]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("block", "capacity", "interval", "expected"),
    [
        (512, 1_000_000, None, 8_091_136),
        (512, 1_000_000, 1024, 1_900_544),
        (512, 10_000_000, None, 43_093_504),
        (512, 10_000_000, 1024, 37_467_136),
        (16, 1_000_000, None, 7_991_440),
        (16, 1_000_000, 1024, 1_880_064),
        (16, 10_000_000, None, 42_516_208),
        (16, 10_000_000, 1024, 37_332_992),
    ],
)
def test_the_conversation_trace_hits_what_two_prototypes_found(
    mooncake: list[tuple[np.ndarray, int]], block: int, capacity: int, interval: int | None, expected: int
) -> None:
    states = capacity // interval + 1 if interval else 0
    manager = make_manager(capacity // block + 1, states, block=block, interval=interval or block)
    assert usable_tokens(manager, mooncake, block) == expected


def usable_tokens(manager: KVCacheManager, trace: list[tuple[np.ndarray, int]], block: int) -> int:
    """Hits of a trace; blocks finer than 512 tokens are parts of its blocks."""
    for ids, length in trace:
        keys = (ids[:, None] * (512 // block) + np.arange(512 // block)).ravel()[: length // block]
        prompt = BlockKeys(keys, block, length)
        sequence = manager.create_kv_cache(prompt[:-1])
        assert sequence.resume()
        assert sequence.resize(length + 1)
        sequence.reserve_snapshots(sequence.snapshot_points(length))
        sequence.commit(prompt[sequence.num_committed_tokens :])
        sequence.close()
    manager.check()
    return manager.stats().usable_tokens


@pytest.mark.shared
def test_the_conversation_trace_hits_its_ceiling_with_unlimited_memory(mooncake: list[tuple[np.ndarray, int]]) -> None:
    assert usable_tokens(make_manager(None, 0, block=512), mooncake, 512) == 54_063_104
