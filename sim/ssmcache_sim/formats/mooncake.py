"""Mooncake traces: JSON lines with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`.

One id per block of prompt tokens (512 as published; derived files use 16), unique per prefix; the last block is
usually partial. Files whose rows name full blocks only are read too.
"""

import json
from collections.abc import Sequence
from itertools import chain

import numpy as np

from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats.building import Rows, SourceFile, build_trace
from ssmcache_sim.trace import Int64Array, Trace

PUBLISHED_BLOCK = 512
# sizes that an unnamed block is looked for among: the published one first, then what derived files use
_BLOCK_SIZES = (PUBLISHED_BLOCK, 16, 64, 128, 256, 32, 1024, 8, 48, 96, 2048, 4096)
_INT_FIELDS = (("timestamp", 0), ("input_length", 1), ("output_length", 0))
_EXPECTED_AT_LEAST = ("a non-negative integer", "a positive integer")
_MAX_INT = (1 << 53) - 1  # exact as a double too
_MAX_ID = (1 << 63) - 1


def recognises(first_row: dict[str, object]) -> bool:
    """Whether a file opens like a Mooncake trace. Rows of other formats with `hash_ids` name their chat or scope."""
    fields = {name for name, _ in _INT_FIELDS} | {"hash_ids"}
    return len(fields & first_row.keys()) >= 2 and not first_row.keys() & {"chat_id", "requests"}


def read(source: SourceFile, tokens_per_block: int | None) -> Trace:
    """Reads all rows. `tokens_per_block=None` finds the block size from the number of ids of each row.

    Errors: TraceError with file and line.
    """
    line_numbers: list[int] = []
    ints: list[tuple[int, int, int]] = []
    id_lists: list[list[int]] = []
    for line_number, line in enumerate(source.lines, start=1):
        if not line or line.isspace():
            continue
        row = parse_object(source, line_number, line)
        ints.append(_int_fields(source, line_number, row))
        id_lists.append(_id_list(source, line_number, row))
        line_numbers.append(line_number)
    fields = np.array(ints, dtype=np.int64).reshape(-1, 3)
    rows = Rows(
        line_numbers=np.array(line_numbers, dtype=np.int64),
        arrival_ms=fields[:, 0].astype(np.float64),
        prompt_tokens=fields[:, 1].copy(),
        output_tokens=fields[:, 2].copy(),
        ids=_all_ids(source, line_numbers, id_lists),
        num_ids=np.fromiter(map(len, id_lists), dtype=np.int64, count=len(id_lists)),
    )
    if tokens_per_block is None:
        tokens_per_block = _find_block(source, rows)
    _check_id_counts(source, rows, tokens_per_block)
    return build_trace(source, rows, tokens_per_block)


def parse_object(source: SourceFile, line_number: int, line: bytes) -> dict[str, object]:
    """One line as a JSON object. Errors: TraceError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise source.error(line_number, f"expected a JSON object, got broken JSON ({reason})") from error
    if not isinstance(row, dict):
        raise source.error(line_number, f"expected a JSON object, got {_shown(row)}")
    return row


def _int_fields(source: SourceFile, line_number: int, row: dict[str, object]) -> tuple[int, int, int]:
    values = [row.get(name) for name, _ in _INT_FIELDS]
    for (name, minimum), value in zip(_INT_FIELDS, values, strict=True):
        if type(value) is not int or not minimum <= value <= _MAX_INT:  # `type`: bool is an int to isinstance
            got = _shown(value) if name in row else "no such field"
            raise source.error(line_number, f"{name}: expected {_EXPECTED_AT_LEAST[minimum]}, got {got}")
    arrival, prompt, output = values
    return (arrival, prompt, output)  # type: ignore[return-value]  # checked above


def _id_list(source: SourceFile, line_number: int, row: dict[str, object]) -> list[int]:
    ids = row.get("hash_ids")
    if not isinstance(ids, list):
        got = _shown(ids) if "hash_ids" in row else "no such field"
        raise source.error(line_number, f"hash_ids: expected a list of integers, got {got}")
    return ids


def _all_ids(source: SourceFile, line_numbers: Sequence[int], id_lists: Sequence[list[int]]) -> Int64Array:
    if set(map(type, chain.from_iterable(id_lists))) <= {int}:
        try:
            ids = np.fromiter(chain.from_iterable(id_lists), dtype=np.int64)
        except OverflowError:
            pass
        else:
            if ids.size == 0 or ids.min() >= 0:
                return ids
    raise _first_bad_id(source, line_numbers, id_lists)


def _first_bad_id(source: SourceFile, line_numbers: Sequence[int], id_lists: Sequence[list[int]]) -> TraceError:
    line_number, bad = next(
        (line_number, value)
        for line_number, ids in zip(line_numbers, id_lists, strict=True)
        for value in ids
        if type(value) is not int or not 0 <= value <= _MAX_ID
    )
    return source.error(line_number, f"hash_ids: expected integers from 0 to 2**63 - 1, got {_shown(bad)}")


def _fitting(rows: Rows, tokens_per_block: int) -> tuple[Int64Array, Int64Array]:
    """Per row: whether the number of ids is ceil, and whether it is floor, of prompt tokens / block."""
    full = rows.prompt_tokens // tokens_per_block
    ceil = full + (rows.prompt_tokens % tokens_per_block > 0)
    return rows.num_ids == ceil, rows.num_ids == full


def _find_block(source: SourceFile, rows: Rows) -> int:
    """The block size that the number of ids of all rows agrees with; the closest one where a row is broken.

    The published size wins where it fits. Errors: TraceError where several others do.
    """
    num_fitting: dict[int, int] = {}
    ceil_sizes: list[int] = []
    for size in _BLOCK_SIZES:
        is_ceil, is_floor = _fitting(rows, size)
        num_fitting[size] = int(np.count_nonzero(is_ceil | is_floor))
        if is_ceil.all():
            ceil_sizes.append(size)
    best = max(_BLOCK_SIZES, key=num_fitting.__getitem__)  # the first of equals
    if num_fitting[best] < rows.num_ids.size or best == PUBLISHED_BLOCK:
        return best
    sizes = ceil_sizes or [size for size in _BLOCK_SIZES if num_fitting[size] == rows.num_ids.size]
    if len(sizes) > 1:
        shown = ", ".join(map(str, sorted(sizes)))
        raise TraceError(f"{source.name}: block size: expected --trace-block, because {shown} all fit the ids")
    return sizes[0]


def _check_id_counts(source: SourceFile, rows: Rows, tokens_per_block: int) -> None:
    is_ceil, is_floor = _fitting(rows, tokens_per_block)
    wrong = np.flatnonzero(~(is_ceil | is_floor))
    if wrong.size == 0:
        return
    row = int(wrong[0])
    num_tokens, num_ids = int(rows.prompt_tokens[row]), int(rows.num_ids[row])
    full, ceil = num_tokens // tokens_per_block, -(-num_tokens // tokens_per_block)
    expected = f"{ceil}" if full == ceil else f"{ceil} (or {full}, full blocks only)"
    raise source.error(
        int(rows.line_numbers[row]),
        f"hash_ids: expected {expected} ids for {num_tokens} tokens in blocks of {tokens_per_block}, got {num_ids}",
    )


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
