"""The best interval, block size and split of a memory for a trace and a model, by the time that prefill saves.

Every split of the memory (`splits.py`), for every block size and interval that the trace records exactly
(`candidates.py`), is ranked by the modelled time (`cost.py`) that the cache saves over the whole trace. How sure the
choice is, is asked of parts of the trace, of its phases and of other costs (`certainty.py`). Hits are exact: what is
recommended is a cell of the grid, and a replay of it hits the same tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ssmcache.models import ModelSpec
from ssmcache_sim.candidates import (
    Candidate,
    LeftOut,
    Question,
    Shape,
    find_candidates,
    measure,
    near_best,
    rank,
    sizes_of,
)
from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.certainty import Case, Certainty, cost_cases, judge, piece_cases
from ssmcache_sim.cost import PrefillCost, prefill_cost
from ssmcache_sim.errors import SettingsError
from ssmcache_sim.grid import StackDistances, stack_distances
from ssmcache_sim.grid_cells import GridCapacity, grid_capacity
from ssmcache_sim.settings import ReplaySettings, build_config, make_settings
from ssmcache_sim.splits import SplitTotals, unlimited_totals
from ssmcache_sim.trace import Trace

# A snapshot at every multiple of the interval. Another admission that the grid can do would be one more member of
# `Shape`, with distances of its own in `splits.py`.
ADMISSION = "every"
_NEAR_BEST = 0.01  # of the time that the best split saves


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What unlimited memory would give at one interval."""

    shape: Shape
    hit_tokens: int
    saved_ns: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The best split of one block size and interval, and what it gives over the whole trace.

    Attributes:
        settings: to replay it.
        num_slots: SSM slots, that of the live state included; 0 without SSM layers.
        near_best_slots: from, to: SSM slots around `num_slots` that save at least 99 % as much time.
        saved_ns: modelled prefill time without a prefix cache less that with it; negative where the cache costs more.
        ceiling: the same interval with unlimited memory.
    """

    settings: ReplaySettings
    num_pages: int
    page_bytes: int
    num_slots: int
    slot_bytes: int
    near_best_slots: tuple[int, int]
    hit_tokens: int
    saved_ns: int
    snapshots_taken: int
    ceiling: Ceiling


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer.

    Attributes:
        plain_ns: modelled prefill time of the trace without a prefix cache.
        choices: the best split of each interval and block size, best first.
        runner_up: the best one of another interval; without SSM layers, of another block size.
        ceiling: of all intervals, also those left out, the one that would save most with unlimited memory.
        kv_ceiling_hit_tokens: by attention alone, with unlimited memory.
        left_out: what was not judged because its largest request does not fit.
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
        """Share of all prompt tokens."""
        return tokens / self.prompt_tokens

    def saved_share(self, nanoseconds: int) -> float:
        """Share of the prefill time without a prefix cache."""
        return nanoseconds / self.plain_ns


def recommend(
    trace: Trace,
    model: ModelSpec,
    question: Question,
    phases: Sequence[Trace] = (),
    progress: Callable[[int], None] = lambda percentage: None,
) -> Recommendation:
    """The best settings for this trace.

    Args:
        phases: the same traffic with its prompts shifted against the interval, in blocks of the same size as `trace`;
            the choice is repeated on each.
        progress: called now and then with the percentage done.

    Cost: one pass over each trace and each piece of it, and O(boundaries found) for each interval and block size.
    Errors: SettingsError for a model that cannot be judged, or settings that cannot be; MemoryTooSmallError where
    nothing holds the largest request; TraceError for blocks that the trace does not record; ModelError for a dtype.
    """
    assert all(phase.tokens_per_block == trace.tokens_per_block for phase in phases), "phases in other blocks"
    if not model.num_attention_layers:
        raise SettingsError(f"{model.name}: expected a model with attention layers, got none: replay it instead")
    cost = prefill_cost(
        model,
        device=question.device,
        prefill=question.prefill,
        state_dtype=question.state_dtype,
        billion_parameters=question.billion_parameters,
    )
    longest = max(each.longest_path for each in (trace, *phases))
    candidates, left_out = find_candidates(trace, model, question, longest)
    distances = stack_distances(trace, sizes_of(candidates))
    totals = measure(trace, distances, candidates, cost)
    places = rank(candidates, totals)
    unlimited = _unlimited(trace, distances, [*candidates, *left_out], cost)
    choices = []
    for place in places:
        candidate, sums = candidates[place.candidate], totals[place.candidate]
        choices.append(_choice(trace, model, question, candidate, sums, place.split, unlimited[candidate.shape.step]))
    plain_ns = int(cost.plain_ns(trace.prompt_tokens).sum())
    second = _runner_up([candidates[place.candidate].shape for place in places])
    margin_ns = 0 if second is None else choices[0].saved_ns - choices[second].saved_ns
    cases = [
        *piece_cases(trace, cost, question.num_pieces, question.seed),
        *(Case("phase", phase.name, phase, cost) for phase in phases),
        *cost_cases(trace, distances, cost),
    ]
    second_place = None if second is None else places[second]
    return Recommendation(
        num_requests=trace.num_requests,
        prompt_tokens=int(trace.prompt_tokens.sum()),
        plain_ns=plain_ns,
        cost=cost,
        choices=tuple(choices),
        runner_up=None if second is None else choices[second],
        ceiling=max(unlimited.values(), key=lambda ceiling: ceiling.saved_ns),
        kv_ceiling_hit_tokens=int(infinite_cache(trace, None).kv_tokens.sum()),
        left_out=left_out,
        certainty=judge(cases, candidates, places[0], second_place, margin_ns / plain_ns, progress),
    )


def _runner_up(shapes: Sequence[Shape]) -> int | None:
    """The first shape of another interval than the best one; without SSM layers, of another block size."""
    return next((index for index, shape in enumerate(shapes) if shape.step != shapes[0].step), None)


def _unlimited(
    trace: Trace, distances: StackDistances, shapes: Sequence[Candidate | LeftOut], cost: PrefillCost
) -> dict[int, Ceiling]:
    """By step: of all blocks that divide it the smallest stands for all, since unlimited memory wastes none."""
    ceilings: dict[int, Ceiling] = {}
    for shape in sorted((each.shape for each in shapes), key=lambda shape: (shape.step, shape.tokens_per_block)):
        if shape.step not in ceilings:
            ceilings[shape.step] = Ceiling(shape, *unlimited_totals(trace, distances, shape.step, cost))
    return ceilings


def _choice(
    trace: Trace,
    model: ModelSpec,
    question: Question,
    candidate: Candidate,
    totals: SplitTotals,
    split: int,
    ceiling: Ceiling,
) -> Choice:
    splits = candidate.splits
    num_slots = splits.first + split
    first, last = near_best(totals, split, _NEAR_BEST)
    return Choice(
        settings=_settings(trace, model, question, candidate, num_slots),
        num_pages=splits.num_pages(num_slots),
        page_bytes=splits.page_bytes,
        num_slots=num_slots,
        slot_bytes=splits.slot_bytes,
        near_best_slots=(splits.first + first, splits.first + last),
        hit_tokens=int(totals.hit_tokens[split]),
        saved_ns=int(totals.saved_ns[split]),
        snapshots_taken=int(totals.snapshots_taken[split]),
        ceiling=ceiling,
    )


def _settings(
    trace: Trace, model: ModelSpec, question: Question, candidate: Candidate, num_slots: int
) -> ReplaySettings:
    """Settings from which a manager makes exactly this split: the fraction with the fewest digits that does."""
    settings = make_settings(
        model,
        candidate.shape.tokens_per_block,
        gpu_memory_bytes=question.gpu_memory_bytes,
        ssm_reuse_interval=candidate.shape.ssm_reuse_interval,
        kv_dtype=question.kv_dtype,
        state_dtype=question.state_dtype,
        prefill=question.prefill,
    )
    splits = candidate.splits
    num_pages = splits.num_pages(num_slots)
    wanted = GridCapacity(num_pages - 1, num_slots - 1 if num_slots else None)
    if not num_slots:
        assert grid_capacity(trace, build_config(model, settings)) == wanted
        return settings
    least = num_slots * splits.slot_bytes / splits.memory_bytes
    for digits in range(2, 18):
        fraction = math.ceil(least * 10**digits) / 10**digits
        exact = replace(settings, ssm_fraction=fraction)
        if fraction < 1 and grid_capacity(trace, build_config(model, exact)) == wanted:
            return exact
    raise AssertionError(f"no share of {splits.memory_bytes} bytes gives {num_slots} slots and {num_pages} pages")
