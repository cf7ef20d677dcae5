"""The contract of `ssmcache.memory.base.Memory`, on every memory. The oracle is a dict from slots to their bytes.

To add a memory: subclass `Subject` if its view is no NumPy array, and add a line to `MEMORIES`. Those on a GPU are
marked `gpu` and skip where there is none.
"""

import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssmcache.config import CacheTierConfig, DiskCacheTierConfig, GpuCacheTierConfig, HostCacheTierConfig
from ssmcache.memory.base import GPU_TIER, Memory, SlotMoves
from ssmcache.memory.host import HostMemory
from ssmcache.memory.simulated import SimulatedMemory

SLOT_BYTES = (24, 1001)
SCRATCH = 0  # the GPU slot that bytes pass through on their way to the other tiers

Place = tuple[int, int, int]  # tier, layer group, slot


@dataclass
class Subject:
    """A memory under test, and how its bytes are reached: through its view of the GPU, and copies to and from there."""

    memory: Memory
    tiers: tuple[CacheTierConfig, ...]
    has_bytes: bool
    stream: Any = None
    num_slots: dict[int, list[int]] = field(default_factory=dict)

    def resize(self, *num_slots: Sequence[int]) -> None:
        """So many slots of each layer group in each tier."""
        for tier, counts in enumerate(num_slots):
            assert self.memory.resize(tier, counts)
            self.num_slots[tier] = list(counts)

    def put(self, place: Place, content: bytes) -> None:
        tier, group, slot = place
        self.put_gpu(group, slot if tier == GPU_TIER else SCRATCH, content)
        if tier != GPU_TIER:
            self.copy(group, GPU_TIER, [SCRATCH], tier, [slot])

    def get(self, place: Place) -> bytes:
        tier, group, slot = place
        if tier == GPU_TIER:
            return self.get_gpu(group, slot)
        self.copy(group, tier, [slot], GPU_TIER, [SCRATCH])
        return self.get_gpu(group, SCRATCH)

    def put_gpu(self, group: int, slot: int, content: bytes) -> None:
        self.memory.view(group)[slot] = np.frombuffer(content, dtype=np.uint8)

    def get_gpu(self, group: int, slot: int) -> bytes:
        return self.memory.view(group)[slot].tobytes()

    def copy(self, group: int, source: int, sources: Sequence[int], target: int, targets: Sequence[int]) -> None:
        self.memory.copy(SlotMoves(group, source, sources, target, targets), self.stream)

    def other_stream(self, name: str) -> Any:
        """The stream of this name."""
        return name

    def pool_bytes(self, tier: int, num_slots: Sequence[int]) -> int:
        """What pools of so many slots take from the system: whole grains."""
        grain = self.memory.grain(tier)
        return sum(
            -(-count * num_bytes // grain) * grain for count, num_bytes in zip(num_slots, SLOT_BYTES, strict=True)
        )


@dataclass
class CudaSubject(Subject):
    """The view is a tensor, and streams are torch's."""

    streams: dict[str, Any] = field(default_factory=dict)

    def put_gpu(self, group: int, slot: int, content: bytes) -> None:
        import torch

        self.memory.view(group)[slot] = torch.frombuffer(bytearray(content), dtype=torch.uint8).cuda()

    def get_gpu(self, group: int, slot: int) -> bytes:
        found: bytes = self.memory.view(group)[slot].cpu().numpy().tobytes()
        return found

    def other_stream(self, name: str) -> Any:
        import torch

        return self.streams.setdefault(name, torch.cuda.Stream())


def simulated(tiers: tuple[CacheTierConfig, ...]) -> Subject:
    return Subject(SimulatedMemory(), tiers, has_bytes=False)


def host(tiers: tuple[CacheTierConfig, ...]) -> Subject:
    return Subject(HostMemory(), tiers, has_bytes=True)


def cuda(tiers: tuple[CacheTierConfig, ...]) -> Subject:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    from ssmcache.memory.cuda import CudaMemory

    return CudaSubject(CudaMemory(), tiers, has_bytes=True)


def plain_cuda(tiers: tuple[CacheTierConfig, ...]) -> Subject:
    """The same where neither cuda-bindings nor Triton is installed."""
    subject = cuda(tiers)
    import ssmcache.memory.cuda as cuda_module
    import ssmcache.memory.cuda_copies as copies_module

    open_memory = subject.memory.open

    def open_without(*args: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_module, "cuda_driver", lambda: None)
            patch.setattr(copies_module, "_kernels", lambda: None)
            open_memory(*args)

    subject.memory.open = open_without  # type: ignore[method-assign]
    return subject


MEMORIES: dict[str, Callable[[tuple[CacheTierConfig, ...]], Subject]] = {
    "simulated": simulated,
    "host": host,
    "cuda": cuda,
    "plain_cuda": plain_cuda,
}
ON_GPU = ("cuda", "plain_cuda")
WITH_BYTES = [name for name in MEMORIES if name != "simulated"]
TIERS = ("gpu", "gpu host", "gpu disk", "gpu host disk")


def tier_configs(kinds: str, folder: Path) -> tuple[CacheTierConfig, ...]:
    configs: dict[str, CacheTierConfig] = {
        "gpu": GpuCacheTierConfig(1 << 24),
        "host": HostCacheTierConfig(1 << 24),
        "disk": DiskCacheTierConfig(1 << 24, str(folder)),
    }
    return tuple(configs[kind] for kind in kinds.split())


def each(names: Sequence[str]) -> pytest.MarkDecorator:
    cases = [
        pytest.param((name, kinds), marks=[pytest.mark.gpu] if name in ON_GPU else [], id=f"{name}-{kinds}")
        for name, kinds in product(names, TIERS)
    ]
    return pytest.mark.parametrize("subject", cases, indirect=True)


@pytest.fixture
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    """A memory that is not open yet."""
    name, kinds = request.param
    subject = MEMORIES[name](tier_configs(kinds, tmp_path))
    yield subject
    subject.memory.close()


@pytest.fixture
def opened(subject: Subject) -> Subject:
    subject.memory.open(subject.tiers, SLOT_BYTES)
    return subject


def as_some_sequence(slots: list[int], rng: random.Random) -> Sequence[int]:
    kinds: list[Callable[[list[int]], Any]] = [list, tuple, lambda s: array("q", s), lambda s: np.array(s, np.int32)]
    return rng.choice(kinds)(slots)


# -- copies ----------------------------------------------------------------------------------------------------------


@each(list(MEMORIES))
@pytest.mark.parametrize("seed", range(6))
def test_random_batches_and_resizes_leave_what_a_dict_of_slots_holds(opened: Subject, seed: int) -> None:
    rng = random.Random(seed)
    model: dict[Place, bytes] = {}
    copied: Counter[tuple[int, int]] = Counter()
    opened.resize(*[[rng.randint(8, 16) for _ in SLOT_BYTES] for _ in opened.tiers])
    for step in range(120):
        group = rng.randrange(len(SLOT_BYTES))
        if opened.has_bytes and step % 2 == 0:
            place = (GPU_TIER, group, rng.randrange(1, opened.num_slots[GPU_TIER][group]))
            model[place] = rng.randbytes(SLOT_BYTES[group])
            opened.put(place, model[place])
        if rng.random() < 0.1:
            tier = rng.randrange(len(opened.tiers))
            opened.num_slots[tier] = [rng.randint(4, 20) for _ in SLOT_BYTES]
            assert opened.memory.resize(tier, opened.num_slots[tier])
            model = {
                place: bytes_ for place, bytes_ in model.items() if place[2] < opened.num_slots[place[0]][place[1]]
            }
        source, target = rng.choices(range(len(opened.tiers)), k=2)
        known = [place[2] for place in model if place[:2] == (source, group)]
        if not opened.has_bytes:
            known = list(range(opened.num_slots[source][group]))
        if not known:
            continue
        sources = rng.choices(known, k=rng.randint(0, 6))  # a source may come twice
        free = set(range(1, opened.num_slots[target][group])) - (set(sources) if source == target else set())
        sources = sources[: len(free)]
        targets = rng.sample(sorted(free), len(sources))
        opened.copy(group, source, as_some_sequence(sources, rng), target, as_some_sequence(targets, rng))
        copied[source, target] += len(sources)
        if opened.has_bytes:
            model |= {(target, group, t): model[source, group, s] for s, t in zip(sources, targets, strict=True)}
            if step % 20 == 0:
                assert {place: opened.get(place) for place in model} == model
    assert {place: opened.get(place) for place in model} == model
    assert len(copied) == len(opened.tiers) ** 2, "a direction was never tried"
    if isinstance(opened.memory, SimulatedMemory):
        found = {pair: opened.memory.copied(*pair).num_slots for pair in copied}
        assert found == copied


@each(WITH_BYTES)
@pytest.mark.parametrize("slot_bytes", [3 << 20, 9 << 20])
def test_batches_larger_than_any_staging_buffer_arrive_whole(subject: Subject, slot_bytes: int) -> None:
    count, rng = 7, random.Random(slot_bytes)
    subject.memory.open(subject.tiers, [slot_bytes])
    subject.resize(*[[2 * count + 1]] * len(subject.tiers))
    slots = list(range(1, count + 1))
    contents = dict(zip(slots, (rng.randbytes(slot_bytes) for _ in slots), strict=True))
    for slot, content in contents.items():
        subject.put((GPU_TIER, 0, slot), content)
    # down and up through all tiers, each time to other slots in another order
    path = [*range(len(subject.tiers)), *reversed(range(len(subject.tiers)))]
    for source, target in pairwise(path):
        targets = rng.sample([slot for slot in range(1, 2 * count + 1) if slot not in slots], count)
        subject.copy(0, source, slots, target, targets)
        contents = {new: contents[old] for old, new in zip(slots, targets, strict=True)}
        slots = targets
    assert all(subject.get((path[-1], 0, slot)) == content for slot, content in contents.items())


@each(list(MEMORIES))
def test_an_empty_batch_is_no_copy(opened: Subject) -> None:
    opened.resize(*[[2, 2]] * len(opened.tiers))
    if opened.has_bytes:
        opened.put((GPU_TIER, 0, 1), b"\1" * SLOT_BYTES[0])
    before = opened.memory.record(None)
    for source, target in product(range(len(opened.tiers)), repeat=2):
        opened.copy(0, source, [], target, [])
    if opened.has_bytes:
        assert opened.get((GPU_TIER, 0, 1)) == b"\1" * SLOT_BYTES[0]
    else:
        assert opened.memory.record(None) == before


@each(list(MEMORIES))
def test_sources_and_destinations_must_be_as_many(opened: Subject) -> None:
    opened.resize(*[[4, 4]] * len(opened.tiers))
    for source, target in product(range(len(opened.tiers)), repeat=2):
        with pytest.raises(AssertionError, match="1 sources"):
            opened.copy(0, source, [1], target, [2, 3])


@each(WITH_BYTES)
@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        ([1, 4], [2, 3], "source slots 1..4 in a pool of 4"),
        ([-1], [2], "source slots -1..-1"),
        ([1, 2], [3, 4], "destination slots 3..4 in a pool of 4"),
        ([1], [-2], "destination slots -2..-2"),
        ([0, 1], [2, 2], "a destination comes twice"),
    ],
)
def test_a_batch_that_breaks_the_rules_is_refused_and_moves_nothing(
    opened: Subject, sources: list[int], targets: list[int], message: str
) -> None:
    opened.resize(*[[4, 4]] * len(opened.tiers))
    contents = {(GPU_TIER, 0, slot): bytes([slot]) * SLOT_BYTES[0] for slot in range(4)}
    for place, content in contents.items():
        opened.put(place, content)
    for source, target in product(range(len(opened.tiers)), repeat=2):
        with pytest.raises(AssertionError, match=message):
            opened.copy(0, source, sources, target, targets)
    assert {place: opened.get(place) for place in contents} == contents


