"""Traces on a GPU: the payload's kernels, and what a trace shows of the memory below them."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpu_runner import LATE_CYCLES  # noqa: E402

from ssmcache import (  # noqa: E402
    AttentionLayerConfig,
    BufferConfig,
    DiskCacheTierConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    KVCacheManagerConfig,
    SsmLayerConfig,
)
from ssmcache.memory.base import SlotMoves  # noqa: E402
from ssmcache.memory.cuda import CudaMemory  # noqa: E402
from ssmcache_sim.payload import Pages, PayloadBuffer, Recurrence, block_seeds  # noqa: E402
from ssmcache_sim.payload_host import HostKernels  # noqa: E402
from ssmcache_sim.real_memory import RealMemory  # noqa: E402
from ssmcache_sim.trace import Trace, offsets_of  # noqa: E402
from ssmcache_sim.verify import Verification, verify  # noqa: E402

BLOCK = 4


class Tight(CudaMemory):
    """Pools of as many slots as were asked for, so that they run full; copies are late if told, or go wrong."""

    late = False
    lost: tuple[int, int] | None = None
    waits = True

    def grain(self, tier: int) -> int:
        return 1

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        if self.late:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(LATE_CYCLES)
        if (moves.source_tier, moves.destination_tier) != self.lost:
            super().copy(moves, stream)

    def wait(self, stream: Any, event: Any) -> None:
        if self.waits:
            super().wait(stream, event)


def trace_at_random(seed: int, count: int = 120, longest: int = 40) -> Trace:
    random = Random(seed)
    prompts: list[list[int]] = []
    for _ in range(count):
        start = random.choice(prompts)[: random.randint(0, longest)] if prompts else []
        prompts.append((start + [random.randint(0, 2) for _ in range(random.randint(1, longest // 2))])[:longest])
    return trace_of(prompts)


def trace_of(prompts: list[list[int]]) -> Trace:
    known: dict[tuple[int, ...], int] = {}
    keys: list[int] = []
    for prompt in prompts:
        keys += [known.setdefault(tuple(prompt[:end]), len(known)) for end in range(BLOCK, len(prompt) + 1, BLOCK)]
    lengths = np.array([len(prompt) for prompt in prompts])
    count = len(prompts)
    return Trace(
        "prompts", "", BLOCK, np.arange(count, dtype=np.float64), lengths, np.ones(count, dtype=np.int64),
        np.array(keys, dtype=np.int64), offsets_of(lengths // BLOCK), np.full(count, -1), len(known),
    )  # fmt: skip


def config_of(path: Path, *slots: int, full: bool = True, window: int | None = None, ssm: bool = True) -> Any:
    layers: list[AttentionLayerConfig | SsmLayerConfig] = []
    if full:
        layers.append(AttentionLayerConfig(0, (BufferConfig("key", 64 * BLOCK), BufferConfig("value", 32 * BLOCK))))
    if window:
        layers.append(AttentionLayerConfig(1, (BufferConfig("kv", 96 * BLOCK),), window, 1))
    if ssm:
        layers.append(SsmLayerConfig(2, (BufferConfig("ssm_state", 320), BufferConfig("conv_state", 64))))
    num_groups = full + bool(window) + ssm
    kinds: Any = (GpuCacheTierConfig, HostCacheTierConfig, lambda quota: DiskCacheTierConfig(quota, str(path)))
    tiers = [kind(384 * num_groups * count) for kind, count in zip(kinds, slots, strict=False)]
    share = 1 / num_groups if ssm else None
    return KVCacheManagerConfig(BLOCK, layers, tiers, ssm_reuse_interval=8, ssm_fraction=share)


def verified(
    trace: Trace, config: Any, memory: CudaMemory, prefill: Any = "reserved", late_kernels: bool = False
) -> Verification:
    from ssmcache_sim.payload_cuda import CudaKernels

    class LateKernels(CudaKernels):
        def write_pages(self, *arguments: Any) -> None:
            torch.cuda._sleep(40 * LATE_CYCLES)  # longer than the host needs for the next request
            super().write_pages(*arguments)

    make = LateKernels if late_kernels else CudaKernels
    streams = tuple(torch.cuda.Stream() for _ in range(4))
    try:
        return verify(
            trace, config, RealMemory("", memory, streams, lambda *sizes: make(memory.device, *sizes)),
            prefill=prefill,
        )  # fmt: skip
    finally:
        memory.close()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("slots", [(16,), (14, 6), (13, 4, 12)])
@pytest.mark.parametrize(
    ("model", "prefill"),
    [
        ({}, "reserved"),
        ({}, "chunked"),
        ({"ssm": False}, "reserved"),
        ({"full": False}, "reserved"),
        ({"window": 6}, "chunked"),
    ],
)
def test_random_traces_pass(tmp_path: Path, slots: Any, model: Any, prefill: Any, late: bool) -> None:
    memory = Tight()
    memory.late = late
    answer = verified(trace_at_random(len(slots)), config_of(tmp_path, *slots, **model), memory, prefill)
    assert answer.passed, answer
    assert answer.payload.checked_bytes > 0


@pytest.mark.parametrize("lost", [(0, 0), (0, 1), (1, 0)])
def test_copies_that_are_not_made_are_found(tmp_path: Path, lost: tuple[int, int]) -> None:
    memory = Tight()
    memory.lost = lost
    answer = verified(trace_at_random(3), config_of(tmp_path, 13, 12), memory)
    assert answer.difference is None
    assert answer.payload.wrong_bytes > 0
    assert answer.payload.first is not None


@pytest.mark.parametrize("waits", [True, False])
def test_streams_that_do_not_wait_for_late_kernels_are_found(tmp_path: Path, waits: bool) -> None:
    """Half of the requests go on with what the one before computes, on another stream."""
    random = Random(4)
    prompts = [[random.randint(0, 9) for _ in range(13)] for _ in range(40)]
    memory = Tight()
    memory.waits = waits
    trace = trace_of([prompt for prompt in prompts for _ in range(2)])
    answer = verified(trace, config_of(tmp_path, 13, 12), memory, late_kernels=True)
    assert answer.difference is None
    assert (answer.payload.wrong_bytes > 0) == (not waits)


@pytest.mark.parametrize(("tokens_per_block", "words"), [(4, 3), (16, 1), (512, 32)])
def test_the_kernels_write_what_numpy_does(tokens_per_block: int, words: int) -> None:
    from ssmcache_sim.payload_cuda import CudaKernels

    num_slots, num_tokens = 9, 5 * tokens_per_block - 1
    keys = np.array([2**40, 0, 77, 5], dtype=np.int64)
    slots = np.array([8, -1, 0, 3, 5], dtype=np.int32)
    pages = Pages(slots, block_seeds(keys, num_tokens, tokens_per_block, request=6))
    host, cuda = HostKernels(2, 1), CudaKernels(torch.device("cuda", 0), 2, 1)
    view = np.full((num_slots, tokens_per_block, words), 0xA5, dtype=np.uint64)
    on_host = PayloadBuffer(0, "", words, 2**63 + 12345, view)
    on_gpu = PayloadBuffer(0, "", words, 2**63 + 12345, torch.from_numpy(view.view(np.int64).copy()).cuda())
    uploaded = cuda.upload(pages)
    host.write_pages(on_host, pages, 3, num_tokens)
    cuda.write_pages(on_gpu, uploaded, 3, num_tokens)
    assert (on_gpu.view.cpu().numpy().view(np.uint64) == view).all()
    for byte in (view.view(np.uint8), on_gpu.view.view(torch.uint8)):
        byte[0, 2, 1] ^= 3
        byte[8, 3, 7] ^= 128
        byte[8, 2, 0] ^= 1  # of a token that is not looked at
    host.check_pages(on_host, pages, 3, num_tokens, request=1)
    cuda.check_pages(on_gpu, uploaded, 3, num_tokens, request=1)
    assert host.wrong_bytes().tolist() == cuda.wrong_bytes().tolist() == [[0], [2]]


@pytest.mark.parametrize("words", [1, 5, 3000])
def test_states_are_those_of_numpy(words: int) -> None:
    from ssmcache_sim.payload_cuda import CudaKernels

    view = np.full((6, words), 0xA5, dtype=np.uint64)
    on_host = PayloadBuffer(0, "", words, 17, view)
    on_gpu = PayloadBuffer(0, "", words, 17, torch.from_numpy(view.view(np.int64).copy()).cuda())
    host, cuda = HostKernels(1, 1), CudaKernels(torch.device("cuda", 0), 1, 1)
    recurrence, tokens = Recurrence(100), np.arange(2**63, 2**63 + 100, dtype=np.uint64)
    steps = [recurrence.step(tokens[:60]), recurrence.step(tokens[60:])]
    for kernels, buffer in ((host, on_host), (cuda, on_gpu)):
        kernels.write_states(buffer, 4, True, steps, [2, 4])
        kernels.write_states(buffer, 2, False, steps[1:], [5])
        kernels.check_state(buffer, 4, recurrence.step(tokens).addend, 0)
        kernels.check_state(buffer, 5, recurrence.step(tokens).addend, 0)
    assert (on_gpu.view.cpu().numpy().view(np.uint64) == view).all()
    assert host.wrong_bytes().sum() == cuda.wrong_bytes().sum() == 0
    cuda.check_state(on_gpu, 4, 1, 0)
    host.check_state(on_host, 4, 1, 0)
    assert host.wrong_bytes().tolist() == cuda.wrong_bytes().tolist()
