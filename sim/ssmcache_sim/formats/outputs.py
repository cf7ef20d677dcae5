"""What requests generated, where a trace names the blocks of prompts only: the next turn of a conversation reveals it.

A request *goes on from* an earlier one of its session, with a lower turn: among those whose full blocks are all on its
own prompt, the one with the most of them; of several, one of the latest turn, and within a turn the first. A prompt
without a full block shows nothing that could be compared, so it is gone on from only where the file itself says so: by
the next number of a turn. Where the file names the request that another goes on from, that one alone is asked, and its
full blocks are compared just so.

If the prompt of the request that goes on is at least as long as the earlier prompt and its whole output, the output is
taken to stand there, right behind the prompt: the full blocks of that stretch are the output's, the one with the end of
the prompt in it included. This is an assumption: ids do not say whether a template put tokens between the two, or
whether what was generated was cut and something else took its place. If it is shorter, the output was cut for certain,
and is not revealed. Several requests may go on from one: the first of them that is long enough reveals.

An output that nobody reveals still takes memory, as it does in an engine that keeps the blocks it generates: its full
blocks have keys of their own that nobody ever looks up. So a trace that names no sessions says what decoding costs, and
nothing of what it may bring; its label says so.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from ssmcache_sim.scratch import new_ids
from ssmcache_sim.trace import BoolArray, Int64Array, Trace, offsets_of, path_lengths

_NOBODY = -1


def with_revealed_outputs(trace: Trace, turn_recorded: BoolArray, parent: Int64Array | None) -> Trace:
    """The trace with the outputs that later turns reveal; `reading` is left to the caller.

    Args:
        trace: prompts only.
        turn_recorded: [num_requests] whether the file numbers the request's turn.
        parent: [num_requests] the request that each goes on from, -1 for none, where the file names it; else None.

    Cost: O(blocks) NumPy work.
    """
    goes_on: Iterable[tuple[int, int]] = ()
    if parent is not None:
        goes_on = _by_parent(trace, parent)
    elif trace.sessions is not None:
        goes_on = _by_session(trace, turn_recorded)
    whole = trace.prompt_tokens + trace.output_tokens
    revealed_by = np.full(trace.num_requests, _NOBODY, dtype=np.int64)
    for request, earlier in goes_on:
        if revealed_by[earlier] == _NOBODY and trace.prompt_tokens[request] >= whole[earlier]:
            revealed_by[earlier] = request
    return _with_outputs(trace, revealed_by)


def _by_session(trace: Trace, turn_recorded: BoolArray) -> Iterator[tuple[int, int]]:
    """(request, the earlier one that it goes on from), within a session in order of arrival."""
    assert trace.sessions is not None
    ends_at = np.full(trace.num_keys, _NOBODY, dtype=np.int64)  # by key: whose prompt has it as its last full block
    turns, index = trace.sessions.turns, trace.sessions.index
    by_session = np.argsort(index, kind="stable")
    by_session = by_session[np.searchsorted(index[by_session], 0) :]  # not those without a session
    starts = np.flatnonzero(np.diff(index[by_session], prepend=-1))
    for members in np.split(by_session, starts[1:]):
        session = _Session(trace, turns, turn_recorded, ends_at)
        for request in members.tolist():
            earlier = session.earlier(request)
            if earlier is not None:
                yield request, earlier
        session.forget()


class _Session:
    """The requests of one session so far, to be asked which of them another one goes on from."""

    def __init__(self, trace: Trace, turns: Int64Array, turn_recorded: BoolArray, ends_at: Int64Array) -> None:
        self._trace, self._turns, self._turn_recorded = trace, turns, turn_recorded
        self._ends_at = ends_at
        self._keys: list[int] = []  # where `ends_at` is set
        self._same_turn: list[tuple[int, int]] = []  # (request, its last key) of the latest turn: not in `ends_at` yet
        self._without_block: dict[int, int] = {}  # by recorded turn: its first request without a full block

    def earlier(self, request: int) -> int | None:
        """The one that `request` goes on from, which is then one of the session itself."""
        trace, turn = self._trace, int(self._turns[request])
        if self._same_turn and turn != self._turns[self._same_turn[0][0]]:
            self._end_turn()
        start = int(trace.offsets[request])
        path = trace.block_keys[start : int(trace.offsets[request + 1])]
        ending = self._ends_at[path]
        found = (one for one in ending[ending >= 0][::-1].tolist() if self._turns[one] < turn)
        earlier = next(found, None)
        if earlier is None and self._turn_recorded[request]:
            earlier = self._without_block.get(turn - 1)
        if path.size:
            self._same_turn.append((request, int(path[-1])))
        elif self._turn_recorded[request]:
            self._without_block.setdefault(turn, request)
        return earlier

    def _end_turn(self) -> None:
        for request, key in self._same_turn:
            known = self._ends_at[key]
            if known == _NOBODY or self._turns[request] > self._turns[known]:  # the first of equals stays
                self._ends_at[key] = request
                self._keys.append(key)
        self._same_turn.clear()

    def forget(self) -> None:
        """Leaves nothing behind for the next session."""
        self._ends_at[self._keys] = _NOBODY


def _by_parent(trace: Trace, parent: Int64Array) -> Iterator[tuple[int, int]]:
    """As `_by_session`, where the file names the earlier request."""
    num_blocks = np.diff(trace.offsets)
    for request in np.flatnonzero(parent >= 0).tolist():
        earlier = int(parent[request])
        last = int(num_blocks[earlier]) - 1
        if earlier >= request or last >= num_blocks[request]:
            continue
        first, first_earlier = int(trace.offsets[request]), int(trace.offsets[earlier])
        if last < 0 or trace.block_keys[first + last] == trace.block_keys[first_earlier + last]:
            yield request, earlier


def _with_outputs(trace: Trace, revealed_by: Int64Array) -> Trace:
    """Paths in place of prompts: that of a revealed output is the first part of the prompt that reveals it."""
    known = revealed_by != _NOBODY
    num_blocks = path_lengths(trace.prompt_tokens, trace.output_tokens) // trace.tokens_per_block
    copied = np.where(known, num_blocks, np.diff(trace.offsets))
    sources = np.where(known, revealed_by, np.arange(trace.num_requests))
    offsets = offsets_of(num_blocks)
    keys = new_ids(int(offsets[-1]))
    is_own = np.ones(keys.size, dtype=np.bool_)  # of an output that nobody reveals
    begins = trace.offsets[sources].tolist()
    for place, begin, count in zip(offsets[:-1].tolist(), begins, copied.tolist(), strict=True):
        keys[place : place + count] = trace.block_keys[begin : begin + count]
        is_own[place : place + count] = False
    num_own = int(np.count_nonzero(is_own))
    keys[is_own] = trace.num_keys + np.arange(num_own)
    return replace(trace, block_keys=keys, offsets=offsets, num_keys=trace.num_keys + num_own, output_known=known)
