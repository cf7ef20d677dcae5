"""The best settings among those whose savings the grid can only estimate, with a bounded number of replays.

Best first: whoever promises most is replayed next. What a replay says of one setting corrects the estimates of its
likes: those of the same block, interval and admission by as much as it was off on the mean, until there is one those of
the same admission. Around the best split found so far the splits halfway to its neighbours are looked at, too. The
search ends when neither the best nor the runner-up can be overtaken by a promise that is left, or with the last replay
that it may make: then the answer says how many promises were left. It is no proof: an estimate may be too low.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import mean

from ssmcache_sim.candidates import Shape

_NOTHING = float("-inf")

Option = tuple[Shape, int]  # a shape, and the SSM slots on the GPU


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What was found.

    Attributes:
        saved_ns: of each setting that was measured.
        estimates: of each setting that was looked at.
        num_replays: made.
        num_promising: settings that still promise more than the best that was measured.
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

    def look_around(self, option: Option) -> None:
        """The splits halfway to the neighbours of one, if it is the best of its shape."""
        shape, slots = option
        if any(other[0] == shape and saved > self.measured[option] for other, saved in self.measured.items()):
            return
        known = sorted(other for of_shape, other in self.estimates if of_shape == shape)
        place = known.index(slots)
        for neighbour in known[max(0, place - 1) : place] + known[place + 1 : place + 2]:
            self.look_at((shape, (slots + neighbour) // 2))


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
        ahead = {option: saved for option, saved in promises.items() if saved > _bar(option[0], best_of)}
        if not ahead:
            break
        option = max(ahead, key=lambda each: ahead[each])
        if costs_replay(option):
            if num_made == num_replays:
                best = max(best_of.values(), default=_NOTHING)
                num_promising = sum(saved > best for saved in promises.values())
                return SearchResult(found.measured, found.estimates, num_made, num_promising)
            num_made += 1
        found.measured[option] = measure(option)
        found.look_around(option)
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
