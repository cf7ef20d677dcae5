"""What the memory on a GPU does beyond the contract: pages that stay where they are, views, ways of copying, errors.

PYTHONPATH=.:sim python -m pytest tests/gpu tests/core/test_memory_contract.py -m gpu -q
"""

import errno
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpu_runner import GpuRunner  # noqa: E402
from payload import Shape, run_at_random  # noqa: E402

import ssmcache.memory.cuda as cuda_module  # noqa: E402
import ssmcache.memory.cuda_copies as copies_module  # noqa: E402
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
from ssmcache.memory import cuda_pools  # noqa: E402
from ssmcache.memory.base import SlotMoves, TransferError  # noqa: E402
from ssmcache.memory.cuda import CudaMemory  # noqa: E402
from ssmcache.memory.cuda_indices import MAX_SLOTS  # noqa: E402

GPU, HOST, DISK = 0, 1, 2
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def memory() -> Iterator[CudaMemory]:
    memory = CudaMemory()
    yield memory
    memory.close()


def opened(memory: CudaMemory, slot_bytes: list[int], *num_slots: list[int], path: str = ".") -> CudaMemory:
    """So many slots of each layer group on the GPU, the host and the disk."""
    kinds: list[Any] = [GpuCacheTierConfig(1), HostCacheTierConfig(1), DiskCacheTierConfig(1, path)]
    memory.open(kinds[: len(num_slots)], slot_bytes)
    for tier, counts in enumerate(num_slots):
        assert memory.resize(tier, counts)
    return memory


def fill_at_random(view: Any, seed: int = 0) -> Any:
    """Returns a copy of what is in the view now."""
    generator = torch.Generator(device=view.device).manual_seed(seed)
    view.copy_(torch.randint(0, 256, view.shape, dtype=torch.uint8, device=view.device, generator=generator))
    return view.clone()


# -- pools -----------------------------------------------------------------------------------------------------------

needs_pages = pytest.mark.skipif(cuda_module.cuda_driver() is None, reason="cuda-bindings is not installed")


@needs_pages
def test_a_pool_that_grows_stays_where_it_is(memory: CudaMemory) -> None:
    opened(memory, [64 * KIB, 3000], [100, 10])
    addresses = [memory.view(group).data_ptr() for group in (0, 1)]
    content = fill_at_random(memory.view(0))
    assert memory.resize(GPU, [5000, 4000])
    assert [memory.view(group).data_ptr() for group in (0, 1)] == addresses
    assert torch.equal(memory.view(0)[:100], content)
    # all of it can be written and read
    larger = fill_at_random(memory.view(0), 1), fill_at_random(memory.view(1), 2)
    assert torch.equal(memory.view(0), larger[0])
    assert torch.equal(memory.view(1), larger[1])


@needs_pages
def test_pages_go_from_pool_to_pool_without_new_memory(memory: CudaMemory) -> None:
    opened(memory, [2 * MIB, 2 * MIB], [512, 64])
    kept = fill_at_random(memory.view(0)[:64])
    torch.cuda.synchronize()
    free, in_use = torch.cuda.mem_get_info()[0], memory.bytes_in_use
    assert memory.resize(GPU, [64, 512])
    assert (torch.cuda.mem_get_info()[0], memory.bytes_in_use) == (free, in_use)
    assert torch.equal(memory.view(0), kept)
    content = fill_at_random(memory.view(1))
    assert torch.equal(memory.view(1), content)
    del content
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    assert memory.resize(GPU, [64, 1])
    assert torch.cuda.mem_get_info()[0] >= free + 500 * 2 * MIB


@needs_pages
def test_closing_gives_all_pages_back(memory: CudaMemory) -> None:
    torch.cuda.synchronize()
    opened(memory, [2 * MIB], [1])
    free = torch.cuda.mem_get_info()[0]
    assert memory.resize(GPU, [1024])
    assert torch.cuda.mem_get_info()[0] <= free - 1000 * 2 * MIB
    memory.close()
    assert torch.cuda.mem_get_info()[0] >= free


