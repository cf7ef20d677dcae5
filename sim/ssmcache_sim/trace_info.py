"""What a trace is like before any replay: lengths, arrivals, turns, and what unlimited memory would hit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssmcache.units import plural
from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.trace import Int64Array, LengthTrace, Sessions, Trace

PERCENTS = (0, 5, 25, 50, 75, 90, 95, 99, 100)
DEFAULT_INTERVALS = (512, 1024, 2048, 4096, 8192)
_MS_PER_SECOND = 1000


@dataclass(frozen=True, slots=True)
class Distribution:
    """Values at `PERCENTS`, each one that occurs (the nearest rank), and the mean."""

    at_percents: tuple[float, ...]
    mean: float


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Tokens that unlimited memory would hit; `ssm_reuse_interval` None: attention alone."""

    ssm_reuse_interval: int | None
    hit_tokens: int
    hit_rate: float


@dataclass(frozen=True, slots=True)
class SharedBlocks:
    """What prompts share, in blocks of the trace.

    Attributes:
        full_blocks, distinct_full_blocks: of all prompts.
        ceilings: prompts only: attention alone, then each interval.
        hit_depth_tokens: of requests, by attention alone, prompts only.
        requests_without_hit: of them.
        outputs: None where the trace was read without outputs.
    """

    tokens_per_block: int
    full_blocks: int
    distinct_full_blocks: int
    ceilings: tuple[Ceiling, ...]
    hit_depth_tokens: Distribution
    requests_without_hit: int
    outputs: "SharedOutputs | None"


@dataclass(frozen=True, slots=True)
class SharedOutputs:
    """What is known of outputs, and what they add to hits.

    Attributes:
        known_requests, known_tokens: whose output is recorded or revealed, of those that generate anything; and how
            much that is.
        ceilings: as those of `SharedBlocks`, where outputs stay for reuse too.
    """

    known_requests: int
    known_tokens: int
    ceilings: tuple[Ceiling, ...]