@each(WITH_BYTES)
def test_a_destination_that_is_a_source_is_refused_within_a_tier_alone(opened: Subject) -> None:
    opened.resize(*[[4, 4]] * len(opened.tiers))
    for tier in range(len(opened.tiers)):
        opened.put((tier, 0, 1), bytes(SLOT_BYTES[0]))
        with pytest.raises(AssertionError, match="a destination is a source"):
            opened.copy(0, tier, [1, 2], tier, [3, 1])
        if tier != GPU_TIER:
            opened.copy(0, tier, [1], GPU_TIER, [1])


@each(list(MEMORIES))
def test_loads_from_files_come_to_an_end(opened: Subject) -> None:
    opened.resize(*[[4, 4]] * len(opened.tiers))
    assert list(opened.memory.loads()) == []
    for source, target in product(range(len(opened.tiers)), repeat=2):
        opened.copy(0, source, [0, 1], target, [2, 3])
        for load in opened.memory.loads():
            load.exception(timeout=20)
        assert list(opened.memory.loads()) == []


# -- pools -----------------------------------------------------------------------------------------------------------


@each(list(MEMORIES))
def test_bytes_in_use_are_those_of_all_pools_in_whole_grains(opened: Subject) -> None:
    memory = opened.memory
    assert memory.bytes_in_use == 0
    expected = 0
    for tier in range(len(opened.tiers)):
        assert memory.resize(tier, [3, 5])
        expected += opened.pool_bytes(tier, [3, 5])
        assert memory.bytes_in_use == expected
    for tier in range(len(opened.tiers)):
        assert memory.resize(tier, [0, 0])
    assert memory.bytes_in_use == 0


