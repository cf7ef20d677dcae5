"""What goes first whatever its age: the priorities that a caller gives to blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ssmcache.segments import DEFAULT_PRIORITY, DEFAULT_RANK, rank_of

LOWEST, HIGHEST = 0, 100

PriorityCallback = Callable[[int, int], int]
"""From a layer group and the ordinal of a block to a priority, 0..100: the lower, the sooner its slots go."""


def default_priority(layer_group: int, block: int) -> int:
    """What a sequence without a callback of its own gives to its blocks."""
    return DEFAULT_PRIORITY


class Priority:
    """The answers of one sequence's callback, which is asked once for each block, before anything is changed."""

    __slots__ = ("_answers", "_callback", "_num_groups", "_num_prepared")

    def __init__(self, callback: PriorityCallback, num_groups: int) -> None:
        self._callback = callback
        self._num_groups = num_groups
        self._answers: dict[tuple[int, int], int] = {}
        self._num_prepared = 0

    def prepare(self, num_blocks: int) -> None:
        """Ask for the first `num_blocks` blocks. Errors: ValueError for an answer out of range."""
        for block in range(self._num_prepared, num_blocks):
            for group in range(self._num_groups):
                answer = self._callback(group, block)
                if not isinstance(answer, int) or not LOWEST <= answer <= HIGHEST:
                    raise ValueError(
                        f"priority of block {block} in layer group {group}: expected an integer in "
                        f"{LOWEST}..{HIGHEST}, got {answer!r}"
                    )
                self._answers[group, block] = answer
        self._num_prepared = max(self._num_prepared, num_blocks)

    def rank(self, layer_group: int, block: int) -> int:
        """The priority of a block as a rank (`rank_of`)."""
        return rank_of(self._answers[layer_group, block])


def rank_in(priority: Priority | None, layer_group: int, block: int) -> int:
    """The rank of a block of a sequence with or without a callback."""
    return DEFAULT_RANK if priority is None else priority.rank(layer_group, block)


def by_rank(priority: Priority | None, layer_group: int, blocks: Sequence[int]) -> dict[int, list[int]]:
    """The positions of the blocks that have each rank."""
    positions: dict[int, list[int]] = {}
    for position, block in enumerate(blocks):
        positions.setdefault(rank_in(priority, layer_group, block), []).append(position)
    return positions
