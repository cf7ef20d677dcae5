"""The best settings among those whose savings the grid can only estimate, with a bounded number of replays.

Best first: whoever promises most is replayed next. What a replay says of one setting corrects the estimates of its
likes: those of the same block, interval and admission by as much as it was off on the mean, until there is one those of
the same admission. Splits are a few of each shape at first, and more of them around the most promising one before the
first replay of its shape. The search ends when no promise that is left could overtake the best or the runner-up, even
if its estimate is off by as much as the errors seen so far differ (those of its shape, if there are any), and a few
splits of these two were replayed; or with the last replay that it may make: then the answer says how many such promises
were left. It is no proof: an estimate may be further off than any seen.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean

from ssmcache_sim.candidates import Shape

_NOTHING = float("-inf")
_NEAR = 0.02  # of the SSM slots: no estimate is made of a split as near as that to another one,
_ALIKE = 0.1  # and no replay as near as that
_LEAST = 3  # splits of the best and the runner-up that are replayed, if there are so many
_COARSE = 0.1  # of what is to be overtaken: what a few splits of a shape may miss

Option = tuple[Shape, int]  # a shape, and the SSM slots on the GPU


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What was found.

    Attributes:
        saved_ns: of each setting that was measured.
        estimates: of each setting that was looked at.
        num_replays: made.
        num_promising: settings that might still have overtaken the best or the runner-up.
    """

    saved_ns: Mapping[Option, int]
    estimates: Mapping[Option, int]
    num_replays: int
    num_promising: int


@dataclass(slots=True)
class _Search:
    estimate: Callable[[Option], int]
    measure: Callable[[Option], int]
    estimates: dict[Option, int] = field(default_factory=dict)
    measured: dict[Option, int] = field(default_factory=dict)
    refined: set[Shape] = field(default_factory=set)

    def look_at(self, option: Option) -> None:
        if option not in self.estimates:
            self.estimates[option] = self.estimate(option)

    def promises(self) -> dict[Option, int]:
        """Corrected estimates of what was not measured."""
        errors: dict[object, list[int]] = {}
        for option, saved_ns in self.measured.items():
            shape = option[0]
            for like in (shape, shape.admission):
                errors.setdefault(like, []).append(saved_ns - self.estimates[option])
        return {
            option: saved_ns + round(mean(errors.get(option[0]) or errors.get(option[0].admission) or [0]))
            for option, saved_ns in self.estimates.items()
            if option not in self.measured
        }

    def slack(self, shape: Shape) -> int:
        """By how much estimates were off differently: those of the shape, if any were compared, else all."""
        errors = {option: saved_ns - self.estimates[option] for option, saved_ns in self.measured.items()}
        compared = [error for option, error in errors.items() if option[0] == shape] or list(errors.values())
        return max(compared, default=0) - min(compared, default=0)

    def to_compare(
        self, promises: Mapping[Option, int], best_of: Mapping[Shape, int], costs_replay: Callable[[Option], bool]
    ) -> dict[Option, int]:
        """More splits of the best and the runner-up, where too few were replayed to know how far estimates are off."""
        leader = max(best_of, key=lambda shape: best_of[shape])
        others = [shape for shape in best_of if differs(shape, leader)]
        chosen = {leader, max(others, key=lambda shape: best_of[shape])} if others else {leader}
        counts = Counter(option[0] for option in self.measured if costs_replay(option))
        return {
            option: saved
            for option, saved in promises.items()
            if option[0] in chosen and 0 < counts[option[0]] < _LEAST and not self.is_like_measured(option)
        }

    def could_pass(self, option: Option, saved_ns: int, bar: float) -> bool:
        """Whether a promise is above the bar, or near it while only a few splits of its shape were looked at."""
        return saved_ns > bar or (option[0] not in self.refined and saved_ns + _COARSE * abs(bar) > bar)

    def is_like_measured(self, option: Option) -> bool:
        """Whether a split was measured that is hardly another one."""
        shape, slots = option
        return any(shape == other and abs(slots - measured) <= _ALIKE * measured for other, measured in self.measured)

    def refine(self, shape: Shape) -> None:
        """Looks at more splits around the most promising one of a shape, until its neighbours are near."""
        self.refined.add(shape)
        while True:
            slots = sorted(count for of_shape, count in self.estimates if of_shape == shape)
            place = max(range(len(slots)), key=lambda index: self.estimates[shape, slots[index]])
            near = slots[max(0, place - 1) : place + 2]
            between = {(low + high) // 2 for low, high in pairwise(near) if high - low > 1 + slots[place] * _NEAR}
            if not between:
                return
            for count in between:
                self.look_at((shape, count))


def search(
    options: list[Option],
    estimate: Callable[[Option], int],
    measure: Callable[[Option], int],
    known: Mapping[Shape, int],
    num_replays: int,
    costs_replay: Callable[[Option], bool],
    progress: Callable[[int], None],
) -> SearchResult:
    """Measures settings, best first.

    Args:
        options: a few splits of each shape.
        estimate, measure: nanoseconds saved; `measure` by a replay unless `costs_replay` denies it.
        known: shapes that need no search, and what their best split saves.
        progress: called with the number of replays made.
    """
    found = _Search(estimate, measure)
    for option in options:
        found.look_at(option)
    num_made = 0
    while promises := found.promises():
        best_of = _best_of_each_shape(known, found.measured)
        bars = {shape: _bar(shape, best_of) - found.slack(shape) for shape, _ in promises}
        ahead = {
            option: saved
            for option, saved in promises.items()
            if found.could_pass(option, saved, bars[option[0]]) and not found.is_like_measured(option)
        }
        worth_it = ahead or found.to_compare(promises, best_of, costs_replay)
        if not worth_it:
            break
        option = max(worth_it, key=lambda each: worth_it[each])
        if option[0] not in found.refined:
            found.refine(option[0])
            continue
        if costs_replay(option):
            if num_made == num_replays:
                return SearchResult(found.measured, found.estimates, num_made, len(ahead))
            num_made += 1
        found.measured[option] = measure(option)
        progress(num_made)
    return SearchResult(found.measured, found.estimates, num_made, 0)


def _bar(shape: Shape, best_of: Mapping[Shape, int]) -> float:
    """What a shape must save to be the best, or the runner-up, which is another choice than the best."""
    leader = max(best_of, key=lambda other: best_of[other], default=None)
    if leader is None or not differs(shape, leader):
        return max(best_of.values(), default=_NOTHING)
    return max((saved for other, saved in best_of.items() if differs(other, leader)), default=_NOTHING)


def differs(shape: Shape, other: Shape) -> bool:
    """Whether a shape is another choice than the other, and not the same in another block size."""
    return (shape.step, shape.admission) != (other.step, other.admission)


def _best_of_each_shape(known: Mapping[Shape, int], measured: Mapping[Option, int]) -> dict[Shape, int]:
    best = dict(known)
    for (shape, _), saved_ns in measured.items():
        best[shape] = max(saved_ns, best.get(shape, saved_ns))
    return best
