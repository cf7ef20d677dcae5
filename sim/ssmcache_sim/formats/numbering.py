"""Numbers for blocks: checks that ids name whole prefixes, and makes such ids of what names contents alone."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ssmcache_sim.scratch import new_ids, spans
from ssmcache_sim.trace import Int64Array

_FIRST = -1  # in place of the id before the first one of a prompt
_UNSEEN = -2


@dataclass(frozen=True, slots=True)
class WrongPlace:
    """An id that follows `previous` at `place` and `usual` before; -1: it is the first of a prompt."""

    place: int
    previous: int
    usual: int


def first_wrong_place(ids: Int64Array, num_ids: Int64Array, num_distinct: int) -> WrongPlace | None:
    """The first id that does not follow what it followed at its first place; None if each id names one prefix.

    An id names a whole prefix, so the same id always follows the same id, or always opens a prompt.

    Args:
        ids: dense ids of all rows, one row after the other; num_ids: how many each row has.
    """
    starts = (np.cumsum(num_ids) - num_ids)[num_ids > 0]
    usual = np.empty(num_distinct, dtype=np.int64)
    for start, stop in reversed(spans(ids.size)):  # back to front: the first place of each id stays
        usual[ids[start:stop][::-1]] = _previous(ids, starts, start, stop)[::-1]
    for start, stop in spans(ids.size):
        previous = _previous(ids, starts, start, stop)
        wrong = previous != usual[ids[start:stop]]
        if wrong.any():
            place = int(wrong.argmax())
            return WrongPlace(start + place, int(previous[place]), int(usual[ids[start + place]]))
    return None


def rows_that_agree(ids: Int64Array, num_ids: Int64Array, num_distinct: int) -> npt.NDArray[np.bool_]:
    """[num_rows] whether each row agrees with itself and with the rows before it that do."""
    usual = np.full(num_distinct, _UNSEEN, dtype=np.int64)
    agrees = np.ones(num_ids.size, dtype=np.bool_)
    start = 0
    for row, count in enumerate(num_ids.tolist()):
        own = ids[start : start + count]
        before = np.concatenate(([_FIRST], own))[:count]
        known = usual[own]
        usual[own] = before
        if (usual[own] != before).any() or ((known != _UNSEEN) & (known != before)).any():
            agrees[row] = False
            usual[own] = known
        start += count
    return agrees


def fold_contents(contents: Int64Array, num_ids: Int64Array, num_contents: int) -> tuple[Int64Array, int]:
    """Ids that name prefixes, from ids that name the content of a block alone, and how many there are.

    Block by block from the start of all prompts at once: a new id for each pair of the id before and the content. So
    equal ids mean equal contents from the start, and nothing is hashed.

    Args:
        contents: dense, 0 <= content < num_contents, of all rows; num_ids: how many each row has.

    Cost: a sort of the prompts for each block of the longest one.
    """
    starts = np.cumsum(num_ids) - num_ids
    by_length = np.argsort(-num_ids, kind="stable")
    lengths = -num_ids[by_length]  # ascending, so that it can be searched
    ids = new_ids(contents.size)
    before = np.zeros(num_ids.size, dtype=np.int64)  # one more than the id, 0 at the start
    num_prefixes = 0
    for block in range(int(num_ids.max(initial=0))):
        num_rows = int(np.searchsorted(lengths, -block, side="left"))  # rows longer than `block`
        places = starts[by_length[:num_rows]] + block
        pairs = before[:num_rows] * num_contents + contents[places]
        distinct, inverse = np.unique(pairs, return_inverse=True)
        ids[places] = num_prefixes + inverse
        before[:num_rows] = ids[places] + 1
        num_prefixes += distinct.size
    return ids, num_prefixes


def _previous(ids: Int64Array, starts: Int64Array, start: int, stop: int) -> Int64Array:
    """What comes before each of the ids from `start` to `stop`; `starts`: where rows with ids begin."""
    previous = np.empty(stop - start, dtype=np.int64)
    previous[1:] = ids[start : stop - 1]
    previous[0] = ids[start - 1]  # of the first of all, which begins a row, anything
    first, last = np.searchsorted(starts, (start, stop))
    previous[starts[first:last] - start] = _FIRST
    return previous
