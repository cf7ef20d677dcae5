"""One sequence of a model runner: its pages, its states and its lengths."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self

from ssmcache import resuming
from ssmcache.committing import commit_tail
from ssmcache.integers import to_integer
from ssmcache.keys import Int64Array, ReuseScope, Tokens
from ssmcache.match import find
from ssmcache.memory.base import GPU_TIER
from ssmcache.parking import Parked
from ssmcache.pools import NO_SLOTS
from ssmcache.priority import PrioritiesGiven, priority_of
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
    time. A sequence is a context that closes it.
    """

    __slots__ = ("_input", "_loads", "adopt", "id", "partly", "usable_tokens_by_tier", "version")

    def __init__(
        self, manager: KVCacheManager, tokens: Tokens, scope: ReuseScope, id: object,
        priority: PrioritiesGiven, adopt: bool,
    ) -> None:  # fmt: skip
        self.priority = priority_of(priority, len(manager.groups))
        kind, keys, num_blocks, num_tokens = manager.keys_of("create_kv_cache", tokens, scope)
        self.calls = manager.calls
        self.calls.changing = True
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
        with self.calls:
            if self.status is not SUSPENDED:
                raise StateError(f"resume: expected a SUSPENDED sequence, got {self.status.name}")
            manager, before = self.manager, self.stream
            if manager.streams.only is not stream:
                manager.memory.check_stream("resume", stream)
            if self._input is not None and self.priority is not None and self.priority.is_asked:
                self._prepare_priorities("resume", -(-self._input[2] // manager.tokens_per_block) + 1)
            self.calls.changing = True
            if stream is not before:
                self._set_stream(stream)
            if manager.streams.only is not stream:
                manager.streams.enter(stream)
            if self._input is None:
                self.shortage = resuming.resume_again(self)
            else:
                keys, num_blocks, num_tokens = self._input
                self.shortage = resuming.first_resume(self, keys, num_blocks, num_tokens)
                if self.shortage is None:
                    self._start(keys, num_tokens)
            if manager.streams.only is not stream:
                if self.shortage is None:
                    manager.streams.acquire(self)
                manager.streams.end(stream)
            if self.shortage is not None:
                self._set_stream(before)
                return False
            self.status = ACTIVE
            manager.num_active += 1
            return True

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
        with self.calls:
            self._require_active("suspend")
            self.calls.changing = True
            self.manager.streams.release(self)
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
        with self.calls:
            if self.status is not SUSPENDED:
                raise StateError(f"prefetch: expected a SUSPENDED sequence, got {self.status.name}")
            tier = to_integer("prefetch", "a tier", tier, 0, len(self.manager.tier_names) - 1)
            self.calls.changing = True
            self.manager.streams.enter(self.stream)
            self.shortage = resuming.prefetch(self, tier)
            self.manager.streams.end(self.stream)
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
        with self.calls:
            if self.status is CLOSED:
                return
            self.calls.changing = True
            manager, store = self.manager, self.store
            if self.soft:
                store.drop_soft_hold(self)
            elif self.locked:
                leaf = None
                if self.status is ACTIVE:
                    manager.num_active -= 1
                    if manager.streams.only is not self.stream:
                        manager.streams.release(self)
                if self.pending.size and manager.partly:
                    leaf = commit_tail(self)
                if self.states is not None:
                    self.states.close()
                if self.windows or self.parked is not None:
                    self._give_up_rest()
                if store.pages is not None and self.own_pages.size:
                    store.pages.pools[GPU_TIER].give_back(self.own_pages)
                    self.own_pages = NO_SLOTS
                store.touch_and_release(self, leaf)
                if store.detached:
                    store.free_path(self.cursor)
            self.status = CLOSED
            was_resumed = self._input is None
            self._input = None
            self._rows = None
            store.leave_scope(self.root)
            manager.forget(self, was_resumed)

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
        with self.calls:
            if self.states is None or layer_group != self.manager.state_group:
                raise ValueError(f"ssm_slot: expected the SSM layer group, got {layer_group}")
            if self.states.live_slot < 0:
                raise StateError("ssm_slot: expected a resumed sequence")
            return self.states.live_slot

    def touch_own_snapshots(self, stamp: int) -> Sequence[int]:
        return () if self.states is None else self.states.touch_own(self.cursor, self.num_committed_tokens, stamp)

    def set_stream(self, stream: Any) -> None:
        """Go on computing on another stream, which waits for what the present one was given so far.

        Errors: StateError unless ACTIVE.
        """
        with self.calls:
            self._require_active("set_stream")
            self.manager.memory.check_stream("set_stream", stream)
            self.calls.changing = True
            self.manager.streams.switch(self, stream)
            self._set_stream(stream)

    def _set_stream(self, stream: Any) -> None:
        self.stream = stream
        if self.states is not None:
            self.states.stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.calls.broken_by is None:  # else there is nothing left to close, and the error is on its way already
            self.close()
