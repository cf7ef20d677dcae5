"""What a configuration refuses, in one line that says what, expected and got; and how a quota becomes slots."""

import pytest
from managers import PAGE_BYTES, STATE_BYTES, make_manager

from ssmcache import (
    AttentionLayerConfig,
    BatchDesc,
    BufferConfig,
    GpuCacheTierConfig,
    KVCacheDesc,
    KVCacheManager,
    KVCacheManagerConfig,
    SimulatedMemory,
    SsmLayerConfig,
)

ATTENTION = AttentionLayerConfig(0, (BufferConfig("key", 100),))
SSM = SsmLayerConfig(1, (BufferConfig("ssm_state", 1000),))


def config(layers, tokens_per_block=32, quota=10_000, **settings):
    return KVCacheManagerConfig(tokens_per_block, layers, [GpuCacheTierConfig(quota)], **settings)


def test_block_96_with_the_default_interval_is_fine_for_attention_only():
    assert config([ATTENTION], tokens_per_block=96).ssm_reuse_interval == 512


def test_block_96_with_the_default_interval_is_refused_with_an_ssm_layer():
    with pytest.raises(
        ValueError, match=r"ssm_reuse_interval: expected a multiple of tokens_per_block \(96\), got 512"
    ):
        config([ATTENTION, SSM], tokens_per_block=96)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: config([ATTENTION, SSM], ssm_reuse_interval=0),
            "ssm_reuse_interval: expected a positive integer, got 0",
        ),
        (lambda: config([SSM], ssm_reuse_interval=-64), "ssm_reuse_interval: expected a positive integer, got -64"),
        (lambda: config([SSM], enable_partial_reuse=True), "enable_partial_reuse: expected None or False with SSM"),
        (lambda: config([ATTENTION], tokens_per_block=0), "tokens_per_block: expected a positive integer, got 0"),
        (lambda: config([ATTENTION], tokens_per_block=True), "tokens_per_block: expected a positive integer, got True"),
        (lambda: config([ATTENTION], tokens_per_block=1.5), "tokens_per_block: expected a positive integer, got 1.5"),
        (lambda: config([]), "layers: expected at least one"),
        (lambda: config([ATTENTION, ATTENTION]), "layer ids: expected each id once"),
        (lambda: config([ATTENTION], quota=0), "quota of the GPU tier: expected a positive integer, got 0"),
        (lambda: config([ATTENTION], max_util_for_resume=0), "max_util_for_resume: expected above 0, at most 1, got 0"),
        (lambda: config([ATTENTION], max_util_for_resume=1.1), "max_util_for_resume"),
        (lambda: config([ATTENTION], ssm_fraction=0.5), "ssm_fraction: expected None without SSM layers, got 0.5"),
        (lambda: config([ATTENTION, SSM], ssm_fraction=0.0), "ssm_fraction: expected a share between 0 and 1, got 0.0"),
        (lambda: config([ATTENTION, SSM], ssm_fraction=1), "ssm_fraction: expected a share between 0 and 1, got 1"),
        (
            lambda: KVCacheManagerConfig(32, [ATTENTION], []),
            "cache_tiers: expected a GPU tier, then a host and a disk tier",
        ),
        (lambda: BufferConfig("key", 0), "size of buffer 'key': expected a positive integer, got 0"),
        (lambda: BufferConfig("", 1), "buffer role: expected a name, got ''"),
        (lambda: AttentionLayerConfig(3, ()), "buffers of layer 3: expected at least one"),
        (lambda: SsmLayerConfig(3, (BufferConfig("a", 1), BufferConfig("a", 2))), "buffer roles of layer 3"),
        (lambda: KVCacheDesc(0), "capacity of a KVCacheDesc"),
        (lambda: KVCacheDesc(5, 6), r"history_length of a KVCacheDesc: expected 0\.\.5, got 6"),
        (lambda: BatchDesc(()), "sequences of a BatchDesc: expected at least one"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def slots(**settings):
    manager = KVCacheManager(config([ATTENTION, SSM], **settings), SimulatedMemory())
    return tuple(pools[0].capacity for pools in manager.pools)


def test_without_a_typical_step_the_bytes_are_split_as_one_sequence_of_2048_tokens_uses_them():
    # 64 pages of 100 bytes, and 1 live state + 4 snapshots (interval 512) of 1,000 bytes: 6,400 to 5,000
    assert slots(quota=11_400) == (64, 5)
    assert slots(quota=114_000) == (640, 50)


def test_a_typical_step_sets_the_split_and_what_ssm_rounds_down_goes_to_pages():
    # 2 sequences of 320 tokens: 20 pages (2,000 bytes) and 2 states (2,000 bytes)
    step = BatchDesc((KVCacheDesc(320), KVCacheDesc(320, 100)))
    assert slots(quota=11_000, typical_step=step) == (60, 5)


def test_the_ssm_fraction_is_taken_as_given():
    assert slots(quota=10_000, ssm_fraction=0.5) == (50, 5)
    assert slots(quota=10_000, ssm_fraction=0.59) == (50, 5)
    assert slots(quota=3 * 100 + 7 * 1000, ssm_fraction=7000 / 7300) == (3, 7)


def test_exact_slot_counts_can_be_asked_for():
    for pages in (1, 2, 7, 1954, 19532):
        for states in (1, 3, 977, 9766):
            make_manager(pages, states)


@pytest.mark.parametrize(("quota", "fraction"), [(999, 0.5), (1050, 0.96)])
def test_a_quota_without_room_for_one_slot_of_each_group_is_refused(quota, fraction):
    with pytest.raises(ValueError, match=f"quota of the GPU tier: expected at least 1100 bytes .* got {quota} bytes"):
        slots(quota=quota, ssm_fraction=fraction)


def test_a_share_too_small_for_one_slot_still_gives_one():
    assert slots(quota=10_000, ssm_fraction=0.01) == (90, 1)
    assert slots(quota=1_100, ssm_fraction=0.999) == (1, 1)


def test_layers_of_a_kind_form_one_group_and_its_slot_holds_all_their_buffers():
    layers = [SSM, ATTENTION, AttentionLayerConfig(7, (BufferConfig("key", 5), BufferConfig("value", 6)))]
    manager = KVCacheManager(config(layers, quota=None), SimulatedMemory())
    assert manager.layer_grouping == ((0, 7), (1,))
    usage = manager.memory_usage()
    assert [(group.kind, group.slot_bytes, group.num_slots) for group in usage.groups] == [
        ("attention", 112, None),  # 60 + 40 + 5, a byte to align the next, 6
        ("ssm", 1000, None),
    ]
    assert manager.max_capacity is None
    assert manager.ssm_reuse_interval == 512


def test_the_capacity_of_one_sequence_is_all_pages():
    assert make_manager(10, 3, block=32).max_capacity == 320
    assert make_manager(10, 0, block=32).max_capacity == 320


def test_the_memory_is_told_of_every_pool_and_counts_its_bytes():
    manager = make_manager(10, 3)
    assert manager.memory.bytes_in_use == 10 * PAGE_BYTES + 3 * STATE_BYTES
    manager.shutdown()
    manager.shutdown()
    assert manager.memory.bytes_in_use == 0
