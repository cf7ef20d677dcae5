"""One sequence of a model runner: its pages, its states and its lengths."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmcache.keys import BlockKeys, Int64Array, ReuseScope, Tokens
from ssmcache.pools import NO_SLOTS, SlotArray
from ssmcache.states import SequenceStates
from ssmcache.stats import ReuseMatch, Shortage
from ssmcache.store import PathHolder
from ssmcache.tree import Run

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
    private, in `_own_pages`. Between `resume` and `close` the whole path is locked.
    """

    __slots__ = (
        "_input", "_kind", "_manager", "_own_pages", "_pending", "_states", "_stopped", "_version", "capacity",
        "history_length", "id", "num_committed_tokens", "reuse_match", "shortage", "status",
    )  # fmt: skip

    def __init__(self, manager: KVCacheManager, tokens: Tokens, scope: ReuseScope, id: object) -> None:
        kind, keys, num_blocks, num_tokens = manager.keys_of(tokens)
        super().__init__(manager.store.enter_scope(scope, kind))
        self._manager = manager
        self._kind = kind
        self.id = id
        self.status = _SUSPENDED
        self.shortage: Shortage | None = None
        self._input: tuple[Int64Array, int, int] | None = (keys, num_blocks, num_tokens)
        self._own_pages = NO_SLOTS
        self._pending = _NO_TOKENS
        self._stopped = False
        self._states = SequenceStates(manager) if manager.store.snapshots is not None else None
        self._apply(*manager.find(self.root, keys, num_blocks, num_tokens))

    # -- the found prefix --------------------------------------------------------------------------------------------

    def _apply(self, run: Run, depth: int, match: ReuseMatch, source_slot: int) -> None:
        store = self._manager.store
        store.hold_softly(self, run, depth, source_slot)
        self._version = store.version
        self.reuse_match = match
        self.num_committed_tokens = self.history_length = self.capacity = match.usable_tokens

    @property
    def num_attention_tokens(self) -> int:
        """KV exists, in shared pages, up to here: kernels must not write KV below it."""
        return self.cursor.end * self._manager.tokens_per_block

    # -- what it owns, for `check` -----------------------------------------------------------------------------------

    def private_pages(self) -> list[int]:
        pages: list[int] = self._own_pages.tolist()
        return pages

    def private_states(self) -> list[int]:
        return [] if self._states is None else self._states.slots()

    # -- status ------------------------------------------------------------------------------------------------------

    def _require_active(self, call: str) -> None:
        if self.status is not _ACTIVE:
            raise StateError(f"{call}: expected an ACTIVE sequence, got {self.status.name}")

    def resume(self, stream: Any = None) -> bool:
        """Make the sequence ACTIVE: all its pages are on the GPU and locked, and `stream` may compute.

        The first resume also gives the sequence its live state, started from the snapshot that was found. If the tree
        has changed since creation it looks the prompt up again, so lengths may change.

        Returns False, with `shortage` set and nothing changed, if there is no room.
        """
        if self.status is not _SUSPENDED:
            raise StateError(f"resume: expected a SUSPENDED sequence, got {self.status.name}")
        if self._input is not None:
            if not self._first_resume(*self._input, stream):
                return False
            self._input = None
        else:
            self.shortage = self._manager.gate(self.cursor, self._own_pages.size, int(self._states is not None))
            if self.shortage is not None:
                return False
        self.status = _ACTIVE
        self._manager.num_active += 1
        return True

    def _first_resume(self, keys: Int64Array, num_blocks: int, num_tokens: int, stream: Any) -> bool:
        manager, store, states = self._manager, self._manager.store, self._states
        # only what is found now may be refused, so a refused resume leaves the old match as it was
        current = self.soft and self._version == store.version
        found = None if current else manager.find(self.root, keys, num_blocks, num_tokens)
        source_slot = self.source_slot if found is None else found[3]
        self.shortage = manager.gate(self.root, 0, 0) if manager.num_active else None
        if self.shortage is None and states is not None:
            self.shortage = states.shortage_of_live_state(source_slot, self.soft and self.source_slot == source_slot)
        if self.shortage is not None:
            return False
        if found is not None:
            self._apply(*found)
        store.lock(self)
        if states is not None:
            states.start(self.cursor, self.source_slot, stream)
        counters, match = manager.counters, self.reuse_match
        counters.lookups += 1
        counters.lookup_tokens += num_tokens
        counters.tree_tokens += match.tree_tokens
        counters.attention_tokens += match.attention_tokens
        counters.usable_tokens += match.usable_tokens
        return True

    def suspend(self) -> None:
        """Stop computing. Touches the path; slots reserved for snapshots go back. The pages stay (one tier)."""
        self._require_active("suspend")
        if self._states is not None:
            self._states.give_back_reserved()
        self._manager.store.touch(self.cursor)
        self.status = _SUSPENDED
        self._manager.num_active -= 1

    def close(self) -> None:
        """Leave: committed blocks stay for reuse, everything private goes back. Idempotent."""
        if self.status is _CLOSED:
            return
        manager, store = self._manager, self._manager.store
        if self.soft:
            store.drop_soft_hold(self)
        elif self.locked:
            if self.status is _ACTIVE:
                manager.num_active -= 1
            if self._states is not None:
                self._states.close()
            if self._own_pages.size:
                assert store.page_pool is not None
                store.page_pool.give_back(self._own_pages)
                self._own_pages = NO_SLOTS
            store.touch_and_release(self)
        self.status = _CLOSED
        self._input = None
        store.leave_scope(self.root)
        manager.forget(self)

    # -- lengths -----------------------------------------------------------------------------------------------------

    def resize(self, capacity: int, history_length: int | None = None) -> bool:
        """Make room for `capacity` tokens, and say how many are computed; history never goes back, capacity may
        shrink down to it.

        Returns False, with `shortage` set and nothing changed, if there are not enough pages.
        Cost: O(pages added or removed).
        Errors: StateError unless ACTIVE; ValueError for lengths out of order.
        """
        if self.status is not _ACTIVE:
            self._require_active("resize")
        history = self.history_length if history_length is None else history_length
        if not self.history_length <= history <= capacity:
            raise ValueError(
                f"resize: expected history {self.history_length} <= history_length <= capacity, "
                f"got history_length {history} and capacity {capacity}"
            )
        store = self._manager.store
        pool = store.page_pool
        if pool is not None:
            own = self._own_pages
            block = self._manager.tokens_per_block
            missing = -(-capacity // block) - self.cursor.end - own.size
            if missing > 0:
                free = pool.capacity - pool.used
                evictable = store.num_cached_pages - store.num_locked_pages
                if missing > free + evictable:
                    held = pool.used - evictable
                    self.shortage = Shortage("slots", self._manager.page_group, "gpu", missing, free, evictable, held)
                    return False
                pages = store.take_pages(missing)
                self._own_pages = np.concatenate((own, pages)) if own.size else pages
            elif missing < 0 and own.size:
                keep = max(0, own.size + missing)
                pool.give_back(own[keep:])
                self._own_pages = own[:keep]
        self.shortage = None
        self.capacity = capacity
        self.history_length = history
        return True

    # -- committing --------------------------------------------------------------------------------------------------

    def snapshot_points(self, end: int) -> range:
        """Positions after the committed tokens, up to `end`, at which a snapshot is wanted, ascending: where prefill
        chunks must stop, or what to hand to `reserve_snapshots`.
        """
        if self._states is None:
            return range(0)
        return self._manager.admission.points(self.num_committed_tokens, end)

    def next_snapshot_point(self) -> int | None:
        """The next position at which a snapshot is wanted; None without SSM layers. For decoding."""
        if self._states is None:
            return None
        return self._manager.admission.next_point(self.num_committed_tokens)

    def reserve_snapshots(self, points: Iterable[int]) -> dict[int, int]:
        """Slots for states that a kernel writes itself while it passes `points`: {position: slot}, with those of
        earlier calls since the last commit.

        Where room is short the shallowest points are served, and the commit counts the rest as skipped; snapshots of
        the sequence's own path are never given up for it. Slots that the next commit does not cover go back.

        Errors: StateError unless ACTIVE; ValueError for points that are not after the committed tokens and within
        the capacity, or without SSM layers.
        """
        self._require_active("reserve_snapshots")
        wanted = points if isinstance(points, range) and points.step > 0 else sorted(points)
        if self._states is None:
            if wanted:
                raise ValueError("reserve_snapshots: expected a model with SSM layers, got none")
            return {}
        if wanted and not self.num_committed_tokens < wanted[0] <= wanted[-1] <= self.capacity:
            raise ValueError(
                f"reserve_snapshots: expected points in {self.num_committed_tokens + 1}..{self.capacity}, got {wanted}"
            )
        return self._states.reserve(wanted, self.cursor)

    def commit(self, tokens: Tokens) -> None:
        """Offer the next computed tokens, from `num_committed_tokens` on, for reuse by others.

        Full blocks go into the tree; where a block is there already, its page replaces the private one. A snapshot
        is kept at each reserved point that the commit covers, and copied from the live state at the end of the commit
        if one is wanted there. No room for a snapshot is counted, never an error.

        Args:
            tokens: [n] integers, or the part of the prompt's `BlockKeys` that starts at `num_committed_tokens`.
        Cost: O(n) NumPy work, a few dictionary look-ups for each run met.
        Errors: StateError unless ACTIVE and committing; ValueError for tokens beyond the capacity, or that differ
        from those that the sequence was created with where it shares pages.
        """
        if self.status is not _ACTIVE:
            self._require_active("commit")
        if self._stopped:
            raise StateError("commit: expected a sequence that commits, got one after stop_committing")
        block = self._manager.tokens_per_block
        start = self.num_committed_tokens
        end = start + len(tokens)
        if end > self.capacity:
            raise ValueError(f"commit: expected at most {self.capacity - start} tokens (capacity), got {end - start}")
        first, last = start // block, end // block
        keys, base, pending = self._keys_of_commit(tokens, first, last)
        if last > first:
            self._commit_blocks(keys, base, first, last)
        self._pending = pending
        if self._states is not None:
            self._states.commit(self.cursor, start, end, self.history_length)
        self.num_committed_tokens = end
        if end > self.history_length:
            self.history_length = end

    def _keys_of_commit(self, tokens: Tokens, first: int, last: int) -> tuple[Int64Array, int, Int64Array]:
        """Keys that cover the blocks that a commit completes, the block that they start from, and the tokens of the
        block that is left unfinished.
        """
        if isinstance(tokens, BlockKeys):
            if tokens.start != self.num_committed_tokens or not self._kind.prefix_unique:
                raise ValueError(
                    f"commit: expected {self._kind} from token {self.num_committed_tokens} on, "
                    f"got ready block keys from token {tokens.start} on"
                )
            return tokens.keys, 0, _NO_TOKENS
        array = self._manager.token_array(tokens)
        if self._kind.prefix_unique:
            raise ValueError("commit: expected ready block keys, as at creation, got tokens")
        if self._pending.size:
            array = np.concatenate((self._pending, array))
        # the run that these keys become must not keep the memory of more tokens than its own
        size = (last - first) * self._kind.width
        return array[:size].copy(), first, array[size:].copy()

    def _commit_blocks(self, keys: Int64Array, base: int, first: int, last: int) -> None:
        """Put the blocks `first`..`last - 1` into the tree; `keys` start from block `base`."""
        store, kind = self._manager.store, self._kind
        cursor = self.cursor
        position = cursor.end
        if position > first:
            self._check_shared(keys, base, first, min(position, last))
        while position < last:
            child = cursor.children.get(kind.edge_key(keys, position - base))
            if child is None:
                break
            comparable = min(child.end, last) - position
            num_blocks = kind.common_blocks(child.key_buffer, 0, keys, position - base, comparable)
            position += num_blocks
            if position < child.end:
                child = store.split(child, position)
            store.lock_child(child)
            if store.page_pool is not None:
                store.page_pool.give_back(self._own_pages[:num_blocks])
                self._own_pages = self._own_pages[num_blocks:]
            cursor = child
        if position < last:
            num_blocks = last - position
            pages = None
            if store.page_pool is not None:
                pages = self._own_pages[:num_blocks]
                self._own_pages = self._own_pages[num_blocks:]
            width = kind.width
            cursor = store.append(cursor, keys[(position - base) * width : (last - base) * width], num_blocks, pages)
        self.cursor = cursor

    def _check_shared(self, keys: Int64Array, base: int, first: int, last: int) -> None:
        """The shared pages of blocks `first`..`last - 1` must be those of the committed tokens."""
        run = self.cursor
        while run.end > first and run.parent is not None:
            begin, end = max(first, run.start), min(last, run.end)
            if begin < end:
                equal = self._kind.common_blocks(run.key_buffer, begin - run.start, keys, begin - base, end - begin)
                if equal < end - begin:
                    raise ValueError(
                        f"commit: expected the tokens that the sequence was created with, up to token "
                        f"{self.num_attention_tokens}, got others"
                    )
                if self._kind.prefix_unique:
                    break  # equal here means equal above
            run = run.parent

    def stop_committing(self) -> None:
        """Commit nothing more: later tokens stay private. Idempotent."""
        self._stopped = True

    # -- what kernels read -------------------------------------------------------------------------------------------

    def page_indices(self, layer_group: int) -> SlotArray:
        """Slots of the blocks up to the capacity, [num_blocks] int32. Cost: O(num_blocks).

        Errors: StateError before the first resume; ValueError if the layer group is not one of attention.
        """
        if layer_group != self._manager.page_group:
            raise ValueError(f"page_indices: expected the attention layer group, got {layer_group}")
        if self._input is not None or self.status is _CLOSED:
            raise StateError("page_indices: expected a resumed sequence")
        parts = [self._own_pages]
        parts += [run.pages.slots for run in self.cursor.path() if run.pages is not None]
        num_blocks = -(-self.capacity // self._manager.tokens_per_block)
        indices: SlotArray = np.concatenate(parts[::-1])[:num_blocks]
        return indices

    def ssm_slot(self, layer_group: int) -> int:
        """Slot of the live state. Errors: StateError before the first resume; ValueError for another layer group."""
        if self._states is None or layer_group != self._manager.state_group:
            raise ValueError(f"ssm_slot: expected the SSM layer group, got {layer_group}")
        if self._states.live_slot < 0:
            raise StateError("ssm_slot: expected a resumed sequence")
        return self._states.live_slot
