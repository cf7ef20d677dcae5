"""How sure a recommendation is: the same choice on parts of the trace, on other phases of it, and with other costs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ssmcache_sim.candidates import Candidate, Place, Shape, measure, rank, sizes_of
from ssmcache_sim.cost import PrefillCost
from ssmcache_sim.grid import StackDistances, stack_distances
from ssmcache_sim.settings import Prefill
from ssmcache_sim.trace import Trace

CaseKind = Literal["half", "piece", "phase", "cost"]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One repetition of the choice: other requests, or other costs. `distances`: of the trace; None: not made yet."""

    kind: CaseKind
    label: str
    trace: Trace
    cost: PrefillCost
    distances: StackDistances | None = None


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What a case says; shares are of its own prefill time without a prefix cache.

    Attributes:
        best_saved_share, runner_up_saved_share: by the recommended setting and by the runner-up, as they are.
        own_shape, own_saved_share: what would be chosen for this case alone, with the split that suits it.
    """

    kind: CaseKind
    label: str
    num_requests: int
    best_saved_share: float
    runner_up_saved_share: float | None
    own_shape: Shape
    own_saved_share: float

    @property
    def margin_share(self) -> float:
        """By how much the recommended setting is ahead of the runner-up."""
        return self.best_saved_share - (self.runner_up_saved_share or 0.0)


@dataclass(frozen=True, slots=True)
class Certainty:
    """All cases, and whether the runner-up is worse by more than chance.

    Attributes:
        margin_share: over the whole trace, by how much the best is ahead of the runner-up.
        noise_share: standard deviation of that over the cases of other requests; 0 where there are fewer than two.
    """

    cases: tuple[CaseResult, ...]
    margin_share: float
    noise_share: float

    @property
    def traffic_cases(self) -> tuple[CaseResult, ...]:
        """The cases of other requests."""
        return tuple(case for case in self.cases if case.kind != "cost")

    @property
    def within_noise(self) -> bool:
        """Whether the margin is not above the noise: then either setting may be the better one."""
        return self.margin_share <= self.noise_share


def piece_cases(trace: Trace, cost: PrefillCost, num_pieces: int, seed: int) -> Iterator[Case]:
    """Both halves of the trace, and contiguous pieces as long as that from random places. Each starts with an empty
    cache, so all of them save less than the whole.
    """
    half = trace.num_requests // 2
    if half == 0:
        return
    yield Case("half", "first half", piece(trace, 0, half), cost)
    yield Case("half", "second half", piece(trace, half, trace.num_requests), cost)
    starts = np.random.default_rng(seed).integers(0, trace.num_requests - half + 1, num_pieces)
    for start in np.sort(starts).tolist():
        yield Case("piece", f"requests {start} to {start + half - 1}", piece(trace, start, start + half), cost)


def cost_cases(trace: Trace, distances: StackDistances, cost: PrefillCost) -> Iterator[Case]:
    """The whole trace with what the cost model estimates changed, one thing at a time."""
    device = cost.device

    def case(label: str, changed: PrefillCost) -> Case:
        return Case("cost", label, trace, changed, distances)

    for factor in (0.5, 1.5):
        utilisation = device.utilisation * factor
        changed = replace(device, utilisation=utilisation)
        yield case(f"{utilisation:.0%} of the peak", replace(cost, device=changed))
    if cost.snapshot_bytes:
        for factor in (0, 4):
            changed = replace(device, pass_seconds=device.pass_seconds * factor)
            yield case(f"{changed.pass_seconds * 1e3:g} ms a pass", replace(cost, device=changed))
        other: Prefill = "reserved" if cost.prefill == "chunked" else "chunked"
        yield case(f"prefill {other}", replace(cost, prefill=other))


def piece(trace: Trace, start: int, stop: int) -> Trace:
    """Requests `start`..`stop - 1` alone."""
    first, last = int(trace.offsets[start]), int(trace.offsets[stop])
    return replace(
        trace,
        arrival_ms=trace.arrival_ms[start:stop],
        prompt_tokens=trace.prompt_tokens[start:stop],
        output_tokens=trace.output_tokens[start:stop],
        block_keys=trace.block_keys[first:last],
        offsets=trace.offsets[start : stop + 1] - first,
        partial_ids=trace.partial_ids[start:stop],
        output_known=None if trace.output_known is None else trace.output_known[start:stop],
        sessions=None,
    )


def judge(
    cases: Sequence[Case],
    candidates: Sequence[Candidate],
    best: Place,
    runner_up: Place | None,
    margin_share: float,
    progress: Callable[[int], None],
) -> Certainty:
    """Repeats the choice on each case; says the percentage done after each. Cost: one pass over the trace of each."""
    results: list[CaseResult] = []
    for case in cases:
        results.append(_judge_case(case, candidates, best, runner_up))
        progress(100 * len(results) // len(cases))
    margins = [result.margin_share for result in results if result.kind != "cost"]
    noise = float(np.std(margins, ddof=1)) if len(margins) > 1 else 0.0
    return Certainty(tuple(results), margin_share, noise)


def _judge_case(case: Case, candidates: Sequence[Candidate], best: Place, runner_up: Place | None) -> CaseResult:
    distances = case.distances or stack_distances(case.trace, sizes_of(candidates))
    totals = measure(case.trace, distances, candidates, case.cost)
    plain_ns = int(case.cost.plain_ns(case.trace.prompt_tokens).sum())
    own = rank(candidates, totals)[0]

    def share(place: Place) -> float:
        return int(totals[place.candidate].saved_ns[place.split]) / plain_ns

    return CaseResult(
        kind=case.kind,
        label=case.label,
        num_requests=case.trace.num_requests,
        best_saved_share=share(best),
        runner_up_saved_share=None if runner_up is None else share(runner_up),
        own_shape=candidates[own.candidate].shape,
        own_saved_share=share(own),
    )
