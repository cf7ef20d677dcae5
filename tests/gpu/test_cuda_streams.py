"""Whoever reads or writes a slot waits for those who used it before, on whatever stream. Each case is also run with the
waits taken out, and must fail then: so it is the wait that makes it pass, not luck.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from ssmcache import (  # noqa: E402
    AttentionLayerConfig,
    BufferConfig,
    DiskCacheTierConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    KVCacheManager,
    KVCacheManagerConfig,
    SsmLayerConfig,
)
from ssmcache.memory.base import SlotMoves  # noqa: E402
from ssmcache.memory.cuda import CudaMemory  # noqa: E402

GPU, HOST, DISK = 0, 1, 2
SLOT = 64 << 10
BLOCK = 4
LONG_CYCLES = 400_000_000  # a fifth of a second and more
VERY_LONG_CYCLES = 10 * LONG_CYCLES

both_ways = pytest.mark.parametrize("waits", [True, False], ids=["as it is", "without waits"])


class Streams(CudaMemory):
    """A memory of pools as small as they are asked to be, whose waits can be taken out."""

    waits = True

    def grain(self, tier: int) -> int:
        return 1

    def wait(self, stream: Any, event: Any) -> None:
        if self.waits:
            super().wait(stream, event)


@pytest.fixture
def streams() -> Iterator[tuple[Any, Any]]:
    yield torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()


def warmed_up(memory: CudaMemory, num_tiers: int) -> None:
    """Load every kernel that a case uses: loading one waits for the device, which would hide a missing wait."""
    view = memory.view(0)
    index = torch.tensor([0, 1], device="cuda")
    for tier in range(num_tiers):
        memory.copy(SlotMoves(0, GPU, [0, 1], tier, [2, 3]), None)
        memory.copy(SlotMoves(0, tier, [2, 3], GPU, [0, 1]), None)
        memory.copy(SlotMoves(0, GPU, [0], tier, [3]), None)
        memory.copy(SlotMoves(0, tier, [3], GPU, [0]), None)
    view[index].clone()
    view[index] = 1
    view[0].fill_(1)
    torch.cuda._sleep(10)
    view.zero_()
    torch.cuda.synchronize()


def values(rows: Any) -> list[int]:
    """The byte that each row is full of; -1 for mixed ones."""
    found = rows.cpu()
    return [int(row[0]) if bool((row == row[0]).all()) else -1 for row in found]


# -- the memory alone ------------------------------------------------------------------------------------------------


def small_memory(path: Path) -> Streams:
    memory = Streams()
    memory.open([GpuCacheTierConfig(1), HostCacheTierConfig(1), DiskCacheTierConfig(1, str(path))], [SLOT])
    for tier in (GPU, HOST, DISK):
        assert memory.resize(tier, [8])
    warmed_up(memory, 3)
    return memory


@both_ways
@pytest.mark.parametrize("tier", [GPU, HOST])
def test_what_one_stream_writes_late_another_reads_after_its_event(
    streams: tuple[Any, Any], waits: bool, tier: int, tmp_path: Path
) -> None:
    first, second = streams
    memory = small_memory(tmp_path)
    memory.waits = waits
    view = memory.view(0)
    for slot in (4, 5):
        view[slot].fill_(7)
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(LONG_CYCLES)
        memory.copy(SlotMoves(0, GPU, [4, 5], tier, [6, 7]), first)
        if tier != GPU:
            memory.copy(SlotMoves(0, tier, [6, 7], GPU, [6, 7]), first)
    memory.wait(second, memory.record(first))
    with torch.cuda.stream(second):
        found = view[6:8].clone()
    torch.cuda.synchronize()
    assert (values(found) == [7, 7]) is waits
    memory.close()


@both_ways
@pytest.mark.parametrize("tier", [GPU, HOST, DISK])
def test_a_slot_that_a_late_copy_reads_is_overwritten_after_its_event(
    streams: tuple[Any, Any], waits: bool, tier: int, tmp_path: Path
) -> None:
    first, second = streams
    memory = small_memory(tmp_path)
    memory.waits = waits
    view = memory.view(0)
    for slot in (4, 5):
        view[slot].fill_(7)
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(LONG_CYCLES)
    memory.copy(SlotMoves(0, GPU, [4, 5], tier, [6, 7]), first)
    memory.wait(second, memory.record(first))
    with torch.cuda.stream(second):
        for slot in (4, 5):
            view[slot].fill_(9)
    torch.cuda.synchronize()
    memory.copy(SlotMoves(0, tier, [6, 7], GPU, [0, 1]), None)
    assert (values(view[0:2]) == [7, 7]) is waits
    memory.close()


def test_what_is_queued_later_on_the_same_stream_comes_later(streams: tuple[Any, Any], tmp_path: Path) -> None:
    memory = small_memory(tmp_path)
    view = memory.view(0)
    for stream in (streams[0], None):
        with torch.cuda.stream(stream) if stream else torch.cuda.stream(torch.cuda.default_stream()):
            view.zero_()
            torch.cuda._sleep(LONG_CYCLES)
            view[1].fill_(5)
            view[2].fill_(6)
            memory.copy(SlotMoves(0, GPU, [1, 2], HOST, [1, 2]), stream)
            view[1].fill_(50)
            memory.copy(SlotMoves(0, HOST, [1, 2], HOST, [3, 4]), stream)
            memory.copy(SlotMoves(0, HOST, [3], GPU, [3]), stream)
            memory.copy(SlotMoves(0, HOST, [3, 4], DISK, [3, 4]), stream)
            memory.copy(SlotMoves(0, GPU, [1, 1], HOST, [3, 4]), stream)
            memory.copy(SlotMoves(0, DISK, [4, 3], GPU, [4, 5]), stream)
            memory.copy(SlotMoves(0, HOST, [3, 4], GPU, [6, 7]), stream)
            assert values(view) == [0, 50, 6, 5, 6, 5, 50, 50]
    memory.close()


# -- the manager -----------------------------------------------------------------------------------------------------


def small_manager(num_slots: int, ssm: bool = False) -> tuple[KVCacheManager, Streams]:
    memory = Streams()
    layers: list[Any] = [AttentionLayerConfig(0, (BufferConfig("kv", SLOT),))]
    if ssm:
        layers = [SsmLayerConfig(0, (BufferConfig("kv", SLOT),))]
    config = KVCacheManagerConfig(BLOCK, layers, [GpuCacheTierConfig(num_slots * SLOT)], ssm_reuse_interval=BLOCK)
    manager = KVCacheManager(config, memory)
    assert len(memory.view(0)) == num_slots
    if num_slots >= 4:
        warmed_up(memory, 1)
    return manager, memory


def started(manager: KVCacheManager, prompt: list[int], stream: Any, known: int) -> tuple[Any, Any]:
    """A sequence on a stream that reuses so many tokens, and the slots of its blocks as a tensor."""
    sequence = manager.create_kv_cache(prompt)
    assert sequence.resume(stream)
    assert sequence.num_committed_tokens == known
    assert sequence.resize(len(prompt))
    slots = sequence.page_indices(0)[: len(prompt) // BLOCK]
    return sequence, torch.tensor(np_list(slots), device="cuda")


def np_list(slots: Any) -> list[int]:
    found = [int(slot) for slot in slots]
    assert min(found) >= 0
    return found


@both_ways
def test_a_page_that_is_written_late_is_reused_on_another_stream(streams: tuple[Any, Any], waits: bool) -> None:
    first, second = streams
    manager, memory = small_manager(8)
    memory.waits = waits
    prompt = list(range(3 * BLOCK))
    writer, slots = started(manager, prompt, first, 0)
    places = slots.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(LONG_CYCLES)
        memory.view(0).index_fill_(0, places, 5)
    writer.commit(prompt)
    writer.close()
    reader = manager.create_kv_cache(prompt)
    assert reader.resume(second)
    assert reader.num_committed_tokens == 3 * BLOCK
    with torch.cuda.stream(second):
        found = memory.view(0).index_select(0, places)
    second.synchronize()
    assert (values(found) == [5, 5, 5]) is waits
    reader.close()
    manager.shutdown()


@both_ways
def test_a_slot_that_is_freed_while_a_kernel_reads_it_is_written_after_that(
    streams: tuple[Any, Any], waits: bool
) -> None:
    first, second = streams
    manager, memory = small_manager(4)
    memory.waits = waits
    view = memory.view(0)
    reader, slots = started(manager, list(range(4 * BLOCK)), first, 0)
    with torch.cuda.stream(first):
        view[slots] = 5
        torch.cuda._sleep(LONG_CYCLES)
        found = view[slots].clone()
    reader.commit(list(range(4 * BLOCK)))
    reader.close()
    prompt = list(range(100, 100 + 4 * BLOCK))
    writer = manager.create_kv_cache(prompt)
    assert writer.resume(second)
    assert writer.resize(len(prompt))
    assert sorted(np_list(writer.page_indices(0)[:4])) == [0, 1, 2, 3], "the slots did not change hands"
    with torch.cuda.stream(second):
        view[slots] = 9
    torch.cuda.synchronize()
    assert (values(found) == [5, 5, 5, 5]) is waits
    writer.close()
    manager.shutdown()


def known(manager: KVCacheManager, streams: tuple[Any, Any]) -> None:
    """Both streams have been used, so what comes later is not put down to the first."""
    for stream in streams:
        sequence = manager.create_kv_cache([2000])
        assert sequence.resume(stream)
        sequence.close()
    torch.cuda.synchronize()


def spin(stream: Any) -> Any:
    """Keep a stream busy for seconds; an event at the end of that."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(VERY_LONG_CYCLES)
    return stream.record_event()


