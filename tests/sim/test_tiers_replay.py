"""Hits by tier of the manager, one request after the other, against the distances of the one-pass grid."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import (
    AttentionLayerConfig,
    BufferConfig,
    DiskCacheTierConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    KVCacheManager,
    KVCacheManagerConfig,
    SimulatedMemory,
)
from ssmcache_sim.grid import stack_distances
from ssmcache_sim.grid_tiers import tier_hits
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
# stretches of equal tokens: long shared prefixes that part anywhere
stretches = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 16)), min_size=1, max_size=4)
branching_prompts = st.lists(
    stretches.map(lambda parts: [token for token, length in parts for _ in range(length)]), min_size=1, max_size=30
)


def served(trace: Trace, block: int, pages: Sequence[int], check: bool = True) -> tuple[tuple[int, ...], int]:
    """Hit tokens by tier, of all requests together and summed up over them, in blocks of the trace."""
    layer = AttentionLayerConfig(0, (BufferConfig("key", 1),))
    tiers = [GpuCacheTierConfig(pages[0]), HostCacheTierConfig(pages[1]), DiskCacheTierConfig(pages[-1], ".")]
    config = KVCacheManagerConfig(block, (layer,), tiers[: len(pages)])
    manager = KVCacheManager(config, memory=SimulatedMemory())
    assert tuple(pool.capacity for pool in manager.pools[0]) == tuple(pages)
    total = [0] * len(pages)
    for prompt in trace.prompts():
        kv = manager.create_kv_cache(prompt[:-1])
        assert kv.resume()
        for tier, tokens in enumerate(kv.usable_tokens_by_tier):
            total[tier] += tokens
        assert kv.resize(len(prompt) + 1)
        kv.commit(prompt[kv.num_committed_tokens :])
        kv.close()
        if check:
            manager.check()
    assert manager.stats().usable_tokens_by_tier == tuple(total)
    return tuple(total), manager.stats().usable_tokens


@settings(max_examples=300, deadline=None)
@given(
    prompts=branching_prompts,
    factor=st.integers(1, 3),
    more_blocks=st.integers(0, 10),
    lower=st.lists(st.integers(1, 15), min_size=1, max_size=2),
)
def test_hits_by_tier_of_any_trace_are_those_of_the_stack_distances(
    trace_of: TraceOf, prompts: list[list[int]], factor: int, more_blocks: int, lower: list[int]
) -> None:
    block = 2 * factor
    capacities = [max(map(len, prompts)) // block + more_blocks, *lower]
    trace = trace_of(prompts, 2)
    expected = tier_hits(stack_distances(trace, [block]), block, capacities)
    # the GPU has one page more than its stack, for the token that each request goes on with
    found, total = served(trace.with_block(block), block, [capacities[0] + 1, *lower])
    assert found == expected.hit_tokens
    assert total == sum(expected.hit_tokens)


def piece_of(trace: Trace, num_requests: int) -> Trace:
    """The first requests of a trace."""
    first = slice(num_requests)
    return replace(
        trace,
        arrival_ms=trace.arrival_ms[first],
        prompt_tokens=trace.prompt_tokens[first],
        output_tokens=trace.output_tokens[first],
        block_keys=trace.block_keys[: trace.offsets[num_requests]],
        offsets=trace.offsets[: num_requests + 1],
        partial_ids=trace.partial_ids[first],
    )


@pytest.mark.shared
@pytest.mark.parametrize("lower", [(3000,), (200, 3000), (1000, 100)])
def test_hits_by_tier_of_a_piece_of_the_conversation_trace(conversation: Trace, lower: tuple[int, ...]) -> None:
    piece = piece_of(conversation, 2000)
    capacity = int(piece.prompt_tokens.max()) // 512 + 300
    expected = tier_hits(stack_distances(piece, [512]), 512, [capacity, *lower])
    found, _ = served(piece, 512, [capacity + 1, *lower], check=False)
    assert found == expected.hit_tokens
    assert min(found) > 0
