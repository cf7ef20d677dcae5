"""The one entry point: a manager decides which pages and states live where, a memory holds them."""

from __future__ import annotations

from collections import deque
from typing import Any, Self

from ssmcache import sizing
from ssmcache.admission import admission_of
from ssmcache.calls import Calls
from ssmcache.config import KVCacheManagerConfig
from ssmcache.events import CacheEvent, CacheObserver, EventLog
from ssmcache.integers import is_integer, to_integer
from ssmcache.invariants import check_manager
from ssmcache.keys import BlockKeys, Int64Array, KeyKind, ReuseScope, TokenIds, Tokens, check_scope
from ssmcache.layout import BufferPlace, LayerGroup, layer_groups
from ssmcache.match import find
from ssmcache.memory.base import GPU_TIER, Memory, SlotMoves
from ssmcache.priority import PrioritiesGiven
from ssmcache.sequence import KVCache
from ssmcache.stats import CacheStats, Counters, MemoryUsage, ReuseMatch, Shortage
from ssmcache.store import BlockStore
from ssmcache.streams import StreamOrder
from ssmcache.tiers import Tiers
from ssmcache.units import plural
from ssmcache.usage import collect_stats, memory_usage, used_slots
from ssmcache.utilization import Utilization

_DEFAULT_SCOPE = ReuseScope()
_TRAFFIC_SEQUENCES = 256