def test_decode_steps_are_over_while_a_chunk_that_shares_nothing_with_them_computes(streams: tuple[Any, Any]) -> None:
    prefill, decode = streams
    manager, memory = small_manager(64)
    view = memory.view(0)
    known(manager, streams)
    chatting, _ = started(manager, list(range(BLOCK)), decode, 0)
    chatting.commit(list(range(BLOCK)))
    long = manager.create_kv_cache(list(range(1000, 1000 + 16 * BLOCK)))
    assert long.resume(prefill)
    assert long.resize(16 * BLOCK)
    chunk = spin(prefill)
    with torch.cuda.stream(prefill):
        view[int(long.page_indices(0)[0])].fill_(3)
    written = prefill.record_event()
    for token in range(4 * BLOCK):
        end = chatting.num_committed_tokens + 1
        assert chatting.resize(end)
        slot = int(chatting.page_indices(0)[(end - 1) // BLOCK])
        with torch.cuda.stream(decode):
            view[slot].fill_(token)
        chatting.commit([token])
        if token == BLOCK:
            long.commit(list(range(1000, 1000 + 8 * BLOCK)))  # while it computes, and nobody waits for that either
    decode.synchronize()
    assert not chunk.query(), "the decode steps waited for the chunk"
    written.synchronize()
    assert values(view[np_list(chatting.page_indices(0))[1:]]) == [BLOCK - 1 + BLOCK * block for block in range(4)]
    for sequence in (long, chatting):
        sequence.close()
    manager.shutdown()


@both_ways
def test_who_reuses_a_page_of_a_chunk_waits_for_it_and_for_no_later_one(streams: tuple[Any, Any], waits: bool) -> None:
    first, second = streams
    manager, memory = small_manager(16)
    view = memory.view(0)
    known(manager, streams)
    memory.waits = waits
    prompt = list(range(8 * BLOCK))
    writer, slots = started(manager, prompt, first, 0)
    places = np_list(slots.cpu())
    with torch.cuda.stream(first):
        for slot in places[:2]:
            view[slot].fill_(5)
    first.synchronize()
    writer.commit(prompt[: 2 * BLOCK])
    chunk = spin(first)
    with torch.cuda.stream(first):
        for slot in places[2:4]:
            view[slot].fill_(6)
    writer.commit(prompt[2 * BLOCK : 4 * BLOCK])

    early = manager.create_kv_cache(prompt[: 2 * BLOCK])
    assert early.resume(second)
    assert early.num_committed_tokens == 2 * BLOCK
    second.synchronize()
    assert not chunk.query(), "a reader of the first chunk waited for the second"

    late = manager.create_kv_cache(prompt[: 4 * BLOCK])
    assert late.resume(second)
    assert late.num_committed_tokens == 4 * BLOCK
    second.synchronize()
    assert chunk.query() is waits
    torch.cuda.synchronize()
    assert values(view[places[:4]]) == [5, 5, 6, 6]
    for sequence in (early, late, writer):
        sequence.close()
    manager.shutdown()


@both_ways
def test_a_snapshot_that_is_being_copied_is_not_overwritten(streams: tuple[Any, Any], waits: bool) -> None:
    """A resume on one stream copies the snapshot late; on another its slot becomes somebody's live state."""
    first, second = streams
    manager, memory = small_manager(4, ssm=True)
    memory.waits = waits
    view = memory.view(0)
    prompt = list(range(BLOCK))
    for stream in streams:  # both are known from now on
        sequence = manager.create_kv_cache([2000])
        assert sequence.resume(stream)
        sequence.close()
    author = manager.create_kv_cache(prompt)
    assert author.resume(first)
    assert author.resize(BLOCK)
    with torch.cuda.stream(first):
        view[author.ssm_slot(0)].fill_(5)
    author.commit(prompt)
    author.close()
    reader = manager.create_kv_cache([*prompt, 50])
    with torch.cuda.stream(first):
        torch.cuda._sleep(LONG_CYCLES)
    assert reader.resume(first)
    assert reader.num_committed_tokens == BLOCK
    others = []
    for token in range(3):  # they take all other slots, that of the snapshot as the last
        other = manager.create_kv_cache([1000 + token])
        assert other.resume(second)
        others.append(other)
    assert manager.probe_reuse(prompt).usable_tokens == 0, "the snapshot is still there"
    with torch.cuda.stream(second):
        for other in others:
            view[other.ssm_slot(0)].fill_(9)
    torch.cuda.synchronize()
    assert (values(view[reader.ssm_slot(0) :][:1]) == [5]) is waits
    for sequence in (reader, *others):
        sequence.close()
    manager.shutdown()
