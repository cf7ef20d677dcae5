"""From layers to layer groups and their pools: what lives and dies together, how many bytes one slot of it has, which
layer groups share a pool, and how many slots the bytes of a tier are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ssmcache.config import AttentionLayerConfig, BatchDesc, KVCacheDesc, KVCacheManagerConfig, LayerConfig
from ssmcache.pools import UNLIMITED_SLOTS
from ssmcache.utilization import Utilization
from ssmcache.windows import Window

DEFAULT_STEP = BatchDesc((KVCacheDesc(capacity=2048),))
# ssm_fraction is a float: let a count that is whole up to rounding be whole
_ROUNDING_SLOTS = 1e-6
# a buffer starts at a multiple of the largest of these that divides its size: 256 bytes are what kernels and copies ask
# for, 4 the largest element of KV and states. So a layer with one small buffer does not shift all those after it
_ALIGNMENTS = (256, 4, 2, 1)
_LEAST_PER_PADDING = 16  # bytes of a slot for each that is added to its end


class LayerGroupKind(Enum):
    ATTENTION = "attention"
    WINDOW = "window"
    SSM = "ssm"


@dataclass(frozen=True, slots=True)
class BufferPlace:
    """Where a buffer lies in each slot of its layer group: bytes `offset`..`offset + size - 1`, which kernels see as
    `num_pages` equal pages.
    """

    layer_id: int
    role: str
    offset: int
    size: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one life cycle. A slot holds one block's KV (attention) or one state (SSM) of all of them, each buffer
    aligned to its elements, and to 256 bytes if its size is a multiple of that.

    Layer groups whose slots are of one size share the pool `pool` of each tier: a slot of it is at one time a page of
    the one, at another a state of the other. States have a pool of their own where `ssm_fraction` says how large.
    """

    kind: LayerGroupKind
    layer_ids: tuple[int, ...]
    slot_bytes: int
    buffers: tuple[BufferPlace, ...]
    pool: int
    window_size: int | None = None
    num_sink_tokens: int = 0


def layer_groups(config: KVCacheManagerConfig) -> tuple[LayerGroup, ...]:
    """The layer groups of a model: full attention; each shape of sliding window, in the order of the layers; SSM."""
    by_life_cycle: dict[tuple[LayerGroupKind, int | None, int], list[LayerConfig]] = {}
    for layer in config.layers:
        if not isinstance(layer, AttentionLayerConfig):
            key: tuple[LayerGroupKind, int | None, int] = (LayerGroupKind.SSM, None, 0)
        elif layer.sliding_window_size is None:
            key = (LayerGroupKind.ATTENTION, None, 0)
        else:
            key = (LayerGroupKind.WINDOW, layer.sliding_window_size, layer.num_sink_tokens or 0)
        by_life_cycle.setdefault(key, []).append(layer)
    groups: list[LayerGroup] = []
    pools: dict[tuple[int, bool], int] = {}
    for wanted in LayerGroupKind:
        for (kind, window_size, num_sink_tokens), layers in by_life_cycle.items():
            if kind is wanted:
                buffers, slot_bytes = _places(layers, config.tokens_per_block)
                layer_ids = tuple(layer.layer_id for layer in layers)
                apart = kind is LayerGroupKind.SSM and config.ssm_fraction is not None
                pool = pools.setdefault((slot_bytes, apart), len(pools))
                groups.append(
                    LayerGroup(kind, layer_ids, slot_bytes, tuple(buffers), pool, window_size, num_sink_tokens)
                )
    return tuple(groups)


def pool_members(groups: Sequence[LayerGroup]) -> tuple[tuple[LayerGroup, ...], ...]:
    """The layer groups by the pool that they share, both in order."""
    num_pools = 1 + max(group.pool for group in groups)
    return tuple(tuple(group for group in groups if group.pool == pool) for pool in range(num_pools))