@each(WITH_BYTES)
def test_a_pool_keeps_what_lies_in_slots_that_remain(opened: Subject) -> None:
    opened.resize(*[[6, 6]] * len(opened.tiers))
    for tier in range(len(opened.tiers)):
        contents = {
            (tier, group, slot): random.Random(slot).randbytes(SLOT_BYTES[group]) for group in (0, 1) for slot in (1, 3)
        }
        for place, content in contents.items():
            opened.put(place, content)
        for counts in ([4, 6], [9, 4], [9, 4], [6, 6]):
            assert opened.memory.resize(tier, counts)
            assert {place: opened.get(place) for place in contents} == contents


@each(WITH_BYTES)
def test_a_resize_that_fails_changes_nothing(opened: Subject) -> None:
    opened.resize(*[[6, 6]] * len(opened.tiers))
    before = opened.memory.bytes_in_use
    for tier in range(len(opened.tiers)):
        contents = {(tier, group, slot): bytes([slot]) * SLOT_BYTES[group] for group in (0, 1) for slot in (1, 5)}
        for place, content in contents.items():
            opened.put(place, content)
        for too_many in ([2, 1 << 44], [1 << 44, 2], [2, 1 << 70]):
            assert opened.memory.resize(tier, too_many) is False
        assert opened.memory.bytes_in_use == before
        assert len(opened.memory.view(0)) == len(opened.memory.view(1)) == 6
        assert {place: opened.get(place) for place in contents} == contents


