"""What a sequence commits: its tokens as blocks of the tree, and snapshots of its state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ssmcache.committing import check_shared, commit_blocks
from ssmcache.integers import to_integer
from ssmcache.keys import BlockKeys, Int64Array, KeyKind, Tokens
from ssmcache.priority import Priority
from ssmcache.sequence_pages import ACTIVE, SequencePages, StateError

NO_TOKENS: Int64Array = np.empty(0, dtype=np.int64)


class SequenceCommits(SequencePages):
    """The calls that offer something for reuse, and those that say where a snapshot is wanted."""

    __slots__ = ("_stopped", "kind", "pending", "priority")

    # set by `KVCache`
    _stopped: bool
    kind: KeyKind
    pending: Int64Array
    priority: Priority | None

    def snapshot_points(self, end: int) -> range:
        """Positions after the committed tokens, up to `end`, at which a snapshot is wanted, ascending: where prefill
        chunks must stop, or what to hand to `reserve_snapshots`.
        """
        if type(end) is not int:
            end = to_integer("snapshot_points", "an end in tokens", end)
        if self.states is None or self.root.retired:
            return range(0)
        return self.states.admission.points(self.num_committed_tokens, end, self.states.prompt_tokens)

    def next_snapshot_point(self) -> int | None:
        """The next position at which a snapshot is wanted; None if none is: without SSM layers, or since
        `clear_reusable_blocks`. For decoding.
        """
        if self.states is None or self.root.retired:
            return None
        return self.states.admission.next_point(self.num_committed_tokens, self.states.prompt_tokens)

    def reserve_snapshots(self, points: Iterable[int]) -> dict[int, int]:
        """Slots for states that a kernel writes itself while it passes `points`: {position: slot}, with those of
        earlier calls since the last commit.

        Where room is short the shallowest points are served, and the commit counts the rest as skipped; snapshots of
        the sequence's own path are never given up for it. Slots that the next commit does not cover go back.

        Errors: StateError unless ACTIVE; ValueError for points that are not after the committed tokens and within
        the capacity, or without SSM layers.
        """
        with self.calls:
            if self.status is not ACTIVE:
                self._require_active("reserve_snapshots")
            wanted: Sequence[int]
            if isinstance(points, range) and points.step > 0:
                wanted = points
            else:
                wanted = sorted({to_integer("reserve_snapshots", "points in tokens", point) for point in points})
            if self.states is None:
                if wanted:
                    raise ValueError("reserve_snapshots: expected a model with SSM layers, got none")
                return {}
            if wanted and not self.num_committed_tokens < wanted[0] <= wanted[-1] <= self.capacity:
                raise ValueError(
                    f"reserve_snapshots: expected points in {self.num_committed_tokens + 1}..{self.capacity}, "
                    f"got {wanted}"
                )
            self.calls.changing = True
            before = None if self.manager.streams.only is self.stream else self.manager.streams.uses(self)
            slots = self.states.reserve(() if self.root.retired else wanted, self.cursor)
            if before is not None:
                self.manager.streams.follow(self, before)
            return slots

    def commit(self, tokens: Tokens) -> None:
        """Offer the next computed tokens, from `num_committed_tokens` on, for reuse by others.

        Full blocks go into the tree; where a block is there already, its page replaces the private one. A snapshot
        is kept at each reserved point that the commit covers, and copied from the live state at the end of the commit
        if one is wanted there. No room for a snapshot is counted, never an error. Of a sequence that was resumed before
        `clear_reusable_blocks` the tokens count as committed, but all stays its own.

        Args:
            tokens: [n] integers or digests, or the part of the prompt's `BlockKeys` that starts at
                `num_committed_tokens`.
        Cost: O(n) NumPy work, a few dictionary look-ups for each run met.
        Errors: StateError unless ACTIVE and committing; ValueError for tokens beyond the capacity, or that differ
        from those that the sequence was created with where it shares pages.
        """
        with self.calls:
            if self.status is not ACTIVE:
                self._require_active("commit")
            if self._stopped:
                raise StateError("commit: expected a sequence that commits, got one after stop_committing")
            block = self.manager.tokens_per_block
            start = self.num_committed_tokens
            end = start + len(tokens)
            if end > self.capacity:
                raise ValueError(
                    f"commit: expected at most {self.capacity - start} tokens (capacity), got {end - start}"
                )
            first, last = start // block, end // block
            keys, base, pending = self._keys_of_commit(tokens, first, last)
            if self.priority is not None and self.priority.is_asked:
                self._prepare_priorities("commit", last + 1)
            if self.cursor.end > first:
                check_shared(self, keys, base, first, min(self.cursor.end, last))
            self.calls.changing = True
            before = None
            if self.manager.streams.only is not self.stream and (
                last > first or self.windows or self.states is not None
            ):
                before = self.manager.streams.uses(self)
            if last > first:
                commit_blocks(self, keys, base, last)
            self.pending = pending
            if self.states is not None and self.root.retired:
                self.states.pass_over(start, end)
            elif self.states is not None:
                self.states.commit(self.cursor, start, end, self.history_length)
            self.num_committed_tokens = end
            if end > self.history_length:
                self.history_length = end
                for window in self.windows:
                    window.forget_stale(end, -(-self.capacity // block))
            if before is not None:  # it may go on with pages that others have written
                self.manager.streams.follow(self, before)
            if self._rows is not None:
                self._rows.refresh()

    def _prepare_priorities(self, call: str, num_blocks: int) -> None:
        """Know the priorities of the first blocks before anything changes.

        Errors: what a callback raises; ValueError for its wrong answers; StateError if it made calls of this sequence
        that leave it otherwise than the call has found it.
        """
        assert self.priority is not None
        before = self._stopped, self.status, self.num_committed_tokens, self.history_length, self.capacity
        self.priority.prepare(num_blocks)
        after = self._stopped, self.status, self.num_committed_tokens, self.history_length, self.capacity
        if after != before:
            raise StateError(
                f"{call}: expected a priority callback that leaves its own sequence as it is, got one that changed it"
            )

    def _keys_of_commit(self, tokens: Tokens, first: int, last: int) -> tuple[Int64Array, int, Int64Array]:
        """Keys that cover the blocks that a commit completes, the block that they start from, and the tokens of the
        block that is left unfinished.
        """
        if isinstance(tokens, BlockKeys):
            if tokens.start != self.num_committed_tokens or not self.kind.prefix_unique:
                raise ValueError(
                    f"commit: expected {self.kind} from token {self.num_committed_tokens} on, "
                    f"got ready block keys from token {tokens.start} on"
                )
            return tokens.keys, 0, NO_TOKENS
        array = self.manager.token_array(tokens)
        if self.kind.prefix_unique:
            raise ValueError("commit: expected ready block keys, as at creation, got tokens")
        if self.pending.size:
            array = np.concatenate((self.pending, array))
        # the run that these keys become must not keep the memory of more tokens than its own
        size = (last - first) * self.kind.width
        if size == array.size:
            return array, first, NO_TOKENS
        return array[:size].copy(), first, array[size:].copy()

    def stop_committing(self) -> None:
        """Commit nothing more: later tokens stay private. Idempotent."""
        with self.calls:
            self._stopped = True
