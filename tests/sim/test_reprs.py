"""What a person sees of the objects of the simulator: short, with units."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ssmcache.models import load_model
from ssmcache_sim import (
    Question,
    ReadOptions,
    build_config,
    describe,
    make_settings,
    parse_session_start,
    read_trace,
    recommend_run,
    replay_run,
    sweep_run,
)
from ssmcache_sim.phase import PhaseCeilings
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import ReplaySettings
from ssmcache_sim.sweep import SweptCell
from ssmcache_sim.trace import LengthTrace, Trace

GIB = 1 << 30
HYBRID = load_model("nemotron-h-8b")
TraceOf = Callable[[Sequence[Sequence[int]], int], Trace]


@pytest.fixture(scope="module")
def sample(sample_path: Path) -> Trace:
    return read_trace(sample_path)


@pytest.fixture(scope="module")
def settings() -> ReplaySettings:
    return make_settings(HYBRID, 512, gpu_memory_bytes=320 * GIB, ssm_reuse_interval=4096)


def test_a_trace_tells_requests_tokens_and_block(trace_of: TraceOf) -> None:
    trace = trace_of([range(10), range(4)], 4)
    assert repr(trace) == f"Trace({trace.name})\n  2 requests in 0 s, 14 prompt tokens in blocks of 4"


def test_a_trace_of_sessions_counts_them_and_one_of_lengths_says_so(write_trace: Callable[..., Path]) -> None:
    row = {
        "id": "a",
        "hash_id_scope": "local",
        "block_size": 64,
        "requests": [{"t": 0, "in": 64, "out": 1, "hash_ids": [1]}],
    }
    options = ReadOptions(session_start=parse_session_start("all"))
    path = write_trace([row], "weka.jsonl")
    assert "1 request of 1 session in 0 s, 64 prompt tokens" in repr(read_trace(path, None, options))
    lengths = LengthTrace("l.csv", "", "azure", np.zeros(1), np.ones(1, np.int64), np.ones(1, np.int64))
    assert repr(lengths) == "LengthTrace(l.csv)\n  1 request in 0 s, 1 prompt token"


def test_a_replay_tells_its_settings_and_rates(sample: Trace, settings: ReplaySettings) -> None:
    result = replay(sample, build_config(HYBRID, settings))
    rates = [result.totals.usable_hit_tokens, result.totals.ceiling_hit_tokens, result.totals.kv_ceiling_hit_tokens]
    usable, ceiling, kv_ceiling = (f"{tokens / 13_732_944:.2%}" for tokens in rates)
    told = (
        f"ReplayTotals(1,000 requests; of 13,732,944 prompt tokens usable {usable}, ceiling {ceiling}, "
        f"KV ceiling {kv_ceiling})"
    )
    assert repr(result.totals) == told
    name = "mooncake_conversation_1000.jsonl.gz"
    assert repr(result) == f"ReplayResult({name}, blocks of 512 tokens: {told})"
    words = "nemotron-h-8b, block 512, interval 4,096, memory 320 GiB"
    assert settings.in_words() == words
    assert repr(replay_run(sample, HYBRID, settings)) == f"ReplayRun({name}, {words})\n  {told}"
    cell = SweptCell(settings, result.totals, "grid", "why", "separate")
    assert repr(cell) == f"SweptCell({words}, grid: {told})"


def test_settings_in_words_name_tiers_and_models_without_states() -> None:
    settings = make_settings(
        load_model("llama-3.1-8b"), 512, gpu_memory_bytes=GIB, host_memory_bytes=2 * GIB, disk_memory_bytes=3 * GIB
    )
    assert settings.in_words() == "llama-3.1-8b, block 512, no SSM layers, GPU 1 GiB, host 2 GiB, disk 3 GiB"


def test_requests_that_are_too_large_are_told(sample: Trace) -> None:
    tight = make_settings(HYBRID, 512, gpu_memory_bytes=GIB, ssm_reuse_interval=4096)
    run = replay_run(sample, HYBRID, tight)
    assert f"1,000 requests, {run.totals.too_large_requests} of them too large;" in repr(run)


def test_a_sweep_counts_its_cells(sample: Trace) -> None:
    run = sweep_run(sample, HYBRID, ssm_reuse_intervals=(300, 2048), gpu_memory_bytes=(8 * GIB, 80 * GIB, None))
    first, second = repr(run).split("\n")
    assert first == (
        "SweepRun(mooncake_conversation_1000.jsonl.gz, nemotron-h-8b: 3 cells, 2 by grid, 1 by replay, "
        "3 impossible combinations left out)"
    )
    rates = run.cells["usable_token_hit_rate"]
    assert second == f"  usable token hit rate {min(rates):.2%} to {max(rates):.2%}"


def test_a_recommendation_tells_the_best_the_runner_up_and_how_sure(sample: Trace) -> None:
    run = recommend_run(sample, HYBRID, Question(gpu_memory_bytes=320 * GIB))
    lines = repr(run).split("\n")
    best, runner_up, sure = run.answer.best, run.answer.runner_up, run.answer.certainty
    assert runner_up is not None
    assert lines[0] == "RecommendRun(mooncake_conversation_1000.jsonl.gz)"
    assert lines[1] == f"Recommendation({best.settings.in_words()})"
    assert f"saves {best.saved_ns / run.answer.plain_ns:.2%} of the prefill time" in lines[2]
    assert f"{best.num_pages:,} KV pages and {best.num_slots:,} SSM slots" in lines[2]
    assert runner_up.settings.in_words() in lines[3]
    assert f"{sure.margin_share:.2%}" in lines[4]
    assert f"{sure.noise_share:.2%}" in lines[4]


def test_ceilings_of_all_shifts_are_three_of_them() -> None:
    low = np.array([10, 40, 20, 0])
    ceilings = PhaseCeilings(4, 1, 100, low, low)
    assert repr(ceilings) == (
        "PhaseCeilings(period of 4 tokens: now 10.00%, worst 0.00% shifted by 3, best 40.00% by 1)"
    )


def test_a_described_trace_is_a_few_lines(sample: Trace) -> None:
    lines = repr(describe(sample, (1024,))).split("\n")
    assert lines[0].startswith("TraceInfo(mooncake_conversation_1000.jsonl.gz, mooncake: 1,000 requests in 330 s")
    median = int(np.percentile(sample.prompt_tokens, 50, method="nearest"))
    assert f"median {median:,} tokens" in lines[1]
    assert lines[2].startswith("  ceilings by interval, blocks of 512 tokens: KV: 21.55%, 1024: ")
