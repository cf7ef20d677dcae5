"""How sure a recommendation is: the same choice on parts of the trace, on other phases of it, and with other costs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ssmcache_sim.candidates import Candidate, Place, Shape, measure, narrowed, rank, sizes_of
from ssmcache_sim.cost import PrefillCost
from ssmcache_sim.grid import StackDistances, stack_distances
from ssmcache_sim.measured import Measured
from ssmcache_sim.phase import shifted
from ssmcache_sim.settings import Prefill
from ssmcache_sim.splits import SplitTotals
from ssmcache_sim.trace import Trace

CaseKind = Literal["half", "piece", "phase", "cost"]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One repetition of the choice: other requests, the same ones shifted, or other costs.

    Attributes:
        distances: of the trace; None: not made yet.
        front_tokens: of each prompt, that are not the trace's own.
    """

    kind: CaseKind
    label: str
    trace: Trace
    cost: PrefillCost
    distances: StackDistances | None = None
    front_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Contender:
    """A setting that is compared: its shape and SSM slots; `place` in the grid's candidates if it is one of them."""

    shape: Shape
    num_slots: int
    place: Place | None


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What a case says; shares are of its own prefill time without a prefix cache.

    Attributes:
        best_saved_share, runner_up_saved_share: by the recommended setting and by the runner-up, as they are.
        own_shape, own_saved_share: what would be chosen for this case alone, with the split that suits it, of all that
            the grid can tell and these two; with other costs, of all that was replayed, too.
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
        """The cases of other requests, or of shifted ones."""
        return tuple(case for case in self.cases if case.kind != "cost")

    @property
    def part_cases(self) -> tuple[CaseResult, ...]:
        return tuple(case for case in self.cases if case.kind in ("half", "piece"))

    @property
    def phase_cases(self) -> tuple[CaseResult, ...]:
        return tuple(case for case in self.cases if case.kind == "phase")

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
    yield Case("half", "first half", trace.part(0, half), cost)
    yield Case("half", "second half", trace.part(half, trace.num_requests), cost)
    starts = np.random.default_rng(seed).integers(0, trace.num_requests - half + 1, num_pieces)
    for start in np.sort(starts).tolist():
        yield Case("piece", f"requests {start} to {start + half - 1}", trace.part(start, start + half), cost)


def cost_cases(trace: Trace, distances: StackDistances, cost: PrefillCost, has_tiers: bool) -> Iterator[Case]:
    """The whole trace with what the cost model estimates changed, one thing at a time."""
    device = cost.device

    def case(label: str, changed: PrefillCost) -> Case:
        return Case("cost", label, trace, changed, distances)

    for factor in (0.5, 1.5):
        changed = replace(device, utilisation=device.utilisation * factor)
        yield case(f"{factor:g} times the FLOP/s", replace(cost, device=changed))
    if cost.snapshot_bytes:
        for factor in (0, 4):
            seconds, floor = device.pass_seconds * factor, device.pass_floor_seconds * factor
            changed = replace(device, pass_seconds=seconds, pass_floor_seconds=floor)
            yield case(f"{max(seconds, floor) * 1e3:.3g} ms a pass", replace(cost, device=changed))
        other: Prefill = "reserved" if cost.prefill == "chunked" else "chunked"
        yield case(f"prefill {other}", replace(cost, prefill=other))
    if has_tiers:
        slower = replace(
            device.bandwidths,
            host_to_gpu_bytes_per_second=device.bandwidths.host_to_gpu_bytes_per_second / 2,
            from_disk_bytes_per_second=device.bandwidths.from_disk_bytes_per_second / 2,
        )
        changed = replace(device, bandwidths=slower)
        yield case("half the bandwidth of host and disk", replace(cost, device=changed))


def phase_cases(trace: Trace, cost: PrefillCost, shifts: Sequence[int]) -> Iterator[Case]:
    """The whole trace with the same tokens in front of every prompt (see `phase.py`), which do not count as saved."""
    for shift in shifts:
        yield Case("phase", f"{shift:,} tokens in front", shifted(trace, shift), cost, front_tokens=shift)


