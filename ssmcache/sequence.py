"""One sequence of a model runner: its pages, its states and its lengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmcache import resuming
from ssmcache.committing import commit_blocks, commit_tail
from ssmcache.keys import BlockKeys, Int64Array, ReuseScope, Tokens
from ssmcache.match import find
from ssmcache.memory.base import GPU_TIER
from ssmcache.parking import Parked
from ssmcache.pools import NO_SLOTS
from ssmcache.priority import Priority, PriorityCallback, default_priority
from ssmcache.sequence_pages import ACTIVE, CLOSED, SUSPENDED, SequencePages, StateError
from ssmcache.sequence_windows import SequenceWindow
from ssmcache.states import SequenceStates
from ssmcache.stats import ReuseMatch, Shortage

if TYPE_CHECKING:
    from ssmcache.manager import KVCacheManager

_NO_TOKENS: Int64Array = np.empty(0, dtype=np.int64)


class KVCache(SequencePages):
    """The cache of one sequence; made by `KVCacheManager.create_kv_cache`.

    Lengths are in tokens: `num_committed_tokens` <= `history_length` <= `capacity`. Blocks below `cursor.end` lie in
    the tree, on the path of `cursor` (the prefix that was found, then what was committed); the pages after it are
    private, in `own_pages`. While the sequence is ACTIVE all of that is on the GPU and locked; while it is suspended it
    is held, but may move to the tiers below.

    Each call takes the manager's lock: sequences of one manager may be used from several threads, each from one at a
    time. (Those made for every request do so by hand: `with` costs twice as much.)
    """

    __slots__ = (
        "_input", "_stopped", "adopt", "id", "kind", "partly", "pending", "priority", "reuse_match",
        "usable_tokens_by_tier", "version",
    )  # fmt: skip

    def __init__(
        self, manager: KVCacheManager, tokens: Tokens, scope: ReuseScope, id: object,
        priority: PriorityCallback | None, adopt: bool,
    ) -> None:  # fmt: skip
        kind, keys, num_blocks, num_tokens = manager.keys_of(tokens)
        store = manager.store
        self.root = store.enter_scope(scope, kind)
        self.soft = self.locked = self.idle = False
        self.manager = manager
        self.store = store
        self.kind = kind
        self.id = id
        self.adopt = adopt
        if priority is not None:
            manager.has_priorities = True
        elif manager.has_priorities:  # a block that was given less may have to be raised
            priority = default_priority
        self.priority = None if priority is None else Priority(priority, len(manager.groups))
        self.status = SUSPENDED
        self.shortage: Shortage | None = None
        self.stream: Any = None
        self.parked: Parked | None = None
        self.own_pages = NO_SLOTS
        self.pending = _NO_TOKENS  # the committed tokens of the last, unfinished block
        self._input: tuple[Int64Array, int, int] | None = (keys, num_blocks, num_tokens)
        self.usable_tokens_by_tier: tuple[int, ...] = ()  # where the match lay at the first resume, with several tiers
        self._stopped = False
        self._rows = None
        self.states = None if store.snapshots is None else SequenceStates(manager, self.priority, num_tokens + 1)
        self.windows: tuple[SequenceWindow, ...] = ()
        if store.windows:
            self.windows = tuple(SequenceWindow(window, self, self.priority) for window in store.windows)
        self.partly = manager.partly and not kind.prefix_unique
        found = find(store, self.root, keys, num_blocks, num_tokens, self.partly, adopt)
        store.hold_softly(self, found)
        self.apply(found[2])

    def apply(self, reuse: ReuseMatch) -> None:
        """The lengths are those of a look-up from now on, which is held."""
        self.version = self.store.version
        self.reuse_match = reuse
        self.num_committed_tokens = self.history_length = self.capacity = reuse.usable_tokens

    def __repr__(self) -> str:
        name = "KVCache" if self.id is None else f"KVCache({self.id!r})"
        lengths = (
            f"{self.num_committed_tokens:,} committed, {self.history_length:,} history, {self.capacity:,} capacity"
        )
        short = "" if self.shortage is None else f"; refused: {self.shortage.reason}"
        return f"<{name} {self.status.name}: tokens {lengths}{short}>"

    # -- what it has -------------------------------------------------------------------------------------------------

    @property
    def num_attention_tokens(self) -> int:
        """KV exists, in shared pages or in a copy of one, up to here: kernels must not write KV below it."""
        if not (self.soft or self.locked):
            return 0
        return max(self.cursor.end * self.manager.tokens_per_block, self.reuse_match.usable_tokens)

    # -- status ------------------------------------------------------------------------------------------------------

    def resume(self, stream: Any = None) -> bool:
        """Make the sequence ACTIVE: all its pages are on the GPU and locked, and `stream` may compute.

        The first resume also gives the sequence its live state, started from the snapshot that was found, and a copy of
        a last block that matched in part. If the tree has changed since creation it looks the prompt up again, so
        lengths may change.

        Returns False, with `shortage` set and nothing changed, if there is no room; only where a tier below could not
        be read or written (`shortage.reason` "lost" or "io") some pages may have moved, and lost ones are gone.
        """
        lock = self.manager.lock
        lock.acquire()
        try:
            if self.status is not SUSPENDED:
                raise StateError(f"resume: expected a SUSPENDED sequence, got {self.status.name}")
            manager = self.manager
            self.stream = stream
            if manager.streams.only is not stream:
                manager.streams.acquire(stream)
            if self.states is not None:
                self.states.stream = stream
            if self._input is None:
                self.shortage = resuming.resume_again(self)
            else:
                if self.priority is not None:
                    self.priority.prepare(-(-self._input[2] // manager.tokens_per_block) + 1)
                keys, num_blocks, num_tokens = self._input
                self.shortage = resuming.first_resume(self, keys, num_blocks, num_tokens)
                if self.shortage is None:
                    self._start(keys, num_tokens)
            if manager.streams.only is not stream:
                manager.streams.release(stream)
            if self.shortage is not None:
                return False
            self.status = ACTIVE
            manager.num_active += 1
            return True
        finally:
            lock.release()

    def _start(self, keys: Int64Array, num_tokens: int) -> None:
        """The first resume has succeeded."""
        self._input = None
        counters = self.manager.counters
        tree, attention, usable = self.reuse_match
        counters.lookups += 1
        counters.lookup_tokens += num_tokens
        counters.tree_tokens += tree
        counters.attention_tokens += attention
        counters.usable_tokens += usable
        if self.partly:
            rest = usable % self.manager.tokens_per_block
            self.pending = keys[usable - rest : usable].copy()
        if self.store.has_tiers:
            for below, tokens in enumerate(self.usable_tokens_by_tier[1:]):
                counters.usable_tokens_below[below] += tokens
        if self.windows:
            self.pins = ()  # they are locks of the windows now

    def suspend(self) -> None:
        """Stop computing. Touches the path; slots reserved for snapshots go back. With tiers below, everything that
        the sequence has may move there when others need the room; else its pages stay.
        """
        with self.manager.lock:
            self._require_active("suspend")
            self.manager.streams.release(self.stream)
            if self.states is not None:
                self.states.give_back_reserved()
            self._rows = None
            resuming.suspend(self)
            self.status = SUSPENDED
            self.manager.num_active -= 1

    def prefetch(self, tier: int = GPU_TIER) -> bool:
        """Bring what the sequence holds up to a tier (0 is the GPU) before it is needed there, while not ACTIVE.

        Returns False, with `shortage` set and nothing changed, if there is no room.
        """
        with self.manager.lock:
            if self.status is not SUSPENDED:
                raise StateError(f"prefetch: expected a SUSPENDED sequence, got {self.status.name}")
            if not 0 <= tier < len(self.manager.tier_names):
                raise ValueError(f"prefetch: expected a tier in 0..{len(self.manager.tier_names) - 1}, got {tier}")
            self.manager.streams.acquire(self.stream)
            self.shortage = resuming.prefetch(self, tier)
            self.manager.streams.release(self.stream)
            return self.shortage is None

    def close(self) -> None:
        """Leave: committed blocks stay for reuse, everything private goes back. Idempotent."""
        lock = self.manager.lock
        lock.acquire()
        try:
            if self.status is CLOSED:
                return
            manager, store = self.manager, self.store
            if self.soft:
                store.drop_soft_hold(self)
            elif self.locked:
                leaf = None
                if self.status is ACTIVE:
                    manager.num_active -= 1
                    if manager.streams.only is not self.stream:
                        manager.streams.release(self.stream)
                if self.pending.size and manager.partly and self.parked is None:
                    leaf = commit_tail(self)
                if self.states is not None:
                    self.states.close()
                if self.windows or self.parked is not None:
                    self._give_up_rest()
                if store.pages is not None and self.own_pages.size:
                    store.pages.pools[GPU_TIER].give_back(self.own_pages)
                    self.own_pages = NO_SLOTS
                store.touch_and_release(self, leaf)
                if store.lost_roots:
                    store.free_lost()
            self.status = CLOSED
            was_resumed = self._input is None
            self._input = None
            self._rows = None
            store.leave_scope(self.root)
            manager.forget(self, was_resumed)
        finally:
            lock.release()

    def _give_up_rest(self) -> None:
        """Give window pages back, and what lies in tiers below."""
        for window in self.windows:
            window.close(self.parked is not None)
        if self.parked is not None:
            self.parked.discard()
            self.parked = None

    # -- committing --------------------------------------------------------------------------------------------------

    def snapshot_points(self, end: int) -> range:
        """Positions after the committed tokens, up to `end`, at which a snapshot is wanted, ascending: where prefill
        chunks must stop, or what to hand to `reserve_snapshots`.
        """
        if self.states is None:
            return range(0)
        return self.states.admission.points(self.num_committed_tokens, end, self.states.prompt_tokens)

    def next_snapshot_point(self) -> int | None:
        """The next position at which a snapshot is wanted; None without SSM layers. For decoding."""
        if self.states is None:
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
        lock = self.manager.lock
        lock.acquire()
        try:
            if self.status is not ACTIVE:
                self._require_active("reserve_snapshots")
            wanted = points if isinstance(points, range) and points.step > 0 else sorted(points)
            if self.states is None:
                if wanted:
                    raise ValueError("reserve_snapshots: expected a model with SSM layers, got none")
                return {}
            if wanted and not self.num_committed_tokens < wanted[0] <= wanted[-1] <= self.capacity:
                raise ValueError(
                    f"reserve_snapshots: expected points in {self.num_committed_tokens + 1}..{self.capacity}, "
                    f"got {wanted}"
                )
            if self.manager.streams.only is not self.stream:
                self.manager.streams.acquire(self.stream)
            slots = self.states.reserve(wanted, self.cursor)
            if self.manager.streams.only is not self.stream:
                self.manager.streams.release(self.stream)
            return slots
        finally:
            lock.release()

    def commit(self, tokens: Tokens) -> None:
        """Offer the next computed tokens, from `num_committed_tokens` on, for reuse by others.

        Full blocks go into the tree; where a block is there already, its page replaces the private one. A snapshot
        is kept at each reserved point that the commit covers, and copied from the live state at the end of the commit
        if one is wanted there. No room for a snapshot is counted, never an error.

        Args:
            tokens: [n] integers or digests, or the part of the prompt's `BlockKeys` that starts at
                `num_committed_tokens`.
        Cost: O(n) NumPy work, a few dictionary look-ups for each run met.
        Errors: StateError unless ACTIVE and committing; ValueError for tokens beyond the capacity, or that differ
        from those that the sequence was created with where it shares pages.
        """
        lock = self.manager.lock
        lock.acquire()
        try:
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
            if self.priority is not None:
                self.priority.prepare(last + 1)
            if self.manager.streams.only is not self.stream:  # it may go on with pages that others have written
                self.manager.streams.acquire(self.stream)
            if last > first:
                commit_blocks(self, keys, base, first, last)
            self.pending = pending
            if self.states is not None:
                self.states.commit(self.cursor, start, end, self.history_length)
            self.num_committed_tokens = end
            if end > self.history_length:
                self.history_length = end
                for window in self.windows:
                    window.forget_stale(end, -(-self.capacity // block))
            if self.manager.streams.only is not self.stream:
                self.manager.streams.release(self.stream)
            if self._rows is not None:
                self._rows.refresh()
        finally:
            lock.release()

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
            return tokens.keys, 0, _NO_TOKENS
        array = self.manager.token_array(tokens)
        if self.kind.prefix_unique:
            raise ValueError("commit: expected ready block keys, as at creation, got tokens")
        if self.pending.size:
            array = np.concatenate((self.pending, array))
        # the run that these keys become must not keep the memory of more tokens than its own
        size = (last - first) * self.kind.width
        if size == array.size:
            return array, first, _NO_TOKENS
        return array[:size].copy(), first, array[size:].copy()

    def stop_committing(self) -> None:
        """Commit nothing more: later tokens stay private. Idempotent."""
        self._stopped = True

    # -- states --------------------------------------------------------------------------------------------------------

    def ssm_slot(self, layer_group: int) -> int:
        """Slot of the live state. Errors: StateError before the first resume; ValueError for another layer group."""
        with self.manager.lock:
            if self.states is None or layer_group != self.manager.state_group:
                raise ValueError(f"ssm_slot: expected the SSM layer group, got {layer_group}")
            if self.states.live_slot < 0:
                raise StateError("ssm_slot: expected a resumed sequence")
            return self.states.live_slot

    def touch_own_snapshot(self, stamp: int) -> int:
        return -1 if self.states is None else self.states.touch_own(self.cursor, self.num_committed_tokens, stamp)

    def set_stream(self, stream: Any) -> None:
        """Go on computing on another stream, which waits for what the present one was given so far.

        Errors: StateError unless ACTIVE.
        """
        with self.manager.lock:
            self._require_active("set_stream")
            self.manager.streams.switch(self.stream, stream)
            self.stream = stream
            if self.states is not None:
                self.states.stream = stream
