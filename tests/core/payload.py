"""A model runner for tests: it writes into every page and state what it computes there, in real bytes, and checks all
that it reuses. Whatever happens between, a page of block b must hold the tokens up to the end of b.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from random import Random

import numpy as np

from ssmcache import (
    AttentionLayerConfig,
    BatchDesc,
    BufferConfig,
    DiskCacheTierConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    HostMemory,
    KVCache,
    KVCacheDesc,
    KVCacheManager,
    KVCacheManagerConfig,
    KVCacheStatus,
    ReuseScope,
    SsmLayerConfig,
)
from ssmcache.memory.base import Memory

BYTES = 16
SCOPE = ReuseScope()


def digest(*parts: Hashable) -> np.ndarray:
    """64 bytes that only these parts have."""
    seed = np.random.SeedSequence([abs(hash(part)) % 2**63 for part in parts])
    return np.frombuffer(seed.generate_state(4 * BYTES // 4, np.uint32).tobytes(), dtype=np.uint8)


@dataclass(frozen=True)
class Shape:
    """A model and its memory, in slots of each layer group by tier. `windows`: (window, sinks) in tokens. `shared`:
    slots of all layer groups are of one size, and so of one pool.
    """

    block: int = 2
    full: bool = True
    windows: tuple[tuple[int, int], ...] = ()
    ssm: bool = False
    interval: int = 4
    slots: tuple[int, ...] = (12, 12)
    partly: bool | None = None
    max_util: float = 0.97
    shared: bool = False


def make_config(shape: Shape, path: str, **settings: object) -> KVCacheManagerConfig:
    layers: list[AttentionLayerConfig | SsmLayerConfig] = []
    if shape.full:
        layers.append(AttentionLayerConfig(0, (BufferConfig("key", BYTES), BufferConfig("value", BYTES))))
    for index, (window, sinks) in enumerate(shape.windows):
        more = 0 if shape.shared else 4 + 4 * index
        layers.append(AttentionLayerConfig(10 + index, (BufferConfig("kv", 2 * BYTES + more),), window, sinks))
    if shape.ssm:
        buffers = [BufferConfig("ssm_state", BYTES), BufferConfig("conv_state", BYTES)]
        layers.append(SsmLayerConfig(20, buffers if shape.shared else [*buffers, BufferConfig("more", 12)]))
    slot_bytes = sum(buffer.size for layer in layers for buffer in layer.buffers)
    kinds = (GpuCacheTierConfig, HostCacheTierConfig, lambda quota: DiskCacheTierConfig(quota, path))
    tiers = [kind(slot_bytes * slots) for kind, slots in zip(kinds, shape.slots, strict=False)]
    # as many slots for each layer group: windows as long as a sequence, and a snapshot at every block
    step = BatchDesc((KVCacheDesc(1),))
    return KVCacheManagerConfig(
        tokens_per_block=shape.block,
        layers=layers,
        cache_tiers=tiers,
        ssm_reuse_interval=shape.interval,
        enable_partial_reuse=shape.partly,
        max_util_for_resume=shape.max_util,
        typical_step=step,
        **settings,
    )


@dataclass(eq=False)
class Request:
    """A sequence, its tokens, and how many of them are computed."""

    kv: KVCache
    tokens: list[int]
    scope: ReuseScope
    computed: int = 0
    states: dict[int, int] = field(default_factory=dict)


class Runner:
    """Makes calls and plays the kernels; every method checks what it reads."""

    def __init__(self, shape: Shape, path: str = ".", memory: Memory | None = None, **settings: object) -> None:
        self.shape = shape
        self.manager = KVCacheManager(make_config(shape, path, **settings), memory or HostMemory())
        self.requests: list[Request] = []
        self.num_checked = self.num_refused = 0

    def stream_of(self, request: Request) -> Hashable:
        """The stream that a request computes on."""
        return None

    # -- what lies where ---------------------------------------------------------------------------------------------

    def page(self, request: Request, layer: int, role: str, block: int, end: int) -> np.ndarray:
        """What a page must hold in the place of token `end - 1`."""
        return digest(layer, role, block, end, hash((request.scope, tuple(request.tokens[:end]))))

    def layers(self) -> list[tuple[int, int, str]]:
        """(layer group, layer, role) of every buffer of attention."""
        return [
            (group, place.layer_id, place.role)
            for group, layer_group in enumerate(self.manager.groups)
            for place in layer_group.buffers
            if layer_group.kind.value != "ssm"
        ]

    def check_pages(self, request: Request, end: int) -> None:
        """Every page that attention would read after `end` tokens holds their KV."""
        block = self.shape.block
        for group, layer, role in self.layers():
            indices = request.kv.page_indices(group)
            buffer = self.manager.buffer(layer, role)
            layer_group = self.manager.groups[group]
            for b in range(-(-end // block)):
                if layer_group.window_size is not None:
                    sinks = -(-layer_group.num_sink_tokens // block)
                    seen = b < sinks or (b + 1) * block > end + 1 - layer_group.window_size
                    if not seen:
                        continue
                assert indices[b] >= 0, f"layer {layer}: block {b} of {end} tokens has no page"
                written = min(end, (b + 1) * block)
                found = buffer[indices[b]]
                size = buffer.shape[1] // block
                for token in range(b * block, written):
                    place = token - b * block
                    expected = self.page(request, layer, role, b, token + 1)[:size]
                    assert (found[place * size : (place + 1) * size] == expected).all(), (
                        f"layer {layer} {role}: token {token} of block {b} holds something else"
                    )
                    self.num_checked += 1

    def write_pages(self, request: Request, start: int, end: int) -> None:
        block = self.shape.block
        for group, layer, role in self.layers():
            indices = request.kv.page_indices(group)
            buffer = self.manager.buffer(layer, role)
            size = buffer.shape[1] // block
            for token in range(start, end):
                b, place = divmod(token, block)
                if indices[b] >= 0:
                    value = self.page(request, layer, role, b, token + 1)[:size]
                    buffer[indices[b], place * size : (place + 1) * size] = value

    def state(self, request: Request, end: int) -> np.ndarray:
        return digest("state", end, hash((request.scope, tuple(request.tokens[:end]))))

    def check_state(self, request: Request, end: int) -> None:
        if self.shape.ssm and end:
            slot = request.kv.ssm_slot(self.manager.state_group)
            for role in ("ssm_state", "conv_state"):
                assert (self.manager.buffer(20, role)[slot] == self.state(request, end)[:BYTES]).all(), (
                    f"state after {end}"
                )
                self.num_checked += 1

    def write_state(self, request: Request, slot: int, end: int) -> None:
        for role in ("ssm_state", "conv_state"):
            self.manager.buffer(20, role)[slot] = self.state(request, end)[:BYTES]

    # -- calls -------------------------------------------------------------------------------------------------------

    def create(self, tokens: list[int], scope: ReuseScope = SCOPE, **options: object) -> Request:
        kv = self.manager.create_kv_cache(tokens[:-1], scope, **options)
        request = Request(kv, tokens, scope)
        self.requests.append(request)
        return request

    def resume(self, request: Request) -> bool:
        first = request.kv.history_length == request.computed == 0 or not request.kv.locked
        granted = request.kv.resume(self.stream_of(request))
        self.num_refused += not granted
        if granted:
            if first:
                request.computed = request.kv.num_committed_tokens
            self.check_pages(request, request.computed)
            self.check_state(request, request.computed)
        return granted

    def compute(self, request: Request, end: int, reserve: bool) -> bool:
        """Make room up to `end`, compute and commit; False if there is no room."""
        kv = request.kv
        if not kv.resize(max(end, kv.capacity), kv.history_length):
            self.num_refused += 1
            return False
        self.check_pages(request, request.computed)
        points = list(kv.snapshot_points(end)) if reserve else []
        slots = kv.reserve_snapshots(points)
        self.write_pages(request, max(request.computed, kv.num_attention_tokens), end)
        if self.shape.ssm:
            for point, slot in slots.items():
                self.write_state(request, slot, point)
            self.write_state(request, kv.ssm_slot(self.manager.state_group), end)
        kv.commit(request.tokens[request.computed : end])
        request.computed = end
        self.check_pages(request, end)
        self.check_state(request, end)
        return True

    def suspend(self, request: Request) -> None:
        request.kv.suspend()

    def close(self, request: Request) -> None:
        request.kv.close()
        self.requests.remove(request)

    def finish(self) -> None:
        for request in list(self.requests):
            self.close(request)
            self.manager.check()
        self.manager.clear_reusable_blocks()
        self.manager.check()
        for usage in (usage for tier in self.manager.memory_usage().tiers for usage in tier):
            assert usage.used_slots == 0, f"a slot leaked: {usage}"
        self.manager.shutdown()


def random_text(random: Random, known: list[list[int]], longest: int) -> list[int]:
    """A text that begins like a known one, more often than not."""
    start = random.choice(known)[: random.randint(0, longest)] if known else []
    text = start + [random.randint(0, 1)] * random.randint(1, longest // 2) + [random.randint(0, 2)]
    known.append(text)
    return text


def run_at_random(runner: Runner, random: Random, num_steps: int, longest: int = 16, max_open: int = 5) -> None:
    """Calls in any order that is allowed, every invariant checked after each."""
    known: list[list[int]] = []
    scopes = (ReuseScope(), ReuseScope(), ReuseScope(salt=0))
    for _ in range(num_steps):
        active = [r for r in runner.requests if r.kv.status is KVCacheStatus.ACTIVE]
        suspended = [r for r in runner.requests if r.kv.status is KVCacheStatus.SUSPENDED]
        action = random.random()
        if action < 0.2 and len(runner.requests) < max_open:
            runner.create(random_text(random, known, longest), random.choice(scopes))
        elif action < 0.45 and suspended:
            runner.resume(random.choice(suspended))
        elif action < 0.75 and active:
            request = random.choice(active)
            left = len(request.tokens) - request.computed
            if left > 0:
                runner.compute(request, request.computed + random.randint(1, left), random.random() < 0.5)
        elif action < 0.85 and active:
            runner.suspend(random.choice(active))
        elif action < 0.9 and suspended:
            request = random.choice(suspended)
            request.kv.prefetch(random.randrange(len(runner.manager.tier_names)))
        elif runner.requests:
            runner.close(random.choice(runner.requests))
        runner.manager.check()
    runner.finish()