class KVCacheManager:
    """Prefix cache of a model with attention layers, sliding windows, SSM layers or several of these, in one to three
    tiers.

    Args:
        config: layers, sizes and reuse settings.
        memory: where the slots lie; the manager reserves its pools there and closes it at `shutdown`.
        observer: is told of every change of the reusable blocks, in place of an event buffer.

    Nothing raises for lack of memory: `resume` and `resize` of a sequence return False.

    What a memory or an observer raises while a call is changing the cache closes the manager: every later call raises
    `BrokenManagerError`, since nobody knows what lies where. Mistakes of the caller raise before anything is touched.

    Threads: every public call of the manager and of its sequences holds one lock for as long as it runs, so calls
    from several threads leave the state whole. None is held between calls: a probe may be out of date when it returns,
    and each sequence belongs to one thread at a time. Under the lock copies are queued, files of the disk tier read and
    written, memory taken and given back (`adjust`, `resize_tier`), and priority callbacks asked; these may call the
    manager, but not wait for other threads that do. What a view of `buffer` shows is guarded by nobody: a sequence may
    read its pages and write those that are its own while it is ACTIVE.

    Errors: ValueError when a quota is too small for the slots that each layer group needs, the memory cannot play a
    tier, or there is an observer beside an event buffer.
    """

    def __init__(self, config: KVCacheManagerConfig, memory: Memory, observer: CacheObserver | None = None) -> None:
        if observer is not None and config.event_buffer_size:
            raise ValueError(f"event_buffer_size: expected 0 beside an observer, got {config.event_buffer_size}")
        self.config = config
        self.memory = memory
        self.calls = Calls()
        self.tokens_per_block = config.tokens_per_block
        self.partly = config.partial_reuse
        self.groups = layer_groups(config)
        self.tier_names = config.tier_names
        self.quotas = [tier.quota for tier in config.cache_tiers]
        pools = sizing.make_pools(self.groups, config, memory)
        self._token_ids = TokenIds()
        size = config.event_buffer_size
        self.event_log = EventLog(size, self._token_ids) if size else None
        told = self.event_log if observer is None else observer
        self.streams = StreamOrder(memory, pools)
        self.admission = admission_of(config.admission, config.ssm_reuse_interval)
        keeps_path = self.admission.keeps_path
        self.store = BlockStore(self.groups, pools, self.streams, self.tokens_per_block, told, keeps_path)
        self.pools = tuple(tiers.pools for tiers in self.store.all_tiers())  # of each layer group, by tier
        self.page_group = -1 if self.store.pages is None else self.store.pages.layer_group
        self.state_group = -1 if self.store.snapshots is None else self.store.snapshots.layer_group
        self.counters = Counters(len(config.cache_tiers))
        self.traffic: deque[tuple[int, int]] = deque(maxlen=_TRAFFIC_SEQUENCES)  # (capacity, history) at the end
        self.num_active = 0
        self._utilization = Utilization(config.max_util_for_resume)
        self.has_priorities = False  # a sequence was given some: the others may have to raise known blocks to 35
        self.open_sequences: dict[KVCache, None] = {}
        self._closed = False
        self._token_kind = KeyKind(self.tokens_per_block, prefix_unique=False)
        self._ready_kind = KeyKind(1, prefix_unique=True)

    def __repr__(self) -> str:
        now = (
            "shut down"
            if self._closed
            else f"{plural(len(self.open_sequences), 'open sequence')}, {self.num_active:,} ACTIVE"
        )
        return f"KVCacheManager({self.config!r}, {type(self.memory).__name__}, {now})"

    # -- sequences ---------------------------------------------------------------------------------------------------

    def create_kv_cache(
        self,
        input_tokens: Tokens = (),
        reuse_scope: ReuseScope = _DEFAULT_SCOPE,
        id: object = None,
        priority: PrioritiesGiven = None,
        adopt_kv: bool = True,
    ) -> KVCache:
        """A new sequence, SUSPENDED, holding softly what the tree knows of its prompt.

        Args:
            input_tokens: [n] integers >= 0 or 32-byte digests of multimodal items, or `BlockKeys`. Pass the prompt
                without its last token: at least one token must be computed, because its logits are needed.
            priority: 0..100, 35 by default: slots of lower priority go first, and a slot keeps the highest that it was
                given. As `PriorityRange`s, which do not overlap in any layer group and cost the same however long they
                are, or as a callable (layer group, block ordinal) -> priority, which is asked for each block of the
                prompt at the first `resume`, and of what is committed beyond it, before anything changes.
            adopt_kv: whether pages beyond the reusable tokens are taken up as they are; False for kernels that cannot
                leave KV unwritten: they get pages of their own, which go when the tokens are committed.
        """
        with self.calls:
            if self._closed:
                raise RuntimeError("create_kv_cache: expected an open manager, got one after shutdown")
            sequence = KVCache(self, input_tokens, reuse_scope, id, priority, adopt_kv)
            self.open_sequences[sequence] = None
            return sequence

    def forget(self, sequence: KVCache, was_resumed: bool) -> None:
        """Called by a sequence that closes."""
        del self.open_sequences[sequence]
        if was_resumed:
            self.traffic.append((sequence.capacity, sequence.history_length))

    def probe_reuse(self, tokens: Tokens, reuse_scope: ReuseScope = _DEFAULT_SCOPE) -> ReuseMatch:
        """What a sequence created with these tokens would reuse. Changes nothing. Errors: as `create_kv_cache`."""
        with self.calls:
            kind, keys, num_blocks, num_tokens = self.keys_of("probe_reuse", tokens, reuse_scope, keep_digests=False)
            root = self.store.roots.get(reuse_scope)
            if root is None:
                return ReuseMatch(0, 0, 0)
            partly = self.partly and not kind.prefix_unique
            return find(self.store, root, keys, num_blocks, num_tokens, partly, True)[2]

    def token_array(self, tokens: Tokens) -> Int64Array:
        """Tokens as [n] int64, a copy; digests as negative ids. Errors: ValueError for anything else."""
        return self._token_ids.array(tokens)

    def keys_of(
        self, call: str, tokens: Tokens, scope: ReuseScope, keep_digests: bool = True
    ) -> tuple[KeyKind, Int64Array, int, int]:
        """A prompt as the tree compares it: (kind of keys, keys, number of blocks known, number of tokens). Of a prompt
        that is only asked about no digests are kept.

        Errors: TypeError, ValueError for anything that is no prompt, no scope, or of another kind than the scope's.
        """
        if scope is not _DEFAULT_SCOPE:
            check_scope(call, scope)
        block = self.tokens_per_block
        if isinstance(tokens, BlockKeys):
            if tokens.start or tokens.tokens_per_block != block:
                raise ValueError(
                    f"{call}: expected block keys from token 0 on in blocks of {block}, got from token "
                    f"{tokens.start} on in blocks of {tokens.tokens_per_block}"
                )
            # the block that the next token ends, if it ends one, can be adopted though not skipped
            kind, keys, num_tokens = self._ready_kind, tokens.keys, tokens.stop
            num_blocks = min(keys.size, (num_tokens + 1) // block)
        else:
            kind, keys = self._token_kind, self._token_ids.array(tokens, keep_digests)
            num_blocks, num_tokens = keys.size // block, keys.size
        known = self.store.roots.get(scope)
        if known is not None and known.kind is not kind and known.kind != kind:
            raise ValueError(f"{call}: expected {known.kind}, as before in {scope}, got {kind}")
        return kind, keys, num_blocks, num_tokens

    # -- for the sequences -------------------------------------------------------------------------------------------

    def gate(self, sequence: KVCache) -> Shortage | None:
        """The resume gate: a shortage if sequences other than the asking one hold more than `max_util_for_resume` of a
        GPU pool in slots that cannot be evicted. Open while none is ACTIVE.
        """
        if self.num_active == 0:
            return None
        for group in self.store.pool_groups:
            pool = group.pools[GPU_TIER]
            held = sizing.held_by_others(group, sequence)
            if not self._utilization.admits(held, pool.capacity):
                name, evictable = self.tier_names[GPU_TIER], group.num_droppable(GPU_TIER)
                first = group.members[0].layer_group
                return Shortage("utilization", first, name, 0, pool.free, evictable, held)
        return None

    def shortage(self, reason: str, tiers: Tiers[Any, Any], needed: int, tier: int = GPU_TIER) -> Shortage:
        """A shortage of slots for one layer group, with what its pool has of them."""
        pool = tiers.pools[tier]
        evictable = tiers.obtainable(tier) - pool.free
        held = pool.used - evictable
        return Shortage(reason, tiers.layer_group, self.tier_names[tier], needed, pool.free, evictable, held)

    def copy_slot(self, layer_group: int, tier: int, source_slot: int, destination_slot: int, stream: Any) -> None:
        """Queue the copy of a slot of some tier into one of the GPU. Errors: TransferError."""
        pool = self.groups[layer_group].pool
        self.streams.copy(SlotMoves(pool, tier, (source_slot,), GPU_TIER, (destination_slot,)), stream)
        self.counters.copied[layer_group, tier] += 1

    def copy_state(self, tier: int, source_slot: int, destination_slot: int, stream: Any) -> None:
        """Queue the copy of a state of some tier into a slot of the GPU. Errors: TransferError."""
        self.copy_slot(self.state_group, tier, source_slot, destination_slot, stream)
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
        """Tokens that one sequence, alone in the cache, can have room for while none of them is computed; None without
        a limit.
        """
        return sizing.max_capacity(self)

    def used_slots(self, layer_group: int, tier: int = GPU_TIER) -> int:
        """Slots that a layer group uses, of a pool of its own or of one that it shares. Cost: O(1), or O(open
        sequences) where it shares.
        """
        return used_slots(self, self.store.all_tiers()[layer_group], tier)

    def memory_usage(self) -> MemoryUsage:
        with self.calls:
            return memory_usage(self)

    def stats(self) -> CacheStats:
        with self.calls:
            return collect_stats(self)

    def take_events(self) -> list[CacheEvent]:
        """The events since the last call; see `CacheEvent`. Errors: RuntimeError if `event_buffer_size` is 0."""
        with self.calls:
            if self.event_log is None:
                raise RuntimeError("take_events: expected a manager with event_buffer_size > 0, got 0")
            return self.event_log.take()

    def check(self) -> None:
        """Verify every invariant. Raises AssertionError with what is broken. Cost: O(everything)."""
        with self.calls:
            check_manager(self)

    # -- what kernels read -------------------------------------------------------------------------------------------

    def _place(self, layer_id: int, role: str) -> tuple[LayerGroup, BufferPlace]:
        for group in self.groups:
            for place in group.buffers:
                if (place.layer_id, place.role) == (layer_id, role):
                    return group, place
        known = sorted((place.layer_id, place.role) for group in self.groups for place in group.buffers)
        raise ValueError(f"buffer: expected one of {known}, got {(layer_id, role)}")

    def buffer(self, layer_id: int, role: str, dtype: Any = None, shape: tuple[int, ...] | None = None) -> Any:
        """One buffer of all slots on the GPU, a view without a copy, [slots, bytes]; with `tokens_per_block_override`
        [slots, pages, bytes]. None if the memory has no bytes. Layer groups that share a pool see the same slots, each
        those that are its own as what they are for it.

        Args:
            dtype: elements in place of bytes.
            shape: of each slot, in place of the bytes or elements in one row; needs a dtype.
        It is good until `adjust` or `resize_tier`. Errors: ValueError for an unknown buffer.
        """
        with self.calls:
            group, place = self._place(layer_id, role)
            pool = self.memory.view(group.pool)
            if pool is None:
                return None
            view = pool[:, place.offset : place.offset + place.size]
            if dtype is not None:
                view = view.view(dtype)
            if shape is not None:
                view = view.reshape((view.shape[0], *shape))
            elif place.num_pages > 1:
                view = view.reshape((view.shape[0], place.num_pages, -1))
            return view

    def page_stride(self, layer_id: int, role: str) -> int:
        """Bytes from a slot to the next in `buffer`."""
        return self._place(layer_id, role)[0].slot_bytes

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def need_adjustment(self) -> bool:
        """Whether the sequences closed lately want a split of the tiers between pools that is more than 1.25
        times away from the present one.
        """
        with self.calls:
            return sizing.need_adjustment(self)

    def adjust(self) -> bool:
        """Split the tiers as the sequences closed lately want it. Slots may move; what no longer fits moves down or
        goes, oldest first. False as with `resize_tier`. Errors: RuntimeError with an ACTIVE sequence.
        """
        with self.calls:
            self._require_no_active_sequence("adjust")
            return sizing.resplit(self, range(len(self.quotas)), self.quotas)

    def resize_tier(self, tier: int, quota: int) -> bool:
        """Give a tier another quota, in bytes, split as the sequences closed lately want it. Slots may move; what no
        longer fits moves down or goes, oldest first. False, and nothing changed, if what is held does not fit or the
        memory has not enough; False, too, if a tier below could not be read or written, and some pages may have moved
        then. Errors: RuntimeError with an ACTIVE sequence; ValueError for an unknown tier or a quota that is too small
        for one slot of each layer group, or for `constraints`.
        """
        with self.calls:
            self._require_no_active_sequence("resize_tier")
            if not is_integer(tier) or not 0 <= tier < len(self.quotas) or self.quotas[tier] is None:
                raise ValueError(f"resize_tier: expected a tier with a quota, of {len(self.quotas)}, got {tier!r}")
            quotas = list(self.quotas)
            quotas[tier] = to_integer("resize_tier", "a quota in bytes", quota, 1)
            return sizing.resplit(self, (tier,), quotas)

    # -- ending ------------------------------------------------------------------------------------------------------

    def clear_reusable_blocks(self, scope: ReuseScope | None = None) -> None:
        """Offer nothing any more of what is cached, in one scope or in all: for new weights, or an adapter that goes.

        Sequences may be open. One that was resumed before goes on with what it has, unchanged, in whatever tier it
        lies, but what it commits from now on stays its own: it has to do with what was cleared, so none of it is ever
        offered, and no snapshot taken. One that was only created finds nothing of what was there. What a sequence still
        holds goes when the last that holds it closes, all else at once.

        Errors: TypeError for a scope that is none.
        """
        with self.calls:
            if scope is not None:
                check_scope("clear_reusable_blocks", scope)
            self.calls.changing = True
            self.store.clear(scope, self.open_sequences)

    def shutdown(self) -> None:
        """Give the memory back. Idempotent; good for a broken manager too. Errors: RuntimeError while sequences of a
        whole one are open.
        """
        with self.calls.lock:
            if self.calls.broken_by is None:
                self._require_no_open_sequences("shutdown")
                self.store.clear(None, ())
            if not self._closed:
                self._closed = True
                self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close what is still open, and shut down."""
        with self.calls.lock:
            if self.calls.broken_by is None:
                for sequence in list(self.open_sequences):
                    sequence.close()
            self.shutdown()

    def _require_no_open_sequences(self, call: str) -> None:
        if self.open_sequences:
            raise RuntimeError(f"{call}: expected no open sequence, got {len(self.open_sequences)}")

    def _require_no_active_sequence(self, call: str) -> None:
        if self.num_active:
            raise RuntimeError(f"{call}: expected no ACTIVE sequence, got {self.num_active}")
