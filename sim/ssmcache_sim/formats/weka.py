"""Weka traces of coding agents: JSON lines of whole conversations, with ids that mean nothing outside of each.

Times count from the start of the conversation, which is not recorded: a rule places it (see `sessions.py`). An entry
of type `subagent` holds requests of its own; it was written when the sub-agent ended, and its requests count from its
start, `t` less `duration_ms`. (In the published files that start follows the end of the main agent's request before
by less than 1.2 s, every time; counted from `t` instead, sub-agents would still run when their answer was used.) One
that nobody waited for, launched in the background, has no duration (`null`): `t` is when it was launched, as far as is
known, and it is counted.
"""

from array import array
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats.building import RowColumns, build_trace
from ssmcache_sim.formats.fields import (
    MAX_ID,
    block_field,
    int_field,
    int_list_field,
    list_field,
    parse_object,
    seconds_field,
    session_field,
    shown,
    text_field,
    tokens_field,
)
from ssmcache_sim.formats.numbering import first_wrong_place
from ssmcache_sim.formats.options import FirstRow, ReadOptions, TraceFormat
from ssmcache_sim.formats.source import RowError, SourceFile
from ssmcache_sim.sessions import SessionStart, session_starts_ms
from ssmcache_sim.trace import Int64Array, Trace

NAME = "weka-session"
_BLOCK = 64
_MS_PER_SECOND = 1000


@dataclass(frozen=True, slots=True)
class _Request:
    """Times in seconds from the start of the conversation."""

    place: str
    session: str
    arrival_seconds: float
    end_seconds: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: list[int]


@dataclass(frozen=True, slots=True)
class _Conversation:
    """The requests of a line, and their ids numbered densely, one request after the other."""

    tokens_per_block: int
    requests: list[_Request]
    ids: Int64Array
    num_distinct: int
    num_clipped: int
    num_of_unknown_duration: int


def recognises(first: FirstRow) -> bool:
    """Whether a file opens with a conversation that holds its requests."""
    return {"requests", "hash_id_scope"} <= first.fields.keys()


def read(source: SourceFile, tokens_per_block: int | None, options: ReadOptions) -> Trace:
    """Reads all conversations. Each agent of one is a session, named CONVERSATION or CONVERSATION/AGENT.

    Errors: TraceError with file and line; a broken row is a whole conversation.
    """
    columns = RowColumns()
    conversation_of, durations_ms = array("q"), array("d")
    block, num_keys, num_clipped, num_unknown = tokens_per_block, 0, 0, 0
    for line_number, talk in source.rows(_parse):
        block = talk.tokens_per_block if block is None else block
        if talk.tokens_per_block != block:
            source.reject(line_number, f"block_size: expected {block}, got {talk.tokens_per_block}")
            continue
        start = 0
        for request in talk.requests:
            ids = talk.ids[start : start + len(request.hash_ids)] + num_keys
            start += ids.size
            arrival_ms = request.arrival_seconds * _MS_PER_SECOND
            columns.add(line_number, arrival_ms, request.prompt_tokens, request.output_tokens, ids, request.session)
            conversation_of.append(len(durations_ms))
        durations_ms.append(max((request.end_seconds for request in talk.requests), default=0.0) * _MS_PER_SECOND)
        num_keys += talk.num_distinct
        num_clipped += talk.num_clipped
        num_unknown += talk.num_of_unknown_duration
    rule, seed = options.session_start or SessionStart(), options.seed or 0
    if options.seed is not None and rule.kind != "poisson":
        raise TraceError(f"--seed: expected --session-start poisson:R, which draws with it, got {rule}")
    starts_ms = session_starts_ms(rule, np.array(durations_ms), seed)
    rows = columns.rows()
    rows.arrival_ms[:] += starts_ms[np.array(conversation_of, dtype=np.int64)]
    return build_trace(
        source,
        rows,
        block or _BLOCK,
        num_keys,
        format_name=NAME,
        outputs="revealed" if options.outputs else "none",
        reading=f"session start {rule}" + (f", seed {seed}" if rule.kind == "poisson" else ""),
        repairs=(
            ("sub-agents longer than their conversation, started with it", num_clipped),
            ("sub-agents of unknown duration, started where they were recorded", num_unknown),
        ),
        ordered=False,
    )


def _parse(line: bytes) -> _Conversation:
    row = parse_object(line)
    block = block_field(row, "block_size")
    if (scope := row.get("hash_id_scope")) != "local":
        raise RowError(f'hash_id_scope: expected "local", got {shown(scope)}')
    name = text_field(row, "id")
    requests: list[_Request] = []
    num_clipped = num_unknown = 0
    for index, entry in enumerate(list_field(row, "requests", "requests")):
        where = f"requests[{index}]"
        if not isinstance(entry, dict):
            raise RowError(f"{where}: expected an object, got {shown(entry)}")
        if entry.get("type") != "subagent":
            requests.append(_request(entry, where, name, 0.0, block))
            continue
        start_seconds = seconds_field(entry, "t", f"{where}.")
        if entry.get("duration_ms") is None:
            num_unknown += 1
        else:
            start_seconds -= int_field(entry, "duration_ms", 0, f"{where}.") / _MS_PER_SECOND
            num_clipped += start_seconds < 0
        agent = session_field(entry, "agent_id", f"{where}.")
        session = f"{name}/{index if agent is None else agent}"
        for nested_index, nested in enumerate(list_field(entry, "requests", "requests", f"{where}.")):
            nested_where = f"{where}.requests[{nested_index}]"
            if not isinstance(nested, dict):
                raise RowError(f"{nested_where}: expected an object, got {shown(nested)}")
            requests.append(_request(nested, nested_where, session, max(start_seconds, 0.0), block))
    return _Conversation(block, requests, *_number(requests), num_clipped, num_unknown)


def _request(entry: dict[str, Any], place: str, session: str, start_seconds: float, block: int) -> _Request:
    where = f"{place}."
    arrival = start_seconds + seconds_field(entry, "t", where)
    num_tokens = tokens_field(entry, "in", 1, where)
    ids = int_list_field(entry, "hash_ids", MAX_ID, where)
    if len(ids) != num_tokens // block:
        expected = f"{num_tokens // block} ids for {num_tokens} tokens in blocks of {block}, full blocks only"
        raise RowError(f"{where}hash_ids: expected {expected}, got {len(ids)}")
    busy_seconds = seconds_field(entry, "api_time", where) if entry.get("api_time") is not None else 0.0
    num_output = tokens_field(entry, "out", 0, where)
    return _Request(place, session, arrival, arrival + busy_seconds, num_tokens, num_output, ids)


def _number(requests: list[_Request]) -> tuple[Int64Array, int]:
    """Dense ids of one conversation, and how many there are."""
    num_ids = np.array([len(request.hash_ids) for request in requests], dtype=np.int64)
    raw = np.fromiter(chain.from_iterable(request.hash_ids for request in requests), np.int64, int(num_ids.sum()))
    distinct, ids = np.unique(raw, return_inverse=True)
    wrong = first_wrong_place(ids, num_ids, distinct.size)
    if wrong is not None:
        request = requests[int(np.searchsorted(np.cumsum(num_ids), wrong.place, side="right"))]
        raise RowError(
            f"{request.place}.hash_ids: expected ids that are unique per prefix, but id "
            f"{raw[wrong.place]} follows two different ids"
        )
    return ids, distinct.size


FORMAT = TraceFormat(NAME, recognises, read, frozenset({"session_start", "seed", "outputs"}))
