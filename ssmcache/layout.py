"""From layers to layer groups: what lives and dies together, and how many bytes one slot of it has."""

from dataclasses import dataclass
from enum import Enum

from ssmcache.config import (
    AttentionLayerConfig,
    BatchDesc,
    KVCacheDesc,
    KVCacheManagerConfig,
    SsmLayerConfig,
)
from ssmcache.pools import UNLIMITED_SLOTS

_DEFAULT_STEP = BatchDesc((KVCacheDesc(capacity=2048),))
# ssm_fraction is a float: let a count that is whole up to rounding be whole
_ROUNDING_SLOTS = 1e-6


class LayerGroupKind(Enum):
    ATTENTION = "attention"
    SSM = "ssm"


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one life cycle. A slot holds one block's KV (attention) or one state (SSM) of all of them."""

    kind: LayerGroupKind
    layer_ids: tuple[int, ...]
    slot_bytes: int


def layer_groups(config: KVCacheManagerConfig) -> tuple[LayerGroup, ...]:
    """The layer groups of a model: all full attention layers, then all SSM layers, as far as there are any."""
    groups = []
    for kind, layer_type in (
        (LayerGroupKind.ATTENTION, AttentionLayerConfig),
        (LayerGroupKind.SSM, SsmLayerConfig),
    ):
        layers = [layer for layer in config.layers if isinstance(layer, layer_type)]
        if layers:
            slot_bytes = sum(buffer.size for layer in layers for buffer in layer.buffers)
            groups.append(LayerGroup(kind, tuple(layer.layer_id for layer in layers), slot_bytes))
    return tuple(groups)


def slots_of_batch(group: LayerGroup, batch: BatchDesc, config: KVCacheManagerConfig) -> int:
    """Slots that the sequences of a batch use at once: pages up to the capacity, or a live state and the
    snapshots of the interval.
    """
    if group.kind is LayerGroupKind.ATTENTION:
        return sum(-(-desc.capacity // config.tokens_per_block) for desc in batch.kv_caches)
    return sum(1 + desc.capacity // config.ssm_reuse_interval for desc in batch.kv_caches)


def split_quota(groups: tuple[LayerGroup, ...], config: KVCacheManagerConfig) -> tuple[int, ...]:
    """Slots of each layer group within the quota of the GPU tier.

    The bytes are split as `typical_step` uses them, or by `ssm_fraction`; SSM slots are rounded down, and what they
    leave goes to pages.

    Errors: ValueError when a group would get no slot at all.
    """
    quota = config.cache_tiers[0].quota
    if quota is None:
        return (UNLIMITED_SLOTS,) * len(groups)
    step = config.typical_step or _DEFAULT_STEP
    step_bytes = [slots_of_batch(group, step, config) * group.slot_bytes for group in groups]
    num_slots = [0] * len(groups)
    rest = quota
    for index in reversed(range(len(groups))):
        group = groups[index]
        if index == 0:
            num_slots[index] = rest // group.slot_bytes
        elif config.ssm_fraction is None:
            num_slots[index] = quota * step_bytes[index] // (sum(step_bytes) * group.slot_bytes)
        else:
            num_slots[index] = int(quota * config.ssm_fraction / group.slot_bytes + _ROUNDING_SLOTS)
        rest -= num_slots[index] * group.slot_bytes
    for group, count in zip(groups, num_slots, strict=True):
        if count < 1:
            what = "page of one block" if group.kind is LayerGroupKind.ATTENTION else "SSM state"
            raise ValueError(
                f"quota of the GPU tier: expected room for at least one {what} ({group.slot_bytes} bytes) within the "
                f"share of its layer group, got {quota} bytes"
            )
    return tuple(num_slots)
