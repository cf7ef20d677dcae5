"""Generated traces: what they share follows from how they are built, and is counted here without looking at ids."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.generate import PRESETS, GeneratorSettings, Kind, generate_lines, parse_kind
from ssmcache_sim.trace import Trace

SMALL = replace(PRESETS["chat"], num_sessions=60)


def generated(tmp_path: Path, settings: GeneratorSettings, seed: int = 0) -> tuple[Trace, list[dict[str, Any]]]:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"".join(generate_lines(settings, seed)))
    return read_trace(path, settings.tokens_per_block), [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", PRESETS)
def test_the_same_seed_gives_the_same_bytes(kind: Kind) -> None:
    settings = replace(PRESETS[kind], num_sessions=5)
    first, again, other = (b"".join(generate_lines(settings, seed)) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("block", [16, 64])
def test_a_turn_shares_the_turn_before_and_a_first_turn_its_system_prompt(tmp_path: Path, block: int) -> None:
    settings = replace(SMALL, num_system_prompts=1, tokens_per_block=block)
    trace, rows = generated(tmp_path, settings)
    hits = infinite_cache(trace, None).tokens.tolist()
    known = {row["session_id"]: 0 for row in rows}
    for index, (row, hit) in enumerate(zip(rows, hits, strict=True)):
        before = known[row["session_id"]] or (settings.system_prompt_tokens if index else 0)
        assert hit == min(before, row["input_length"] - 1) // block * block
        known[row["session_id"]] = row["input_length"]
    assert trace.repairs == ()


def test_system_prompts_of_different_kinds_share_nothing(tmp_path: Path) -> None:
    settings = replace(PRESETS["shared-prefix"], num_sessions=200, num_system_prompts=7, system_prompt_tokens=640)
    trace, _ = generated(tmp_path, settings)
    hits = infinite_cache(trace, None).tokens
    assert np.count_nonzero(hits == 0) == 7
    assert np.count_nonzero(hits == 640) == trace.num_requests - 7


def test_branches_of_a_turn_share_their_context_alone(tmp_path: Path) -> None:
    settings = replace(PRESETS["branching"], num_sessions=1, system_prompt_tokens=0, branches=3)
    trace, rows = generated(tmp_path, settings)
    hits = infinite_cache(trace, None).tokens.tolist()
    context = 0  # tokens of the prompt that the session goes on from
    for turn in range(len(rows) // 3):
        siblings, shared = rows[3 * turn : 3 * turn + 3], hits[3 * turn : 3 * turn + 3]
        assert {row["turn"] for row in siblings} == {turn + 1}
        first = siblings[0]["input_length"]
        answered = context if not turn else context + rows[3 * turn - 3]["output_length"]
        assert shared[0] == min(context, first - 1) // 16 * 16
        for row, hit in zip(siblings[1:], shared[1:], strict=True):
            assert hit == min(answered, row["input_length"] - 1) // 16 * 16
        context = first


def test_means_and_rates_are_those_asked_for(tmp_path: Path) -> None:
    settings = replace(SMALL, num_sessions=3000, request_rate=2.0, session_turns_mean=3.0, system_prompt_tokens=0)
    trace, rows = generated(tmp_path, settings)
    assert trace.num_requests / 3000 == pytest.approx(3.0, rel=0.05)
    assert trace.output_tokens.mean() == pytest.approx(settings.output_tokens_mean, rel=0.05)
    firsts = [row for row in rows if row["turn"] == 1]
    assert np.mean([row["input_length"] for row in firsts]) == pytest.approx(settings.input_tokens_mean, rel=0.05)
    assert firsts[-1]["timestamp"] == pytest.approx(1_500_000, rel=0.06)


def test_wrong_knobs_are_one_line() -> None:
    with pytest.raises(TraceError, match=r"^kind of trace: expected one of shared-prefix, chat, agent, branching, got"):
        parse_kind("poem")
    with pytest.raises(TraceError, match=r"^num_sessions: expected a number from 1 on, got 0$"):
        replace(SMALL, num_sessions=0)
    with pytest.raises(TraceError, match=r"^session_turns_mean: expected a number from 1 on, got nan$"):
        replace(SMALL, session_turns_mean=float("nan"))
    with pytest.raises(TraceError, match=r"^num_sessions: expected a whole number, got 2.5$"):
        replace(SMALL, num_sessions=2.5)  # type: ignore[arg-type]
    with pytest.raises(TraceError, match=r"^num_sessions: expected up to 10,000,000, got 100000000000$"):
        replace(SMALL, num_sessions=10**11)
    with pytest.raises(TraceError, match=r"^tokens_per_block: expected up to 1,048,576, got 1099511627776$"):
        replace(SMALL, tokens_per_block=1 << 40)
