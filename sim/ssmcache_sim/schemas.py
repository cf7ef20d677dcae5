"""Schemas of what we read back from files: the type hints of our records and columns, checked value by value.

A record is a dataclass, with exactly its fields. `int` and `float` mean 0 or more, and finite; `Annotated` with a
`Range` says otherwise, `| None` that a value may be missing, `Literal`, or `Annotated` with a tuple, which texts there
are.
"""

import json
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")

MOST_INT = 1 << 62  # sums of two stay within 64 bits
_MOST_FLOAT = 1e30  # products of some stay finite
_MOST_CHARACTERS = 4096


class Range(NamedTuple):
    """Both ends included."""

    low: float
    high: float


Positive = Annotated[int, Range(1, MOST_INT)]
Share = Annotated[float, Range(0, 1)]


class Scalar(NamedTuple):
    """A type hint of a single value, taken apart.

    Attributes:
        kind: int, float, str or bool; anything else is no scalar.
        range: of numbers.
        texts: that there are; empty: any.
        may_miss: whether None is a value of it.
    """

    kind: Any
    range: Range
    texts: tuple[str, ...]
    may_miss: bool

    def expected(self) -> str:
        if self.kind is bool:
            said = "true or false"
        elif self.kind is str:
            said = " or ".join(self.texts) or "text"
        else:
            low, high = self.range
            limit = f" to {high:g}" if high < (MOST_INT if self.kind is int else _MOST_FLOAT) else " or more"
            said = f"{'a whole number' if self.kind is int else 'a number'} of {low:g}{limit}"
        return f"{said}, or none" if self.may_miss else said


@cache
def scalar(hint: Any) -> Scalar:
    """The parts of a type hint."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        (inner,) = (each for each in get_args(hint) if each is not NoneType)
        return scalar(inner)._replace(may_miss=True)
    if origin is Annotated:
        kind, limits = get_args(hint)
        return Scalar(str, Range(0, 0), limits, False) if kind is str else Scalar(kind, limits, (), False)
    if origin is Literal:
        return Scalar(str, Range(0, 0), get_args(hint), False)
    return Scalar(hint, Range(0, _MOST_FLOAT if hint is float else MOST_INT), (), False)


def decode(hint: Any, value: Any, what: str) -> Any:
    """A value of JSON as what the hint says: scalars, lists, objects of one kind of values, records.

    Args:
        what: names it in errors.

    Errors: ValueError, one line.
    """
    kind, limits, texts, may_miss = scalar(hint)
    if value is None and may_miss:
        return None
    if is_dataclass(kind):
        return _record(kind, value, what)
    if get_origin(kind) in (tuple, list):
        if not isinstance(value, list):
            raise ValueError(f"{what}: expected a list, got {shown(value)}")
        inner = get_args(kind)[0]
        items = [decode(inner, each, f"{what}[{index}]") for index, each in enumerate(value)]
        return tuple(items) if get_origin(kind) is tuple else items
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{what}: expected an object, got {shown(value)}")
        inner = get_args(kind)[1]
        return {decode(str, name, what): decode(inner, each, f"{what}.{name}") for name, each in value.items()}
    if kind is str:
        fits = isinstance(value, str) and (value in texts if texts else is_plain(value))
    elif kind is bool:
        fits = isinstance(value, bool)
    else:
        numbers = (int,) if kind is int else (int, float)
        # NaN is in no range
        fits = isinstance(value, numbers) and not isinstance(value, bool) and limits.low <= value <= limits.high
    if not fits:
        raise ValueError(f"{what}: expected {scalar(hint).expected()}, got {shown(value)}")
    return value


def require_equal(expected: dict[str, Any], value: dict[str, Any], what: str) -> None:
    """Errors: ValueError for the first name of `expected` of which `value` has something else."""
    for name, each in expected.items():
        if name not in value or value[name] != each:
            got = shown(value[name]) if name in value else "none"
            raise ValueError(f"{what}.{name}: expected {shown(each)}, as it follows from the rest, got {got}")


def shown(value: Any, most: int = 40) -> str:
    """A value of a file in an error, cut where it is long."""
    try:
        text = json.dumps(value)
    except (RecursionError, TypeError):
        text = type(value).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def is_plain(text: str) -> bool:
    """Short, and no half of a character, which no page and no picture can hold."""
    return len(text) <= _MOST_CHARACTERS and not any("\ud800" <= each <= "\udfff" for each in text)


def _record(kind: Any, value: Any, what: str) -> Any:
    hints = _hints(kind)
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected an object, got {shown(value)}")
    missing, unknown = [name for name in hints if name not in value], sorted(set(value) - set(hints))
    if missing or unknown:
        got = f"no {missing[0]}" if missing else f"also {shown(unknown[0])}"
        raise ValueError(f"{what}: expected {', '.join(hints)}, got {got}")
    decoded = {name: decode(hint, value[name], f"{what}.{name}") for name, hint in hints.items()}
    try:
        return kind(**decoded)
    except ValueError as error:  # of a record that checks itself
        raise ValueError(f"{what}: {error}") from error


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Of the fields of a record, in their order."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def hints_of(kind: Any, *kinds: Any) -> dict[str, Any]:
    """Type hints of the fields of a record, by name; with `kinds` those alone that are values of one of these."""
    return {name: hint for name, hint in _hints(kind).items() if not kinds or scalar(hint).kind in kinds}
