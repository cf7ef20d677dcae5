"""Stories of requests against a look at the whole cache, and remedies against replays with them."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_watch import Seen, branching_prompts, scarce_windowed, watched
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import GpuCacheTierConfig, HostCacheTierConfig, KVCache, KVCacheManagerConfig
from ssmcache.admission import EveryBoundary, LastBoundary
from ssmcache.models import load_model
from ssmcache_sim.errors import MemoryTooSmallError, UserError
from ssmcache_sim.explain import Explanation, LostPart, RequestStory, explain, requests_of_session, worst_requests
from ssmcache_sim.explain_words import closing_words, lost_words, paragraphs, remedy_words
from ssmcache_sim.formats import read_trace
from ssmcache_sim.remedies import Remedy, variants_of
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import Prefill, build_config, make_settings
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
TinyConfig = Callable[..., KVCacheManagerConfig]
Prompts = list[list[int]]
BLOCK, INTERVAL = 2, 4


def check_parts(explanation: Explanation, config: KVCacheManagerConfig, prefill: Prefill = "reserved") -> None:
    """The parts of each story cover what was lost, and say what a look at the cache shows."""
    result = explanation.result
    history = watched(result.trace, config, prefill, result)
    for story in explanation.stories:
        edges = [story.usable_tokens, *(part.end_token for part in story.parts)]
        assert [part.start_token for part in story.parts] == edges[:-1]
        assert edges[-1] == story.kv_ceiling_tokens
        by_cause = {"kv_evicted": result.lost_evicted - result.lost_to_size, "too_large": result.lost_to_size}
        by_cause["alignment"] = result.lost_alignment
        for cause, tokens in by_cause.items():
            found = [part.num_tokens for part in story.parts if part.cause == cause]
            assert sum(found) == tokens[story.request]
        for part in story.parts:
            path, seen = result.trace.prompt(story.request).keys.tolist(), history[story.request]
            is_kv = part.cause == "kv_evicted"
            capacity = explanation.capacity_blocks if is_kv else explanation.capacity_snapshots
            check_part(part, path, seen, config, capacity)


def check_part(part: LostPart, path: list[int], seen: Seen, config: KVCacheManagerConfig, capacity: int | None) -> None:
    keys = path[part.start_token // BLOCK : part.end_token // BLOCK]
    used_by = seen.used_by.get(keys[-1])
    assert part.last_used_by == used_by
    taken, ended = (part.first_taken, part.last_taken), (part.first_ended, part.last_ended)
    if part.cause.startswith("snapshot_"):
        factor = config.ssm_reuse_interval // BLOCK
        ends = keys[factor - 1 :: factor]
        assert {seen.fate.get(key, "not_admitted") for key in ends} == {part.cause.removeprefix("snapshot_")}
        assert taken == extremes([seen.taken[key] for key in ends if key in seen.taken])
        if part.cause != "snapshot_window":
            assert ended == extremes([seen.ended[key] for key in ends if key in seen.ended])
    elif part.cause == "kv_evicted":
        assert taken == (None, None)
        # where the page of the first lost block is there, that of a window is not
        gone = [seen.kv_gone[key] for key in keys if key in seen.kv_gone] if keys[0] in seen.kv_gone else []
        assert ended == extremes(gone)
        assert used_by is not None
        assert gone or config.has_windows
    else:
        assert taken == ended == (None, None)
    if part.cause in {"kv_evicted", "snapshot_evicted"} and capacity is not None:
        assert part.distance is not None
        assert part.distance > capacity


def extremes(requests: list[int]) -> tuple[int | None, int | None]:
    return (min(requests), max(requests)) if requests else (None, None)


@settings(max_examples=150, deadline=None)
@given(
    prompts=branching_prompts,
    more_pages=st.integers(-3, 20),
    num_states=st.integers(2, 7),
    prefill=st.sampled_from(["reserved", "chunked"]),
)
def test_every_part_of_a_story_is_what_a_look_at_the_cache_shows(
    trace_of: TraceOf,
    tiny_config: TinyConfig,
    prompts: Prompts,
    more_pages: int,
    num_states: int,
    prefill: Prefill,
) -> None:
    num_pages = max(2, max(map(len, prompts)) // BLOCK + 1 + more_pages)
    config = tiny_config(BLOCK, num_pages=num_pages, interval=INTERVAL, num_states=num_states)
    with suppress(MemoryTooSmallError):
        found = explain(trace_of(prompts, BLOCK), config, requests=range(len(prompts)), prefill=prefill)
        check_parts(found, config, prefill)
        for story, prompt in zip(found.stories, prompts, strict=True):
            check_shared(story, prompts[: story.request], prompt)


def check_shared(story: RequestStory, earlier: Prompts, prompt: list[int]) -> None:
    shared = prompt[: story.kv_ceiling_tokens]
    alike = [index for index, one in enumerate(earlier) if one[: len(shared)] == shared]
    assert story.shared_with == (alike[-1] if shared else None)
    used = story.usable_tokens + sum(part.num_tokens for part in story.parts)
    assert used + story.never_seen_tokens + story.last_block_tokens == story.prompt_tokens == len(prompt)


@settings(max_examples=60, deadline=None)
@given(prompts=branching_prompts, num_pages=st.integers(2, 15))
def test_stories_without_ssm_layers_tell_of_kv_alone(
    trace_of: TraceOf, tiny_config: TinyConfig, prompts: Prompts, num_pages: int
) -> None:
    config = tiny_config(BLOCK, num_pages=num_pages)
    with suppress(MemoryTooSmallError):
        found = explain(trace_of(prompts, BLOCK), config, requests=range(len(prompts)))
        check_parts(found, config)


@settings(max_examples=40, deadline=None)
@given(prompts=branching_prompts, host_slots=st.integers(1, 12), num_states=st.integers(2, 5))
def test_stories_of_several_tiers_tell_of_what_left_the_last_one(
    trace_of: TraceOf, tiny_config: TinyConfig, prompts: Prompts, host_slots: int, num_states: int
) -> None:
    num_pages = max(map(len, prompts)) // BLOCK + 2
    config = tiny_config(BLOCK, num_pages=num_pages, interval=INTERVAL, num_states=num_states)
    slot_bytes = sum(layer.buffers[0].size for layer in config.layers)
    config = replace(config, cache_tiers=(*config.cache_tiers, HostCacheTierConfig(host_slots * slot_bytes)))
    found = explain(trace_of(prompts, BLOCK), config, requests=range(len(prompts)))
    check_parts(found, config)


@settings(max_examples=100, deadline=None)
@given(prompts=branching_prompts, page_bytes=st.sampled_from([8, 16, 64]), quota=st.integers(600, 2500))
def test_stories_with_windows_tell_missing_window_pages_from_evicted_kv(
    trace_of: TraceOf, prompts: Prompts, page_bytes: int, quota: int
) -> None:
    with suppress(MemoryTooSmallError):
        config = scarce_windowed(page_bytes, quota)
        found = explain(trace_of(prompts, BLOCK), config, requests=range(len(prompts)))
        check_parts(found, config)


# -- remedies ----------------------------------------------------------------------------------------------------------


def with_memory(config: KVCacheManagerConfig, num_bytes: int) -> KVCacheManagerConfig:
    return replace(config, cache_tiers=(GpuCacheTierConfig(num_bytes),))


@settings(max_examples=120, deadline=None)
@given(prompts=branching_prompts, num_pages=st.integers(3, 20), num_states=st.integers(0, 7), host=st.booleans())
def test_the_memory_named_keeps_it_and_one_byte_less_does_not(
    trace_of: TraceOf, tiny_config: TinyConfig, prompts: Prompts, num_pages: int, num_states: int, host: bool
) -> None:
    trace = trace_of(prompts, BLOCK)
    if num_states < 2:
        config = tiny_config(BLOCK, num_pages=num_pages)
    else:
        config = tiny_config(BLOCK, num_pages=num_pages, interval=INTERVAL, num_states=num_states)
    told = config
    if host:
        slot_bytes = sum(layer.buffers[0].size for layer in config.layers)
        told = replace(config, cache_tiers=(*config.cache_tiers, HostCacheTierConfig(slot_bytes)))
    with suppress(MemoryTooSmallError):
        found = explain(trace, told, requests=range(len(prompts)))
        assert found.why_replayed == ""
        for story in found.stories:
            memories = [remedy for remedy in story.remedies if remedy.setting == "gpu_memory_bytes"]
            if story.usable_tokens == story.ceiling_tokens:
                assert not memories
            elif not memories:  # a tier below can make one request lose what the GPU alone keeps for it
                assert host
                assert replay(trace, config).usable[story.request] == story.ceiling_tokens
            for remedy in memories:
                usable = replay(trace, with_memory(config, remedy.value)).usable[story.request]
                assert usable == remedy.usable_tokens == story.ceiling_tokens
                if remedy.is_least:
                    less = replay(trace, with_memory(config, remedy.value - 1)).usable[story.request]
                    assert less < remedy.usable_tokens


def test_other_intervals_and_blocks_are_what_a_replay_with_them_gives(sample_path: Path) -> None:
    trace, model = read_trace(sample_path), load_model("nemotron-h-8b")
    chosen = make_settings(model, 1024, ssm_reuse_interval=4096, gpu_memory_bytes=320 << 30)
    variants = variants_of(model, chosen, trace)
    found = explain(trace, build_config(model, chosen), worst=40, variants=variants)
    told: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for story in found.stories:
        for remedy in story.remedies:
            told.setdefault((remedy.setting, remedy.value), []).append((story.request, remedy.usable_tokens))
    assert {"ssm_reuse_interval", "tokens_per_block"} <= {setting for setting, _ in told}
    for (setting, value), expected in told.items():
        if setting != "gpu_memory_bytes":
            usable = replay(trace, build_config(model, replace(chosen, **{setting: value}))).usable
            assert [(request, int(usable[request])) for request, _ in expected] == expected
    # no interval that was tried lets a request skip more than the one named
    by_interval = [replay(trace, one).usable for one in variants if one.tokens_per_block == 1024 and _fits(trace, one)]
    for story in found.stories:
        best = max(int(usable[story.request]) for usable in by_interval)
        named = [one.usable_tokens for one in story.remedies if one.setting == "ssm_reuse_interval"]
        assert max([story.usable_tokens, *named]) == max(story.usable_tokens, best)


def _fits(trace: Trace, config: KVCacheManagerConfig) -> bool:
    from ssmcache_sim.grid_cells import GridCapacity, grid_capacity

    return isinstance(grid_capacity(trace, config), GridCapacity)


def test_where_the_grid_is_not_exact_neighbours_are_replayed_and_it_is_said_why(sample_path: Path) -> None:
    trace, model = read_trace(sample_path), load_model("mamba2-2.7b")
    chosen = make_settings(model, 512, ssm_reuse_interval=1024, gpu_memory_bytes=200 << 30)
    found = explain(trace, build_config(model, chosen), worst=20, variants=variants_of(model, chosen, trace))
    assert found.why_replayed.startswith("no attention layers")
    causes = {part.cause for story in found.stories for part in story.parts}
    assert causes <= {"snapshot_evicted", "snapshot_no_room", "alignment"}
    told = [(story.request, remedy) for story in found.stories for remedy in story.remedies]
    assert {remedy.setting for _, remedy in told} == {"gpu_memory_bytes", "ssm_reuse_interval"}
    for request, remedy in told:
        assert (remedy.engine, remedy.is_least) == ("replay", False)
        tried = replay(trace, build_config(model, replace(chosen, **{remedy.setting: remedy.value})))
        assert tried.usable[request] == remedy.usable_tokens > found.result.usable[request]


def test_intervals_of_a_hybrid_with_host_memory_are_replayed_with_it(sample_path: Path) -> None:
    trace, model = read_trace(sample_path), load_model("nemotron-h-8b")
    chosen = make_settings(model, 512, ssm_reuse_interval=2048, gpu_memory_bytes=40 << 30, host_memory_bytes=200 << 30)
    found = explain(trace, build_config(model, chosen), worst=20, variants=variants_of(model, chosen, trace))
    engines = {(remedy.setting, remedy.engine) for story in found.stories for remedy in story.remedies}
    assert engines == {("gpu_memory_bytes", "grid"), ("ssm_reuse_interval", "replay")}
    for story in found.stories:
        for remedy in story.remedies:
            if remedy.engine == "replay":
                tried = replay(trace, build_config(model, replace(chosen, ssm_reuse_interval=remedy.value)))
                assert tried.usable[story.request] == remedy.usable_tokens


# -- words: every cause once, by hand ----------------------------------------------------------------------------------

A, OTHER = [0] * 9, [1] * 9  # boundaries at 4 and 8


def told(explanation: Explanation, config: KVCacheManagerConfig) -> list[str]:
    """All that is said of the first story."""
    story = explanation.stories[0]
    parts = [lost_words(part, story, explanation, config) for part in story.parts]
    remedies = [remedy_words(remedy, config) for remedy in story.remedies]
    return [*paragraphs(story, explanation, config), *parts, *remedies, closing_words(story, explanation)]


@pytest.mark.parametrize(
    ("prompts", "pools", "request_number", "expected"),
    [
        (
            [A, OTHER, A],
            (20, 4),
            2,
            [
                "9 prompt tokens: 4 skipped, 4 lost, 0 never seen before, 1 in the last block.",
                "Its first 8 tokens are those of request 0, 2 requests before it, 2 ms earlier; not all of that was "
                "skipped:",
                "Tokens 4 to 8 (4): their KV was there, but the snapshot at token 8, taken during request 0, was "
                "evicted "
                "during request 1: the memory for states was full. With all that were used since, it took 4 snapshots "
                "(160 B) to keep it; there is room for 3 (120 B).",
                "With GPU memory of 400 B or more, now 320 B, it would have skipped 8 tokens.",
                "",
            ],
        ),
        (
            [A, [0] * 9],
            (20, 2),
            1,
            [
                "9 prompt tokens: 4 skipped, 4 lost, 0 never seen before, 1 in the last block.",
                "Its first 8 tokens are those of request 0, the request before it, 1 ms earlier; not all of that was "
                "skipped:",
                "Tokens 4 to 8 (4): their KV was there, but there is no snapshot at token 8: request 0 found no room "
                "for "
                "it beside the snapshots of its own prompt.",
                "With GPU memory of 240 B or more (which holds the largest request, too), now 160 B, it would have "
                "skipped 8 tokens.",
                "",
            ],
        ),
        (
            [A, OTHER, A],
            (7, 9),
            2,
            [
                "9 prompt tokens: 4 skipped, 4 lost, 0 never seen before, 1 in the last block.",
                "Its first 8 tokens are those of request 0, 2 requests before it, 2 ms earlier; not all of that was "
                "skipped:",
                "Tokens 4 to 8 (4): their KV, last used as a whole by request 0, was evicted during request 1: the "
                "memory for KV was full. With all that was used since, it took 16 tokens of KV (144 B) to keep it; "
                "there is room for 12 (108 B).",
                "With GPU memory of 302 B or more, now 252 B, it would have skipped 8 tokens.",
                "",
            ],
        ),
        (
            [[0] * 3, [0] * 8],
            (20, 9),
            1,
            [
                "8 prompt tokens: 0 skipped, 2 lost, 4 never seen before, 2 in the last block.",
                "Its first 2 tokens are those of request 0, the request before it, 1 ms earlier; not all of that was "
                "skipped:",
                "Tokens 0 to 2 (2): their KV was there, but they are less than one snapshot interval (4 tokens).",
                "None of the other settings that were tried would have let it skip more.",
            ],
        ),
        (
            [[0] * 7, [0] * 7],
            (20, 9),
            1,
            [
                "7 prompt tokens: 4 skipped, 2 lost, 0 never seen before, 1 in the last block.",
                "Its first 6 tokens are those of request 0, the request before it, 1 ms earlier; not all of that was "
                "skipped:",
                "Tokens 4 to 6 (2): their KV was there, but no snapshot is ever taken within an interval (4 tokens), "
                "and "
                "they end before the next.",
                "None of the other settings that were tried would have let it skip more.",
            ],
        ),
        (
            [A, A],
            (20, 9),
            1,
            [
                "9 prompt tokens: 8 skipped, 0 lost, 0 never seen before, 1 in the last block.",
                "Its first 8 tokens are those of request 0, the request before it, 1 ms earlier; nothing of that was "
                "lost.",
                "",
            ],
        ),
        (
            [A, OTHER],
            (20, 9),
            1,
            [
                "9 prompt tokens: 0 skipped, 0 lost, 8 never seen before, 1 in the last block.",
                "No earlier prompt begins with its first block of 2 tokens.",
                "",
            ],
        ),
        (
            [A, [1]],
            (20, 9),
            1,
            [
                "1 prompt token: 0 skipped, 0 lost, 0 never seen before, 1 in the last block.",
                "It has no block but its last one, which no cache skips.",
                "",
            ],
        ),
    ],
)
def test_the_story_is_told_in_plain_words(
    trace_of: TraceOf,
    tiny_config: TinyConfig,
    prompts: Prompts,
    pools: tuple[int, int],
    request_number: int,
    expected: list[str],
) -> None:
    config = tiny_config(BLOCK, num_pages=pools[0], interval=INTERVAL, num_states=pools[1])
    found = explain(trace_of(prompts, BLOCK), config, requests=[request_number])
    assert told(found, config) == expected


def test_the_example_of_the_documentation(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    prompts = [[0] * 4609, [1] * 4097, [0] * 4608 + [2] * 692]
    config = tiny_config(512, num_pages=16, interval=1024, num_states=6)
    found = explain(trace_of(prompts, 512), config, requests=[2])
    (story,) = found.stories
    assert (story.prompt_tokens, story.kv_ceiling_tokens, story.attention_tokens) == (5300, 4608, 3584)
    assert [(part.cause, part.start_token, part.end_token) for part in story.parts] == [
        ("snapshot_evicted", 1024, 3072),
        ("alignment", 3072, 3584),
        ("kv_evicted", 3584, 4608),
    ]
    assert (story.usable_tokens, story.never_seen_tokens, story.last_block_tokens) == (1024, 512, 180)


def test_requests_too_large_are_told_apart_from_evicted_ones(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    short, long = [0] * 9, [0] * 40
    trace, config = trace_of([short, long, long, short, [0] * 13], 4), tiny_config(4, num_pages=4)
    for request, words in (
        (2, "Tokens 0 to 36 (36): the request does not fit into the memory, even alone, and was served without the "
            "cache."),
        (4, "Tokens 8 to 12 (4): no earlier request that fits into the memory had them; the others were served without "
            "the cache."),
    ):  # fmt: skip
        found = explain(trace, config, requests=[request])
        assert told(found, config)[2] == words
        assert found.stories[0].remedies[0].usable_tokens == found.stories[0].ceiling_tokens


_resize = KVCache.resize


@pytest.mark.parametrize(
    ("owner", "name", "value", "prefill", "words"),
    [
        (
            KVCache,
            "reserve_snapshots",
            lambda self, points: {},
            "reserved",
            "there is no snapshot at the ends of these 2 intervals: request 0 passed there inside one commit, without "
            "a "
            "slot reserved for it.",
        ),
        (
            KVCache,
            "resize",
            lambda self, capacity: _resize(self, capacity, capacity - 1),
            "chunked",
            "there is no snapshot at the ends of these 2 intervals: request 0 had computed beyond it before its tokens "
            "were committed.",
        ),
        (
            EveryBoundary,
            "points",
            LastBoundary.points,
            "reserved",
            "nobody asked for a snapshot at the ends of these 2 intervals.",
        ),
    ],
)
def test_snapshots_that_an_engine_or_a_policy_left_out_are_told_apart(
    trace_of: TraceOf,
    tiny_config: TinyConfig,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    value: object,
    prefill: Prefill,
    words: str,
) -> None:
    config = tiny_config(BLOCK, num_pages=20, interval=INTERVAL, num_states=9)
    monkeypatch.setattr(owner, name, value)
    found = explain(trace_of([[0] * 14, A], BLOCK), config, requests=[1], prefill=prefill)
    assert told(found, config)[2] == f"Tokens 0 to 8 (8): their KV was there, but {words}"
    assert found.stories[0].remedies == ()


def test_a_snapshot_that_was_decoded_past_is_told_from_one_that_nobody_asked_for(
    trace_with_outputs: Callable[..., Trace], tiny_config: TinyConfig
) -> None:
    config = replace(tiny_config(BLOCK, num_pages=40, interval=INTERVAL, num_states=9), admission="last")
    # decoded up to 12: what was kept at 4 and 8 on the way is gone
    pairs = [([0], [1] * 12), ([0, *[1] * 9], [])]
    found = explain(trace_with_outputs(pairs, BLOCK), config, requests=[1])
    assert told(found, config)[2] == (
        "Tokens 0 to 8 (8): their KV was there, but the snapshots at the ends of these 2 intervals, taken during "
        "request 0, were given up for a later one of the same request."
    )
    asked_at_once = [([0, *[1] * 12], []), ([0, *[1] * 9], [])]
    found = explain(trace_with_outputs(asked_at_once, BLOCK), config, requests=[1])
    assert "nobody asked for a snapshot" in told(found, config)[2]


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_the_worst_requests_lost_the_most_and_come_in_order(sample_path: Path) -> None:
    trace, model = read_trace(sample_path), load_model("nemotron-h-8b")
    config = build_config(model, make_settings(model, 512, ssm_reuse_interval=1024, gpu_memory_bytes=320 << 30))
    told: list[int] = []
    found = explain(trace, config, worst=5, progress=told.append)
    result = replay(trace, config)
    lost = (result.kv_ceiling - result.usable).tolist()
    expected = sorted(range(trace.num_requests), key=lambda request: (-lost[request], request))[:5]
    assert [story.request for story in found.stories] == expected == worst_requests(result, 5)
    assert found.result.totals == result.totals
    assert told == sorted(told)
    assert told[-1] == 2 * trace.num_requests


def test_a_request_that_the_trace_does_not_have_is_one_line(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    trace, config = trace_of([[0] * 9], BLOCK), tiny_config(BLOCK, num_pages=9)
    with pytest.raises(UserError, match="request: expected 0 to 0, got 1"):
        explain(trace, config, requests=[1])
    with pytest.raises(UserError, match=r"session: expected a trace that names sessions, got .*, which names none"):
        requests_of_session(trace, "a")


def test_frames_have_a_row_a_part_and_a_row_a_remedy(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    config = tiny_config(BLOCK, num_pages=20, interval=INTERVAL, num_states=4)
    found = explain(trace_of([[0] * 9, [1] * 9, [0] * 9], BLOCK), config, requests=[2, 0])
    assert [story.request for story in found.stories] == [2, 0]
    parts, remedies = found.parts(), found.remedies()
    assert parts[["request", "cause", "start_token", "end_token"]].to_numpy().tolist() == [
        [2, "snapshot_evicted", 4, 8]
    ]
    assert parts[["first_taken", "last_ended"]].to_numpy().tolist() == [[0, 1]]
    assert remedies["setting"].tolist() == ["gpu_memory_bytes"]
    assert found.stories[1].parts == ()
    assert isinstance(found.stories[0].remedies[0], Remedy)
    assert np.array_equal(found.result.usable, replay(found.result.trace, config).usable)
