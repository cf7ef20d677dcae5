"""Every shared trace, read by its own format, hits what was published for it, to the token."""

import json
from pathlib import Path

import pytest

from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats import read_trace

FILES = (
    "dynamo_request_trace_pi.jsonl.gz",
    "exgentic_tau2_retail_blk16.jsonl.xz",
    "llmservingsim_sharegpt_llama31_tokens.jsonl.xz",
    "qwen_bailian_traceA_lite54.jsonl",
    "sharegpt_derived_blk16.jsonl.xz",
    "weka_claude_code_small60.jsonl.xz",
)


@pytest.mark.shared
@pytest.mark.parametrize("name", FILES)
def test_a_shared_trace_hits_the_published_ceilings(shared_traces: Path, name: str) -> None:
    published = json.loads((shared_traces / "expected_infinite_cache.json").read_text())
    (expected,) = [entry for entry in published if entry["file"] == name]
    trace = read_trace(shared_traces / name)
    assert trace.num_requests == expected["requests"]
    assert int(trace.prompt_tokens.sum()) == expected["input_tokens"]
    for row in expected["infinite_cache"]:
        coarse = trace.with_block(row["block"])
        assert int(infinite_cache(coarse, None).kv_tokens.sum()) == row["usable_hit_tokens"]
        for interval, rate in row["interval_token_hit"].items():
            tokens = int(infinite_cache(coarse, int(interval)).tokens.sum())
            assert round(tokens / expected["input_tokens"], 6) == rate


@pytest.mark.shared
@pytest.mark.parametrize("name", ["azure_llm_2023_conv.csv.gz", "lmcache_miniswe_text.jsonl.xz"])
def test_a_trace_that_does_not_tell_what_prompts_share_is_refused_in_one_line(shared_traces: Path, name: str) -> None:
    with pytest.raises(TraceError) as error:
        read_trace(shared_traces / name)
    assert "\n" not in str(error.value)
