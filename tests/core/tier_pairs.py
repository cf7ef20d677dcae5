"""A manager with several tiers and the oracle of `reference_tiers.py`, given the same calls: after every call every
page and snapshot lies in the same tier, and all counts are equal; a refused call has changed nothing.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from pictures import deep_picture, page_tiers, parked_tiers, snapshot_tiers

from ssmcache import (
    AttentionLayerConfig,
    BlockKeys,
    BufferConfig,
    DiskCacheTierConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    KVCache,
    KVCacheManager,
    KVCacheManagerConfig,
    ReuseScope,
    SimulatedMemory,
    SsmLayerConfig,
)
from tests.core.reference import Prefix
from tests.core.reference_tier_calls import ReferenceTierCache
from tests.core.reference_tiers import Refusal, TierSequence, TierSetup
from tests.core.test_concurrent_sequences import SCOPES, Text, Tokens

COUNTS = (
    "lookups", "lookup_tokens", "tree_tokens", "attention_tokens", "usable_tokens", "snapshots_taken",
    "snapshots_reused", "snapshots_evicted", "snapshots_evicted_unused", "snapshots_skipped_crossed",
    "snapshots_skipped_no_room", "snapshots_skipped_history", "snapshots_skipped_not_admitted", "snapshots_superseded",
    "pages_evicted", "copied_states",
)  # fmt: skip


def manager_of(setup: TierSetup, staging: int) -> KVCacheManager:
    """The real thing, with exactly these numbers of slots, and so many more for moves under way."""
    layers: list[AttentionLayerConfig | SsmLayerConfig] = []
    if setup.pages:
        layers.append(AttentionLayerConfig(0, (BufferConfig("kv", 1),)))
    if setup.states:
        layers.append(SsmLayerConfig(1, (BufferConfig("state", 3),)))
    tiers = [GpuCacheTierConfig(100), HostCacheTierConfig(100), DiskCacheTierConfig(100, ".")][: setup.num_tiers]
    config = KVCacheManagerConfig(
        setup.block, layers, tiers, setup.interval or setup.block, enable_partial_reuse=False,
        max_util_for_resume=setup.max_util, admission=setup.admission,
    )  # fmt: skip
    manager = KVCacheManager(config, memory=SimulatedMemory())
    # any mixture of sizes, which no quota and no split of it would give
    for pools, capacities in zip(manager.pools, filter(None, (setup.pages, setup.states)), strict=True):
        for tier, (pool, capacity) in enumerate(zip(pools, capacities, strict=True)):
            pool.capacity, pool.staging = capacity, staging if tier else 0
    return manager


class TierPair:
    """The manager and its oracle, given the same calls. `ready`: prompts are `BlockKeys`, else integer tokens."""

    def __init__(self, setup: TierSetup, ready: bool, staging: int = 1) -> None:
        self.setup, self.ready = setup, ready
        self.manager, self.reference = manager_of(setup, staging), ReferenceTierCache(setup)
        self.ids: dict[Prefix, int] = {}
        self.prefix_of: dict[Prefix, Prefix] = {}  # as the manager names a block
        self.sequences: list[tuple[KVCache, TierSequence, Tokens]] = []
        self.num_created = 0
        self.refusals: Counter[tuple[str, str, int]] = Counter()
        self.compare()

    def tokens(self, text: Text, scope: ReuseScope) -> tuple[list[Prefix], Tokens]:
        """The blocks of a text, and what the manager is given for it."""
        blocks: list[Prefix] = [(scope,)]
        named: list[Prefix] = [(scope,)]
        for end in range(self.setup.block, len(text) + 1, self.setup.block):
            blocks.append((*blocks[-1], text[end - self.setup.block : end]))
            key = self.ids.setdefault(blocks[-1], 7 * len(self.ids) + 3)
            named.append((*named[-1], key if self.ready else blocks[-1][-1]))
            self.prefix_of[named[-1]] = blocks[-1]
        keys = [self.ids[prefix] for prefix in blocks[1:]]
        tokens = BlockKeys(keys, self.setup.block, len(text)) if self.ready else np.array(text, dtype=np.int64)
        return blocks[1:], tokens

    # -- calls -------------------------------------------------------------------------------------------------------

    def create(self, text: Text, num_prompt: int, scope: ReuseScope = SCOPES[0]) -> int:
        blocks, tokens = self.tokens(text, scope)
        self.num_created += 1
        sequence = self.manager.create_kv_cache(tokens[: num_prompt - 1], scope, id=self.num_created)
        known = (num_prompt if self.ready else num_prompt - 1) // self.setup.block
        twin = self.reference.create(self.num_created, blocks, known, num_prompt - 1)
        self.sequences.append((sequence, twin, tokens))
        self.compare()
        return len(self.sequences) - 1

    def refusable(self, index: int, call: str, *amounts: int) -> bool:
        sequence, twin, _ = self.sequences[index]
        before = deep_picture(self.manager)
        granted = getattr(sequence, call)(*amounts)
        refusal: Refusal | None = getattr(self.reference, call)(twin, *amounts)
        shortage = sequence.shortage
        found = None
        if shortage is not None:
            kind = self.manager.groups[shortage.layer_group].kind.value
            tier = self.manager.tier_names.index(shortage.tier)
            found = Refusal(shortage.reason, kind, tier, shortage.needed)
        assert (granted, found) == (refusal is None, refusal)
        self.compare()
        if refusal is not None:
            self.refusals[call, refusal.reason, refusal.tier] += 1
            after = deep_picture(self.manager)
            assert not [name for name in after if after[name] != before[name]], "a refused call changed something"
        return bool(granted)

    def resume(self, index: int) -> bool:
        return self.refusable(index, "resume")

    def prefetch(self, index: int, tier: int) -> bool:
        return self.refusable(index, "prefetch", tier)

    def resize(self, index: int, capacity: int, history: int | None = None) -> bool:
        history = self.sequences[index][1].history if history is None else history
        return self.refusable(index, "resize", capacity, history)

    def reserve(self, index: int, points: list[int]) -> None:
        sequence, twin, _ = self.sequences[index]
        assert set(sequence.reserve_snapshots(points)) == self.reference.reserve(twin, points)
        self.compare()

    def commit(self, index: int, num_tokens: int) -> None:
        sequence, twin, tokens = self.sequences[index]
        sequence.commit(tokens[twin.committed : twin.committed + num_tokens])
        self.reference.commit(twin, num_tokens)
        self.compare()

    def suspend(self, index: int) -> None:
        sequence, twin, _ = self.sequences[index]
        sequence.suspend()
        self.reference.suspend(twin)
        self.compare()

    def close(self, index: int) -> None:
        sequence, twin, _ = self.sequences.pop(index)
        sequence.close()
        self.reference.close(twin)
        self.compare()

    # -- comparison --------------------------------------------------------------------------------------------------

    def compare(self) -> None:
        self.manager.check()
        seen, expected = self.look(), self.look_at_reference()
        assert seen == expected

    def look(self) -> dict[str, object]:
        manager, stats = self.manager, self.manager.stats()
        counts = [getattr(stats, name) for name in COUNTS] + list(stats.usable_tokens_by_tier)
        names = manager.tier_names
        return {
            "blocks": {self.prefix_of[block]: tier for block, tier in page_tiers(manager).items()},
            "snapshots": {self.prefix_of[block]: tier for block, tier in snapshot_tiers(manager).items()},
            "slots": [
                (group.kind, group.cached_slots, group.num_slots - group.used_slots)
                for tier in manager.memory_usage().tiers
                for group in tier
            ],
            "counts": dict(zip(self.count_names(), counts, strict=True)),
            "moves": {
                (manager.groups[part.layer_group].kind.value, names.index(part.source_tier), names.index(part.tier)):
                    part.num_slots for part in stats.transfers
            },
            "sequences": [
                (
                    sequence.status.value, sequence.num_committed_tokens, sequence.history_length, sequence.capacity,
                    sequence.reuse_match, sequence.num_attention_tokens, sequence.usable_tokens_by_tier,
                    parked_tiers(sequence),
                )
                for sequence, _, _ in self.sequences
            ],
        }  # fmt: skip

    def count_names(self) -> list[str]:
        return [*COUNTS, *(f"usable_tokens_on_{tier}" for tier in range(self.setup.num_tiers))]

    def look_at_reference(self) -> dict[str, object]:
        reference = self.reference
        pages, states = reference.pages.entries, reference.states.entries
        return {
            "blocks": {block: pages[block].tier if self.setup.pages else 0 for block in reference.tree},
            "snapshots": {block: entry.tier for block, entry in states.items() if block[0] != "parked"},
            "slots": [
                (kind.name, len(kind.at(tier)), reference.free(kind, tier))
                for tier in range(self.setup.num_tiers)
                for kind in reference.kinds
            ],
            "counts": {name: reference.counts[name] for name in self.count_names()},
            "moves": {move: count for move, count in reference.moves.items() if count},
            "sequences": [self.look_at_twin(twin) for _, twin, _ in self.sequences],
        }

    def look_at_twin(self, twin: TierSequence) -> tuple[object, ...]:
        status = "active" if twin.status == "active" else "suspended"
        attention_tokens = len(twin.path) * self.setup.block if twin.status != "created" or twin.holding else 0
        parked = None
        if twin.status == "suspended":
            pages, states = self.reference.pages.entries, self.reference.states.entries
            page_tiers = tuple(pages[item].tier for item in twin.parked_pages()) if self.setup.pages else ()
            parked = page_tiers, (states[twin.parked_state()].tier,) if self.setup.states else ()
        return status, twin.committed, twin.history, twin.capacity, twin.hits, attention_tokens, twin.by_tier, parked
