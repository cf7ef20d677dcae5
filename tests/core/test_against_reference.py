"""One request after another, on the manager and on the oracle of `reference.py`: after every call all that can be seen
from outside is equal. `Pair`, which makes the calls, also serves `test_concurrent_sequences.py`.

`REFERENCE_CASES=20` in the environment makes 20 times as many random cases.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmcache import (
    AttentionLayerConfig,
    BlockKeys,
    BufferConfig,
    GpuCacheTierConfig,
    KVCache,
    KVCacheManager,
    KVCacheManagerConfig,
    ReuseScope,
    SimulatedMemory,
    SsmLayerConfig,
)
from tests.core.reference import Prefix, ReferenceCache, ReferenceSequence, Setup

Text = tuple[int, ...]
Tokens = BlockKeys | np.ndarray
SCOPE = ReuseScope()
MOONCAKE = Path(__file__).resolve().parents[3] / "shared" / "traces" / "mooncake_conversation.jsonl.gz"


def cases(number: int) -> settings:
    """So many random cases, times REFERENCE_CASES."""
    factor = int(os.environ.get("REFERENCE_CASES", "1"))
    return settings(
        max_examples=number * factor,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def make_manager(setup: Setup) -> KVCacheManager:
    """The real thing, with exactly these numbers of slots."""
    page_bytes, state_bytes = 64, 100
    layers: list[AttentionLayerConfig | SsmLayerConfig] = []
    if setup.pages:
        layers.append(AttentionLayerConfig(0, (BufferConfig("key", page_bytes),)))
    if setup.states:
        layers.append(SsmLayerConfig(1, (BufferConfig("ssm_state", state_bytes),)))
    quota = setup.pages * page_bytes + setup.states * state_bytes
    config = KVCacheManagerConfig(
        tokens_per_block=setup.block,
        layers=tuple(layers),
        cache_tiers=(GpuCacheTierConfig(quota),),
        ssm_reuse_interval=setup.interval or setup.block,
        max_util_for_resume=setup.max_util,
        ssm_fraction=setup.states * state_bytes / quota if setup.pages and setup.states else None,
    )
    return KVCacheManager(config, SimulatedMemory())


class Pair:
    """The manager and its oracle, given the same calls. `ready`: prompts are `BlockKeys`, else integer tokens."""

    def __init__(self, setup: Setup, ready: bool) -> None:
        self.setup, self.ready = setup, ready
        self.manager, self.reference = make_manager(setup), ReferenceCache(setup)
        self.ids: dict[Prefix, int] = {}
        self.probes: dict[Prefix, tuple[Tokens, ReuseScope]] = {}
        self.sequences: list[tuple[KVCache, ReferenceSequence, Tokens]] = []
        self.seen: dict[str, object] = {}
        self.compare()

    def prefixes(self, text: Text, scope: ReuseScope) -> list[Prefix]:
        prefixes: list[Prefix] = [(scope,)]
        for end in range(self.setup.block, len(text) + 1, self.setup.block):
            prefixes.append((*prefixes[-1], text[end - self.setup.block : end]))
        return prefixes[1:]

    def tokens(self, text: Text, blocks: list[Prefix]) -> Tokens:
        """What the manager is given for a text. Its blocks are looked for in every comparison from now on."""
        keys = [self.ids.setdefault(prefix, 7 * len(self.ids) + 3) for prefix in blocks]
        tokens = BlockKeys(keys, self.setup.block, len(text)) if self.ready else np.array(text, dtype=np.int64)
        for depth, prefix in enumerate(blocks, start=1):
            if prefix not in self.probes:
                self.probes[prefix] = tokens[: depth * self.setup.block], prefix[0]
        return tokens

    def create(self, text: Text, num_prompt: int, scope: ReuseScope = SCOPE) -> int:
        """A sequence of the first tokens of a text, which it may go on to decode; its place in `sequences`."""
        blocks = self.prefixes(text, scope)
        tokens = self.tokens(text, blocks)
        sequence = self.manager.create_kv_cache(tokens[: num_prompt - 1], scope)
        # the block that the last token of the prompt completes is known by its ready key, though not by its tokens
        known = (num_prompt if self.ready else num_prompt - 1) // self.setup.block
        self.sequences.append((sequence, self.reference.create(blocks, known, num_prompt - 1), tokens))
        self.compare()
        return len(self.sequences) - 1

    def resume(self, index: int) -> bool:
        sequence, twin, _ = self.sequences[index]
        return self.agreed(sequence, sequence.resume(), self.reference.resume(twin))

    def resize(self, index: int, capacity: int, history: int | None = None) -> bool:
        sequence, twin, _ = self.sequences[index]
        reason = self.reference.resize(twin, capacity, twin.history if history is None else history)
        return self.agreed(sequence, sequence.resize(capacity, history), reason)

    def agreed(self, sequence: KVCache, granted: bool, reason: str) -> bool:
        assert granted == (not reason)
        assert (sequence.shortage.reason if sequence.shortage else "") == reason
        before = self.seen
        self.compare()
        assert granted or self.seen == before, "a refused call changed something"
        return granted

    def reserve(self, index: int, points: list[int]) -> None:
        sequence, twin, _ = self.sequences[index]
        slots = sequence.reserve_snapshots(points)
        assert set(slots) == self.reference.reserve(twin, points)
        if slots:
            own = {*slots.values(), sequence.ssm_slot(self.manager.state_group)}
            assert len(own) == len(slots) + 1
        self.compare()

    def commit(self, index: int, num_tokens: int) -> None:
        sequence, twin, tokens = self.sequences[index]
        sequence.commit(tokens[twin.committed : twin.committed + num_tokens])
        self.reference.commit(twin, num_tokens)
        self.compare()

    def suspend(self, index: int) -> None:
        sequence, twin, _ = self.sequences[index]
        sequence.suspend()
        self.reference.suspend(twin)
        self.compare()

    def close(self, index: int) -> None:
        sequence, twin, _ = self.sequences.pop(index)
        sequence.close()
        self.reference.close(twin)
        self.compare()

    def compare(self) -> None:
        self.manager.check()
        self.seen = self.look()
        assert self.seen == self.reference.look()

    def look(self) -> dict[str, object]:
        """What can be seen of the manager: blocks and snapshots by probing for every block ever named."""
        blocks, snapshots = set(), set()
        for prefix, (tokens, scope) in self.probes.items():
            match = self.manager.probe_reuse(tokens, scope)
            length = (len(prefix) - 1) * self.setup.block
            if match.tree_tokens == length:
                blocks.add(prefix)
            if self.setup.states and match.usable_tokens == length:
                snapshots.add(prefix)
        return {
            "slots": [
                (group.kind, group.cached_slots, group.num_slots - group.used_slots)
                for group in self.manager.memory_usage().groups
            ],
            "blocks": blocks,
            "snapshots": snapshots,
            "counts": self.counts(),
            "sequences": [
                (s.num_committed_tokens, s.history_length, s.capacity, s.reuse_match, s.num_attention_tokens)
                for s, _, _ in self.sequences
            ],
        }

    def counts(self) -> dict[str, int]:
        stats = self.manager.stats()
        return {
            "lookups": stats.lookups,
            "lookup_tokens": stats.lookup_tokens,
            "tree": stats.tree_tokens,
            "attention": stats.attention_tokens,
            "usable": stats.usable_tokens,
            "taken": stats.snapshots_taken,
            "reused": stats.snapshots_reused,
            "evicted": stats.snapshots_evicted,
            "evicted_unused": stats.snapshots_evicted_unused,
            "pages_evicted": stats.pages_evicted,
            "crossed": stats.snapshots_skipped_crossed,
            "no_room": stats.snapshots_skipped_no_room,
            "history": stats.snapshots_skipped_history,
            "copied": stats.copied_states,
        }


# -- random traffic ------------------------------------------------------------------------------------------------------


@st.composite
def setups(draw: st.DrawFn, kinds: tuple[str, ...] = ("attention", "hybrid", "ssm"), min_block: int = 1) -> Setup:
    kind = draw(st.sampled_from(kinds))
    block = draw(st.integers(min_block, 4))
    pages = 0 if kind == "ssm" else draw(st.integers(1, 20))
    states = 0 if kind == "attention" else draw(st.integers(1, 7))
    interval = 0 if kind == "attention" else block * draw(st.integers(1, 3))
    return Setup(block, pages, states, interval, draw(st.sampled_from((0.3, 0.6, 0.97, 1.0))))


def long_lists(elements: st.SearchStrategy, max_size: int) -> st.SearchStrategy[list]:
    """Lists of which many are long; those of `st.lists` are mostly short."""
    return st.sampled_from((max_size, 1, max_size // 3)).flatmap(
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


# -- sequential replays --------------------------------------------------------------------------------------------------


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
