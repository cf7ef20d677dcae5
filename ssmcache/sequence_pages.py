"""The pages of one sequence, and the lengths that they are there for."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmcache.memory.base import GPU_TIER, TransferError
from ssmcache.pool_groups import PoolGroup
from ssmcache.pools import SlotArray
from ssmcache.resuming import transfer_shortage
from ssmcache.rows import PageRows
from ssmcache.sequence_windows import SequenceWindow
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
        "_rows", "capacity", "history_length", "manager", "num_committed_tokens", "own_pages", "parked", "reuse_match",
        "shortage", "states", "status", "store", "stream", "windows",
    )  # fmt: skip

    # set by `KVCache`
    _rows: PageRows | None
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
        Errors: StateError unless ACTIVE; ValueError for lengths out of order.
        """
        lock = self.manager.lock
        lock.acquire()
        try:
            if self.status is not ACTIVE:
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
            shortage = None
            if missing or (self.windows and self._windows_change(history, num_blocks)):
                shortage = self._change(missing, history, num_blocks)
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

    def _windows_change(self, history: int, num_blocks: int) -> bool:
        return any(window.would_change(history, num_blocks) for window in self.windows)

    def _change(self, missing: int, history: int, num_blocks: int) -> Shortage | None:
        """Take `missing` pages and what windows need for these lengths, or give some back."""
        changes_hands = missing > 0 or (missing < 0 and self.own_pages.size > 0) or self.windows
        ordered = changes_hands and self.manager.streams.only is not self.stream
        if ordered:
            self.manager.streams.acquire(self.stream)
        shortage = self._shortage_of_windows(missing, history, num_blocks) if self.windows else None
        if self.store.shares_pools and shortage is None:  # what goes stale may be what others take
            for window in self.windows:
                window.give_up_stale(history, num_blocks)
        if missing and shortage is None:
            shortage = self._change_pages(missing)
        if self.windows and shortage is None:
            shortage = self._change_windows(history, num_blocks, missing)
        if ordered:
            self.manager.streams.release(self.stream)
        return shortage

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
            self.own_pages = own[:keep]
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

    def _change_windows(self, history: int, num_blocks: int, new_pages: int) -> Shortage | None:
        """Take what windows need, for which there is room, and give up what is stale. `new_pages` were just taken."""
        try:
            for window in self.windows:
                window.resize(history, num_blocks, self.stream)
        except TransferError as error:
            if new_pages > 0:
                self._change_pages(-new_pages)
                pages = self.store.pages
                assert pages is not None
                pages.num_allocated -= new_pages
            return transfer_shortage(self, error)
        return None

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
            if not self.locked or self.parked is not None:
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
