"""What `ssmcache doctor` asks of a real device, against torch, the driver and figures that no device can exceed."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from ssmcache.memory import cuda_probe  # noqa: E402
from ssmcache.memory.cuda_vmm import cuda_driver  # noqa: E402
from ssmcache.memory.slot_timing import WrongBytesError  # noqa: E402
from ssmcache_sim.diagnosis import LARGE_SLOT_BYTES, SMALL_SLOT_BYTES  # noqa: E402
from ssmcache_sim.doctor import examine  # noqa: E402
from ssmcache_sim.machine_profile import read_profile, write_profile  # noqa: E402

GPU, HOST = 0, 1
MIB = 1 << 20


def test_there_is_a_device_and_it_is_the_one_that_torch_names() -> None:
    assert cuda_probe.why_no_device() is None
    devices = cuda_probe.devices()
    assert [each.name for each in devices] == [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]
    assert all(0 < each.free_bytes <= each.total_bytes for each in devices)


def test_pages_are_of_2_mib_where_there_are_bindings() -> None:
    assert cuda_probe.page_bytes(0) == (None if cuda_driver() is None else 2 * MIB)


def test_slots_move_and_memory_is_pinned_and_given_back() -> None:
    cuda_probe.move_a_few_slots(0)
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    for _ in range(10):
        cuda_probe.move_a_few_slots(0)
        cuda_probe.pin(64 * MIB)
    torch.cuda.empty_cache()
    after, _ = torch.cuda.mem_get_info()
    assert before - after < 10 * 2 * MIB  # a page each time would be that


@pytest.mark.parametrize(("source", "destination"), [(GPU, GPU), (HOST, GPU), (GPU, HOST)])
def test_copies_take_as_long_as_a_device_needs(source: int, destination: int) -> None:
    num_slots = 64
    took = cuda_probe.copy_seconds(0, source, destination, MIB, num_slots, repeats=3)
    # no device copies 20 TB/s, and none that is of use less than 1 GB/s
    for seconds in (took.plain, took.slots):
        assert num_slots * MIB / 20e12 < seconds < num_slots * MIB / 1e9


def test_a_copy_of_twice_as_much_takes_about_twice_as_long() -> None:
    once, twice = (cuda_probe.copy_seconds(0, GPU, GPU, 2 * MIB, count, repeats=5) for count in (64, 128))
    assert 1.6 < twice.slots / once.slots < 2.4
    assert 1.6 < twice.plain / once.plain < 2.4


def test_bytes_that_do_not_arrive_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmcache.memory.cuda_copies import SlotCopier

    monkeypatch.setattr(SlotCopier, "copy", lambda self, batch, stream: None)
    with pytest.raises(WrongBytesError, match="did not arrive"):
        cuda_probe.copy_seconds(0, GPU, GPU, MIB, 8, repeats=1)


def test_too_much_memory_is_an_error_that_says_so() -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(MemoryError, match="MB of GPU memory"):
        cuda_probe.copy_seconds(0, GPU, GPU, 2 * MIB, total // (2 * MIB), repeats=1)


def test_the_doctor_measures_every_way_and_its_profile_is_whole(tmp_path: Path) -> None:
    diagnosis = examine(str(tmp_path))
    assert diagnosis.failures == []
    assert diagnosis.device == torch.cuda.get_device_name(0)
    for way in ("gpu", "host_to_gpu", "gpu_to_host", "host", "to_disk", "from_disk"):
        for slot_bytes in (None, SMALL_SLOT_BYTES, LARGE_SLOT_BYTES):
            assert (diagnosis.bytes_per_second(way, slot_bytes) or 0) > 0
    write_profile(tmp_path / "machine.json", diagnosis.to_json())
    assert read_profile(tmp_path / "machine.json").not_measured == ()


def test_a_device_that_is_not_there_is_a_line() -> None:
    diagnosis = examine(device_index=99)
    assert [(each.what, each.is_there) for each in diagnosis.findings if "99" in each.what] == [
        ("CUDA device 99", False)
    ]
    assert diagnosis.device is None
