"""When sessions start: traces of whole conversations record times within each one only, so a rule must place them."""

import heapq
import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from ssmcache_sim.errors import TraceError
from ssmcache_sim.trace import Float64Array

StartKind = Literal["all", "spacing", "poisson", "closed"]
_FORMS = "all, spacing:SECONDS, poisson:SESSIONS_PER_SECOND or closed:SESSIONS_AT_ONCE"
_MS_PER_SECOND = 1000
_MAX_SECONDS = 1e11  # from one session to the next


@dataclass(frozen=True, slots=True)
class SessionStart:
    """A rule that gives each session of a trace its start; the sessions keep the order of the file.

    `all`: everyone at time 0. `spacing`: one every `value` seconds. `poisson`: independent arrivals, `value` sessions
    a second on average, the first after one gap. `closed`: `value` sessions at once, each next one starts when the
    first of those under way ends.
    """

    kind: StartKind = "all"
    value: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind == "all" else f"{self.kind}:{self.value:g}"


def parse_session_start(text: str) -> SessionStart:
    """Reads `all`, `spacing:S`, `poisson:R` or `closed:N`. Errors: TraceError."""
    kind, colon, number = text.partition(":")
    try:
        value = float(number) if colon else 0.0
    except ValueError:
        value = math.nan
    whole = kind != "closed" or value.is_integer()
    least = {"poisson": 1 / _MAX_SECONDS, "closed": 1}.get(kind, 0)
    fits = least <= value < math.inf and (kind != "spacing" or value <= _MAX_SECONDS)
    if kind not in get_args(StartKind) or bool(colon) == (kind == "all") or not (whole and fits):
        raise TraceError(f"session start: expected {_FORMS}, got {text!r}")
    return SessionStart(cast(StartKind, kind), value)


def session_starts_ms(rule: SessionStart, durations_ms: Float64Array, seed: int) -> Float64Array:
    """[num_sessions] start of each session.

    Args:
        durations_ms: [num_sessions] from a session's start to the end of its last request; `closed` alone needs it.
        seed: of `poisson`; the other rules draw nothing.
    """
    num_sessions = durations_ms.size
    match rule.kind:
        case "all":
            return np.zeros(num_sessions)
        case "spacing":
            return np.arange(num_sessions, dtype=np.float64) * (rule.value * _MS_PER_SECOND)
        case "poisson":
            gaps_ms = np.random.default_rng(seed).exponential(_MS_PER_SECOND / rule.value, num_sessions)
            starts_ms: Float64Array = np.cumsum(gaps_ms, dtype=np.float64)
            return starts_ms
        case "closed":
            return _closed_starts_ms(int(rule.value), durations_ms)


def _closed_starts_ms(num_at_once: int, durations_ms: Float64Array) -> Float64Array:
    free_ms = [0.0] * min(num_at_once, durations_ms.size)  # when each place becomes free
    starts_ms = np.empty(durations_ms.size)
    for session, duration_ms in enumerate(durations_ms.tolist()):
        starts_ms[session] = free_ms[0]
        heapq.heapreplace(free_ms, free_ms[0] + duration_ms)
    return starts_ms
