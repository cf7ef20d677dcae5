"""What goes first whatever its age: the priorities that a caller gives to blocks."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ssmcache.integers import is_integer, to_integer
from ssmcache.segments import DEFAULT_RANK, rank_of

LOWEST, HIGHEST = 0, 100

PriorityCallback = Callable[[int, int], int]
"""From a layer group and the ordinal of a block to a priority, 0..100: the lower, the sooner its slots go."""


@dataclass(frozen=True, slots=True)
class PriorityRange:
    """One priority, 0..100, for the blocks `start_block`..`end_block - 1` of a sequence, without an end for all from
    `start_block` on; in one layer group, or in all. Blocks in no range have the default, 35.

    Errors: ValueError for an empty range, and for anything but integers in range.
    """

    start_block: int
    end_block: int | None
    priority: int
    layer_group: int | None = None

    def __post_init__(self) -> None:
        name = "PriorityRange"
        start = to_integer(name, "start_block", self.start_block)
        object.__setattr__(self, "start_block", start)
        if self.end_block is not None:
            object.__setattr__(self, "end_block", to_integer(name, "end_block", self.end_block, start + 1))
        object.__setattr__(self, "priority", to_integer(name, "priority", self.priority, LOWEST, HIGHEST))
        if self.layer_group is not None:
            object.__setattr__(self, "layer_group", to_integer(name, "layer_group", self.layer_group))


PrioritiesGiven = PriorityCallback | Sequence[PriorityRange] | None
"""What a sequence is created with: a callback, ranges that do not overlap in any layer group, or nothing."""


class _Stretches:
    """The blocks of one layer group as stretches of equal rank: the one of `ranks[i]` begins at block `starts[i]`."""

    __slots__ = ("ranks", "starts")

    def __init__(self) -> None:
        self.starts = [0]
        self.ranks = [DEFAULT_RANK]

    def begin(self, block: int, rank: int) -> None:
        """From a block on, which is in the last stretch, the rank is another."""
        starts, ranks = self.starts, self.ranks
        if starts[-1] == block:
            del starts[-1], ranks[-1]
        if not ranks or ranks[-1] != rank:
            starts.append(block)
            ranks.append(rank)


class Priority:
    """The ranks (`rank_of`) of the blocks of one sequence, by layer group. `is_asked`: the caller is asked for them."""

    __slots__ = ("_stretches",)
    is_asked = False

    def __init__(self, stretches: list[_Stretches]) -> None:
        self._stretches = stretches

    def prepare(self, num_blocks: int) -> None:
        """Make sure that the ranks of the first `num_blocks` blocks are known."""

    def rank(self, layer_group: int, block: int) -> int:
        stretches = self._stretches[layer_group]
        return stretches.ranks[bisect_right(stretches.starts, block) - 1]

    def starts_and_ranks(self, layer_group: int) -> tuple[list[int], list[int]]:
        """Where the stretches of equal rank begin, and the rank of each."""
        stretches = self._stretches[layer_group]
        return stretches.starts, stretches.ranks

    def stretches(self, layer_group: int, first: int, end: int) -> list[tuple[int, int, int]]:
        """The blocks `first`..`end - 1`, at least one, as neighbours of equal rank: (first, end, rank) of each. Cost:
        O(log of all stretches + those found).
        """
        starts, ranks = self._stretches[layer_group].starts, self._stretches[layer_group].ranks
        index = bisect_right(starts, first)
        stop = bisect_left(starts, end, index)
        if index == stop:
            return [(first, end, ranks[index - 1])]
        bounds = [first, *starts[index:stop], end]
        return list(zip(bounds, bounds[1:], ranks[index - 1 : stop], strict=False))


_NOTHING: Any = object()


class _AskedPriority(Priority):
    """The answers of a callback, which is asked once for each block, before anything is changed."""

    __slots__ = ("_callback", "_num_prepared")
    is_asked = True

    def __init__(self, callback: PriorityCallback, num_groups: int) -> None:
        super().__init__([_Stretches() for _ in range(num_groups)])
        self._callback = callback
        self._num_prepared = 0

    def prepare(self, num_blocks: int) -> None:
        """Errors: what the callback raises; ValueError for an answer that is no priority. Nothing has changed then."""
        while self._num_prepared < num_blocks:  # a callback that goes on with its own sequence comes here, too
            first = self._num_prepared
            answers = [self._ask(group, first, num_blocks) for group in range(len(self._stretches))]
            if self._num_prepared == first:
                for stretches, found in zip(self._stretches, answers, strict=True):
                    for block, rank in found:
                        stretches.begin(block, rank)
                self._num_prepared = num_blocks

    def _ask(self, group: int, first: int, end: int) -> list[tuple[int, int]]:
        """The blocks `first`..`end - 1` at which the rank changes, with the new one."""
        callback, last = self._callback, _NOTHING
        changes: list[tuple[int, int]] = []
        for block in range(first, end):
            answer = callback(group, block)
            if answer is last:  # neighbours mostly get the same, which is one object
                continue
            if not is_integer(answer) or not LOWEST <= answer <= HIGHEST:
                raise ValueError(
                    f"priority of block {block} in layer group {group}: expected an integer in "
                    f"{LOWEST}..{HIGHEST}, got {answer!r}"
                )
            changes.append((block, rank_of(int(answer))))
            last = answer
        return changes


def priority_of(given: PrioritiesGiven, num_groups: int) -> Priority | None:
    """The priorities that a sequence is created with, of a model with so many layer groups; None without any.

    Errors: TypeError for anything else; ValueError for ranges of a layer group that is none, or that overlap.
    """
    if given is None:
        return None
    if callable(given):
        return _AskedPriority(given, num_groups)
    expected = "priority: expected a callable or a sequence of PriorityRange"
    if type(given) is not tuple and not isinstance(given, Sequence):
        raise TypeError(f"{expected}, got {type(given).__name__}")
    for entry in given:
        if not isinstance(entry, PriorityRange):
            raise TypeError(f"{expected}, got {type(entry).__name__} in it")
    return _priority_of_ranges(tuple(given), num_groups)


@lru_cache(maxsize=64)  # few are used by many requests
def _priority_of_ranges(given: tuple[PriorityRange, ...], num_groups: int) -> Priority:
    for entry in given:
        if entry.layer_group is not None and entry.layer_group >= num_groups:
            raise ValueError(f"priority: expected a layer group in 0..{num_groups - 1}, got {entry}")
    ranges = sorted(given, key=lambda entry: entry.start_block)
    return Priority(
        [_stretches_of(entry for entry in ranges if entry.layer_group in (None, group)) for group in range(num_groups)]
    )


def _stretches_of(ranges: Iterable[PriorityRange]) -> _Stretches:
    """The stretches of one layer group, of ranges by ascending start."""
    stretches = _Stretches()
    before: PriorityRange | None = None
    for entry in ranges:
        if before is not None and (before.end_block is None or entry.start_block < before.end_block):
            raise ValueError(
                f"priority: expected ranges that do not overlap in a layer group, got {before} and {entry}"
            )
        stretches.begin(entry.start_block, rank_of(entry.priority))
        if entry.end_block is not None:
            stretches.begin(entry.end_block, DEFAULT_RANK)
        before = entry
    return stretches


def rank_in(priority: Priority | None, layer_group: int, block: int) -> int:
    """The rank of a block of a sequence with or without priorities."""
    return DEFAULT_RANK if priority is None else priority.rank(layer_group, block)


def stretches_in(priority: Priority | None, layer_group: int, first: int, end: int) -> list[tuple[int, int, int]]:
    """`Priority.stretches` of a sequence with or without priorities."""
    return [(first, end, DEFAULT_RANK)] if priority is None else priority.stretches(layer_group, first, end)


def by_rank(priority: Priority | None, layer_group: int, blocks: Sequence[int]) -> dict[int, list[int]]:
    """The positions of the blocks, which are in ascending order, that have each rank."""
    positions: dict[int, list[int]] = {}
    if blocks:
        position = 0
        for _, end, rank in stretches_in(priority, layer_group, blocks[0], blocks[-1] + 1):
            stop = bisect_left(blocks, end, position)
            if stop > position:
                positions.setdefault(rank, []).extend(range(position, stop))
            position = stop
    return positions
