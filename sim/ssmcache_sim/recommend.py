"""The best interval, block size, admission and split of a memory for a trace and a model, by prefill time saved.

Every split of the memory (`splits.py`), for every block size and interval that the trace records exactly
(`candidates.py`), is ranked by the modelled time (`cost.py`) that the cache saves over the whole trace. What the grid
cannot tell exactly is searched by replays (`rating.py`, `search.py`). How sure the choice is, is asked of parts of the
trace, of its phases and of other costs (`certainty.py`). Hits are exact: a replay of what is recommended hits the same
tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssmcache.models import ModelSpec
from ssmcache_sim.candidates import (
    Candidate,
    LeftOut,
    Place,
    Question,
    Shape,
    find_candidates,
    measure,
    narrowed,
    near_best,
    order_of,
    rank,
    sizes_of,
)
from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.certainty import Case, Certainty, Contender, cost_cases, judge, phase_cases, piece_cases
from ssmcache_sim.cost import PrefillCost, prefill_cost
from ssmcache_sim.errors import SettingsError
from ssmcache_sim.grid import StackDistances, stack_distances
from ssmcache_sim.phase import shifts_of
from ssmcache_sim.rating import By, Rater
from ssmcache_sim.search import SearchResult, differs
from ssmcache_sim.settings import ReplaySettings
from ssmcache_sim.splits import SplitTotals, unlimited_totals
from ssmcache_sim.trace import Trace

_NEAR_BEST = 0.01  # of the time that the best split saves


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What unlimited memory would give at one interval and admission."""

    shape: Shape
    hit_tokens: int
    saved_ns: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The best split found of one block size, interval and admission, and what it gives over the whole trace.

    Attributes:
        settings: to replay it.
        by: how it is known: exactly, by the grid or a replay, or by an estimate alone.
        num_slots: SSM slots on the GPU, that of the live state included; 0 without SSM layers.
        near_best_slots: from, to: SSM slots around `num_slots` that save at least 99 % as much time; None where not all
            splits were looked at.
        hit_tokens_by_tier: from the GPU down; one entry for the GPU alone.
        saved_ns: modelled prefill time without a prefix cache less that with it; negative where the cache costs more.
        ceiling: the same interval and admission with unlimited memory.
    """

    settings: ReplaySettings
    by: By
    shape: Shape
    num_pages: int
    page_bytes: int
    num_slots: int
    slot_bytes: int
    near_best_slots: tuple[int, int] | None
    hit_tokens: int
    hit_tokens_by_tier: tuple[int, ...]
    saved_ns: int
    snapshots_taken: int
    ceiling: Ceiling


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer.

    Attributes:
        plain_ns: modelled prefill time of the trace without a prefix cache.
        choices: the best split of each interval, block size and admission, best first; estimates come last.
        runner_up: the best one of another interval or admission; without SSM layers, of another block size.
        ceiling: of all intervals, also those left out, the one that would save most with unlimited memory.
        kv_ceiling_hit_tokens: by attention alone, with unlimited memory.
        left_out: what was not judged because its largest request does not fit.
        num_replays: that the search made.
        num_promising: settings that still promised more than the best when it might make no more.
    """

    num_requests: int
    prompt_tokens: int
    plain_ns: int
    cost: PrefillCost
    choices: tuple[Choice, ...]
    runner_up: Choice | None
    ceiling: Ceiling
    kv_ceiling_hit_tokens: int
    left_out: tuple[LeftOut, ...]
    certainty: Certainty
    num_replays: int
    num_promising: int

    def __repr__(self) -> str:
        lines = [f"Recommendation({self.best.settings.in_words()})", f"  {self._gains(self.best)}"]
        if self.runner_up is not None:
            lines.append(f"  runner-up: {self.runner_up.settings.in_words()}: {self._gains(self.runner_up)}")
        sure = self.certainty
        lines.append(
            f"  ahead by {sure.margin_share:.2%} of the prefill time; parts of the trace vary by {sure.noise_share:.2%}"
        )
        return "\n".join(lines)

    def _gains(self, choice: Choice) -> str:
        split = f", {choice.num_pages:,} KV pages and {choice.num_slots:,} SSM slots" if choice.num_slots else ""
        saved, hits = self.saved_share(choice.saved_ns), self.hit_rate(choice.hit_tokens)
        return f"saves {saved:.2%} of the prefill time, usable token hit rate {hits:.2%}{split}"

    @property
    def best(self) -> Choice:
        return self.choices[0]

    def hit_rate(self, tokens: int) -> float:
        """Share of all prompt tokens; of none, 0."""
        return tokens / max(self.prompt_tokens, 1)

    def saved_share(self, nanoseconds: int) -> float:
        """Share of the prefill time without a prefix cache; of none, 0."""
        return nanoseconds / max(self.plain_ns, 1)


