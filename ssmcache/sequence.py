"""One sequence of a model runner: its pages, its states and its lengths."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ssmcache import resuming
from ssmcache.committing import commit_tail
from ssmcache.keys import Int64Array, ReuseScope, Tokens
from ssmcache.match import find
from ssmcache.memory.base import GPU_TIER
from ssmcache.parking import Parked
from ssmcache.pools import NO_SLOTS
from ssmcache.priority import Priority, PriorityCallback, default_priority
from ssmcache.sequence_commits import NO_TOKENS, SequenceCommits
from ssmcache.sequence_pages import ACTIVE, CLOSED, SUSPENDED, StateError
from ssmcache.sequence_windows import SequenceWindow
from ssmcache.states import SequenceStates
from ssmcache.stats import ReuseMatch, Shortage

if TYPE_CHECKING:
    from ssmcache.manager import KVCacheManager


class KVCache(SequenceCommits):
    """The cache of one sequence; made by `KVCacheManager.create_kv_cache`.

    Lengths are in tokens: `num_committed_tokens` <= `history_length` <= `capacity`. Blocks below `cursor.end` lie in
    the tree, on the path of `cursor` (the prefix that was found, then what was committed); the pages after it are
    private, in `own_pages`. While the sequence is ACTIVE all of that is on the GPU and locked; while it is suspended it
    is held, but may move to the tiers below.

    Each call takes the manager's lock: sequences of one manager may be used from several threads, each from one at a
    time. (Those made for every request do so by hand: `with` costs twice as much.)
    """

    __slots__ = ("_input", "_loads", "adopt", "id", "partly", "usable_tokens_by_tier", "version")

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
        self.pending = NO_TOKENS  # the committed tokens of the last, unfinished block
        self._input: tuple[Int64Array, int, int] | None = (keys, num_blocks, num_tokens)
        self.usable_tokens_by_tier: tuple[int, ...] = ()  # where the match lay at the first resume, with several tiers
        self._loads: Sequence[Future[Any]] = ()
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
        block = self.manager.tokens_per_block
        counters.blocks_looked_up += -(-num_tokens // block)
        counters.blocks_full += usable // block
        if self.partly:
            rest = usable % block
            counters.blocks_partial += rest > 0
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
        """Bring what the sequence holds up to a tier (0 is the GPU) before it is needed there, while not ACTIVE. What
        comes from files to a host tier may still be read after the call: see `is_loading`.

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
            self._loads = self.manager.memory.loads()
            return self.shortage is None

    @property
    def is_loading(self) -> bool:
        """Whether files are still being read that the last `prefetch` asked for, or found others to have asked for.
        Until they are read `resume` may wait for them.
        """
        return not all(load.done() for load in self._loads)

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

    # -- states and streams --------------------------------------------------------------------------------------------

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
