"""Synthetic traces whose sharing is known by construction, in the mooncake format with session fields.

A session opens with one of a few system prompts. Each turn asks with some new tokens; the next prompt is the prompt
before, its answer and new tokens again. With branches, a turn asks several times from the same context, each time
with tokens of its own, and the session goes on from the first of them.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, cast, get_args

import numpy as np

from ssmcache_sim.errors import TraceError
from ssmcache_sim.trace import MAX_BLOCK

Kind = Literal["shared-prefix", "chat", "agent", "branching"]
_LENGTH_SIGMA = 0.7  # of the logarithm of lengths: measured traces lie between 0.6 and 1
_MS_PER_SECOND = 1000
_LEAST = {"session_turn_delay_mean": 0, "system_prompt_tokens": 0, "request_rate": 1e-9}
_MOST = {"tokens_per_block": MAX_BLOCK, "session_turns_mean": 1e5, "branches": 1e4}


@dataclass(frozen=True, slots=True)
class GeneratorSettings:
    """The knobs of a generator; lengths in tokens. The names are those of common load generators.

    Attributes:
        request_rate: sessions that start in a second on average (Poisson).
        session_turns_mean: 1 and a Poisson number more.
        session_turn_delay_mean: seconds from one turn of a session to its next, answer included (exponential).
        input_tokens_mean, output_tokens_mean: new tokens of a turn, and of an answer (log-normal, at least 1).
        num_system_prompts, system_prompt_tokens: each session takes one of them at random; its length.
        branches: requests of a turn.
        tokens_per_block: that an id of the trace stands for.
    """

    num_sessions: int
    request_rate: float
    session_turns_mean: float
    session_turn_delay_mean: float
    input_tokens_mean: float
    output_tokens_mean: float
    num_system_prompts: int
    system_prompt_tokens: int
    branches: int = 1
    tokens_per_block: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), _LEAST.get(field.name, 1)
            if field.type is int and type(value) is not int:
                raise TraceError(f"{field.name}: expected a whole number, got {value!r}")
            if not least <= value:
                raise TraceError(f"{field.name}: expected a number from {least:g} on, got {value!r}")
            if value > _MOST.get(field.name, 1e7):
                raise TraceError(f"{field.name}: expected up to {_MOST.get(field.name, 1e7):,.0f}, got {value!r}")


PRESETS: dict[Kind, GeneratorSettings] = {
    "shared-prefix": GeneratorSettings(1000, 5.0, 1, 0.0, 256, 128, 8, 2048),
    "chat": GeneratorSettings(400, 1.0, 5, 45.0, 128, 256, 4, 512),
    "agent": GeneratorSettings(40, 0.05, 40, 8.0, 900, 250, 1, 12_000),
    "branching": GeneratorSettings(100, 0.2, 6, 20.0, 400, 300, 2, 1024, branches=4),
}


class _Stretch(NamedTuple):
    """Tokens up to `end` (exclusive), from the end of the stretch before, that one owner wrote."""

    owner: tuple[int, ...]
    end: int


class _Request(NamedTuple):
    arrival_ms: int
    session: int
    turn: int
    branch: int
    prompt: tuple[_Stretch, ...]
    output_tokens: int


def parse_kind(text: str) -> Kind:
    """Errors: TraceError."""
    if text not in get_args(Kind):
        raise TraceError(f"kind of trace: expected one of {', '.join(get_args(Kind))}, got {text!r}")
    return cast(Kind, text)


def generate_lines(settings: GeneratorSettings, seed: int) -> Iterator[bytes]:
    """Rows of a trace as JSON lines, in order of arrival. The same settings and seed give the same bytes."""
    random = np.random.default_rng(seed)
    starts_ms = np.cumsum(random.exponential(_MS_PER_SECOND / settings.request_rate, settings.num_sessions))
    requests = [
        request
        for session, start_ms in enumerate((starts_ms - starts_ms[0]).tolist())
        for request in _session(settings, random, session, start_ms)
    ]
    requests.sort(key=lambda request: request[:4])
    ids: dict[tuple[tuple[int, ...], int], int] = {}
    for request in requests:
        row = {
            "timestamp": request.arrival_ms,
            "session_id": request.session,
            "turn": request.turn,
            "input_length": request.prompt[-1].end,
            "output_length": request.output_tokens,
            "hash_ids": [ids.setdefault(block, len(ids)) for block in _blocks(request.prompt, settings)],
        }
        yield json.dumps(row, separators=(",", ":")).encode() + b"\n"


def _session(
    settings: GeneratorSettings, random: np.random.Generator, session: int, start_ms: float
) -> Iterator[_Request]:
    context: tuple[_Stretch, ...] = ()
    if settings.system_prompt_tokens:
        context = (_Stretch((int(random.integers(settings.num_system_prompts)),), settings.system_prompt_tokens),)
    time_ms = start_ms
    for turn in range(1, 2 + int(random.poisson(settings.session_turns_mean - 1))):
        known = context
        length = known[-1].end if known else 0
        for branch in range(settings.branches):
            num_input = _length(random, settings.input_tokens_mean)
            num_output = _length(random, settings.output_tokens_mean)
            owner = (session, turn, branch)
            prompt = (*known, _Stretch(owner, length + num_input))
            yield _Request(int(time_ms), session, turn, branch, prompt, num_output)
            if branch == 0:
                context = (*known, _Stretch(owner, length + num_input + num_output))
        time_ms += random.exponential(settings.session_turn_delay_mean * _MS_PER_SECOND)


def _length(random: np.random.Generator, mean: float) -> int:
    # exp(mu + sigma^2 / 2) is the mean of a log-normal distribution
    length = random.lognormal(math.log(mean) - _LENGTH_SIGMA**2 / 2, _LENGTH_SIGMA)
    return max(1, round(float(length)))


def _blocks(prompt: tuple[_Stretch, ...], settings: GeneratorSettings) -> Iterator[tuple[tuple[int, ...], int]]:
    """What names each block, the last and partial one too: who wrote its last token, and where it ends.

    The tokens before are then known as well: an owner continues one context only. The length of a block is part of the
    name, because the partial block of a prompt is not the full block that the next prompt has in its place.
    """
    length, block = prompt[-1].end, settings.tokens_per_block
    stretch = 0
    for begin in range(0, length, block):
        end = min(begin + block, length)
        while prompt[stretch].end < end:
            stretch += 1
        yield prompt[stretch].owner, end
