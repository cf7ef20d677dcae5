"""Replays with host and disk tiers, against the grid's tiers, unlimited memory, and the memory's own counts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import (
    DiskCacheTierConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    KVCacheManagerConfig,
    SimulatedMemory,
)
from ssmcache.config import CacheTierConfig
from ssmcache.models import load_model
from ssmcache_sim import replay as replay_module
from ssmcache_sim.accounting import ReplayResult
from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.errors import MemoryTooSmallError, SettingsError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.grid import stack_distances
from ssmcache_sim.grid_tiers import tier_hits
from ssmcache_sim.replay import replay
from ssmcache_sim.results import per_request_columns
from ssmcache_sim.settings import build_config, make_settings
from ssmcache_sim.totals import ReplayTotals
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
TinyConfig = Callable[..., KVCacheManagerConfig]
GIB = 1 << 30
PIB = 1 << 50
# stretches of equal tokens: long shared prefixes that part anywhere
stretches = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 16)), min_size=1, max_size=4)
branching_prompts = st.lists(
    stretches.map(lambda parts: [token for token, length in parts for _ in range(length)]), min_size=1, max_size=30
)


def with_tiers(config: KVCacheManagerConfig, host_bytes: int, disk_bytes: int = 0) -> KVCacheManagerConfig:
    tiers: list[CacheTierConfig] = [config.cache_tiers[0]]
    if host_bytes:
        tiers.append(HostCacheTierConfig(host_bytes))
    if disk_bytes:
        tiers.append(DiskCacheTierConfig(disk_bytes, "nowhere"))
    return replace(config, cache_tiers=tuple(tiers))


def check_tiers(result: ReplayResult) -> None:
    """What must hold for every replay with several tiers."""
    totals = result.totals
    assert (result.usable_by_tier >= 0).all()
    assert np.array_equal(result.usable_by_tier.sum(axis=0), result.usable)
    assert [tier.usable_hit_tokens for tier in totals.tiers] == result.usable_by_tier.sum(axis=1).tolist()
    assert sum(tier.usable_hit_tokens for tier in totals.tiers) == totals.usable_hit_tokens
    assert totals.tiers[0].peaks == totals.peaks
    for tier in totals.tiers:
        for peak in tier.peaks:
            assert peak.pool_bytes is not None
            assert peak.peak_bytes <= peak.pool_bytes


@settings(max_examples=300, deadline=None)
@given(
    prompts=branching_prompts,
    block=st.integers(1, 4),
    more_pages=st.integers(0, 10),
    host_blocks=st.integers(0, 15),
    disk_blocks=st.integers(0, 15),
)
def test_hits_by_tier_of_attention_equal_the_grid_to_the_token(
    trace_of: TraceOf,
    tiny_config: TinyConfig,
    prompts: list[list[int]],
    block: int,
    more_pages: int,
    host_blocks: int,
    disk_blocks: int,
) -> None:
    largest = max(map(len, prompts)) // block
    gpu_blocks = largest + more_pages
    if host_blocks + disk_blocks == 0:
        host_blocks = 1
    trace = trace_of(prompts, block)
    config = with_tiers(tiny_config(block, num_pages=gpu_blocks + 1), host_blocks * block, disk_blocks * block)
    result = replay(trace, config)
    check_tiers(result)
    capacities = [gpu_blocks, *(count for count in (host_blocks, disk_blocks) if count)]
    expected = tier_hits(stack_distances(trace, [block]), block, capacities)
    assert tuple(tier.usable_hit_tokens for tier in result.totals.tiers) == expected.hit_tokens
    assert result.totals.lost_evicted_tokens == expected.lost_evicted_tokens


@pytest.mark.parametrize("prefill", ["reserved", "chunked"])
@pytest.mark.parametrize("model", ["nemotron-h-8b", "llama-3.1-8b", "mamba2-2.7b"])
def test_a_host_that_holds_everything_hits_the_ceiling_of_every_request(
    sample_path: Path, model: str, prefill: Any
) -> None:
    trace, spec = read_trace(sample_path), load_model(model)
    setting = make_settings(
        spec, 1024, ssm_reuse_interval=2048, gpu_memory_bytes=80 * GIB, host_memory_bytes=PIB, ssm_fraction=None
    )
    result = replay(trace, build_config(spec, setting), prefill=prefill)
    expected = infinite_cache(trace.with_block(1024), 2048 if spec.num_ssm_layers else None)
    check_tiers(result)
    assert result.totals.too_large_requests == 0
    assert np.array_equal(result.usable, expected.tokens)
    assert np.array_equal(result.attention, expected.kv_tokens)
    assert result.totals.tiers[1].usable_hit_tokens > 0


class CountingMemory(SimulatedMemory):
    """Remembers the memory that was opened last with more than one tier."""

    last: "CountingMemory"

    def open(self, tiers: Sequence[CacheTierConfig], slot_bytes: Sequence[int]) -> None:
        super().open(tiers, slot_bytes)
        if len(tiers) > 1:
            CountingMemory.last = self


@settings(max_examples=100, deadline=None)
@given(
    prompts=branching_prompts,
    more_pages=st.integers(0, 6),
    num_states=st.integers(2, 8),
    host_share=st.integers(1, 20),
    disk_share=st.integers(0, 20),
)
def test_moves_of_a_hybrid_are_those_that_the_memory_counted(
    trace_of: TraceOf,
    tiny_config: TinyConfig,
    prompts: list[list[int]],
    more_pages: int,
    num_states: int,
    host_share: int,
    disk_share: int,
) -> None:
    num_pages = max(map(len, prompts)) // 2 + 1 + more_pages
    config = tiny_config(2, num_pages=num_pages, interval=4, num_states=num_states)
    slot_bytes = sum(layer.buffers[0].size for layer in config.layers)
    config = with_tiers(config, host_share * slot_bytes, disk_share * slot_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay_module, "SimulatedMemory", CountingMemory)
        result = replay(trace_of(prompts, 2), config)
    check_tiers(result)
    memory, names = CountingMemory.last, ("gpu", "host", "disk")[: len(config.cache_tiers)]
    moved = result.totals.moved
    assert moved is not None
    for (source, source_name), (target, target_name) in product(enumerate(names), repeat=2):
        counted = memory.copied(source, target)
        of_direction = [each for each in moved if (each.source_tier, each.tier) == (source_name, target_name)]
        assert sum(each.num_slots for each in of_direction) == counted.num_slots
        assert sum(each.num_bytes for each in of_direction) == counted.num_bytes
    for each in moved:
        assert each.num_bytes == each.num_slots * config.layers[each.layer_group].buffers[0].size
        assert each.kind == ("attention", "ssm")[each.layer_group]


def test_full_blocks_alone_are_counted_on_the_tier_where_they_lay(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    first, second = [0] * 8, [1] * 8
    # a stack of 3 blocks on the GPU: after the second prompt the first block of the first one is the oldest there
    result = replay(trace_of([first, second, first, first], 4), with_tiers(tiny_config(4, num_pages=4), 100))
    assert result.usable.tolist() == [0, 0, 4, 4]
    assert result.usable_by_tier.tolist() == [[0, 0, 4, 4], [0, 0, 0, 0]]
    # a stack of 2: the whole first prompt went to the host
    result = replay(trace_of([first, second, first, first], 4), with_tiers(tiny_config(4, num_pages=3), 100))
    assert result.usable_by_tier.tolist() == [[0, 0, 0, 4], [0, 0, 4, 0]]


def test_a_model_without_attention_has_its_hits_where_the_state_lay(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    config = tiny_config(4, num_pages=8, interval=4, num_states=2)
    config = replace(config, layers=config.layers[1:], ssm_fraction=None)
    state = config.layers[0].buffers[0].size
    config = replace(config, cache_tiers=(GpuCacheTierConfig(2 * state), HostCacheTierConfig(2 * state)))
    first, second = [0] * 5, [1] * 5
    result = replay(trace_of([first, second, first, first], 4), config)
    assert result.usable_by_tier.tolist() == [[0, 0, 0, 0], [0, 0, 4, 4]]


def test_what_fits_is_a_matter_of_the_gpu_alone(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    long, short = [0] * 40, [0] * 9
    result = replay(trace_of([short, long, short], 4), with_tiers(tiny_config(4, num_pages=4), 1 << 20, 1 << 20))
    check_tiers(result)
    assert result.too_large.tolist() == [False, True, False]
    assert result.usable.tolist() == [0, 0, 8]
    with pytest.raises(MemoryTooSmallError, match="memory too small for every request: expected at least 12 bytes"):
        replay(trace_of([short], 4), with_tiers(tiny_config(4, num_pages=2), 1 << 20))


def test_with_the_gpu_alone_there_are_neither_tiers_nor_moves(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    result = replay(trace_of([[0] * 9] * 2, 4), tiny_config(4, num_pages=10, interval=4, num_states=5))
    assert (result.totals.tiers, result.totals.moved) == ((), ())
    assert result.usable_by_tier.tolist() == [result.usable.tolist()]
    assert not [name for name in per_request_columns(result) if name.endswith(("_gpu", "_host", "_disk"))]


def test_totals_with_tiers_come_back_from_json_and_sum_up(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    prompts = [[group] * 9 + [0] * group for group in (0, 1, 2, 0, 1, 2)]
    config = tiny_config(2, num_pages=7, interval=2, num_states=7)
    result = replay(trace_of(prompts, 2), with_tiers(config, 20 * config.cache_tiers[0].quota, 4000))
    published = result.totals.to_json()
    assert ReplayTotals.from_json(published) == result.totals
    assert [tier["tier"] for tier in published["tiers"]] == ["gpu", "host", "disk"]
    rates = sum(tier["usable_token_hit_rate"] for tier in published["tiers"])
    assert rates == pytest.approx(published["usable_token_hit_rate"])
    assert published["tiers"][1]["usable_hit_tokens"] > 0
    assert published["tiers"][1]["peak_bytes"].keys() == {"attention", "ssm", "total"}
    columns = per_request_columns(result)
    by_tier = [columns[f"usable_hit_tokens_{name}"] for name in ("gpu", "host", "disk")]
    assert np.array_equal(sum(by_tier), columns["usable_hit_tokens"])


@pytest.mark.parametrize(("tier", "name"), [({"host_memory_bytes": 1}, "host"), ({"disk_memory_bytes": 1}, "disk")])
def test_the_least_size_of_a_tier_named_by_the_error_is_enough_and_one_byte_less_is_not(
    sample_path: Path, tier: dict[str, Any], name: str
) -> None:
    trace, spec = read_trace(sample_path), load_model("nemotron-h-8b")
    least = 512 * spec.kv_bytes_per_token() + spec.snapshot_bytes()
    for size in (1, least - 1):
        setting = make_settings(spec, 512, gpu_memory_bytes=40 * GIB, **dict.fromkeys(tier, size))
        with pytest.raises(
            MemoryTooSmallError, match=rf"^{name} memory too small: expected at least {least} bytes .* got"
        ):
            replay(trace, build_config(spec, setting))
    setting = make_settings(spec, 512, gpu_memory_bytes=40 * GIB, **dict.fromkeys(tier, least))
    assert len(replay(trace, build_config(spec, setting)).totals.tiers) == 2


def test_tiers_that_could_never_be_used_are_one_line() -> None:
    spec = load_model("nemotron-h-8b")
    below = make_settings(spec, 512, gpu_memory_bytes=None, host_memory_bytes=GIB)
    with pytest.raises(SettingsError, match=r"^host memory: expected none below unlimited GPU memory, got 1 GiB$"):
        build_config(spec, below)
    without = make_settings(spec, 512, gpu_memory_bytes=GIB, disk_path="/data")
    with pytest.raises(
        SettingsError, match=r"^disk path: expected a size of the disk tier beside it, got '/data' alone"
    ):
        build_config(spec, without)
    disk = make_settings(spec, 512, gpu_memory_bytes=GIB, disk_memory_bytes=GIB, disk_path="/data")
    assert build_config(spec, disk).cache_tiers[1:] == (DiskCacheTierConfig(GIB, "/data"),)


@pytest.mark.shared
def test_tiers_of_the_conversation_trace_have_the_hits_of_the_grid(
    conversation: Trace, tiny_config: TinyConfig
) -> None:
    config = with_tiers(tiny_config(512, num_pages=1954), 7812 * 512, 9766 * 512)
    totals = replay(conversation, config).totals
    expected = tier_hits(stack_distances(conversation, [512]), 512, [1953, 7812, 9766]).hit_tokens
    assert tuple(tier.usable_hit_tokens for tier in totals.tiers) == expected
    assert expected[0] == 8_091_136  # 1 M tokens: a figure published for one tier
    assert totals.usable_hit_tokens == 43_093_504  # 10 M tokens
