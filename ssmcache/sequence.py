"""One sequence of a model runner: its pages, its states and its lengths."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmcache import resuming
from ssmcache.committing import commit_blocks, commit_tail
from ssmcache.keys import BlockKeys, Int64Array, ReuseScope, Tokens
from ssmcache.match import find
from ssmcache.memory.base import GPU_TIER, TransferError
from ssmcache.parking import Parked
from ssmcache.pools import NO_SLOTS, SlotArray
from ssmcache.priority import Priority, PriorityCallback
from ssmcache.rows import PageRows
from ssmcache.sequence_windows import SequenceWindow
from ssmcache.states import SequenceStates
from ssmcache.stats import ReuseMatch, Shortage
from ssmcache.store import PathHolder

if TYPE_CHECKING:
    from ssmcache.manager import KVCacheManager

_NO_TOKENS: Int64Array = np.empty(0, dtype=np.int64)


class KVCacheStatus(Enum):
    SUSPENDED = "suspended"
    ACTIVE = "active"
    CLOSED = "closed"


# looking a member up in its class costs more than the rest of the comparison
_SUSPENDED, _ACTIVE, _CLOSED = KVCacheStatus


class StateError(RuntimeError):
    """A call that the status of the sequence does not allow: a mistake of the caller, nothing has changed."""


class KVCache(PathHolder):
    """The cache of one sequence; made by `KVCacheManager.create_kv_cache`.

    Lengths are in tokens: `num_committed_tokens` <= `history_length` <= `capacity`. Blocks below `cursor.end` lie in
    the tree, on the path of `cursor` (the prefix that was found, then what was committed); the pages after it are
    private, in `own_pages`. While the sequence is ACTIVE all of that is on the GPU and locked; while it is suspended it
    is held, but may move to the tiers below.

    Each call takes the manager's lock: sequences of one manager may be used from several threads, each from one at a
    time. (Those made for every request do so by hand: `with` costs twice as much.)
    """

    __slots__ = (
        "_input", "_rows", "_stopped", "adopt", "capacity", "history_length", "id", "kind",
        "manager", "num_committed_tokens", "own_pages", "parked", "partly", "pending", "priority", "reuse_match",
        "shortage", "states", "status", "store", "stream", "usable_tokens_by_tier", "version", "windows",
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
        self.priority = None if priority is None else Priority(priority, len(manager.groups))
        self.status = _SUSPENDED
        self.shortage: Shortage | None = None
        self.stream: Any = None
        self.parked: Parked | None = None
        self.own_pages = NO_SLOTS
        self.pending = _NO_TOKENS  # the committed tokens of the last, unfinished block
        self._input: tuple[Int64Array, int, int] | None = (keys, num_blocks, num_tokens)
        self.usable_tokens_by_tier: tuple[int, ...] = ()  # where the match lay at the first resume, with several tiers
        self._stopped = False
        self._rows: PageRows | None = None
        self.states = None if store.snapshots is None else SequenceStates(manager, self.priority)
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

    # -- what it has -------------------------------------------------------------------------------------------------

    @property
    def num_attention_tokens(self) -> int:
        """KV exists, in shared pages or in a copy of one, up to here: kernels must not write KV below it."""
        if not (self.soft or self.locked):
            return 0
        return max(self.cursor.end * self.manager.tokens_per_block, self.reuse_match.usable_tokens)

    @property
    def num_own_pages(self) -> int:
        return self.own_pages.size

    def take_own_pages(self, count: int) -> SlotArray:
        """The first private pages, which are no longer the sequence's."""
        taken, self.own_pages = self.own_pages[:count], self.own_pages[count:]
        return taken

    # -- status ------------------------------------------------------------------------------------------------------

    def _require_active(self, call: str) -> None:
        if self.status is not _ACTIVE:
            raise StateError(f"{call}: expected an ACTIVE sequence, got {self.status.name}")

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
            if self.status is not _SUSPENDED:
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
            if manager.streams.only is not stream:  # what was moved is not there yet, nor is its place free
                manager.streams.release(stream)
            if self.shortage is not None:
                return False
            self.status = _ACTIVE
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
            self.status = _SUSPENDED
            self.manager.num_active -= 1

    def prefetch(self, tier: int = GPU_TIER) -> bool:
        """Bring what the sequence holds up to a tier (0 is the GPU) before it is needed there, while not ACTIVE.

        Returns False, with `shortage` set and nothing changed, if there is no room.
        """
        with self.manager.lock:
            if self.status is not _SUSPENDED:
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
            if self.status is _CLOSED:
                return
            manager, store = self.manager, self.store
            if self.soft:
                store.drop_soft_hold(self)
            elif self.locked:
                leaf = None
                if self.status is _ACTIVE:
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
            self.status = _CLOSED
            self._input = None
            self._rows = None
            store.leave_scope(self.root)
            manager.forget(self)
        finally:
            lock.release()

    def _give_up_rest(self) -> None:
        """Give window pages back, and what lies in tiers below."""
        for window in self.windows:
            window.close(self.parked is not None)
        if self.parked is not None:
            self.parked.discard()
            self.parked = None

    # -- lengths -----------------------------------------------------------------------------------------------------

    def resize(self, capacity: int, history_length: int | None = None) -> bool:
        """Make room for `capacity` tokens, and say how many are computed; history never goes back, capacity may
        shrink down to it. Pages that are out of every window at that history are given up.

        Returns False, with `shortage` set and nothing changed, if there are not enough pages.
        Cost: O(pages added or removed); with windows, O(their pages) where a block is crossed.
        Errors: StateError unless ACTIVE; ValueError for lengths out of order.
        """
        lock = self.manager.lock
        lock.acquire()
        try:
            if self.status is not _ACTIVE:
                self._require_active("resize")
            history = self.history_length if history_length is None else history_length
            if not self.history_length <= history <= capacity:
                raise ValueError(
                    f"resize: expected history {self.history_length} <= history_length <= capacity, "
                    f"got history_length {history} and capacity {capacity}"
                )
            num_blocks = -(-capacity // self.manager.tokens_per_block)
            if self._rows is not None:
                self._rows.check(num_blocks)
            pages = self.store.pages
            missing = 0 if pages is None else num_blocks - self.cursor.end - self.own_pages.size
            shortage = self._shortage_of_windows(history, num_blocks) if self.windows else None
            if missing and shortage is None:
                shortage = self._change_pages(missing)
            if self.windows and shortage is None:
                shortage = self._change_windows(history, num_blocks, missing)
            self.shortage = shortage
            if shortage is not None:
                return False
            self.capacity = capacity
            self.history_length = history
            if self._rows is not None:
                self._rows.refresh()
            return True
        finally:
            lock.release()

    def _change_pages(self, missing: int) -> Shortage | None:
        """Take `missing` pages, or give some back if it is negative."""
        manager, pages, own = self.manager, self.store.pages, self.own_pages
        assert pages is not None
        if missing > 0:
            if manager.streams.only is not self.stream:
                manager.streams.acquire(self.stream)
            try:
                taken = pages.try_take(missing, self.stream)
            except TransferError as error:
                return resuming.transfer_shortage(self, error)
            finally:
                if manager.streams.only is not self.stream:
                    manager.streams.release(self.stream)
            if taken is None:
                return manager.shortage("slots", pages, missing)
            self.own_pages = np.concatenate((own, taken)) if own.size else taken
        elif own.size:
            if manager.streams.only is not self.stream:
                manager.streams.release(self.stream)
            keep = max(0, own.size + missing)
            pages.pools[GPU_TIER].give_back(own[keep:])
            self.own_pages = own[:keep]
        return None

    def _shortage_of_windows(self, history: int, num_blocks: int) -> Shortage | None:
        for window in self.windows:
            needed = window.missing(history, num_blocks)
            if needed > 0 and needed > window.store.obtainable():
                return self.manager.shortage("slots", window.store, needed)
        return None

    def _change_windows(self, history: int, num_blocks: int, new_pages: int) -> Shortage | None:
        """Take what windows need, for which there is room, and give up what is stale. `new_pages` were just taken."""
        streams = self.manager.streams
        if streams.only is not self.stream:
            streams.acquire(self.stream)
        try:
            for window in self.windows:
                window.resize(history, num_blocks, self.stream)
        except TransferError as error:
            if new_pages > 0:
                self._change_pages(-new_pages)
            return resuming.transfer_shortage(self, error)
        finally:
            if streams.only is not self.stream:
                streams.release(self.stream)
        return None

    # -- committing --------------------------------------------------------------------------------------------------

    def snapshot_points(self, end: int) -> range:
        """Positions after the committed tokens, up to `end`, at which a snapshot is wanted, ascending: where prefill
        chunks must stop, or what to hand to `reserve_snapshots`.
        """
        if self.states is None:
            return range(0)
        return self.manager.admission.points(self.num_committed_tokens, end)

    def next_snapshot_point(self) -> int | None:
        """The next position at which a snapshot is wanted; None without SSM layers. For decoding."""
        if self.states is None:
            return None
        return self.manager.admission.next_point(self.num_committed_tokens)

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
            if self.status is not _ACTIVE:
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
            streams = self.manager.streams
            if streams.only is not self.stream:
                streams.acquire(self.stream)
            slots = self.states.reserve(wanted, self.cursor)
            if streams.only is not self.stream:
                streams.release(self.stream)
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
            if self.status is not _ACTIVE:
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
            if self.manager.streams.only is not self.stream:  # others may have written the pages that it goes on with
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
        return array[:size].copy(), first, array[size:].copy()

    def stop_committing(self) -> None:
        """Commit nothing more: later tokens stay private. Idempotent."""
        self._stopped = True

    # -- what kernels read -------------------------------------------------------------------------------------------

    def page_indices(self, layer_group: int, out: SlotArray | None = None) -> SlotArray:
        """Slots of the blocks up to the capacity, [num_blocks] int32, -1 where there is no page on the GPU.

        Args:
            out: filled and returned in place of a new array; what is behind the blocks becomes -1.
        Cost: O(num_blocks).
        Errors: StateError before the first resume and while suspended with tiers below; ValueError if the layer group
        is not one of attention, or `out` is too short.
        """
        with self.manager.lock:
            if self._input is not None or self.status is _CLOSED or self.parked is not None:
                raise StateError("page_indices: expected a resumed sequence")
            rows = PageRows(self)
            return rows.indices(layer_group, out)

    def bind_page_indices(self, layer_group: int, row: SlotArray | None) -> None:
        """Keep a row of the caller's buffer, int32, filled as `page_indices` would: only entries that change are
        written, until the sequence is suspended or closed, or None is bound.

        Errors: StateError unless ACTIVE; ValueError as `page_indices`, now or when the row gets too short.
        """
        with self.manager.lock:
            self._require_active("bind_page_indices")
            if self._rows is None:
                self._rows = PageRows(self)
            self._rows.bind(layer_group, row)

    def ssm_slot(self, layer_group: int) -> int:
        """Slot of the live state. Errors: StateError before the first resume; ValueError for another layer group."""
        with self.manager.lock:
            if self.states is None or layer_group != self.manager.state_group:
                raise ValueError(f"ssm_slot: expected the SSM layer group, got {layer_group}")
            if self.states.live_slot < 0:
                raise StateError("ssm_slot: expected a resumed sequence")
            return self.states.live_slot

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
