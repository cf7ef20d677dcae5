"""What `ssmcache doctor --calibrate` keeps in the profile of a machine: times to the first token, and their fit."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ssmcache_sim.schemas import MOST_INT, is_plain

# with more, or less, times are no number of nanoseconds
_MOST = 1e30
_LEAST_FLOPS_PER_SECOND = 1e6


@dataclass(frozen=True, slots=True)
class FirstTokenTime:
    """Seconds from the call to the first token on the host, the median of some runs: new tokens in one pass, behind
    tokens that were cached.

    Attributes:
        spread: the longest run less the shortest, as a share of the median. A prediction is no better than that.
    """

    cached_tokens: int
    new_tokens: int
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """The numbers of the cost model for one model on one machine. See `cost.py` for what they mean.

    Attributes:
        model: name of its config.
        dtype: of its weights.
        num_parameters: that the linear part was counted with.
        flops_per_second: of linear layers.
        attention_factor, cached_attention_factor, pass_seconds, pass_floor_seconds: as in `DeviceProfile`.
        times: what they were fitted to.
    """

    model: str
    dtype: str
    num_parameters: int
    flops_per_second: float
    attention_factor: float
    cached_attention_factor: float
    pass_seconds: float
    pass_floor_seconds: float
    times: tuple[FirstTokenTime, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calibration_from_json(value: Any) -> Calibration:
    """What `to_json` gave. Errors: ValueError, one line."""
    read = _Fields(value, Calibration)
    times = value["times"]
    if not isinstance(times, list):
        raise ValueError(f"times: expected a list, got {type(times).__name__}")
    return Calibration(
        model=read.text("model"),
        dtype=read.text("dtype"),
        num_parameters=read.count("num_parameters", 1),
        flops_per_second=read.positive("flops_per_second", _LEAST_FLOPS_PER_SECOND),
        attention_factor=read.number("attention_factor"),
        cached_attention_factor=read.number("cached_attention_factor"),
        pass_seconds=read.number("pass_seconds"),
        pass_floor_seconds=read.number("pass_floor_seconds"),
        times=tuple(_time(each) for each in times),
    )


def _time(value: Any) -> FirstTokenTime:
    read = _Fields(value, FirstTokenTime)
    counts = (read.count("cached_tokens", 0), read.count("new_tokens", 1))
    return FirstTokenTime(*counts, read.positive("seconds", 0), read.number("spread"))


def finite_number(value: Any) -> float | None:
    """A number of a JSON file; None for anything else, and for one that no float holds."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            return None
        return number if math.isfinite(number) else None
    return None


class _Fields:
    """An object with the fields of a record, and no others. Errors: ValueError."""

    def __init__(self, value: Any, record: Any) -> None:
        names = {field.name for field in fields(record)}
        if not isinstance(value, Mapping) or set(value) != names:
            got = sorted(value) if isinstance(value, Mapping) else value
            raise ValueError(f"expected {', '.join(sorted(names))}, got {got}")
        self._value = value

    def text(self, name: str) -> str:
        found = self._value[name]
        if not isinstance(found, str) or not is_plain(found):
            raise ValueError(f"{name}: expected text, got {found!r:.40}")
        return found

    def count(self, name: str, least: int) -> int:
        found = self._value[name]
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= MOST_INT:
            raise ValueError(f"{name}: expected a whole number of {least} or more, got {found!r}")
        return found

    def number(self, name: str) -> float:
        """0 or more."""
        found = finite_number(self._value[name])
        if found is None or not 0 <= found <= _MOST:
            raise ValueError(f"{name}: expected a non-negative number, got {self._value[name]!r}")
        return found

    def positive(self, name: str, least: float) -> float:
        """At least so much, and not 0."""
        found = finite_number(self._value[name])
        if found is None or found <= 0 or not least <= found <= _MOST:
            raise ValueError(f"{name}: expected a positive number, got {self._value[name]!r}")
        return found