MeasureOn = Callable[[Trace, Contender], Measured]


def judge(
    cases: Sequence[Case],
    candidates: Sequence[Candidate],
    best: Contender,
    runner_up: Contender | None,
    margin_share: float,
    measure_on: MeasureOn,
    replayed: Sequence[Contender],
    progress: Callable[[int], None],
) -> Certainty:
    """Repeats the choice on each case.

    Args:
        candidates: those of the grid, which it is repeated with.
        measure_on: of a contender that is none of them, on a trace.
        replayed: all such contenders that `measure_on` knows for the whole trace.
        progress: called with the number of cases done.

    Cost: one pass over the trace of each case, and replays of the contenders that the grid has not.
    """
    results: list[CaseResult] = []
    for case in cases:
        results.append(_judge_case(case, candidates, best, runner_up, measure_on, replayed))
        progress(len(results))
    margins = [result.margin_share for result in results if result.kind != "cost"]
    noise = float(np.std(margins, ddof=1)) if len(margins) > 1 else 0.0
    return Certainty(tuple(results), margin_share, noise)


def _judge_case(
    case: Case,
    candidates: Sequence[Candidate],
    best: Contender,
    runner_up: Contender | None,
    measure_on: MeasureOn,
    replayed: Sequence[Contender],
) -> CaseResult:
    grid = _GridOfCase(case, candidates)
    front = np.full_like(case.trace.prompt_tokens, case.front_tokens)
    plain_ns = max(
        int((case.cost.plain_ns(case.trace.prompt_tokens) - case.cost.front_ns(front)).sum()), 1
    )  # 0 where all prompts are empty

    def saved(contender: Contender) -> int:
        if contender.place is not None:
            return grid.saved_ns(contender.place.candidate, contender.num_slots)
        return measure_on(case.trace, contender).saved_ns(case.trace, case.cost, case.front_tokens)

    chosen = [best] if runner_up is None else [best, runner_up]
    others = [contender for contender in replayed if case.kind == "cost" and contender not in chosen]
    own = [(saved(contender), contender.shape) for contender in (*chosen, *others)]
    own += grid.best()
    own_ns, own_shape = max(own, key=lambda pair: pair[0])
    return CaseResult(
        kind=case.kind,
        label=case.label,
        num_requests=case.trace.num_requests,
        best_saved_share=own[0][0] / plain_ns,
        runner_up_saved_share=None if runner_up is None else own[1][0] / plain_ns,
        own_shape=own_shape,
        own_saved_share=own_ns / plain_ns,
    )


class _GridOfCase:
    """What the grid says of its candidates in one case: those of their splits that hold its largest request."""

    def __init__(self, case: Case, candidates: Sequence[Candidate]) -> None:
        self._candidates: list[Candidate] = []
        self._index: dict[int, int] = {}
        longest = case.trace.longest_path
        for index, candidate in enumerate(candidates):
            fitting = narrowed(candidate, longest) if case.front_tokens else candidate
            if fitting is not None:
                self._index[index] = len(self._candidates)
                self._candidates.append(fitting)
        self._totals: list[SplitTotals] = []
        if self._candidates:
            distances = case.distances or stack_distances(case.trace, sizes_of(self._candidates))
            self._totals = measure(case.trace, distances, self._candidates, case.cost, case.front_tokens)

    def saved_ns(self, candidate: int, num_slots: int) -> int:
        index = self._index[candidate]
        return int(self._totals[index].saved_ns[num_slots - self._candidates[index].splits.first])

    def best(self) -> list[tuple[int, Shape]]:
        """The best candidate with its time, if there are any."""
        if not self._candidates:
            return []
        place = rank(self._candidates, self._totals)[0]
        return [(int(self._totals[place.candidate].saved_ns[place.split]), self._candidates[place.candidate].shape)]
