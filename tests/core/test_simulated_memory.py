"""Virtual times of the simulated memory against numbers worked out by hand, and its counts."""

import random
from collections.abc import Callable
from dataclasses import Field, fields
from fractions import Fraction

import pytest

from ssmcache.config import DiskCacheTierConfig, GpuCacheTierConfig, HostCacheTierConfig
from ssmcache.memory.bandwidths import BandwidthProfile
from ssmcache.memory.base import SlotMoves
from ssmcache.memory.simulated import CopiedSlots, SimulatedMemory

GPU, HOST, DISK = 0, 1, 2
Copy = Callable[..., float]


@pytest.fixture
def memory() -> SimulatedMemory:
    """Slots of 100 bytes; 1000 bytes/s within the GPU, 100 over the link, 10 on the disk: 0.1, 1 and 10 s a slot."""
    memory = SimulatedMemory(BandwidthProfile(1000.0, 100.0, 100.0, 10.0, 10.0))
    tiers = (GpuCacheTierConfig(None), HostCacheTierConfig(1), DiskCacheTierConfig(1, "nowhere"))
    memory.open(tiers, [100])
    for tier in (GPU, HOST, DISK):
        memory.resize(tier, [1000])
    return memory


@pytest.fixture
def copy(memory: SimulatedMemory) -> Copy:
    """Copies slots and gives the time at which the stream is done."""

    def run(source: int, destination: int, num_slots: int = 1, stream: object = None) -> float:
        slots = range(num_slots)
        memory.copy(SlotMoves(0, source, slots, destination, [slot + num_slots for slot in slots]), stream)
        return memory.record(stream)

    return run


@pytest.mark.parametrize(
    ("source", "destination", "seconds"),
    [
        (GPU, GPU, 0.3),
        (GPU, HOST, 3),
        (HOST, GPU, 3),
        (HOST, HOST, 3),
        (GPU, DISK, 30),
        (HOST, DISK, 30),
        (DISK, GPU, 30),
        (DISK, HOST, 30),
        (DISK, DISK, 30),
    ],
)
def test_a_copy_of_three_slots_takes_its_bytes_over_the_bandwidth_of_its_slower_end(
    copy: Copy, memory: SimulatedMemory, source: int, destination: int, seconds: float
) -> None:
    assert copy(source, destination, 3) == seconds
    assert memory.copied(source, destination) == CopiedSlots(3, 300)
    assert (memory.num_copied_slots, memory.num_copied_bytes) == (3, 300)


def test_copies_on_one_stream_follow_each_other_whatever_their_direction(copy: Copy) -> None:
    assert copy(GPU, HOST) == 1
    assert copy(HOST, GPU) == 2
    assert copy(GPU, DISK) == 12


def test_copies_of_one_direction_share_its_channel_also_between_streams(copy: Copy) -> None:
    assert copy(GPU, HOST, 2, stream="a") == 2
    assert copy(GPU, HOST, 1, stream="b") == 3
    assert copy(GPU, HOST, 1, stream="a") == 4


@pytest.mark.parametrize("busy", [(GPU, GPU), (GPU, HOST), (HOST, GPU), (GPU, DISK), (DISK, GPU)])
def test_other_directions_go_on_while_one_is_busy(copy: Copy, busy: tuple[int, int]) -> None:
    copy(*busy, 500, stream="a")
    alone = {(GPU, GPU): 0.1, (GPU, HOST): 1, (HOST, GPU): 1, (GPU, DISK): 10, (DISK, GPU): 10}
    del alone[busy]
    assert {pair: copy(*pair, stream=pair) for pair in alone} == alone


def test_the_disk_writes_and_reads_one_copy_at_a_time_wherever_it_comes_from(copy: Copy) -> None:
    assert copy(GPU, DISK, stream="a") == 10
    assert copy(HOST, DISK, stream="b") == 20
    assert copy(DISK, DISK, stream="c") == 30
    assert copy(DISK, GPU, stream="d") == 10
    assert copy(DISK, HOST, stream="e") == 20


def test_an_idle_channel_does_not_save_time_up(copy: Copy, memory: SimulatedMemory) -> None:
    memory.wait("a", 50.0)
    assert copy(GPU, HOST, stream="a") == 51
    # the channel was free from 0 to 50, but what is queued later goes later
    assert copy(GPU, HOST, stream="b") == 52


def test_an_empty_batch_does_not_wait_for_its_channel(copy: Copy) -> None:
    copy(GPU, HOST, 5, stream="a")
    assert copy(GPU, HOST, 0, stream="b") == 0


