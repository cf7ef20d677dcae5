"""Fields of JSON rows, checked. Errors are RowError: `name: expected X, got Y`."""

import json
from typing import Any

from ssmcache_sim.formats.source import RowError, legal_text
from ssmcache_sim.trace import MAX_BLOCK, MAX_TOKENS

_MAX_INT = (1 << 53) - 1  # exact as a double too
_MAX_SECONDS = 10**11  # 3,000 years: sums of a few are still exact in milliseconds
MAX_ID = (1 << 63) - 1
_EXPECTED_AT_LEAST = ("a non-negative integer", "a positive integer")


def parse_object(line: bytes) -> dict[str, Any]:
    """One line as a JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RowError(f"expected a JSON object, got broken JSON ({reason})") from error
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, got {shown(row)}")
    return row


def int_field(row: dict[str, Any], name: str, minimum: int, where: str = "", maximum: int = _MAX_INT) -> int:
    """An integer from `minimum` (0 or 1) to `maximum`. `where` is the path of the object, for messages."""
    value = row.get(name)
    if type(value) is not int or not minimum <= value <= maximum:  # `type`: bool is an int to isinstance
        most = f" up to {maximum:,}" if type(value) is int and maximum < min(value, _MAX_INT) else ""
        raise RowError(f"{where}{name}: expected {_EXPECTED_AT_LEAST[minimum]}{most}, got {_got(row, name)}")
    return value


def tokens_field(row: dict[str, Any], name: str, minimum: int, where: str = "") -> int:
    """A number of tokens of a prompt or an output, from `minimum` (0 or 1)."""
    return int_field(row, name, minimum, where, MAX_TOKENS)


def block_field(row: dict[str, Any], name: str, where: str = "") -> int:
    """A number of tokens that an id stands for."""
    return int_field(row, name, 1, where, MAX_BLOCK)


def seconds_field(row: dict[str, Any], name: str, where: str = "") -> float:
    """A number of seconds, not negative, that is finite as milliseconds too."""
    value: Any = row.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 <= value <= _MAX_SECONDS:
        return float(value)
    most = f" up to {_MAX_SECONDS:,}" if is_number and value > _MAX_SECONDS else ", not negative"
    raise RowError(f"{where}{name}: expected seconds{most}, got {_got(row, name)}")


def object_field(row: dict[str, Any], name: str, where: str = "") -> dict[str, Any]:
    """A JSON object."""
    value = row.get(name)
    if not isinstance(value, dict):
        raise RowError(f"{where}{name}: expected an object, got {_got(row, name)}")
    return value


def list_field(row: dict[str, Any], name: str, of: str, where: str = "") -> list[Any]:
    """A list of anything; `of` says what it should hold."""
    value = row.get(name)
    if not isinstance(value, list):
        raise RowError(f"{where}{name}: expected a list of {of}, got {_got(row, name)}")
    return value


def text_field(row: dict[str, Any], name: str) -> str:
    """A string, as `legal_text`."""
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(f"{name}: expected a string, got {_got(row, name)}")
    return legal_text(value)


def int_list_field(row: dict[str, Any], name: str, maximum: int, where: str = "") -> list[int]:
    """A list of integers from 0 to `maximum`, a power of two less one."""
    values = list_field(row, name, "integers", where)
    if values and (not set(map(type, values)) <= {int} or min(values) < 0 or max(values) > maximum):
        bad = next(value for value in values if type(value) is not int or not 0 <= value <= maximum)
        raise RowError(f"{where}{name}: expected integers from 0 to 2**{maximum.bit_length()} - 1, got {shown(bad)}")
    return values


def session_field(row: dict[str, Any], name: str = "session_id", where: str = "") -> str | None:
    """A name or a number of a session, as `legal_text`; None without one."""
    value = row.get(name)
    if value is None:
        return None
    if type(value) not in (int, str):
        raise RowError(f"{where}{name}: expected a string or an integer, got {shown(value)}")
    return legal_text(str(value))


def turn_field(row: dict[str, Any]) -> int:
    """Number of the turn in its session, from 1; 0 where it is not recorded."""
    return int_field(row, "turn", 1) if row.get("turn") is not None else 0


def shown(value: object) -> str:
    """A value for a message, shortened."""
    try:
        text = json.dumps(value)
    except RecursionError:  # what is nested may be read deeper than it is written
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def _got(row: dict[str, Any], name: str) -> str:
    return shown(row[name]) if name in row else "no such field"