def _places(layers: Sequence[LayerConfig], tokens_per_block: int) -> tuple[list[BufferPlace], int]:
    """Where the buffers of a slot lie, and the bytes of the slot. What has the largest alignment comes first, so that
    nothing is lost between buffers; a slot is rounded up to the largest alignment for which that costs little.
    """
    buffers = [(layer.layer_id, buffer, _alignment_of(buffer.size)) for layer in layers for buffer in layer.buffers]
    offsets: dict[tuple[int, str], int] = {}
    end = 0
    for layer_id, buffer, _ in sorted(buffers, key=lambda entry: -entry[2]):
        offsets[layer_id, buffer.role] = end
        end += buffer.size
    places = [
        BufferPlace(
            layer_id, buffer.role, offsets[layer_id, buffer.role], buffer.size, buffer.pages_per_block(tokens_per_block)
        )
        for layer_id, buffer, _ in buffers
    ]
    largest = max(alignment for *_, alignment in buffers)
    rounded = (_round_up(end, alignment) for alignment in _ALIGNMENTS if alignment <= largest)
    return places, next(size for size in rounded if (size - end) * _LEAST_PER_PADDING <= end)


def _alignment_of(num_bytes: int) -> int:
    return next(alignment for alignment in _ALIGNMENTS if num_bytes % alignment == 0)