def test_a_stream_waits_for_events_that_are_ahead_of_it(copy: Copy, memory: SimulatedMemory) -> None:
    copy(GPU, DISK, stream="down")
    ahead = memory.record("down")
    memory.wait("compute", ahead)
    assert copy(GPU, GPU, stream="compute") == 10.1
    memory.wait("compute", ahead)
    assert memory.record("compute") == 10.1


def test_random_copies_end_when_an_exact_schedule_says(copy: Copy, memory: SimulatedMemory) -> None:
    rng = random.Random(5)
    channel_free: dict[object, Fraction] = {}
    stream_free: dict[int, Fraction] = {}
    for _ in range(300):
        source, destination, stream, count = rng.randrange(3), rng.randrange(3), rng.randrange(4), rng.randint(1, 9)
        if rng.random() < 0.3:
            other = rng.randrange(4)
            memory.wait(stream, memory.record(other))
            stream_free[stream] = max(stream_free.get(stream, Fraction(0)), stream_free.get(other, Fraction(0)))
        channel = "write" if destination == DISK else "read" if source == DISK else (source, destination)
        slot_seconds = {GPU: Fraction(1, 10), HOST: Fraction(1), DISK: Fraction(10)}[max(source, destination)]
        start = max(channel_free.get(channel, Fraction(0)), stream_free.get(stream, Fraction(0)))
        channel_free[channel] = stream_free[stream] = start + count * slot_seconds
        assert copy(source, destination, count, stream) == pytest.approx(float(stream_free[stream]), rel=1e-9)


def test_the_default_bandwidths_are_the_measured_ceilings() -> None:
    memory = SimulatedMemory()
    memory.open((GpuCacheTierConfig(None), HostCacheTierConfig(1), DiskCacheTierConfig(1, "nowhere")), [52_000_000])
    ends = {}
    for pair in ((GPU, GPU), (GPU, HOST), (DISK, GPU)):
        memory.copy(SlotMoves(0, pair[0], [0], pair[1], [1]), pair)
        ends[pair] = memory.record(pair)
    # one snapshot of 52 MB at 1.35 TB/s, 54.6 GB/s and 1.1 GB/s
    expected = {(GPU, GPU): 38.5e-6, (GPU, HOST): 952.4e-6, (DISK, GPU): 47.27e-3}
    assert ends == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("field", fields(BandwidthProfile), ids=lambda field: field.name)
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_a_bandwidth_is_a_positive_number(field: Field[float], value: float) -> None:
    with pytest.raises(ValueError, match=f"{field.name}: expected a positive number, got {value}"):
        BandwidthProfile(**{field.name: value})


@pytest.mark.parametrize(
    ("source", "destination", "seconds"),
    [
        (GPU, GPU, 2),
        (GPU, HOST, 3),
        (HOST, GPU, 5),
        (HOST, HOST, 5),  # both ways over the link: the slower one
        (GPU, DISK, 7),
        (HOST, DISK, 7),
        (DISK, DISK, 7),
        (DISK, GPU, 11),
        (DISK, HOST, 11),
    ],
)
def test_each_way_has_the_bandwidth_that_its_profile_states(source: int, destination: int, seconds: int) -> None:
    memory = SimulatedMemory(BandwidthProfile(2310 / 2, 2310 / 3, 2310 / 5, 2310 / 7, 2310 / 11))
    memory.open((GpuCacheTierConfig(None), HostCacheTierConfig(1), DiskCacheTierConfig(1, "nowhere")), [2310])
    memory.copy(SlotMoves(0, source, [0], destination, [1]), None)
    assert memory.record(None) == pytest.approx(seconds)


def test_only_the_pools_of_the_gpu_may_be_unlimited(memory: SimulatedMemory) -> None:
    assert memory.resize(GPU, [None])
    assert memory.bytes_in_use == 200_000
    for tier in (HOST, DISK):
        with pytest.raises(ValueError, match=f"slots of tier {tier}: expected a number, got None"):
            memory.resize(tier, [None])
    assert memory.bytes_in_use == 200_000


def test_an_unlimited_pool_takes_any_slot(memory: SimulatedMemory) -> None:
    memory.resize(GPU, [None])
    memory.copy(SlotMoves(0, GPU, [1 << 50], HOST, [1]), None)
    assert memory.copied(GPU, HOST) == CopiedSlots(1, 100)


def test_counts_outlive_the_memory(copy: Copy, memory: SimulatedMemory) -> None:
    copy(GPU, HOST, 2)
    copy(HOST, GPU, 3)
    memory.close()
    assert memory.copied(GPU, HOST) == CopiedSlots(2, 200)
    assert memory.copied(HOST, GPU) == CopiedSlots(3, 300)
    assert (memory.num_copied_slots, memory.num_copied_bytes) == (5, 500)
