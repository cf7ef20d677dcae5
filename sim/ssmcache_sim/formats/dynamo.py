"""Dynamo request traces: JSON lines of events, of which those of type `request_end` hold a request.

An event is written when its request ends; the request arrived at `request_received_ms`. Ids are unsigned 64-bit
hashes of whole prefixes. Events of other types (tools, for instance) are no requests.
"""

from typing import NamedTuple

from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats.building import Outputs, RowColumns, build_trace, check_id_counts, number_prefix_ids
from ssmcache_sim.formats.fields import (
    block_field,
    int_field,
    int_list_field,
    object_field,
    parse_object,
    session_field,
    tokens_field,
)
from ssmcache_sim.formats.options import FirstRow, ReadOptions, TraceFormat
from ssmcache_sim.formats.source import RowError, SourceFile
from ssmcache_sim.trace import Trace

NAME = "dynamo-request-trace"
_MAX_HASH = (1 << 64) - 1
_IDS = "event.request.replay.input_sequence_hashes"


class _RequestRow(NamedTuple):
    arrival_ms: int
    prompt_tokens: int
    output_tokens: int
    hashes: list[int]
    session: str | None
    tokens_per_block: int


def recognises(first: FirstRow) -> bool:
    """Whether a file opens with an event of a type."""
    event = first.fields.get("event")
    return isinstance(event, dict) and "event_type" in event


def read(source: SourceFile, tokens_per_block: int | None, options: ReadOptions) -> Trace:
    """Reads all requests, times from the first arrival on. Errors: TraceError with file and line."""
    columns = RowColumns("Q")
    block = tokens_per_block
    for line_number, row in source.rows(_parse):
        block = row.tokens_per_block if block is None else block
        if row.tokens_per_block != block:
            source.reject(line_number, f"trace_block_size: expected {block}, got {row.tokens_per_block}")
        else:
            columns.add(line_number, *row[:5])
    if block is None:
        raise TraceError(f"{source.name}: expected at least one request, got no event of type request_end")
    rows = check_id_counts(source, columns.rows(), block, _IDS)
    rows, num_keys = number_prefix_ids(source, rows, _IDS)
    outputs: Outputs = "revealed" if options.outputs else "none"
    return build_trace(source, rows, block, num_keys, format_name=NAME, outputs=outputs, rebase=True, ordered=False)


def _parse(line: bytes) -> _RequestRow | None:
    row = parse_object(line)
    event = object_field(row, "event")
    kind = event.get("event_type")
    if not isinstance(kind, str):
        raise RowError("event.event_type: expected a string")
    if kind != "request_end":
        return None
    request = object_field(event, "request", "event.")
    replay = object_field(request, "replay", "event.request.")
    context = event.get("agent_context")
    return _RequestRow(
        int_field(request, "request_received_ms", 0, "event.request."),
        tokens_field(replay, "input_length", 1, "event.request.replay."),
        tokens_field(request, "output_tokens", 0, "event.request."),
        int_list_field(replay, "input_sequence_hashes", _MAX_HASH, "event.request.replay."),
        session_field(context, where="event.agent_context.") if isinstance(context, dict) else None,
        block_field(replay, "trace_block_size", "event.request.replay."),
    )


FORMAT = TraceFormat(NAME, recognises, read, frozenset({"outputs"}))