def _round_up(num_bytes: int, step: int) -> int:
    return -(-num_bytes // step) * step


def slots_of_batch(group: LayerGroup, batch: BatchDesc, tokens_per_block: int) -> tuple[int, list[int]]:
    """Slots that the sequences of a batch need while all are active: those that several share, pages of whole blocks of
    the system prompt, and for each the ones that it alone needs. Pages are needed up to the capacity, less those out of
    the window; of states, one each.
    """
    if group.kind is LayerGroupKind.SSM:
        return 0, [1] * len(batch.kv_caches)
    num_shared_blocks = batch.system_prompt_length // tokens_per_block
    users: dict[int, list[int]] = {}  # of each block of the system prompt: who needs it
    own = []
    for index, desc in enumerate(batch.kv_caches):
        num_blocks = -(-desc.capacity // tokens_per_block)
        first_stale = end_stale = num_blocks
        if group.window_size is not None:
            window = Window(group.window_size, group.num_sink_tokens, tokens_per_block)
            first_stale, end_stale = window.stale_blocks(desc.history_length)
        needed = (range(min(first_stale, num_blocks)), range(end_stale, num_blocks))
        own.append(sum(len(range(max(blocks.start, num_shared_blocks), blocks.stop)) for blocks in needed))
        for block in (block for blocks in needed for block in range(blocks.start, min(blocks.stop, num_shared_blocks))):
            users.setdefault(block, []).append(index)
    for alone in [indices[0] for indices in users.values() if len(indices) == 1]:
        own[alone] += 1
    return sum(len(indices) > 1 for indices in users.values()), own


def step_slots(group: LayerGroup, batch: BatchDesc, config: KVCacheManagerConfig) -> int:
    """Slots that the sequences of a typical step use at once, with the snapshots that they keep, each counted once."""
    num_shared, own = slots_of_batch(group, batch, config.tokens_per_block)
    slots = num_shared + sum(own)
    if group.kind is LayerGroupKind.SSM:
        interval, keeps_all = config.ssm_reuse_interval, config.admission == "every"
        num_shared_boundaries = batch.system_prompt_length // interval
        num_boundaries = [desc.capacity // interval for desc in batch.kv_caches]
        if keeps_all:
            slots += num_shared_boundaries + sum(count - num_shared_boundaries for count in num_boundaries)
        else:  # of its last one each, which is another's too if it lies in the system prompt
            slots += sum(count > num_shared_boundaries for count in num_boundaries)
            slots += 0 < num_shared_boundaries == min(num_boundaries)
    return slots


def floor_slots(members: Sequence[LayerGroup], config: KVCacheManagerConfig) -> int:
    """Slots of a pool that `constraints` guarantee: each batch fits, and the last of its sequences is let in by the
    resume gate while the others hold all that they need. At least one for each layer group.
    """
    floor, utilization = len(members), Utilization(config.max_util_for_resume)
    for batch in config.constraints:
        needs = [slots_of_batch(group, batch, config.tokens_per_block) for group in members]
        own = [sum(counts) for counts in zip(*(own for _, own in needs), strict=True)]
        total = sum(num_shared for num_shared, _ in needs) + sum(own)
        others = total - min(own) if len(own) > 1 else 0
        floor = max(floor, total, utilization.least_slots(others))
    return floor


def split_tier(
    groups: Sequence[LayerGroup],
    config: KVCacheManagerConfig,
    tier: int,
    quota: int | None,
    step: BatchDesc,
    grain: int,
) -> tuple[int, ...]:
    """Slots of the pool of each layer group within `quota` bytes of a tier, rounded up to its grain; layer groups that
    share one have all of its slots.

    The bytes are split as `step` uses them, or by `ssm_fraction`, but on the GPU no pool gets less than `constraints`
    ask for. Pools are rounded down to whole slots, and what they leave goes to the first.

    Errors: ValueError when the floors do not fit.
    """
    if quota is None:
        return (UNLIMITED_SLOTS,) * len(groups)
    pools = pool_members(groups)
    floors = [floor_slots(members, config) if tier == 0 else len(members) for members in pools]
    slot_bytes = [members[0].slot_bytes for members in pools]
    _check_floors(pools, floors, tier, quota, grain)
    quota = _round_up(quota, grain)
    weights: list[float] = [
        sum(step_slots(group, step, config) for group in members) * members[0].slot_bytes for members in pools
    ]
    if config.ssm_fraction is not None:
        weights = _weights_with_fraction(pools, weights, config.ssm_fraction)
    at_floor: set[int] = set()
    while True:
        slots = _split(slot_bytes, quota, weights, floors, at_floor, grain)
        below = {index for index, count in enumerate(slots) if count < floors[index]} - at_floor
        if not below:
            return tuple(slots[group.pool] for group in groups)
        at_floor |= below


Pools = Sequence[tuple[LayerGroup, ...]]


def _weights_with_fraction(pools: Pools, weights: list[float], fraction: float) -> list[float]:
    is_ssm = [members[0].kind is LayerGroupKind.SSM for members in pools]
    if not any(weight for weight, ssm in zip(weights, is_ssm, strict=True) if not ssm):
        # a step of windows that went stale: as many slots of each
        weights = [len(members) * members[0].slot_bytes for members in pools]
    others = sum(weight for weight, ssm in zip(weights, is_ssm, strict=True) if not ssm)
    return [fraction if ssm else (1 - fraction) * weight / others for weight, ssm in zip(weights, is_ssm, strict=True)]


def _split(
    slot_bytes: Sequence[int],
    quota: int,
    weights: Sequence[float],
    floors: list[int],
    at_floor: set[int],
    grain: int,
) -> list[int]:
    """One division of the quota where the pools of `at_floor` get just their floor, up to the grain."""
    slots = [0] * len(slot_bytes)
    rest = quota
    for index in at_floor:
        num_bytes = _round_up(floors[index] * slot_bytes[index], grain)
        slots[index] = num_bytes // slot_bytes[index]
        rest -= num_bytes
    shared = rest
    free = [index for index in range(len(slot_bytes)) if index not in at_floor]
    total = sum(weights[index] for index in free)
    for index in reversed(free[1:]):
        weight = weights[index]
        if isinstance(weight, int) and isinstance(total, int):
            slots[index] = shared * weight // (total * slot_bytes[index])
        else:
            slots[index] = int(shared * (weight / total) / slot_bytes[index] + _ROUNDING_SLOTS)
        num_bytes = _round_up(slots[index] * slot_bytes[index], grain)
        slots[index] = num_bytes // slot_bytes[index]
        rest -= num_bytes
    first = free[0] if free else 0
    slots[first] += max(0, rest) // slot_bytes[first]
    return slots


def _check_floors(pools: Pools, floors: list[int], tier: int, quota: int, grain: int) -> None:
    needed = sum(_round_up(floor * members[0].slot_bytes, grain) for members, floor in zip(pools, floors, strict=True))
    if needed > _round_up(quota, grain):
        counts = ", ".join(
            f"{floor} of {members[0].slot_bytes} bytes ({', '.join(group.kind.value for group in members)})"
            for members, floor in zip(pools, floors, strict=True)
        )
        name = ("GPU", "next", "last")[tier]
        raise ValueError(
            f"quota of the {name} tier: expected at least {needed} bytes for the slots that are needed, {counts}, "
            f"got {quota} bytes"
        )


def split_quota(groups: Sequence[LayerGroup], config: KVCacheManagerConfig) -> tuple[int, ...]:
    """`split_tier` for the GPU, by the settings alone. Errors: ValueError when the floors do not fit."""
    quota = config.cache_tiers[0].quota
    return split_tier(groups, config, 0, quota, config.typical_step or DEFAULT_STEP, 1)
