"""The pages of one sequence, and the lengths that they are there for."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmcache.calls import Calls
from ssmcache.integers import MAX_BLOCKS, to_integer
from ssmcache.memory.base import GPU_TIER, TransferError
from ssmcache.pool_groups import PoolGroup
from ssmcache.pools import IntArray, SlotArray, fitting
from ssmcache.resuming import transfer_shortage
from ssmcache.rows import PageRows
from ssmcache.sequence_windows import SequenceWindow, WindowChange, apply_changes
from ssmcache.soft_holds import PathHolder
from ssmcache.states import SequenceStates
from ssmcache.stats import ReuseMatch, Shortage
from ssmcache.tiers import Tiers

if TYPE_CHECKING:
    from ssmcache.manager import KVCacheManager
    from ssmcache.parking import Parked
    from ssmcache.store import BlockStore


class KVCacheStatus(Enum):
    SUSPENDED = "suspended"
    ACTIVE = "active"
    CLOSED = "closed"


# looking a member up in its class costs more than the rest of the comparison
SUSPENDED, ACTIVE, CLOSED = KVCacheStatus


class StateError(RuntimeError):
    """A call that the status of the sequence does not allow: a mistake of the caller, nothing has changed."""


class SequencePages(PathHolder):
    """What a sequence has beside its path: its lengths in tokens, and pages of its own, in `own_pages` for full
    attention and in `windows`.
    """

    __slots__ = (
        "_rows", "calls", "capacity", "history_length", "manager", "num_committed_tokens", "own_pages", "parked",
        "reuse_match", "shortage", "states", "status", "store", "stream", "windows",
    )  # fmt: skip

    # set by `KVCache`
    _rows: PageRows | None
    calls: Calls
    capacity: int
    history_length: int
    manager: KVCacheManager
    num_committed_tokens: int
    own_pages: SlotArray
    parked: Parked | None
    reuse_match: ReuseMatch
    shortage: Shortage | None
    states: SequenceStates | None
    status: KVCacheStatus
    store: BlockStore
    stream: Any
    windows: tuple[SequenceWindow, ...]

    @property
    def num_attention_tokens(self) -> int:
        """KV exists, in shared pages or in a copy of one, up to here: kernels must not write KV below it."""
        if not (self.soft or self.locked):
            return 0
        return max(self.cursor.end * self.manager.tokens_per_block, self.reuse_match.usable_tokens)

    @property
    def num_blocks(self) -> int:
        """Blocks that there is room for: what kernels may use of the path and the pages after it."""
        return -(-self.capacity // self.manager.tokens_per_block)

    @property
    def num_own_pages(self) -> int:
        return self.own_pages.size

    def take_own_pages(self, count: int) -> SlotArray:
        """The first private pages, which are no longer the sequence's."""
        taken, self.own_pages = self.own_pages[:count], self.own_pages[count:]
        return taken

    def _require_active(self, call: str) -> None:
        if self.status is not ACTIVE:
            raise StateError(f"{call}: expected an ACTIVE sequence, got {self.status.name}")

    # -- lengths -----------------------------------------------------------------------------------------------------

    def resize(self, capacity: int, history_length: int | None = None) -> bool:
        """Make room for `capacity` tokens, and say how many are computed; history never goes back, capacity may
        shrink down to it. Pages that are out of every window at that history are given up.

        Returns False, with `shortage` set and nothing changed, if there are not enough pages.
        Cost: O(pages added or removed); with windows, O(their pages) where a block is crossed.
        Errors: StateError unless ACTIVE; ValueError for lengths that are none, or out of order.
        """
        with self.calls:
            if self.status is not ACTIVE:
                self._require_active("resize")
            block = self.manager.tokens_per_block
            if type(capacity) is not int:
                capacity = to_integer("resize", "a capacity in tokens", capacity)
            history = self.history_length
            if history_length is not None:
                history = to_integer("resize", "a history length in tokens", history_length)
            if not self.history_length <= history <= capacity:
                raise ValueError(
                    f"resize: expected history {self.history_length} <= history_length <= capacity, "
                    f"got history_length {history} and capacity {capacity}"
                )
            num_blocks = -(-capacity // block)
            if num_blocks > MAX_BLOCKS:
                raise ValueError(
                    f"resize: expected a capacity of at most {MAX_BLOCKS * block:,} tokens, got {capacity:,}"
                )
            if self._rows is not None:
                self._rows.check(num_blocks)
            self.calls.changing = True
            pages = self.store.pages
            missing = 0 if pages is None else num_blocks - self.cursor.end - self.own_pages.size
            shortage = before = None
            changes = missing or (self.windows and self._windows_change(history, num_blocks))
            streams = self.manager.streams
            if streams.only is not self.stream and (changes or num_blocks != self.num_blocks):
                before = streams.uses(self)
            if changes:
                shortage = self._change(missing, history, num_blocks)
            self.shortage = shortage
            if shortage is None:
                self.capacity = capacity
                self.history_length = history
            if before is not None:
                streams.follow(self, before)
            if shortage is not None:
                return False
            if self._rows is not None:
                self._rows.refresh()
            return True

    def _windows_change(self, history: int, num_blocks: int) -> bool:
        return any(window.would_change(history, num_blocks) for window in self.windows)

    def _change(self, missing: int, history: int, num_blocks: int) -> Shortage | None:
        """Take `missing` pages and what windows need for these lengths, or give some back."""
        if not self.windows:
            return self._change_pages(missing)
        shortage = self._shortage_of_windows(missing, history, num_blocks)
        if shortage is not None:
            return shortage
        # nothing is given up before all that is new is there, since that may fail
        by_pool: dict[PoolGroup, list[WindowChange]] = {}
        for window in self.windows:
            change = window.plan(history, num_blocks)
            if change is not None:
                by_pool.setdefault(window.store.pool_group, []).append(change)
        pages = self.store.pages
        shared = missing if missing > 0 and pages is not None and pages.pool_group in by_pool else 0
        if missing > shared:
            shortage = self._change_pages(missing)
            if shortage is not None:
                return shortage
        taken: list[tuple[list[WindowChange], int, IntArray]] = []
        try:
            for pool_group, same in by_pool.items():
                num_pages = shared if pages is not None and pool_group is pages.pool_group else 0
                num_short = num_pages + sum(len(change.missing) - change.num_own for change in same)
                slots = same[0].window.store.take_some(num_short, self.stream)
                taken.append((same, num_pages, slots))
        except TransferError as error:
            for same, _, slots in taken:
                same[0].window.store.gpu_pool.give_back(slots)
            if missing > shared and pages is not None:
                self._change_pages(-missing)
                pages.num_allocated -= missing
            return transfer_shortage(self, error)
        for same, num_pages, slots in taken:
            new = apply_changes(same, slots, num_pages)
            if num_pages and pages is not None:
                self.own_pages = np.concatenate((self.own_pages, np.array(new, dtype=np.int32)))
                pages.num_allocated += num_pages
        return self._change_pages(missing) if missing < 0 else None

    def _change_pages(self, missing: int) -> Shortage | None:
        """Take `missing` pages, or give some back if it is negative."""
        manager, pages, own = self.manager, self.store.pages, self.own_pages
        assert pages is not None
        if missing > 0:
            try:
                taken = pages.try_take(missing, self.stream)
            except TransferError as error:
                return transfer_shortage(self, error)
            if taken is None:
                return manager.shortage("slots", pages, missing)
            self.own_pages = np.concatenate((own, taken)) if own.size else taken
        elif own.size:
            keep = max(0, own.size + missing)
            pages.pools[GPU_TIER].give_back(own[keep:])
            self.own_pages = fitting(own[:keep], keep)
        return None

    def _shortage_of_windows(self, missing: int, history: int, num_blocks: int) -> Shortage | None:
        """Whether there is room for what windows need, and `missing` pages where they share a pool."""
        pages = self.store.pages
        needs: dict[PoolGroup, list[tuple[Tiers[Any, Any], int]]] = {}
        for window in self.windows:
            same = needs.setdefault(window.store.pool_group, [])
            if not same and missing and pages is not None and window.store.pool_group is pages.pool_group:
                same.append((pages, max(missing, -self.num_own_pages)))
            same.append((window.store, window.missing(history, num_blocks)))
        for pool_group, same in needs.items():
            needed = sum(count for _, count in same)
            if needed > 0 and needed > pool_group.obtainable():
                tiers = next(tiers for tiers, count in same if count > 0)
                return self.manager.shortage("slots", tiers, needed)
        return None

    # -- what kernels read -------------------------------------------------------------------------------------------

    def page_indices(self, layer_group: int, out: SlotArray | None = None) -> SlotArray:
        """Slots of the blocks up to the capacity, [num_blocks] int32, -1 where there is no page on the GPU.

        Args:
            out: filled and returned in place of a new array; what is behind the blocks becomes -1.
        Cost: O(num_blocks). While suspended with tiers below all are -1.
        Errors: StateError before the first resume and once closed; ValueError if the layer group is not one of
        attention, or `out` is too short or cannot be written.
        """
        with self.calls:
            if not self.locked:
                raise StateError("page_indices: expected a resumed sequence")
            return PageRows(self).indices(layer_group, out)

    def bind_page_indices(self, layer_group: int, row: SlotArray | None) -> None:
        """Keep a row of the caller's buffer, int32, filled as `page_indices` would: only entries that change are
        written, until the sequence is suspended or closed, or None is bound.

        Errors: StateError unless ACTIVE; ValueError as `page_indices`, now or when the row gets too short.
        """
        with self.calls:
            self._require_active("bind_page_indices")
            if self._rows is None:
                self._rows = PageRows(self)
            self._rows.bind(layer_group, row)
