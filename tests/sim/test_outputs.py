"""Which outputs a trace knows, format by format, against conversations whose tokens are all known."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats import ReadOptions, read_requests, read_trace
from ssmcache_sim.formats.binary import write_binary
from ssmcache_sim.generate import PRESETS, generate_lines
from ssmcache_sim.trace_info import describe

WriteTrace = Callable[..., Path]
WITH_OUTPUTS = ReadOptions(outputs=True)


class Request(NamedTuple):
    session: int
    turn: int
    prompt: list[int]
    output: list[int]


def rows_of(requests: Sequence[Request], block: int, numbered: bool = True) -> list[dict[str, Any]]:
    """Mooncake rows; an id stands for all tokens up to the end of its block. `numbered`: with numbers of turns."""
    ids: dict[tuple[int, ...], int] = {}
    rows = []
    for time, (session, turn, prompt, output) in enumerate(requests):
        row: dict[str, Any] = {"timestamp": time, "session_id": session, "input_length": len(prompt)}
        row |= {"output_length": len(output), **({"turn": turn} if numbered else {})}
        ends = range(block, len(prompt) + block, block)
        rows.append({**row, "hash_ids": [ids.setdefault(tuple(prompt[:end]), len(ids)) for end in ends]})
    return rows


def token_rows(requests: Sequence[Request]) -> list[dict[str, Any]]:
    return [
        {"arrival_time_ns": time, "input_toks": len(prompt), "output_toks": len(output)}
        | {"input_tok_ids": prompt, "output_tok_ids": output}
        for time, (_, _, prompt, output) in enumerate(requests)
    ]


def brute_force_hits(requests: Sequence[Request], known: Sequence[bool], block: int, interval: int | None) -> list[int]:
    """From a set of all token prefixes that earlier requests left at block ends."""
    left: set[tuple[int, ...]] = set()
    hits = []
    for (_, _, prompt, output), is_known in zip(requests, known, strict=True):
        ends = [end for end in range(0, len(prompt), block) if end == 0 or tuple(prompt[:end]) in left]
        deepest = max(ends, default=0)
        hits.append(deepest if interval is None else deepest // interval * interval)
        path = prompt + output[:-1] if is_known else prompt
        left |= {tuple(path[:end]) for end in range(block, len(path) + 1, block)}
    return hits


def linear(turns_of: Sequence[tuple[Sequence[tuple[int, int]], int]], order: Sequence[int]) -> list[Request]:
    """Sessions whose every prompt is the one before, its answer, and new tokens; interleaved as `order` says.

    A session is a list of (new tokens, answer tokens) of each turn, and which of three system prompts it has.
    """
    sessions: list[list[Request]] = []
    for session, (turns, system) in enumerate(turns_of):
        context = [system] * (system * 3)
        sessions.append([])
        for turn, (num_new, num_output) in enumerate(turns, 1):
            prompt = [*context, *(1000 * session + 10 * turn + index for index in range(num_new))]
            output = [-(1000 * session + 10 * turn) + 1_000_000 - index for index in range(num_output)]
            sessions[-1].append(Request(session, turn, prompt, output))
            context = prompt + output
    merged = []
    for number in order:
        waiting = [of_session for of_session in sessions if of_session]
        if waiting:
            merged.append(waiting[number % len(waiting)].pop(0))
    return merged + [request for of_session in sessions for request in of_session]


some_sessions = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=5),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=5,
)
some_order = st.lists(st.integers(0, 20), max_size=25)


@settings(max_examples=200, deadline=None)
@given(
    sessions=some_sessions,
    order=some_order,
    block=st.integers(1, 4),
    factor=st.integers(1, 3),
    multiple=st.integers(1, 3),
    numbered=st.booleans(),
)
def test_ceilings_with_revealed_outputs_are_those_of_all_tokens_that_a_next_turn_has(
    write_trace: WriteTrace,
    sessions: list[tuple[list[tuple[int, int]], int]],
    order: list[int],
    block: int,
    factor: int,
    multiple: int,
    numbered: bool,
) -> None:
    requests = linear(sessions, order)
    last_turn = {request.session: request.turn for request in requests}
    known = [
        request.turn < last_turn[request.session] and (numbered or len(request.prompt) >= block) for request in requests
    ]
    path = write_trace(rows_of(requests, block, numbered))
    recorded = read_trace(path, block, WITH_OUTPUTS)
    assert recorded.output_known is not None
    assert recorded.output_known.tolist() == known
    trace, prompts_only = recorded.with_block(block * factor), read_trace(path, block).with_block(block * factor)
    for interval in (None, block * factor * multiple):
        found = infinite_cache(trace, interval).tokens
        assert found.tolist() == brute_force_hits(requests, known, block * factor, interval)
        assert (found >= infinite_cache(prompts_only, interval).tokens).all()
        without = infinite_cache(trace.without_outputs(), interval).tokens
        assert np.array_equal(without, infinite_cache(prompts_only, interval).tokens)


@settings(max_examples=100, deadline=None)
@given(sessions=some_sessions, order=some_order, block=st.integers(1, 4), multiple=st.integers(1, 3))
def test_recorded_outputs_are_known_whether_a_next_turn_has_them_or_not(
    write_trace: WriteTrace,
    sessions: list[tuple[list[tuple[int, int]], int]],
    order: list[int],
    block: int,
    multiple: int,
) -> None:
    requests = linear(sessions, order)
    trace = read_trace(write_trace(token_rows(requests)), block, WITH_OUTPUTS)
    assert trace.output_known is not None
    assert trace.output_known.all()
    assert (trace.partial_ids == -1).all()
    for interval in (None, block * multiple):
        expected = brute_force_hits(requests, [True] * len(requests), block, interval)
        assert infinite_cache(trace, interval).tokens.tolist() == expected


# any conversations, also such that are cut, repeated, or branch


def goes_on_from(requests: Sequence[Request], index: int, block: int, numbered: bool) -> int | None:
    """The rule of `formats/outputs.py`, word by word, on tokens."""
    own = requests[index]
    best: tuple[int, int, int] | None = None
    for earlier, (session, turn, prompt, _) in enumerate(requests[:index]):
        whole = len(prompt) // block * block
        if session != own.session or turn >= own.turn or own.prompt[:whole] != prompt[:whole]:
            continue
        if whole == 0 and not (numbered and turn == own.turn - 1):
            continue
        if best is None or (whole, turn) > best[:2]:
            best = (whole, turn, earlier)
    return None if best is None else best[2]


@st.composite
def messy_sessions(draw: st.DrawFn) -> list[Request]:
    requests: list[Request] = []
    turns: dict[int, int] = {}
    for _ in range(draw(st.integers(1, 16))):
        session = draw(st.integers(0, 1))
        before = [request for request in requests if request.session == session]
        context: list[int] = []
        if before and draw(st.integers(0, 4)):
            earlier = draw(st.sampled_from(before))
            context = earlier.prompt + earlier.output[: draw(st.integers(0, 8))]
        tokens = st.lists(st.integers(0, 1), max_size=6)
        prompt = (context + draw(tokens)) or [0]
        turns[session] = turns.get(session, 1) + draw(st.integers(0, 1))
        requests.append(Request(session, turns[session], prompt, draw(tokens)))
    return requests


@settings(max_examples=300, deadline=None)
@given(requests=messy_sessions(), block=st.integers(1, 4), numbered=st.booleans())
def test_a_request_goes_on_from_the_one_whose_blocks_it_has_most_of(
    write_trace: WriteTrace, requests: list[Request], block: int, numbered: bool
) -> None:
    if not numbered:  # then turns are counted
        counts: dict[int, int] = {}
        for index, request in enumerate(requests):
            counts[request.session] = counts.get(request.session, 0) + 1
            requests[index] = request._replace(turn=counts[request.session])
    trace = read_trace(write_trace(rows_of(requests, block, numbered)), block, WITH_OUTPUTS)
    revealed_by: dict[int, int] = {}
    for index, request in enumerate(requests):
        earlier = goes_on_from(requests, index, block, numbered)
        if earlier is None:
            continue
        if len(request.prompt) >= len(requests[earlier].prompt) + len(requests[earlier].output):
            revealed_by.setdefault(earlier, index)
    assert trace.output_known is not None
    assert np.flatnonzero(trace.output_known).tolist() == sorted(revealed_by)
    prompts = [prompt.keys.tolist() for prompt in trace.prompts()]
    nobody_elses: list[int] = []
    for index, path in enumerate(trace.paths()):
        keys = path.keys.tolist()
        assert path.stop == len(requests[index].prompt) + max(len(requests[index].output) - 1, 0)
        assert keys[: len(prompts[index])] == prompts[index]
        if index in revealed_by:
            assert keys == prompts[revealed_by[index]][: len(keys)]
        else:
            nobody_elses += keys[len(prompts[index]) :]
    in_prompts = {key for prompt in prompts for key in prompt}
    assert len(set(nobody_elses) - in_prompts) == len(nobody_elses)


@pytest.mark.parametrize("kind", ["chat", "agent", "branching"])
def test_generated_conversations_reveal_every_answer_that_goes_on(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "generated.jsonl"
    path.write_bytes(b"".join(generate_lines(PRESETS[kind], 3)))
    trace = read_trace(path, 16, WITH_OUTPUTS)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = {row["session_id"]: row["turn"] for row in rows}
    first: dict[tuple[int, int], int] = {}
    for index, row in enumerate(rows):
        first.setdefault((row["session_id"], row["turn"]), index)  # a session goes on from the first branch
    expected = [index for (session, turn), index in first.items() if turn < last[session]]
    assert trace.output_known is not None
    assert np.flatnonzero(trace.output_known).tolist() == sorted(expected)
    # a turn hits all that stood before its new tokens, the last generated one and a block that is not full aside
    hits = infinite_cache(trace, None).kv_tokens
    for (session, turn), index in first.items():
        if (session, turn - 1) in first:
            before = rows[first[session, turn - 1]]
            whole = before["input_length"] + before["output_length"] - 1
            assert hits[index] == min(whole, rows[index]["input_length"] - 1) // 16 * 16


def test_an_output_that_was_cut_is_not_revealed_and_by_no_later_turn_either(write_trace: WriteTrace) -> None:
    first = Request(0, 1, [1] * 4, [2] * 6)
    second = Request(0, 2, [*first.prompt, *[2] * 4], [3] * 4)  # two of six tokens are gone
    third = Request(0, 3, [*second.prompt, *second.output, 4, 4, 4, 4], [5])
    trace = read_trace(write_trace(rows_of([first, second, third], 4)), 4, WITH_OUTPUTS)
    assert trace.output_known is not None
    assert trace.output_known.tolist() == [False, True, False]
    assert infinite_cache(trace, None).kv_tokens.tolist() == [0, 4, 8]


def test_numbers_of_turns_that_fall_or_are_missing_reveal_nothing(write_trace: WriteTrace) -> None:
    first, second = Request(0, 2, [1] * 8, [2] * 4), Request(0, 1, [1] * 8 + [2] * 4 + [3] * 4, [])
    trace = read_trace(write_trace(rows_of([first, second], 4)), 4, WITH_OUTPUTS)
    assert trace.output_known is not None
    assert not trace.output_known.any()
    # a prompt without a full block, and a next turn that is only counted
    rows = rows_of([Request(0, 1, [1] * 3, [2] * 4), Request(0, 2, [1] * 3 + [2] * 4 + [3], [])], 4)
    for numbered, known in (([0, 1], True), ([0], False), ([1], False), ([], False)):
        some = [row if index in numbered else {**row, "turn": None} for index, row in enumerate(rows)]
        trace = read_trace(write_trace(some), 4, WITH_OUTPUTS)
        assert trace.output_known is not None
        assert trace.output_known.tolist() == [known, False]


def test_the_last_generated_token_is_not_there(write_trace: WriteTrace) -> None:
    requests = [Request(0, 1, [1] * 6, [2, 2]), Request(0, 2, [1] * 6 + [2] * 2 + [3] * 3, [])]
    trace = read_trace(write_trace(rows_of(requests, 4)), 4, WITH_OUTPUTS)
    assert trace.path_tokens.tolist() == [7, 11]
    assert infinite_cache(trace, None).kv_tokens.tolist() == [0, 4]
    longer = [requests[0]._replace(output=[2, 2, 2]), requests[1]._replace(prompt=[1] * 6 + [2] * 3 + [3] * 3)]
    trace = read_trace(write_trace(rows_of(longer, 4)), 4, WITH_OUTPUTS)
    assert infinite_cache(trace, None).kv_tokens.tolist() == [0, 8]


# the formats


def chat(chat_id: int, parent: int, prompt: Sequence[int], num_output: int, block: int = 16) -> dict[str, Any]:
    pieces = [hash(tuple(prompt[start : start + block])) % (1 << 62) for start in range(0, len(prompt), block)]
    row = {"chat_id": chat_id, "parent_chat_id": parent, "timestamp": chat_id / 2, "input_length": len(prompt)}
    return {**row, "output_length": num_output, "turn": 1 if parent < 0 else 2, "hash_ids": pieces}


def test_a_chat_reveals_the_output_of_its_parent_alone(write_trace: WriteTrace) -> None:
    start = list(range(20))
    # both asked from the same start, with too few tokens to tell them apart by full blocks
    asked = [chat(1, -1, start, 0), chat(2, 1, [*start, 90], 30), chat(3, 1, [*start, 91], 30)]
    goes_on = {"turn": 3, **chat(4, 3, [*start, 91, *range(100, 140)], 5)}
    trace = read_trace(write_trace([*asked, goes_on]), options=WITH_OUTPUTS)
    assert trace.output_known is not None
    assert trace.output_known.tolist() == [True, False, True, False]
    assert [len(path.keys) for path in trace.paths()] == [1, 3, 3, 4]
    lost = [*asked[:2], chat(3, 9, [*start, *range(100, 140)], 5)]  # of a parent that is not in the file
    trace = read_trace(write_trace(lost), options=WITH_OUTPUTS)
    assert trace.output_known is not None
    assert trace.output_known.tolist() == [True, False, False]


def test_a_chat_that_does_not_begin_with_its_parent_reveals_nothing(write_trace: WriteTrace) -> None:
    rows = [chat(1, -1, range(20), 4), chat(2, 1, range(5, 60), 4), chat(3, 1, range(15), 4)]
    trace = read_trace(write_trace(rows), options=WITH_OUTPUTS)
    assert trace.output_known is not None
    assert not trace.output_known.any()


def test_agents_of_a_conversation_reveal_their_own_outputs_alone(write_trace: WriteTrace) -> None:
    def call(t: float, ids: Sequence[int], out: int) -> dict[str, Any]:
        return {"t": t, "in": 4 * len(ids) + 1, "out": out, "hash_ids": list(ids)}

    helper = {
        "t": 9.0,
        "type": "subagent",
        "duration_ms": 8000,
        "requests": [call(0, [1, 8], 6), call(1, [1, 8, 9], 1)],
    }
    row = {"id": "a", "block_size": 4, "hash_id_scope": "local"}
    row["requests"] = [call(0, [1], 3), helper, call(10, [1, 2, 3], 7), call(20, [1, 2, 3, 4, 5], 2)]
    trace = read_trace(write_trace([row]), options=WITH_OUTPUTS)
    assert trace.sessions is not None
    assert trace.output_known is not None
    names = [trace.sessions.names[index] for index in trace.sessions.index]
    assert names == ["a", "a/1", "a/1", "a", "a"]
    # of the helper's first output only four of six tokens fit into what it asked next
    assert trace.output_known.tolist() == [True, False, False, True, False]
    assert infinite_cache(trace, None).kv_tokens.tolist() == [0, 4, 8, 4, 16]
    assert trace.reading == "session start all, outputs"


def test_events_reveal_outputs_by_session(write_trace: WriteTrace) -> None:
    def event(arrival: int, hashes: Sequence[int], out: int, session: str) -> dict[str, Any]:
        replay = {"trace_block_size": 16, "input_length": 16 * len(hashes), "input_sequence_hashes": list(hashes)}
        request = {"request_received_ms": arrival, "output_tokens": out, "replay": replay}
        context = {"session_id": session}
        return {"timestamp": 0, "event": {"event_type": "request_end", "agent_context": context, "request": request}}

    top = (1 << 64) - 1
    rows = [event(3, [top, 1, 2, 3], 9, "s"), event(1, [top], 33, "s"), event(2, [top, 5, 6, 7], 9, "other")]
    trace = read_trace(write_trace(rows), options=WITH_OUTPUTS)
    assert trace.output_known is not None
    assert trace.output_known.tolist() == [True, False, False]
    assert infinite_cache(trace, None).kv_tokens.tolist() == [0, 16, 48]


def test_text_outputs_are_cut_into_tokens_by_themselves(
    write_trace: WriteTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssmcache_sim.formats import text

    def pairs(letters: str) -> list[int]:
        return [ord(letters[start]) for start in range(0, len(letters), 2)]

    monkeypatch.setattr(text, "load_tokenizer", lambda name: pairs)
    rows = [
        {"timestamp": index, "session_id": "s", "input": prompt, "output": output}
        for index, (prompt, output) in enumerate([("abcdefghi", "ABCDEFGH"), ("abcdefghi" + "ABCDEFGH" + "z", "Z")])
    ]
    trace = read_trace(write_trace(rows), 1, ReadOptions(tokenizer="any", outputs=True))
    assert trace.output_known is not None
    assert trace.output_known.all()
    # a c e g i | A C E, and in one piece a c e g i | B D F H
    assert infinite_cache(trace, None).kv_tokens.tolist() == [0, 5]


def test_a_trace_that_cannot_tell_outputs_is_refused_in_one_line(write_trace: WriteTrace, tmp_path: Path) -> None:
    request = Request(0, 1, [1] * 40, [2] * 3)
    lengths = ["TIMESTAMP,ContextTokens,GeneratedTokens\r", "2023-11-16 18:15:46.5,374,44\r"]
    prompts_only = tmp_path / "prompts.npz"
    write_binary(read_trace(write_trace(rows_of([request], 16)), 16), prompts_only)
    wrong = token_rows([request, request._replace(output=[7, 7])])
    wrong[1]["output_toks"] = 3
    for path, message in (
        (write_trace(lengths, "a.csv"), "--outputs: expected a trace of the format ssmcache-npz, weka-session, "),
        (prompts_only, "prompts.npz: --outputs: expected a trace that was converted with it, got prompts only"),
        (write_trace(wrong), "trace.jsonl:2: output_tok_ids: expected 3 ids, as output_toks says, got 2"),
    ):
        with pytest.raises(TraceError) as caught:
            read_requests(path, options=WITH_OUTPUTS)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
    assert read_trace(write_trace(wrong)).num_requests == 2  # what is not asked for is not judged


@settings(max_examples=100, deadline=None)
@given(requests=messy_sessions(), block=st.integers(1, 4), factor=st.integers(1, 2))
def test_without_sessions_outputs_take_memory_and_nobody_looks_them_up(
    write_trace: WriteTrace, requests: list[Request], block: int, factor: int
) -> None:
    rows = rows_of(requests, block)
    for row in rows:
        del row["session_id"], row["turn"]
    path = write_trace(rows)
    plain, recorded = read_trace(path, block), read_trace(path, block, WITH_OUTPUTS)
    assert (recorded.label, recorded.reading) == (
        "trace.jsonl (prompts and outputs, none of them known)", "outputs (none known)",
    )  # fmt: skip
    assert recorded.output_known is not None
    assert not recorded.output_known.any()
    trace = recorded.with_block(block * factor)
    kept = [keys for path in trace.paths() for keys in path.keys.tolist()]
    in_prompts = [keys for prompt in trace.prompts() for keys in prompt.keys.tolist()]
    assert trace.path_tokens.tolist() == [len(one.prompt) + max(len(one.output) - 1, 0) for one in requests]
    # each block beyond the prompts' is there once
    assert len(set(kept)) - len(set(in_prompts)) == len(kept) - len(in_prompts)
    prompts_only = plain.with_block(block * factor)
    assert [prompt.keys.tolist() for prompt in trace.prompts()] == [one.keys.tolist() for one in prompts_only.paths()]
    assert np.array_equal(infinite_cache(trace, None).tokens, infinite_cache(prompts_only, None).tokens)
    assert recorded.without_outputs().reading == ""


def test_a_trace_of_sessions_that_reveal_nothing_says_so_too(write_trace: WriteTrace) -> None:
    trace = read_trace(write_trace(rows_of([Request(0, 1, [1] * 16, [2] * 3)], 16)), 16, WITH_OUTPUTS)
    assert trace.label == "trace.jsonl (prompts and outputs, none of them known)"
    assert trace.reading == "outputs (none known)"


@pytest.mark.parametrize("named", [True, False], ids=["sessions", "no_sessions"])
def test_a_converted_trace_keeps_outputs_and_gives_them_when_asked(
    write_trace: WriteTrace, tmp_path: Path, named: bool
) -> None:
    requests = linear([([(9, 8), (9, 8), (5, 2)], 1), ([(7, 3), (1, 0)], 1)], [0, 1, 0])
    rows = rows_of(requests, 4)
    if not named:
        rows = [{name: value for name, value in row.items() if name not in ("session_id", "turn")} for row in rows]
    original, packed = write_trace(rows), tmp_path / "trace.npz"
    write_binary(read_trace(original, 4, WITH_OUTPUTS), packed)
    for options in (WITH_OUTPUTS, ReadOptions()):
        expected, found = read_trace(original, 4, options), read_trace(packed, options=options)
        for name in ("arrival_ms", "prompt_tokens", "output_tokens", "block_keys", "offsets", "path_tokens"):
            assert np.array_equal(getattr(found, name), getattr(expected, name)), name
        assert (found.reading, found.label, found.sha256) == (expected.reading, expected.label, expected.sha256)
        assert (found.output_known is None) == (expected.output_known is None)
    twice = tmp_path / "twice.npz"
    write_binary(read_trace(packed, options=WITH_OUTPUTS), twice)
    assert twice.read_bytes() == packed.read_bytes()


def test_a_trace_with_outputs_says_so_and_is_not_split(write_trace: WriteTrace) -> None:
    requests = [Request(0, 1, [1] * 16, [2] * 3), Request(0, 2, [1] * 16 + [2] * 3, [])]
    trace = read_trace(write_trace(rows_of(requests, 16)), 16, WITH_OUTPUTS)
    assert trace.label == "trace.jsonl (prompts and outputs)"
    assert trace.reading == "outputs"
    with pytest.raises(TraceError, match="expected prompts only, got outputs too"):
        trace.expanded(2)
    assert trace.without_outputs().reading == ""


def test_info_counts_what_is_known_and_has_both_ceilings(write_trace: WriteTrace) -> None:
    requests = linear([([(40, 30), (20, 10), (9, 5)], 0)], [])
    path = write_trace(rows_of(requests, 4))
    info, plain = describe(read_trace(path, 4, WITH_OUTPUTS), [8]), describe(read_trace(path, 4), [8])
    assert info.shared is not None
    assert plain.shared is not None
    outputs = info.shared.outputs
    assert outputs is not None
    assert plain.shared.outputs is None
    assert (outputs.known_requests, outputs.known_tokens) == (2, 40)
    assert info.shared.ceilings == plain.shared.ceilings
    assert (info.shared.full_blocks, info.shared.hit_depth_tokens) == (
        plain.shared.full_blocks,
        plain.shared.hit_depth_tokens,
    )
    assert [ceiling.hit_tokens for ceiling in info.shared.ceilings] == [40 + 88, 40 + 88]
    assert [ceiling.hit_tokens for ceiling in outputs.ceilings] == [68 + 96, 64 + 96]
