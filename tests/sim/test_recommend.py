"""What is recommended against an exhaustive search by replays, and how sure it is against traces made for it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache.config import Admission
from ssmcache.memory.bandwidths import BandwidthProfile
from ssmcache.models import AttentionSpec, LayerSpec, ModelSpec, SsmSpec, load_model
from ssmcache_sim.candidates import Candidate, Place, Question, Shape, near_best, rank
from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.device_profile import DeviceProfile
from ssmcache_sim.errors import MemoryTooSmallError, SettingsError, TraceError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.grid import stack_distances
from ssmcache_sim.parquet import read_parquet
from ssmcache_sim.recommend import recommend
from ssmcache_sim.recommend_results import (
    recommend_directory,
    recommend_manifest,
    recommendation_json,
    write_recommendation,
)
from ssmcache_sim.replay import replay
from ssmcache_sim.results import RunTimes
from ssmcache_sim.settings import ReplaySettings, build_config, make_settings
from ssmcache_sim.splits import Splits, SplitTotals, possible_splits, split_totals
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
# one operation and one byte take a nanosecond
COPIES = BandwidthProfile(0.5e9, host_to_gpu_bytes_per_second=1e9, from_disk_bytes_per_second=1e8)
DEVICE = DeviceProfile("slow", 2e9, 0.5, COPIES, launch_seconds=7e-9, pass_tokens=5, pass_seconds=1e-7)
ATTENTION = AttentionSpec(1, 1, num_query_elements=2, num_output_elements=2)
TINY = ModelSpec(
    name="tiny",
    family="made here",
    source="",
    confidence="",
    layers=(LayerSpec(attention=ATTENTION), LayerSpec(ssm=SsmSpec("mamba1", (3, 2), (1, 1)))),
    kv_dtype="float8_e4m3fn",  # 2 bytes a token
    state_dtype="float16",
    conv_dtype="float8_e4m3fn",  # 13 bytes a state
    num_parameters=50,
)


def every(memory_bytes: int, **more: Any) -> Question:
    """A question that the grid answers alone."""
    return Question(memory_bytes, admissions=("every",), num_phases=0, **more)


prompts_of_few_tokens = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=17), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def sample(sample_path: Path) -> Trace:
    return read_trace(sample_path)


def saved_by_replay(trace: Trace, shape: Shape, memory_bytes: int, num_slots: int, host_bytes: int = 0) -> int:
    """Nanoseconds that `TINY` on `DEVICE` saves, from the hits and snapshots of a replay and a walk over the tokens."""
    setting = make_settings(
        TINY,
        shape.tokens_per_block,
        gpu_memory_bytes=memory_bytes,
        ssm_reuse_interval=shape.ssm_reuse_interval,
        ssm_fraction=num_slots * 13 / memory_bytes,
        admission=shape.admission,
        host_memory_bytes=host_bytes,
    )
    return saved_by_settings(trace, setting)


def saved_by_settings(trace: Trace, setting: ReplaySettings, front_tokens: int = 0) -> int:
    """The same, of settings; what the first tokens of each prompt cost is left out."""
    result = replay(trace, build_config(TINY, setting))
    totals, step = result.totals, setting.ssm_reuse_interval
    assert totals.snapshots is not None
    assert step is not None
    copy = 7 + 2 * 13
    lifted = [moved for moved in totals.moved or () if (moved.source_tier, moved.tier) == ("host", "gpu")]
    time = -copy * totals.snapshots.taken - sum(moved.num_bytes for moved in lifted)
    for prompt, start in zip(trace.prompt_tokens.tolist(), result.usable.tolist(), strict=True):
        # a token costs its parameters, its recurrence, and a pair with each token before it and half of itself
        time += sum(2 * 50 + 16 * 6 + 8 * position + 4 for position in range(front_tokens, start))
        passes = in_pass = 0
        for position in range(start, prompt):
            passes += in_pass == 0
            end = position + 1
            cut = end == prompt // step * step if setting.admission == "last" else end % step == 0
            in_pass = 0 if in_pass == 4 or cut else in_pass + 1
        time += 100 * (-(-prompt // 5) - passes) - (copy if start else 0)
    return time


@settings(max_examples=25, deadline=None)
@given(prompts=prompts_of_few_tokens, more_bytes=st.integers(0, 60))
def test_the_best_is_the_best_of_all_replays(trace_of: TraceOf, prompts: list[list[int]], more_bytes: int) -> None:
    trace = trace_of(prompts, 2)
    memory_bytes = max(map(len, prompts)) * 2 + 4 + 2 * 13 + more_bytes
    question = every(memory_bytes, tokens_per_block=(2, 4), device=DEVICE, num_pieces=0)
    answer = recommend(trace, TINY, question)
    left_out = {each.shape for each in answer.left_out}
    longest = max(map(len, prompts))
    saved = {}
    for block, interval in product((2, 4), {choice.settings.ssm_reuse_interval for choice in answer.choices}):
        shape = Shape(block, interval)
        assert interval is not None
        if interval % block or shape in left_out:
            continue
        for num_slots in range(longest // interval + 1, memory_bytes // 13 + 1):
            if (memory_bytes - num_slots * 13) // (2 * block) > longest // block:
                saved[shape, num_slots] = saved_by_replay(trace, shape, memory_bytes, num_slots)
    best = answer.best
    assert best.saved_ns == max(saved.values())
    chosen = Shape(best.settings.tokens_per_block, best.settings.ssm_reuse_interval)
    assert saved[chosen, best.num_slots] == best.saved_ns
    assert best.near_best_slots is not None
    low, high = best.near_best_slots
    near = {slots for (shape, slots), value in saved.items() if shape == chosen and low <= slots <= high}
    assert near == set(range(low, high + 1))
    assert min(saved[chosen, slots] for slots in near) >= best.saved_ns - abs(best.saved_ns) / 100
    if answer.runner_up is not None:
        others = [value for (shape, _), value in saved.items() if shape.step != chosen.step]
        assert answer.runner_up.saved_ns == max(others)


@pytest.mark.parametrize(("model", "gib"), [("nemotron-h-8b", 320), ("qwen3.5-9b", 40), ("llama-3.1-8b", 100)])
def test_recommended_cells_of_the_sample_equal_their_replays(sample: Trace, model: str, gib: int) -> None:
    spec = load_model(model)
    answer = recommend(sample, spec, every(gib << 30, num_pieces=0))
    for choice in (answer.best, answer.runner_up, answer.choices[-1]):
        assert choice is not None
        totals = replay(sample, build_config(spec, choice.settings)).totals
        assert choice.hit_tokens == totals.usable_hit_tokens
        assert choice.snapshots_taken == (totals.snapshots.taken if totals.snapshots and choice.num_slots else 0)
        assert choice.ceiling.hit_tokens == totals.ceiling_hit_tokens
        if choice.settings.tokens_per_block == sample.tokens_per_block:
            assert answer.kv_ceiling_hit_tokens == totals.kv_ceiling_hit_tokens
        pools = [peak.pool_bytes for peak in totals.peaks]
        assert pools[0] == choice.num_pages * choice.page_bytes
        assert pools[1:] == ([choice.num_slots * choice.slot_bytes] if choice.num_slots else [])


@settings(max_examples=25, deadline=None)
@given(prompts=prompts_of_few_tokens, more_bytes=st.integers(0, 60), host_bytes=st.sampled_from((0, 60)))
def test_what_is_searched_by_replays_saves_what_its_replay_saves(
    trace_of: TraceOf, prompts: list[list[int]], more_bytes: int, host_bytes: int
) -> None:
    trace = trace_of(prompts, 2)
    memory_bytes = max(map(len, prompts)) * 2 + 4 + 2 * 13 + more_bytes
    question = Question(
        memory_bytes, tokens_per_block=(2,), device=DEVICE, num_pieces=0, host_memory_bytes=host_bytes, num_phases=0
    )
    answer = recommend(trace, TINY, question)
    exact = [choice for choice in answer.choices if choice.by != "estimate"]
    assert answer.choices[: len(exact)] == tuple(exact)
    assert answer.best.saved_ns == max(choice.saved_ns for choice in exact)
    for choice in exact:
        assert saved_by_settings(trace, choice.settings) == pytest.approx(choice.saved_ns, abs=2 * len(prompts))
        assert choice.hit_tokens == sum(choice.hit_tokens_by_tier)


@pytest.mark.parametrize("host_bytes", [0, 80])
def test_the_search_finds_nearly_the_best_of_all_replays(trace_of: TraceOf, host_bytes: int) -> None:
    random, regrets = np.random.default_rng(3), []
    for _ in range(12):
        stems = [random.integers(0, 2, 12).tolist() for _ in range(4)]
        prompts = [
            stems[random.integers(4)][: random.integers(4, 13)] + random.integers(0, 9, random.integers(1, 6)).tolist()
            for _ in range(40)
        ]
        trace, memory_bytes = trace_of(prompts, 2), 160
        question = Question(
            memory_bytes,
            tokens_per_block=(2,),
            device=DEVICE,
            num_pieces=0,
            num_phases=0,
            admissions=("last",),
            host_memory_bytes=host_bytes,
        )
        answer = recommend(trace, TINY, question)
        longest = max(map(len, prompts))
        best = max(
            saved_by_replay(trace, Shape(2, interval, "last"), memory_bytes, num_slots, host_bytes)
            for interval in {choice.shape.ssm_reuse_interval for choice in answer.choices}
            for num_slots in range(2, memory_bytes // 13)
            if (memory_bytes - num_slots * 13) // 4 > longest // 2
        )
        regrets.append((best - answer.best.saved_ns) / abs(best))
        assert answer.num_replays <= 24
    assert np.mean(regrets) < 0.01
    assert np.median(regrets) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("disk_gib", [0, 100])
def test_attention_on_tiers_is_told_by_the_grid_as_its_replay_would(sample: Trace, disk_gib: int) -> None:
    spec = load_model("llama-3.1-8b")
    question = Question(60 << 30, host_memory_bytes=100 << 30, disk_memory_bytes=disk_gib << 30, num_pieces=2)
    answer = recommend(sample, spec, question)
    assert answer.num_replays == 0
    for choice in answer.choices:
        result = replay(sample, build_config(spec, choice.settings))
        by_tier = result.usable_by_tier.sum(axis=1)
        assert choice.hit_tokens_by_tier == tuple(by_tier.tolist())
        nothing = np.zeros_like(sample.prompt_tokens)
        step = choice.settings.tokens_per_block
        cost, prompts = answer.cost, sample.prompt_tokens
        # 128 KiB of KV a token; 54.6 GB/s from the host, 1.1 GB/s from the disk
        lifts = by_tier[1] * 131_072 / 54.6 + (by_tier[2] * 131_072 / 1.1 if disk_gib else 0)
        reuse = cost.reuse_ns(prompts, nothing, step) - cost.reuse_ns(prompts, result.usable, step)
        assert choice.saved_ns == pytest.approx(int(reuse.sum()) - lifts, abs=2)


def test_lower_tiers_add_to_what_is_saved_and_a_slow_one_can_cost_more_than_it_saves(sample: Trace) -> None:
    spec = load_model("llama-3.1-8b")
    alone = recommend(sample, spec, Question(60 << 30, num_pieces=0))
    host = recommend(sample, spec, Question(60 << 30, host_memory_bytes=200 << 30, num_pieces=0))
    slow = replace(Question(1).device, bandwidths=BandwidthProfile(host_to_gpu_bytes_per_second=1e8))
    slower = recommend(sample, spec, Question(60 << 30, host_memory_bytes=200 << 30, num_pieces=0, device=slow))
    assert slower.best.saved_ns < alone.best.saved_ns < host.best.saved_ns
    assert slower.best.hit_tokens == host.best.hit_tokens


def test_a_hybrid_on_tiers_is_replayed_and_says_where_hits_lay(sample: Trace) -> None:
    spec = load_model("nemotron-h-8b")
    question = Question(
        40 << 30, host_memory_bytes=100 << 30, ssm_reuse_intervals=(2048, 8192), num_pieces=1, num_phases=1
    )
    told: list[int] = []
    answer = recommend(sample, spec, question, progress=told.append)
    assert answer.best.by == "replay"
    assert told == sorted(told)
    assert told[-1] == 100
    result = replay(sample, build_config(spec, answer.best.settings), prefill="chunked")
    assert answer.best.hit_tokens_by_tier == tuple(result.usable_by_tier.sum(axis=1).tolist())
    assert [case.label for case in answer.certainty.cases][-1] == "half the bandwidth of host and disk"
    assert answer == recommend(sample, spec, question)


def test_no_more_settings_are_replayed_than_may_be(sample: Trace) -> None:
    question = Question(
        40 << 30,
        host_memory_bytes=100 << 30,
        tokens_per_block=(512,),
        ssm_reuse_intervals=(2048, 8192),
        num_pieces=0,
        num_replays=1,
    )
    answer = recommend(sample, load_model("nemotron-h-8b"), question)
    assert answer.num_replays == 1
    assert answer.num_promising > 0
    assert [choice.by for choice in answer.choices] == ["replay", "estimate", "estimate", "estimate"]
    assert answer.runner_up is None


def test_a_tier_that_holds_nothing_is_refused(sample: Trace) -> None:
    with pytest.raises(MemoryTooSmallError, match="host memory too small"):
        recommend(sample, load_model("nemotron-h-8b"), Question(40 << 30, host_memory_bytes=1 << 20))


def test_last_boundaries_are_recommended_where_they_save_more(sample: Trace) -> None:
    spec = load_model("nemotron-h-8b")
    both, one = (recommend(sample, spec, question) for question in (Question(320 << 30), every(320 << 30)))
    assert (both.best.settings.admission, one.best.settings.admission) == ("last", "every")
    assert both.best.saved_ns > one.best.saved_ns
    by_grid = [choice for choice in both.choices if choice.settings.admission == "every"]
    assert [choice.saved_ns for choice in by_grid] == [choice.saved_ns for choice in one.choices]


@pytest.mark.shared
def test_the_choice_for_the_conversation_trace_equals_its_replay(conversation: Trace) -> None:
    spec = load_model("nemotron-h-8b")
    answer = recommend(conversation, spec, Question(640 << 30))
    hits = replay(conversation, build_config(spec, answer.best.settings)).totals.usable_hit_tokens
    assert answer.best.hit_tokens == hits
    assert answer.best.ceiling.hit_tokens >= hits
    assert answer.kv_ceiling_hit_tokens == 54_063_104


def test_the_same_question_gives_the_same_answer(sample: Trace) -> None:
    spec, question = load_model("qwen3.5-9b"), Question(40 << 30)
    assert recommend(sample, spec, question) == recommend(sample, spec, question)


def test_only_settings_that_were_asked_for_are_chosen_from(sample: Trace) -> None:
    asked = Question(100 << 30, tokens_per_block=(1024, 2048), ssm_reuse_intervals=(3072, 4096), num_pieces=0)
    answer = recommend(sample, load_model("qwen3.5-9b"), asked)
    chosen = {(each.settings.tokens_per_block, each.settings.ssm_reuse_interval) for each in answer.choices}
    assert chosen == {(1024, 3072), (1024, 4096), (2048, 4096)}


def test_choices_are_ranked_by_time_and_not_by_hits(sample: Trace) -> None:
    answer = recommend(sample, load_model("nemotron-h-8b"), every(320 << 30))
    saved = [choice.saved_ns for choice in answer.choices]
    assert saved == sorted(saved, reverse=True)
    # a small interval hits more here, but cuts passes and copies states more often
    assert answer.best.hit_tokens < max(choice.hit_tokens for choice in answer.choices)
    at_once = BandwidthProfile(gpu_bytes_per_second=1e30)
    free = replace(every(320 << 30).device, pass_seconds=0.0, bandwidths=at_once, launch_seconds=0.0)
    answer = recommend(sample, load_model("nemotron-h-8b"), every(320 << 30, device=free, num_pieces=0))
    assert answer.best.settings.ssm_reuse_interval == 3072


def totals_of(*saved_ns: int, hits: int = 0) -> SplitTotals:
    saved = np.array(saved_ns, dtype=np.int64)
    return SplitTotals(np.full_like(saved, hits), saved, np.zeros_like(saved))


def candidate(block: int, interval: int) -> Candidate:
    return Candidate(Shape(block, interval), Splits(100, 1, 1, 1, 5))


def test_of_equal_splits_the_middle_one_is_taken() -> None:
    assert rank([candidate(1, 1)], [totals_of(1, 7, 7, 7, 2)]) == [Place(0, 2)]


def test_of_equal_candidates_more_hits_then_the_longer_interval_then_the_smaller_block() -> None:
    equal = [candidate(1, 4), candidate(4, 8), candidate(2, 8), candidate(2, 4)]
    totals = [totals_of(5), totals_of(5), totals_of(5), totals_of(5, hits=1)]
    assert [place.candidate for place in rank(equal, totals)] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("saved", "split", "near"),
    [
        ((100, 99, 98, 100, 99, 100), 3, (3, 5)),
        ((100, 99, 100), 0, (0, 2)),
        ((-102, -101, -100, -101), 2, (1, 3)),
        ((0, 5, 0), 1, (1, 1)),
    ],
)
def test_near_the_best_is_what_loses_a_hundredth_at_most(
    saved: tuple[int, ...], split: int, near: tuple[int, int]
) -> None:
    assert near_best(totals_of(*saved), split, 0.01) == near


def test_the_range_of_splits_near_the_best_is_as_wide_as_can_be(sample: Trace) -> None:
    answer = recommend(sample, load_model("nemotron-h-8b"), every(320 << 30, num_pieces=0))
    best = answer.best
    assert best.near_best_slots is not None
    block, interval = best.settings.tokens_per_block, best.settings.ssm_reuse_interval
    assert interval is not None
    splits = possible_splits(
        121_924, interval, 320 << 30, tokens_per_block=block, page_bytes=block * 16_384, slot_bytes=102_137_856
    )
    assert isinstance(splits, Splits)
    distances = stack_distances(sample, [block, interval])
    saved = split_totals(sample, distances, block, interval, splits, answer.cost).saved_ns / best.saved_ns
    first, last = (slots - splits.first for slots in best.near_best_slots)
    assert saved[first : last + 1].min() >= 0.99
    assert max(saved[first - 1], saved[last + 1]) < 0.99


# ---- how sure ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(prompts=prompts_of_few_tokens, data=st.data())
def test_a_piece_is_the_trace_of_its_requests(trace_of: TraceOf, prompts: list[list[int]], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(prompts) - 1))
    stop = data.draw(st.integers(start + 1, len(prompts)))
    part, alone = trace_of(prompts, 2).part(start, stop), trace_of(prompts[start:stop], 2)
    assert part.prompt_tokens.tolist() == alone.prompt_tokens.tolist()
    assert infinite_cache(part, 4).tokens.tolist() == infinite_cache(alone, 4).tokens.tolist()


def test_halves_and_pieces_are_judged_as_traces_of_their_own(sample: Trace) -> None:
    spec, question = load_model("qwen3.5-9b"), every(40 << 30, num_pieces=3, seed=5)
    answer = recommend(sample, spec, question)
    parts = answer.certainty.traffic_cases
    assert [case.kind for case in parts] == ["half", "half", "piece", "piece", "piece"]
    assert {case.num_requests for case in parts} == {500}
    for case, (start, stop) in zip(parts[:2], ((0, 500), (500, 1000)), strict=True):
        asked = replace(question, num_pieces=0)
        alone = recommend(sample.part(start, stop), spec, asked)
        assert case.own_saved_share == alone.saved_share(alone.best.saved_ns)
        assert case.own_shape.ssm_reuse_interval == alone.best.settings.ssm_reuse_interval
        assert case.best_saved_share <= case.own_saved_share
    assert [case.label for case in parts] != [
        case.label for case in recommend(sample, spec, replace(question, seed=6)).certainty.traffic_cases
    ]


def test_costs_are_judged_one_change_at_a_time(sample: Trace) -> None:
    spec, question = load_model("nemotron-h-8b"), every(320 << 30, num_pieces=0)
    answer = recommend(sample, spec, question)
    cases = {case.label: case for case in answer.certainty.cases if case.kind == "cost"}
    assert list(cases) == [
        "0.5 times the FLOP/s",
        "1.5 times the FLOP/s",
        "0 ms a pass",
        "20 ms a pass",
        "prefill reserved",
    ]
    reserved = recommend(sample, spec, replace(question, prefill="reserved"))
    case = cases["prefill reserved"]
    assert case.own_shape.ssm_reuse_interval == reserved.best.settings.ssm_reuse_interval
    assert case.own_saved_share == reserved.saved_share(reserved.best.saved_ns)


@pytest.mark.parametrize("admission", ["every", "last"])
def test_phases_save_the_time_of_the_trace_s_own_tokens(trace_of: TraceOf, admission: Admission) -> None:
    prompts = [[session, *range(10, 26 + session)] for session in (1, 1, 2, 2, 1, 2, 1, 2)]
    trace = trace_of(prompts, 2)
    question = Question(
        330, device=DEVICE, num_pieces=0, ssm_reuse_intervals=(8,), tokens_per_block=(2,), admissions=(admission,)
    )
    answer = recommend(trace, TINY, question)
    phases = answer.certainty.phase_cases
    assert [case.label for case in phases] == ["2 tokens in front", "4 tokens in front", "6 tokens in front"]
    for shift, case in zip((2, 4, 6), phases, strict=True):
        longer = trace_of([[90 + i for i in range(shift)] + prompt for prompt in prompts], 2)
        saved = saved_by_settings(longer, answer.best.settings, front_tokens=shift)
        plain = sum(
            sum(2 * 50 + 16 * 6 + 8 * position + 4 for position in range(shift, len(prompt) + shift))
            + 100 * -(-(len(prompt) + shift) // 5)
            for prompt in prompts
        )
        assert case.best_saved_share == pytest.approx(saved / plain, abs=1e-12)


def test_shifts_that_leave_no_room_for_the_longer_prompts_are_left_out(trace_of: TraceOf) -> None:
    trace = trace_of([list(range(16))] * 3, 2)
    pages_and_states = (16 // 2 + 1) * 4 + (16 // 8 + 1) * 13  # not one page more
    question = every(pages_and_states, device=DEVICE, num_pieces=0, ssm_reuse_intervals=(8,), tokens_per_block=(2,))
    assert recommend(trace, TINY, replace(question, num_phases=3)).certainty.phase_cases == ()


def test_a_runner_up_that_saves_as_much_is_within_noise(trace_of: TraceOf) -> None:
    answer = recommend(trace_of([[1], [2], [3], [4]] * 2, 2), load_model("llama-3.1-8b"), Question(1 << 30))
    assert answer.runner_up is not None
    assert (answer.certainty.margin_share, answer.certainty.noise_share) == (0, 0)
    assert answer.certainty.within_noise


def test_a_runner_up_that_is_always_far_behind_is_not_within_noise(sample: Trace) -> None:
    question = every(320 << 30, ssm_reuse_intervals=(4096, 98_304))
    certainty = recommend(sample, load_model("nemotron-h-8b"), question).certainty
    assert certainty.margin_share > certainty.noise_share > 0
    assert not certainty.within_noise
    assert certainty.noise_share == pytest.approx(stdev(case.margin_share for case in certainty.traffic_cases))
    assert all(case.margin_share > 0 for case in certainty.traffic_cases)


def test_one_request_has_no_parts(trace_of: TraceOf) -> None:
    answer = recommend(trace_of([[1, 2, 3, 4, 5]], 2), TINY, Question(100, device=DEVICE))
    assert answer.certainty.part_cases == ()
    assert answer.best.hit_tokens == 0
    assert answer.best.saved_ns < 0  # passes are cut and states copied for nothing


# ---- errors and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "question", "error", "message"),
    [
        ("mamba2-2.7b", Question(40 << 30), SettingsError, "mamba2-2.7b: expected a model with attention layers"),
        ("qwen3.5-9b", Question(1 << 30), MemoryTooSmallError, "memory too small for the largest request (121924 "),
        ("qwen3.5-9b", Question(1 << 36, ssm_reuse_intervals=(700,)), SettingsError, "ssm_reuse_interval: expected a"),
        ("qwen3.5-9b", Question(1 << 36, tokens_per_block=(256,)), TraceError, "tokens_per_block: expected a multi"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    sample: Trace, model: str, question: Question, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        recommend(sample, load_model(model), question)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_memory_that_is_asked_for_is_enough(sample: Trace) -> None:
    spec = load_model("qwen3.5-9b")
    with pytest.raises(MemoryTooSmallError) as caught:
        recommend(sample, spec, Question(1 << 30))
    enough = int(str(caught.value).split("at least ")[1].split()[0])
    assert len(recommend(sample, spec, Question(enough, num_pieces=0)).choices) >= 1
    with pytest.raises(MemoryTooSmallError):
        recommend(sample, spec, Question(enough - 1))


def test_the_directory_holds_the_answer_and_the_same_bytes_for_the_same_input(sample: Trace, tmp_path: Path) -> None:
    spec, question = load_model("qwen3.5-9b"), Question(40 << 30)
    manifest = recommend_manifest(sample, spec.name, question)
    for name in ("a", "b"):
        answer = recommend(sample, spec, question)
        with recommend_directory(tmp_path / name) as folder:
            write_recommendation(folder, answer, manifest, RunTimes("2026-01-01T00:00:00+00:00", 1.0))
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert sorted(files) == ["manifest.json", "recommendation.json", "settings.parquet"]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    rows = read_parquet(tmp_path / "a" / "settings.parquet")
    best = recommendation_json(answer, manifest)["best"]
    assert {name: None if pd.isna(value) else value for name, value in rows.iloc[0].to_dict().items()} == best
    assert len(rows) == len(answer.choices)