@each(WITH_BYTES)
def test_no_pool_with_bytes_is_unlimited(opened: Subject) -> None:
    for tier in range(len(opened.tiers)):
        opened.memory.resize(tier, [2, 2])
        with pytest.raises(ValueError, match=f"slots of tier {tier}: expected a number, got None"):
            opened.memory.resize(tier, [3, None])
    assert opened.memory.bytes_in_use == sum(opened.pool_bytes(tier, [2, 2]) for tier in range(len(opened.tiers)))


@each(list(MEMORIES))
def test_the_view_of_a_pool_is_that_pool(opened: Subject) -> None:
    opened.resize([3, 5])
    for group, count in enumerate((3, 5)):
        view = opened.memory.view(group)
        if not opened.has_bytes:
            assert view is None
            continue
        assert tuple(view.shape) == (count, SLOT_BYTES[group])
        opened.put((GPU_TIER, group, 1), b"\1" * SLOT_BYTES[group])
        opened.copy(group, GPU_TIER, [1], GPU_TIER, [2])
        assert view[2].tolist() == [1] * SLOT_BYTES[group]


# -- streams ---------------------------------------------------------------------------------------------------------


@each(list(MEMORIES))
def test_events_are_recorded_and_waited_for_in_any_order(opened: Subject) -> None:
    memory = opened.memory
    opened.resize(*[[3, 3]] * len(opened.tiers))
    other, third = opened.other_stream("other"), opened.other_stream("third")
    unused = memory.record(opened.other_stream("never used"))
    first = memory.record(None)
    for tier in range(len(opened.tiers)):
        memory.copy(SlotMoves(1, GPU_TIER, [1], tier, [2]), None)
    memory.wait(other, memory.record(None))
    memory.wait(None, memory.record(other))  # each waits for the other
    memory.wait(other, first)
    memory.wait(None, unused)
    memory.wait(None, unused)
    memory.copy(SlotMoves(1, GPU_TIER, [2], GPU_TIER, [1]), other)
    memory.wait(third, memory.record(other))


# -- ends ------------------------------------------------------------------------------------------------------------


@each(list(MEMORIES))
def test_a_memory_can_be_closed_twice_and_not_used_afterwards(opened: Subject) -> None:
    memory = opened.memory
    opened.resize(*[[3, 3]] * len(opened.tiers))
    memory.close()
    memory.close()
    assert memory.bytes_in_use == 0
    calls: list[Callable[[], object]] = [
        lambda: memory.open(opened.tiers, SLOT_BYTES),
        lambda: memory.resize(GPU_TIER, [1, 1]),
        lambda: opened.copy(0, GPU_TIER, [0], GPU_TIER, [1]),
        lambda: memory.view(0),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="expected"):
            call()


@each(list(MEMORIES))
def test_a_memory_is_opened_once_and_not_used_before(subject: Subject) -> None:
    with pytest.raises(RuntimeError, match="resize: expected an open memory"):
        subject.memory.resize(GPU_TIER, [1, 1])
    subject.memory.open(subject.tiers, SLOT_BYTES)
    subject.resize([2, 2])
    with pytest.raises(RuntimeError, match="open: expected a memory that was never opened"):
        subject.memory.open(subject.tiers, SLOT_BYTES)
    assert subject.memory.bytes_in_use == subject.pool_bytes(GPU_TIER, [2, 2])


@each(list(MEMORIES))
def test_a_memory_that_was_never_opened_can_be_closed(subject: Subject) -> None:
    subject.memory.close()
    assert subject.memory.bytes_in_use == 0