def recommend(
    trace: Trace,
    model: ModelSpec,
    question: Question,
    progress: Callable[[int], None] = lambda percentage: None,
) -> Recommendation:
    """The best settings for this trace.

    Args:
        progress: called now and then with the percentage done.

    Cost: one pass over the trace, and each piece and shift of it, and O(boundaries found) for each interval and block
    size; where replays are needed, up to `num_replays` of the trace, and up to two of each piece and shift.
    Errors: SettingsError for a model that cannot be judged, or settings that cannot be; MemoryTooSmallError where
    nothing holds the largest request; TraceError for blocks that the trace does not record; ModelError for a dtype.
    """
    if not model.num_attention_layers:
        raise SettingsError(f"{model.name}: expected a model with attention layers, got none: replay it instead")
    cost = prefill_cost(
        model,
        device=question.device,
        prefill=question.prefill,
        state_dtype=question.state_dtype,
        billion_parameters=question.billion_parameters,
    )
    longest = trace.longest_path
    candidates, left_out = find_candidates(trace, model, question, longest)
    distances = stack_distances(trace, sizes_of(candidates))
    rater = Rater(trace, model, question, cost, distances, {each.shape: each for each in candidates})
    by_grid = [each for each in candidates if not question.has_tiers and each.shape.admission == "every"]
    totals = measure(trace, distances, by_grid, cost)
    places = rank(by_grid, totals) if by_grid else []
    known = {by_grid[place.candidate].shape: int(totals[place.candidate].saved_ns[place.split]) for place in places}
    found = rater.search(known, lambda done: progress(50 * done // question.num_replays))
    ceilings = _ceilings(trace, distances, rater, [*candidates, *left_out], cost)
    rated = [_of_place(by_grid, totals, rater, place, ceilings) for place in places]
    rated += _searched(rater, found, ceilings)
    rated.sort(key=lambda one: (one[0].by == "estimate", order_of(one[0].shape, one[0].saved_ns, one[0].hit_tokens)))
    choices = [choice for choice, _ in rated]
    plain_ns = int(cost.plain_ns(trace.prompt_tokens).sum())
    second = _runner_up(choices)
    contenders = [contender for _, contender in rated]
    margin_ns = 0 if second is None else choices[0].saved_ns - choices[second].saved_ns
    compared = [contenders[index] for index in (0, second) if index is not None]
    cases = _cases(trace, distances, rater, compared)
    certainty = judge(
        cases,
        by_grid,
        contenders[0],
        None if second is None else contenders[second],
        margin_ns / max(plain_ns, 1),
        rater.measure_contender,
        [Contender(*option, None) for option in found.saved_ns],
        lambda done: progress(50 + 50 * done // len(cases)),
    )
    return Recommendation(
        num_requests=trace.num_requests,
        prompt_tokens=int(trace.prompt_tokens.sum()),
        plain_ns=plain_ns,
        cost=cost,
        choices=tuple(choices),
        runner_up=None if second is None else choices[second],
        ceiling=max(ceilings.values(), key=lambda ceiling: ceiling.saved_ns),
        kv_ceiling_hit_tokens=int(infinite_cache(trace, None).kv_tokens.sum()),
        left_out=left_out,
        certainty=certainty,
        num_replays=found.num_replays,
        num_promising=found.num_promising,
    )


def _runner_up(choices: Sequence[Choice]) -> int | None:
    """The first exact choice of another interval or admission; without SSM layers, of another block size."""
    return next(
        (
            index
            for index, choice in enumerate(choices)
            if choice.by != "estimate" and differs(choice.shape, choices[0].shape)
        ),
        None,
    )


def _cases(trace: Trace, distances: StackDistances, rater: Rater, compared: Sequence[Contender]) -> list[Case]:
    """What the choice is repeated on. Shifts are over the longer interval of both that are compared, as far as both
    have room for the longer prompts.
    """
    question, cost, longest = rater.question, rater.cost, trace.longest_path

    def fits(shift: int) -> bool:
        for contender in compared:
            candidate = narrowed(rater.candidates[contender.shape], longest + shift)
            if candidate is None or not candidate.splits.first <= contender.num_slots <= candidate.splits.last:
                return False
        return True

    period = max(contender.shape.step for contender in compared)
    shifts = shifts_of(period, trace.tokens_per_block, question.num_phases + 1)[1:]
    return [
        *piece_cases(trace, cost, question.num_pieces, question.seed),
        *phase_cases(trace, cost, [shift for shift in shifts if fits(shift)]),
        *cost_cases(trace, distances, cost, question.has_tiers),
    ]


_CeilingKey = tuple[int, str]  # step and admission


def _ceilings(
    trace: Trace, distances: StackDistances, rater: Rater, shapes: Sequence[Candidate | LeftOut], cost: PrefillCost
) -> dict[_CeilingKey, Ceiling]:
    """Of all blocks that divide an interval the smallest stands for all, since unlimited memory wastes none."""
    ceilings: dict[_CeilingKey, Ceiling] = {}
    for shape in sorted((each.shape for each in shapes), key=lambda shape: (shape.step, shape.tokens_per_block)):
        if (shape.step, shape.admission) in ceilings:
            continue
        if shape.admission == "every":
            ceiling = Ceiling(shape, *unlimited_totals(trace, distances, shape.step, cost))
        elif shape in rater.candidates:
            measured = rater.unlimited(shape)
            ceiling = Ceiling(shape, measured.hit_tokens, measured.saved_ns(trace, cost))
        else:
            continue
        ceilings[shape.step, shape.admission] = ceiling
    return ceilings


_Rated = tuple[Choice, Contender]


def _of_place(
    candidates: Sequence[Candidate],
    totals: Sequence[SplitTotals],
    rater: Rater,
    place: Place,
    ceilings: dict[_CeilingKey, Ceiling],
) -> _Rated:
    """The best split of a candidate whose splits the grid has done all."""
    candidate, sums, split = candidates[place.candidate], totals[place.candidate], place.split
    shape, splits = candidate.shape, candidate.splits
    num_slots = splits.first + split
    first, last = near_best(sums, split, _NEAR_BEST)
    choice = Choice(
        settings=rater.settings(shape, num_slots),
        by="grid",
        shape=shape,
        num_pages=splits.num_pages(num_slots),
        page_bytes=splits.page_bytes,
        num_slots=num_slots,
        slot_bytes=splits.slot_bytes,
        near_best_slots=(splits.first + first, splits.first + last),
        hit_tokens=int(sums.hit_tokens[split]),
        hit_tokens_by_tier=(int(sums.hit_tokens[split]),),
        saved_ns=int(sums.saved_ns[split]),
        snapshots_taken=int(sums.snapshots_taken[split]),
        ceiling=ceilings[shape.step, shape.admission],
    )
    return choice, Contender(shape, num_slots, place)


def _searched(rater: Rater, found: SearchResult, ceilings: dict[_CeilingKey, Ceiling]) -> list[_Rated]:
    """The best split of each shape that was searched: of those that were measured, else of those estimated."""
    best: dict[Shape, tuple[bool, int, int]] = {}
    for (shape, num_slots), saved_ns in found.estimates.items():
        is_exact = (shape, num_slots) in found.saved_ns
        rated = is_exact, found.saved_ns.get((shape, num_slots), saved_ns), num_slots
        best[shape] = max(rated, best.get(shape, rated), key=lambda one: one[:2])
    rated_choices = []
    for shape, (is_exact, saved_ns, num_slots) in best.items():
        option, splits = (shape, num_slots), rater.candidates[shape].splits
        is_exact = is_exact or rater.is_by_grid(option)
        measured = rater.measure(option) if is_exact else rater.estimate(option)
        choice = Choice(
            settings=rater.settings(shape, num_slots),
            by=("grid" if rater.is_by_grid(option) else "replay") if is_exact else "estimate",
            shape=shape,
            num_pages=splits.num_pages(num_slots),
            page_bytes=splits.page_bytes,
            num_slots=num_slots,
            slot_bytes=splits.slot_bytes,
            near_best_slots=None,
            hit_tokens=measured.hit_tokens,
            hit_tokens_by_tier=measured.hit_tokens_by_tier,
            saved_ns=saved_ns,
            snapshots_taken=measured.snapshots_taken,
            ceiling=ceilings[shape.step, shape.admission],
        )
        rated_choices.append((choice, Contender(shape, num_slots, None)))
    return rated_choices