@pytest.mark.parametrize("with_pages", [True, False])
def test_a_device_without_room_refuses_and_nothing_changes(
    memory: CudaMemory, with_pages: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_pages:
        monkeypatch.setattr(cuda_module, "cuda_driver", lambda: None)
    opened(memory, [2 * MIB, 2 * MIB], [8, 4])
    contents = [fill_at_random(memory.view(group), group) for group in (0, 1)]
    free, total = torch.cuda.mem_get_info()
    others = torch.empty(free - 4096 * MIB, dtype=torch.uint8, device="cuda")  # leaves 4 GiB
    before, left = memory.bytes_in_use, torch.cuda.mem_get_info()[0]
    assert memory.resize(GPU, [2, 5 * 1024 * MIB // (2 * MIB)]) is False
    assert memory.resize(GPU, [total // (2 * MIB), 1]) is False
    assert memory.bytes_in_use == before
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] >= left - 64 * MIB
    for group, content in enumerate(contents):
        assert torch.equal(memory.view(group), content)
    del others
    torch.cuda.empty_cache()
    assert memory.resize(GPU, [2, 3 * 1024 * MIB // (2 * MIB)])
    assert torch.equal(memory.view(0), contents[0][:2])


def test_without_cuda_bindings_pools_are_copied_and_the_log_says_it_once(
    memory: CudaMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_module, "cuda_driver", lambda: None)
    cuda_pools.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        opened(memory, [1000], [10])
        second = opened(CudaMemory(), [1000], [10])
        second.close()
    assert [r.message for r in caplog.records if "cuda-bindings is not installed" in r.message] == [
        "cuda-bindings is not installed: GPU pools are plain torch memory, and a change of size copies them"
    ]
    assert memory.grain(GPU) == 1
    content = fill_at_random(memory.view(0))
    assert memory.resize(GPU, [25])
    assert torch.equal(memory.view(0)[:10], content)


def test_what_is_there_is_used_and_the_log_says_nothing(memory: CudaMemory, caplog: pytest.LogCaptureFixture) -> None:
    """Fails where a package is missing or the driver is too old, so that a run does not silently test the stand-ins."""
    cuda_pools.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        opened(memory, [1 << 16], [4], [4])
    assert [record.message for record in caplog.records] == []
    assert memory.grain(GPU) == 2 * MIB


# -- views -----------------------------------------------------------------------------------------------------------


def test_buffers_of_a_manager_are_the_pool_itself_in_any_dtype_and_shape() -> None:
    layers = [
        AttentionLayerConfig(0, (BufferConfig("key", 4 * KIB), BufferConfig("value", 4 * KIB))),
        SsmLayerConfig(1, (BufferConfig("state", 64 * KIB),)),
    ]
    config = KVCacheManagerConfig(32, layers, [GpuCacheTierConfig(64 * MIB)], ssm_reuse_interval=64)
    memory = CudaMemory()
    manager = KVCacheManager(config, memory)
    group = manager.layer_grouping.index((0,))
    pool = memory.view(group)
    value = manager.buffer(0, "value", torch.bfloat16, (32, 8, 8))
    assert value.shape == (len(pool), 32, 8, 8)
    assert value.is_cuda
    assert value.data_ptr() == pool.data_ptr() + 4 * KIB
    assert value.stride(0) * 2 == manager.page_stride(0, "value") == 8 * KIB
    value[3].fill_(1.5)
    memory.copy(SlotMoves(group, GPU, [3], GPU, [7]), None)
    assert (manager.buffer(0, "value", torch.bfloat16)[7] == 1.5).all()
    assert manager.buffer(1, "state").shape[1] == 64 * KIB
    manager.shutdown()
    with pytest.raises(RuntimeError, match="view: expected an open memory"):
        manager.buffer(0, "value")


# -- ways of copying -------------------------------------------------------------------------------------------------

PLACES = [(GPU, GPU), (GPU, HOST), (HOST, GPU), (HOST, HOST), (GPU, DISK), (DISK, GPU), (HOST, DISK), (DISK, HOST)]
SLOT_SIZES = [1, 2, 12, 40, 1001, 4096, 4112, 64 * KIB, 64 * KIB + 16, 300_000, 512 * KIB, 2 * MIB, 2 * MIB + 4]
Setting = Callable[[pytest.MonkeyPatch], None]


def as_it_is(patch: pytest.MonkeyPatch) -> None:
    pass


def kernel_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(copies_module, "ENGINE_BYTES", 1 << 62)


def engine_over_the_link(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(copies_module, "ENGINE_BYTES", 0)


def torch_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(copies_module, "_kernels", lambda: None)
    patch.setattr(copies_module, "copy_engine", lambda driver, device: None)


@pytest.mark.parametrize("setting", [as_it_is, kernel_only, engine_over_the_link, torch_only])
@pytest.mark.parametrize("slot_bytes", SLOT_SIZES)
def test_every_way_moves_every_size_of_slots(
    memory: CudaMemory, slot_bytes: int, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting(monkeypatch)
    count = 13
    rng = random.Random(slot_bytes)
    opened(memory, [slot_bytes], *[[2 * count]] * 3, path=str(tmp_path))
    content = fill_at_random(memory.view(0)[:count])
    slots = list(range(count))
    memory.copy(SlotMoves(0, GPU, slots, HOST, slots), None)
    memory.copy(SlotMoves(0, GPU, slots, DISK, slots), None)
    for source, destination in PLACES:
        sources = [rng.randrange(count) for _ in range(count)]
        targets = rng.sample(range(count, 2 * count), count)
        memory.copy(SlotMoves(0, source, sources, destination, targets), None)
        if destination != GPU:  # back to other slots
            into = rng.sample(range(count, 2 * count), count)
            memory.copy(SlotMoves(0, destination, targets, GPU, into), None)
            targets = into
        found = memory.view(0)[torch.tensor(targets, device="cuda")]
        assert torch.equal(found, content[torch.tensor(sources, device="cuda")]), f"{source} to {destination}"


@pytest.mark.parametrize("setting", [as_it_is, torch_only])
def test_a_batch_larger_than_a_line_of_indices_arrives_whole(
    memory: CudaMemory, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting(monkeypatch)
    count = 2 * MAX_SLOTS + 77
    opened(memory, [48], [2 * count])
    content = fill_at_random(memory.view(0))
    order = np.random.default_rng(0).permutation(2 * count)
    memory.copy(SlotMoves(0, GPU, order[:count], GPU, order[count:]), None)
    sources, targets = (torch.from_numpy(part).cuda() for part in (order[:count], order[count:]))
    assert torch.equal(memory.view(0)[targets], content[sources])
    assert torch.equal(memory.view(0)[sources], content[sources])


def test_offsets_beyond_32_bits_are_right(memory: CudaMemory) -> None:
    slot_bytes = 50 * MIB
    opened(memory, [slot_bytes], [100], [2])
    view = memory.view(0)
    for slot in (0, 90, 99):
        view[slot].fill_(slot)
    memory.copy(SlotMoves(0, GPU, [99, 90], GPU, [1, 98]), None)
    assert bool((view[1] == 99).all())
    assert bool((view[98] == 90).all())
    assert bool((view[0] == 0).all())


def test_the_host_runs_ahead_of_a_busy_gpu_by_any_number_of_batches(memory: CudaMemory) -> None:
    opened(memory, [4096], [200])
    content = fill_at_random(memory.view(0))
    memory.copy(SlotMoves(0, GPU, [0, 1], GPU, [100, 101]), None)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    done = torch.cuda.Event()
    for start in range(98):
        memory.copy(SlotMoves(0, GPU, [start, start + 1], GPU, [100 + start, 101 + start]), None)
    done.record()
    assert not done.query(), "the copies were waited for"
    torch.cuda.synchronize()
    assert torch.equal(memory.view(0)[100:199], content[:99])


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_stream_that_is_none_of_the_device_is_refused(memory: CudaMemory) -> None:
    opened(memory, [16], [4])
    strangers: list[Any] = ["compute", 7, torch.cuda.Event()]
    if torch.cuda.device_count() > 1:
        strangers.append(torch.cuda.Stream(torch.device("cuda", 1)))
    for stranger in strangers:
        with pytest.raises(ValueError, match=r"copy: expected a torch.cuda.Stream of cuda:0 or None, got"):
            memory.copy(SlotMoves(0, GPU, [0], GPU, [1]), stranger)
        with pytest.raises(ValueError, match="record: expected a torch"):
            memory.record(stranger)
        with pytest.raises(ValueError, match="wait: expected a torch"):
            memory.wait(stranger, memory.record(None))
    with pytest.raises(ValueError, match=r"wait: expected an event of torch.cuda, got 3"):
        memory.wait(None, 3)


@pytest.mark.parametrize("device", ["cpu", "cuda:99", 99, "nothing"])
def test_a_device_that_is_not_there_is_refused(device: Any) -> None:
    with pytest.raises(ValueError, match=r"device: expected one of \d CUDA devices, got"):
        CudaMemory(device)


def test_nothing_is_kept_of_a_memory_that_cannot_be_opened(memory: CudaMemory, tmp_path: Path) -> None:
    free = torch.cuda.mem_get_info()[0]
    disk = DiskCacheTierConfig(1, str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="path of the disk tier"):
        memory.open([GpuCacheTierConfig(1), disk], [16])
    with pytest.raises(ValueError, match="quota of the GPU tier"):
        memory.open([GpuCacheTierConfig(None)], [16])
    assert torch.cuda.mem_get_info()[0] >= free - 64 * MIB
    opened(memory, [16], [4])  # it was never open, so it can be now


def test_all_calls_after_shutdown_are_refused(memory: CudaMemory) -> None:
    opened(memory, [16], [4])
    event = memory.record(None)
    memory.close()
    memory.close()
    calls: list[Callable[[], object]] = [
        lambda: memory.copy(SlotMoves(0, GPU, [0], GPU, [1]), None),
        lambda: memory.record(None),
        lambda: memory.wait(None, event),
        lambda: memory.view(0),
        lambda: memory.grain(0),
        lambda: memory.resize(GPU, [1]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="expected an open memory, got one that is not open"):
            call()


FAILED_DEVICE = """
import torch
from ssmcache.config import GpuCacheTierConfig, HostCacheTierConfig
from ssmcache.memory.base import SlotMoves
from ssmcache.memory.cuda import CudaMemory
memory = CudaMemory()
memory.open([GpuCacheTierConfig(1), HostCacheTierConfig(1)], [4096])
assert memory.resize(0, [8]) and memory.resize(1, [8])
event = memory.record(None)
table, index = torch.zeros(4, device="cuda"), torch.full((1,), 100, device="cuda")
table[index]
try:
    torch.cuda.synchronize()
except RuntimeError:
    pass
for call in (
    lambda: memory.copy(SlotMoves(0, 0, [0, 1], 1, [2, 3]), None),
    lambda: memory.copy(SlotMoves(0, 0, [0], 0, [1]), None),
    lambda: memory.resize(0, [4]),
    lambda: memory.record(None),
    lambda: memory.wait(None, event),
    lambda: memory.view(0),
):
    try:
        call()
        print("nothing was raised", flush=True)
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0], flush=True)
memory.close()
memory.close()
print("closed", flush=True)
"""


def test_a_failed_device_is_one_clear_error_and_can_be_closed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILED_DEVICE], capture_output=True, text=True, check=False, timeout=120
    )
    lines = done.stdout.splitlines()
    assert lines[-1:] == ["closed"], f"{done.stdout}\n{done.stderr[-2000:]}"
    assert len(lines) == 7
    for call, line in zip(("copy", "copy", "resize", "record", "wait", "view"), lines, strict=False):
        assert line.startswith(f"CudaDriverError {call}: expected a working device, but cuda:0 has failed: "), line


# -- the manager on it -----------------------------------------------------------------------------------------------

SHAPES = {
    "attention": Shape(),
    "attention and states": Shape(ssm=True),
    "windows": Shape(full=False, windows=((5, 0), (3, 2)), partly=False),
    "three tiers": Shape(ssm=True, slots=(10, 8, 8)),
    "all kinds, three tiers": Shape(windows=((5, 2),), ssm=True, slots=(12, 8, 8), partly=False),
}


@pytest.mark.parametrize("num_streams", [0, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_every_reused_page_and_state_holds_what_was_committed(shape: Shape, num_streams: int, tmp_path: Path) -> None:
    for seed in range(3):
        runner = GpuRunner(shape, str(tmp_path), num_streams, late=num_streams > 0)
        run_at_random(runner, random.Random(seed), 120)
        assert runner.num_checked > 100


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_a_copy_from_the_disk_to_the_host_waits_for_no_file_and_who_reads_it_does(
    memory: CudaMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(memory, [64 * KIB], [8], [8], [8], path=str(tmp_path))
    before = fill_at_random(memory.view(0))
    slots = list(range(8))
    memory.copy(SlotMoves(0, GPU, slots, DISK, slots), None)
    assert memory.resize(DISK, [8])  # it is written
    may_read, real = threading.Event(), os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (may_read.wait(20), real(*args))[1])
    start = time.monotonic()
    memory.copy(SlotMoves(0, DISK, slots, HOST, slots[::-1]), None)
    assert time.monotonic() - start < 10
    memory.view(0).zero_()
    release = threading.Timer(0.2, may_read.set)
    release.start()
    memory.copy(SlotMoves(0, HOST, slots[::-1], GPU, slots), None)
    torch.cuda.synchronize()
    assert torch.equal(memory.view(0), before)
    release.join()


def test_a_sequence_says_for_how_long_files_are_read_for_it(
    memory: CudaMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = AttentionLayerConfig(0, [BufferConfig("key", MIB), BufferConfig("value", MIB)])
    tiers = [GpuCacheTierConfig(8 * MIB), HostCacheTierConfig(8 * MIB), DiskCacheTierConfig(16 * MIB, str(tmp_path))]
    manager = KVCacheManager(KVCacheManagerConfig(tokens_per_block=1, cache_tiers=tiers, layers=[layer]), memory)
    keys = manager.buffer(0, "key")
    for prompt in ([1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]):
        kv = manager.create_kv_cache(prompt)
        assert kv.resume()
        assert kv.resize(3)
        for token, page in zip(prompt, kv.page_indices(0), strict=True):
            keys[int(page)] = token
        kv.commit(prompt)
        kv.close()
    assert memory.resize(DISK, [8])  # what went there is written
    kv = manager.create_kv_cache([1, 2, 3])
    assert (kv.num_committed_tokens, kv.is_loading) == (3, False)
    assert manager.memory_usage().tiers[DISK][0].used_slots > 2
    may_read, real = threading.Event(), os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (may_read.wait(20), real(*args))[1])
    assert kv.prefetch(HOST)
    assert kv.is_loading
    another = manager.create_kv_cache([1, 2, 3])
    assert not another.is_loading  # it has not asked
    assert another.prefetch(HOST)
    assert another.is_loading
    another.close()
    may_read.set()
    deadline = time.monotonic() + 20
    while kv.is_loading:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    monkeypatch.setattr(os, "preadv", lambda *args: pytest.fail("nothing is left to be read"))
    assert kv.resume()
    torch.cuda.synchronize()
    assert [int(keys[int(page), 0]) for page in kv.page_indices(0)] == [1, 2, 3]
    assert [int(keys[int(page), -1]) for page in kv.page_indices(0)] == [1, 2, 3]
    kv.close()
    manager.shutdown()


def test_a_file_that_cannot_be_read_is_told_by_the_copy_that_needs_it(
    memory: CudaMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(memory, [64 * KIB], [4], [4], [4], path=str(tmp_path))
    before = fill_at_random(memory.view(0))
    memory.copy(SlotMoves(0, GPU, [0, 1], DISK, [0, 1]), None)
    assert memory.resize(DISK, [4])

    def broken(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        memory.copy(SlotMoves(0, DISK, [0], HOST, [2]), None)
        with pytest.raises(TransferError, match="disk tier: cannot read 1 of 1 slots") as caught:
            memory.copy(SlotMoves(0, HOST, [2], GPU, [3]), None)
    assert (caught.value.tier, caught.value.lost) == (HOST, (0,))
    memory.copy(SlotMoves(0, DISK, [1], HOST, [2]), None)
    memory.copy(SlotMoves(0, HOST, [2], GPU, [3]), None)
    torch.cuda.synchronize()
    assert torch.equal(memory.view(0)[3], before[1])
