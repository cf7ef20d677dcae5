"""Numbers for blocks: checks that ids name whole prefixes, and makes such ids of what names contents alone."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
    previous = _previous(ids, num_ids)
    usual = np.empty(num_distinct, dtype=np.int64)
    usual[ids[::-1]] = previous[::-1]  # back to front: the first place of each id stays
    wrong = previous != usual[ids]
    if not wrong.any():
        return None
    place = int(wrong.argmax())
    return WrongPlace(place, int(previous[place]), int(usual[ids[place]]))


def rows_that_agree(ids: Int64Array, num_ids: Int64Array, num_distinct: int) -> npt.NDArray[np.bool_]:
    """[num_rows] whether each row agrees with itself and with the rows before it that do."""
    previous = _previous(ids, num_ids)
    usual = np.full(num_distinct, _UNSEEN, dtype=np.int64)
    agrees = np.ones(num_ids.size, dtype=np.bool_)
    start = 0
    for row, count in enumerate(num_ids.tolist()):
        own, before = ids[start : start + count], previous[start : start + count]
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
    ids = np.empty(contents.size, dtype=np.int64)
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


def _previous(ids: Int64Array, num_ids: Int64Array) -> Int64Array:
    previous = np.empty_like(ids)
    previous[1:] = ids[:-1]
    previous[(np.cumsum(num_ids) - num_ids)[num_ids > 0]] = _FIRST
    return previous
