"""The one entry point: a manager decides which pages and states live where, a memory holds them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ssmcache.admission import IntervalAdmission
from ssmcache.config import KVCacheManagerConfig
from ssmcache.invariants import check_manager
from ssmcache.keys import BlockKeys, Int64Array, KeyKind, ReuseScope, Tokens
from ssmcache.layout import LayerGroupKind, layer_groups, split_quota
from ssmcache.memory.base import Memory
from ssmcache.pools import UNLIMITED_SLOTS, PagePool, SlotPool, StatePool
from ssmcache.sequence import KVCache
from ssmcache.stats import CacheStats, Counters, LayerGroupUsage, MemoryUsage, ReuseMatch, Shortage
from ssmcache.store import BlockStore
from ssmcache.tree import Root, Run, deepest_snapshot, match_blocks

_DEFAULT_SCOPE = ReuseScope()


class KVCacheManager:
    """Prefix cache of a model with attention layers, SSM layers or both, in one GPU tier.

    Args:
        config: layers, sizes and reuse settings.
        memory: where the slots lie; the manager reserves its pools there and closes it at `shutdown`.

    One thread at a time. Nothing raises for lack of memory: `resume` and `resize` of a sequence return False.

    Errors: ValueError when the quota is too small for one slot of each layer group.
    """

    def __init__(self, config: KVCacheManagerConfig, memory: Memory) -> None:
        self.config = config
        self.memory = memory
        self.tokens_per_block = config.tokens_per_block
        self.groups = layer_groups(config)
        num_slots = dict(zip((group.kind for group in self.groups), split_quota(self.groups, config), strict=True))
        kinds = list(num_slots)
        page_pool = state_pool = None
        self.page_group = self.state_group = -1
        if LayerGroupKind.ATTENTION in num_slots:
            page_pool = PagePool(num_slots[LayerGroupKind.ATTENTION])
            self.page_group = kinds.index(LayerGroupKind.ATTENTION)
        if LayerGroupKind.SSM in num_slots:
            state_pool = StatePool(num_slots[LayerGroupKind.SSM])
            self.state_group = kinds.index(LayerGroupKind.SSM)
        self.pools: tuple[SlotPool, ...] = tuple(pool for pool in (page_pool, state_pool) if pool is not None)
        self.store = BlockStore(page_pool, state_pool)
        self.admission = IntervalAdmission(config.ssm_reuse_interval)
        self.counters = Counters()
        self.num_active = 0
        self.open_sequences: dict[KVCache, None] = {}
        self._token_kind = KeyKind(self.tokens_per_block, prefix_unique=False)
        self._ready_kind = KeyKind(1, prefix_unique=True)
        for index, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            memory.reserve(index, group.slot_bytes, _limit(pool))

    # -- sequences ---------------------------------------------------------------------------------------------------

    def create_kv_cache(
        self, input_tokens: Tokens = (), reuse_scope: ReuseScope = _DEFAULT_SCOPE, id: object = None
    ) -> KVCache:
        """A new sequence, SUSPENDED, holding softly what the tree knows of its prompt.

        Args:
            input_tokens: [n] integers >= 0, or `BlockKeys`. Pass the prompt without its last token: at least one
                token must be computed, because its logits are needed.
        """
        sequence = KVCache(self, input_tokens, reuse_scope, id)
        self.open_sequences[sequence] = None
        return sequence

    def forget(self, sequence: KVCache) -> None:
        """Called by a sequence that closes."""
        del self.open_sequences[sequence]

    def probe_reuse(self, tokens: Tokens, reuse_scope: ReuseScope = _DEFAULT_SCOPE) -> ReuseMatch:
        """What a sequence created with these tokens would reuse. Changes nothing."""
        kind, keys, num_blocks, num_tokens = self.keys_of(tokens)
        root = self.store.roots.get(reuse_scope)
        if root is None or root.kind != kind:
            return ReuseMatch(0, 0, 0)
        return self.find(root, keys, num_blocks, num_tokens)[2]

    def token_array(self, tokens: Tokens) -> Int64Array:
        """Tokens as [n] int64, a copy. Errors: ValueError unless they are integers >= 0 in one dimension."""
        array = np.array(tokens)
        if array.size == 0:
            return np.empty(0, dtype=np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"tokens: expected integers in one dimension, got {array.dtype} of shape {array.shape}")
        if array.min() < 0:
            raise ValueError(f"tokens: expected integers >= 0, got {array.min()}")
        return array.astype(np.int64, copy=False)

    def keys_of(self, tokens: Tokens) -> tuple[KeyKind, Int64Array, int, int]:
        """A prompt as the tree compares it: (kind of keys, keys, number of blocks known, number of tokens)."""
        block = self.tokens_per_block
        if isinstance(tokens, BlockKeys):
            if tokens.start or tokens.tokens_per_block != block:
                raise ValueError(
                    f"input_tokens: expected block keys from token 0 on in blocks of {block}, got from token "
                    f"{tokens.start} on in blocks of {tokens.tokens_per_block}"
                )
            # the block that the next token ends, if it ends one, can be adopted though not skipped
            keys, num_tokens = tokens.keys, tokens.stop
            return self._ready_kind, keys, min(keys.size, (num_tokens + 1) // block), num_tokens
        array = self.token_array(tokens)
        return self._token_kind, array, array.size // block, array.size

    # -- for the sequences -------------------------------------------------------------------------------------------

    def find(self, root: Root, keys: Int64Array, num_blocks: int, num_tokens: int) -> tuple[Run, int, ReuseMatch, int]:
        """Look a prompt up: (run, blocks found, lengths, slot of the snapshot to start from or -1). Pure."""
        block = self.tokens_per_block
        run, depth = match_blocks(root, keys, num_blocks)
        # one more block may be known than the tokens fill: it can be adopted, but not skipped
        usable = found = min(depth, num_tokens // block)
        slot = -1
        if self.store.snapshots is not None:
            usable, slot = deepest_snapshot(run, found)
        return run, depth, ReuseMatch(found * block, found * block, usable * block), slot

    def gate(self, cursor: Run, own_pages: int, own_states: int) -> Shortage | None:
        """The resume gate: a shortage if sequences other than the asking one, which has the path of `cursor` locked
        and so many private slots, hold more than `max_util_for_resume` of a pool. Open while none is ACTIVE.
        """
        if self.num_active == 0:
            return None
        store = self.store
        if store.page_pool is not None:
            alone = sum(run.end - run.start for run in cursor.path() if run.holds == 1)
            held = store.page_pool.used - store.num_evictable_pages - own_pages - alone
            if held > self.config.max_util_for_resume * store.page_pool.capacity:
                return self._utilization(self.page_group, store.num_evictable_pages, held)
        if store.snapshots is not None:
            held = store.snapshots.pool.used - store.snapshots.num_cached - own_states
            if held > self.config.max_util_for_resume * store.snapshots.pool.capacity:
                return self._utilization(self.state_group, store.snapshots.num_cached, held)
        return None

    def _utilization(self, group: int, evictable: int, held: int) -> Shortage:
        return Shortage("utilization", group, "gpu", 0, self.pools[group].free, evictable, held)

    def copy_state(self, source_slot: int, destination_slot: int, stream: Any) -> None:
        self.memory.copy(self.state_group, (source_slot,), (destination_slot,), stream)
        self.counters.copied_states += 1

    # -- what it holds -----------------------------------------------------------------------------------------------

    @property
    def ssm_reuse_interval(self) -> int:
        return self.config.ssm_reuse_interval

    @property
    def layer_grouping(self) -> tuple[tuple[int, ...], ...]:
        """Layer ids by layer group."""
        return tuple(group.layer_ids for group in self.groups)

    @property
    def max_capacity(self) -> int | None:
        """Tokens that one sequence, alone in the cache, can have room for; None without a limit."""
        pool = self.store.page_pool
        limit = None if pool is None else _limit(pool)
        return None if limit is None else limit * self.tokens_per_block

    def used_slots(self, layer_group: int) -> int:
        return self.pools[layer_group].used

    def memory_usage(self) -> MemoryUsage:
        cached = {self.page_group: self.store.num_cached_pages}
        if self.store.snapshots is not None:
            cached[self.state_group] = self.store.snapshots.num_cached
        return MemoryUsage(
            tuple(
                LayerGroupUsage(
                    index, group.kind.value, group.slot_bytes, _limit(pool), pool.used, cached[index], pool.peak_used
                )
                for index, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True))
            )
        )

    def stats(self) -> CacheStats:
        counters, snapshots = self.counters, self.store.snapshots
        state_bytes = self.groups[self.state_group].slot_bytes if snapshots is not None else 0
        return CacheStats(
            lookups=counters.lookups,
            lookup_tokens=counters.lookup_tokens,
            tree_tokens=counters.tree_tokens,
            attention_tokens=counters.attention_tokens,
            usable_tokens=counters.usable_tokens,
            snapshots_taken=counters.snapshots_taken,
            snapshots_reused=counters.snapshots_reused,
            snapshots_evicted=0 if snapshots is None else snapshots.num_evicted,
            snapshots_evicted_unused=0 if snapshots is None else snapshots.num_evicted_unused,
            snapshots_skipped_crossed=counters.snapshots_skipped_crossed,
            snapshots_skipped_no_room=counters.snapshots_skipped_no_room,
            snapshots_skipped_not_admitted=counters.snapshots_skipped_not_admitted,
            snapshots_skipped_history=counters.snapshots_skipped_history,
            pages_evicted=self.store.num_evicted_pages,
            copied_states=counters.copied_states,
            copied_bytes=counters.copied_states * state_bytes,
        )

    def check(self) -> None:
        """Verify every invariant. Raises AssertionError with what is broken. Cost: O(everything)."""
        check_manager(self)

    # -- ending ------------------------------------------------------------------------------------------------------

    def clear_reusable_blocks(self) -> None:
        """Forget everything that is cached. Errors: RuntimeError while sequences are open."""
        self._require_no_open_sequences("clear_reusable_blocks")
        self.store.clear()

    def shutdown(self) -> None:
        """Give the memory back. Errors: RuntimeError while sequences are open."""
        self._require_no_open_sequences("shutdown")
        self.store.clear()
        self.memory.close()

    def _require_no_open_sequences(self, call: str) -> None:
        if self.open_sequences:
            raise RuntimeError(f"{call}: expected no open sequence, got {len(self.open_sequences)}")


def _limit(pool: SlotPool) -> int | None:
    return None if pool.capacity == UNLIMITED_SLOTS else pool.capacity