@dataclass(frozen=True, slots=True)
class TraceInfo:
    """A trace in figures.

    Attributes:
        span_seconds: from the first arrival to the last.
        interarrival_seconds: None with a single request.
        sessions, turns: None where the trace names no sessions; `turns` is requests of a session.
        block_origin: how the block size was guessed; empty where the file or the reader states it.
        shared: None where only lengths are known.
    """

    name: str
    sha256: str
    format: str
    reading: str
    block_origin: str
    requests: int
    sessions: int | None
    prompt_tokens: int
    output_tokens: int
    span_seconds: float
    prompt_length: Distribution
    output_length: Distribution
    interarrival_seconds: Distribution | None
    turns: Distribution | None
    shared: SharedBlocks | None
    repairs: tuple[tuple[str, int], ...]
    broken_rows: int

    def __repr__(self) -> str:
        lines = [
            f"TraceInfo({self.name}, {self.format}: {plural(self.requests, 'request')} in {self.span_seconds:,.0f} s, "
            f"{self.prompt_tokens:,} prompt and {self.output_tokens:,} output tokens)",
            f"  prompt: median {_median(self.prompt_length):,.0f} tokens, mean {self.prompt_length.mean:,.0f}; "
            f"output: median {_median(self.output_length):,.0f}, mean {self.output_length.mean:,.0f}",
        ]
        if self.block_origin:
            lines.append(f"  block: {self.block_origin}")
        if self.turns is not None:
            lines.append(f"  {plural(self.sessions or 0, 'session')} of {self.turns.mean:.1f} requests on average")
        if self.shared is not None:
            names = [
                ("KV", self.shared.ceilings[0]),
                *((each.ssm_reuse_interval, each) for each in self.shared.ceilings[1:]),
            ]
            ceilings = ", ".join(f"{name}: {each.hit_rate:.2%}" for name, each in names)
            lines.append(f"  ceilings by interval, blocks of {self.shared.tokens_per_block:,} tokens: {ceilings}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As an object: percentiles by percent, repairs by what was repaired."""
        return {
            "percents": PERCENTS,
            **asdict(self),
            "repairs": dict(self.repairs),
        }


def _median(lengths: Distribution) -> float:
    return lengths.at_percents[PERCENTS.index(50)]


def describe(requests: Trace | LengthTrace, ssm_reuse_intervals: Sequence[int] = DEFAULT_INTERVALS) -> TraceInfo:
    """The figures of a trace; ceilings at the intervals given that are multiples of its block.

    Cost: one pass for the ceiling of attention; each interval is a rounding of it.
    """
    gaps_seconds = np.diff(requests.arrival_ms) / _MS_PER_SECOND
    sessions = requests.sessions
    return TraceInfo(
        name=requests.name,
        sha256=requests.sha256,
        format=requests.format_name,
        reading=requests.reading if isinstance(requests, Trace) else "",
        block_origin=_block_origin(requests),
        requests=requests.num_requests,
        sessions=None if sessions is None else len(sessions.names),
        prompt_tokens=int(requests.prompt_tokens.sum()),
        output_tokens=int(requests.output_tokens.sum()),
        span_seconds=float(requests.arrival_ms[-1] - requests.arrival_ms[0]) / _MS_PER_SECOND,
        prompt_length=distribution(requests.prompt_tokens),
        output_length=distribution(requests.output_tokens),
        interarrival_seconds=distribution(gaps_seconds) if gaps_seconds.size else None,
        turns=None if sessions is None else distribution(_turns(sessions)),
        shared=_shared(requests, ssm_reuse_intervals) if isinstance(requests, Trace) else None,
        repairs=requests.repairs,
        broken_rows=requests.num_broken,
    )


def _block_origin(requests: Trace | LengthTrace) -> str:
    inferred = requests.inferred_block if isinstance(requests, Trace) else None
    return "" if inferred is None else f"{inferred.tokens_per_block:,} tokens, {inferred}"


def distribution(values: npt.NDArray[Any]) -> Distribution:
    """The percentiles of some values, at least one."""
    at_percents = np.percentile(values, PERCENTS, method="nearest").tolist()
    return Distribution(tuple(at_percents), float(values.mean()))


def _turns(sessions: Sessions) -> Int64Array:
    counts = np.bincount(sessions.index[sessions.index >= 0], minlength=len(sessions.names))
    return counts[counts > 0]


def _shared(trace: Trace, ssm_reuse_intervals: Sequence[int]) -> SharedBlocks:
    prompts = trace.without_outputs()
    hit_depth = infinite_cache(prompts, None).kv_tokens
    seen = np.zeros(prompts.num_keys, dtype=np.bool_)
    seen[prompts.block_keys] = True
    return SharedBlocks(
        tokens_per_block=trace.tokens_per_block,
        full_blocks=prompts.block_keys.size,
        distinct_full_blocks=int(np.count_nonzero(seen)),
        ceilings=_ceilings(prompts, hit_depth, ssm_reuse_intervals),
        hit_depth_tokens=distribution(hit_depth),
        requests_without_hit=int(np.count_nonzero(hit_depth == 0)),
        outputs=_shared_outputs(trace, ssm_reuse_intervals),
    )


def _shared_outputs(trace: Trace, ssm_reuse_intervals: Sequence[int]) -> SharedOutputs | None:
    if trace.output_known is None:
        return None
    known_tokens = trace.output_tokens[trace.output_known]
    return SharedOutputs(
        known_requests=int(np.count_nonzero(known_tokens)),
        known_tokens=int(known_tokens.sum()),
        ceilings=_ceilings(trace, infinite_cache(trace, None).kv_tokens, ssm_reuse_intervals),
    )


def _ceilings(trace: Trace, hit_depth: Int64Array, ssm_reuse_intervals: Sequence[int]) -> tuple[Ceiling, ...]:
    """Attention alone, then each interval that is a multiple of the trace's block."""
    num_tokens = max(int(trace.prompt_tokens.sum()), 1)
    usable = [interval for interval in ssm_reuse_intervals if interval % trace.tokens_per_block == 0]
    sums = [(None, int(hit_depth.sum())), *((step, int((hit_depth // step * step).sum())) for step in usable)]
    return tuple(Ceiling(interval, tokens, tokens / num_tokens) for interval, tokens in sums)
