"""Stories of requests against a look at the whole cache, and remedies against replays with them."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_watch import Seen, watched
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import GpuCacheTierConfig, HostCacheTierConfig, KVCacheManagerConfig
from ssmcache.models import load_model
from ssmcache_sim.errors import MemoryTooSmallError, UserError
from ssmcache_sim.explain import Explanation, LostPart, RequestStory, explain, requests_of_session, worst_requests
from ssmcache_sim.formats import read_trace
from ssmcache_sim.remedies import Remedy, variants_of
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import Prefill, build_config, make_settings
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
TinyConfig = Callable[..., KVCacheManagerConfig]
Prompts = list[list[int]]
BLOCK, INTERVAL = 2, 4

stretches = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 10)), min_size=1, max_size=3)
branching_prompts = st.lists(
    stretches.map(lambda parts: [token for token, length in parts for _ in range(length)]), min_size=1, max_size=25
)


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
            check_part(part, result.trace.prompt(story.request).keys.tolist(), history[story.request], config)


def check_part(part: LostPart, path: list[int], seen: Seen, config: KVCacheManagerConfig) -> None:
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
        assert ended == extremes([seen.kv_gone[key] for key in keys])
        assert used_by is not None
        assert ended[0] is not None
        assert ended[0] > used_by or len(keys) > 1
    else:
        assert taken == ended == (None, None)


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
        assert found.why_no_memory == ""
        for story in found.stories:
            memories = [remedy for remedy in story.remedies if remedy.setting == "gpu_memory_bytes"]
            assert bool(memories) == (story.usable_tokens < story.ceiling_tokens)
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


def test_without_attention_layers_no_memory_is_named_and_it_is_said_why(sample_path: Path) -> None:
    trace, model = read_trace(sample_path), load_model("mamba2-2.7b")
    chosen = make_settings(model, 512, ssm_reuse_interval=1024, gpu_memory_bytes=2 << 30)
    found = explain(trace, build_config(model, chosen), worst=2, variants=variants_of(model, chosen, trace))
    assert found.why_no_memory.startswith("no attention layers")
    assert all(story.parts and not story.remedies for story in found.stories)
    assert {part.cause for story in found.stories for part in story.parts} <= {
        "snapshot_evicted",
        "snapshot_no_room",
        "alignment",
    }


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
