"""What the doctor says of machines that are made up: without torch, with a GPU, with one that fails, with bad disks."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate, product, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ssmcache_sim.doctor_disk as doctor_disk
from ssmcache.memory.disk import DiskTier
from ssmcache_sim.diagnosis import LARGE_SLOT_BYTES, SMALL_SLOT_BYTES, Diagnosis, Finding
from ssmcache_sim.doctor import examine
from ssmcache_sim.doctor_disk import disk_rates
from ssmcache_sim.doctor_gpu import driver_version
from ssmcache_sim.machine_profile import BANDWIDTH_NAMES, read_profile, write_profile

MIB = 1 << 20
GPU, HOST = 0, 1
QUESTIONS = ("page_bytes", "has_copy_engine", "move_a_few_slots", "pin")


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that is so much later at each look."""
    times: Iterator[float] = accumulate(repeat(seconds))
    return lambda: next(times)


def no_torch() -> Any:
    raise ModuleNotFoundError("No module named 'torch'")


def fake_probe(**changes: Any) -> SimpleNamespace:
    """A GPU with 1 TB/s, of which slots reach a half; 50 GB/s to it and 40 GB/s from it, all of it by slots."""
    rates = {(GPU, GPU): 1e12, (HOST, GPU): 50e9, (GPU, HOST): 40e9}

    def copy_seconds(
        index: int, source: int, destination: int, slot_bytes: int, num_slots: int, repeats: int
    ) -> SimpleNamespace:
        assert index == 0
        plain = slot_bytes * num_slots / rates[source, destination]
        return SimpleNamespace(plain=plain, slots=plain * (2 if source == destination else 1))

    device = SimpleNamespace(index=0, name="Fake GPU", capability="9.0", total_bytes=80 << 30, free_bytes=79 << 30)
    functions = {
        "why_no_device": lambda: None,
        "torch_cuda_version": lambda: "13.0",
        "devices": lambda: (device,),
        "page_bytes": lambda index: 2 * MIB,
        "has_copy_engine": lambda index: True,
        "move_a_few_slots": lambda index: None,
        "pin": lambda num_bytes: None,
        "copy_seconds": copy_seconds,
    }
    return SimpleNamespace(**{**functions, **changes})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host copies of 4 MiB: what is measured here is not this machine."""
    monkeypatch.setattr("ssmcache_sim.doctor._HOST_BYTES", 4 * MIB)


def finding(diagnosis: Diagnosis, what: str) -> Finding:
    (found,) = [each for each in diagnosis.findings if each.what == what]
    return found


@pytest.mark.usefixtures("small")
def test_without_torch_each_part_is_a_line_and_the_host_is_measured() -> None:
    diagnosis = examine(gpu_probe=no_torch)
    missing = [each.what for each in diagnosis.findings if each.is_there is False]
    assert {"CUDA device", "pinned memory", "torch"} <= set(missing)
    assert finding(diagnosis, "disk").is_there is None
    assert diagnosis.failures == []
    assert {each.way for each in diagnosis.measurements} == {"host"}
    assert diagnosis.to_json()["bandwidths"] == dict.fromkeys(BANDWIDTH_NAMES)


@pytest.mark.usefixtures("small")
def test_a_torch_that_cannot_be_imported_or_asked_is_a_line_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("libcudart.so.13: cannot open shared object file\nand more")

    monkeypatch.setattr("ssmcache_sim.doctor.metadata.version", lambda name: "1.2.3")
    assert finding(examine(gpu_probe=broken), "torch").found == "libcudart.so.13: cannot open shared object file"
    asked = examine(gpu_probe=lambda: fake_probe(why_no_device=lambda: "torch is built without CUDA"))
    assert finding(asked, "CUDA device") == Finding(
        "CUDA device", False, "torch is built without CUDA", "no CudaMemory; simulations and HostMemory do without"
    )
    assert finding(asked, "Triton") == Finding("Triton", True, "1.2.3", "not used without a device")


@pytest.mark.usefixtures("small")
def test_a_gpu_s_bandwidths_are_bytes_over_seconds_and_large_slots_make_the_profile(tmp_path: Path) -> None:
    diagnosis = examine(gpu_probe=fake_probe)
    assert diagnosis.bytes_per_second("gpu", None) == pytest.approx(1e12)
    for slot_bytes in (SMALL_SLOT_BYTES, LARGE_SLOT_BYTES):
        assert diagnosis.bytes_per_second("gpu", slot_bytes) == pytest.approx(0.5e12)
        assert diagnosis.bytes_per_second("host_to_gpu", slot_bytes) == pytest.approx(50e9)
        assert diagnosis.bytes_per_second("gpu_to_host", slot_bytes) == pytest.approx(40e9)
    write_profile(tmp_path / "machine.json", diagnosis.to_json())
    machine = read_profile(tmp_path / "machine.json")
    assert machine.device == "Fake GPU"
    assert machine.not_measured == ("to_disk_bytes_per_second", "from_disk_bytes_per_second")
    measured = machine.bandwidths
    assert (measured.gpu_bytes_per_second, measured.host_to_gpu_bytes_per_second) == (0.5e12, 50e9)
    assert measured.gpu_to_host_bytes_per_second == 40e9


@pytest.mark.usefixtures("small")
def test_what_a_gpu_cannot_do_says_what_is_done_instead() -> None:
    probe = fake_probe(page_bytes=lambda index: None, has_copy_engine=lambda index: False)
    diagnosis = examine(gpu_probe=lambda: probe)
    pages, engines = finding(diagnosis, "CUDA virtual memory"), finding(diagnosis, "copy engines")
    assert (pages.is_there, engines.is_there) == (False, False)
    assert "plain torch memory" in pages.meaning
    assert "as small ones do" in engines.meaning


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("broken", [*QUESTIONS, "devices", "copy_seconds", "all"])
def test_whatever_fails_on_a_gpu_is_a_line(broken: str) -> None:
    def fail(*arguments: object) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access\nCUDA kernel errors might be reported later")

    names = [*QUESTIONS, "copy_seconds"] if broken == "all" else [broken]
    diagnosis = examine(gpu_probe=lambda: fake_probe(**dict.fromkeys(names, fail)))
    said = [each.found for each in diagnosis.findings if each.is_there is False]
    wrong = [text for text in [*said, *(why for _, why in diagnosis.failures)] if "CUDA error" in text]
    assert wrong == ["CUDA error: an illegal memory access"] * {"all": 4 + 6, "copy_seconds": 6}.get(broken, 1)
    assert diagnosis.bytes_per_second("host", LARGE_SLOT_BYTES) is not None


@pytest.mark.usefixtures("small")
def test_a_device_that_is_not_there_is_a_line() -> None:
    diagnosis = examine(device_index=3, gpu_probe=fake_probe)
    assert finding(diagnosis, "CUDA device 0").is_there
    assert finding(diagnosis, "CUDA device 3").found == "expected one of 1 devices"
    assert diagnosis.device is None
    assert {each.way for each in diagnosis.measurements} == {"host"}


@pytest.mark.usefixtures("small")
def test_too_little_host_memory_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmcache_sim.doctor.HostMemory.resize", lambda self, tier, num_slots: False)
    diagnosis = examine(gpu_probe=no_torch)
    assert [what for what, _ in diagnosis.failures] == [
        "within the host, slots of 64 KiB",
        "within the host, slots of 2 MiB",
    ]
    assert all(why == "expected 8 MiB of memory, got less" for _, why in diagnosis.failures)


@pytest.mark.usefixtures("small")
def test_host_rates_follow_from_the_clock() -> None:
    diagnosis = examine(gpu_probe=no_torch, clock=ticking(0.5))
    assert {each.bytes_per_second for each in diagnosis.measurements} == {4 * MIB / 0.5}
    assert len(diagnosis.measurements) == 3


@pytest.mark.usefixtures("small")
def test_progress_goes_from_nothing_to_all() -> None:
    shown: list[int] = []
    examine(gpu_probe=fake_probe, progress=shown.append)
    assert shown == sorted(shown)
    assert shown[-1] == 100


def test_disk_rates_follow_from_the_clock_and_a_slow_disk_gets_little_to_do(tmp_path: Path) -> None:
    # each way takes half a second: the first 8 MiB are as much as can be moved in that time, and 12 looks at the clock
    # later the first round is over and has taken longer than five seconds
    rates = disk_rates(str(tmp_path), ticking(0.5))
    copies = product(("to_disk", "from_disk"), (None, SMALL_SLOT_BYTES, LARGE_SLOT_BYTES))
    assert {(each.way, each.slot_bytes) for each in rates.measurements} == set(copies)
    assert {each.bytes_per_second for each in rates.measurements} == {8 * MIB / 0.5}
    assert rates.written_bytes == (1 + 3) * 8 * MIB


def test_a_fast_disk_gets_two_rounds_and_no_more_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_disk, "MAX_BYTES", 16 * MIB)
    rates = disk_rates(str(tmp_path), ticking(0.001))
    assert [each.bytes_per_second for each in rates.measurements] == pytest.approx([16 * MIB / 0.001] * 6)
    assert rates.written_bytes == 8 * MIB + 6 * 16 * MIB


def test_nothing_has_a_name_while_a_disk_is_measured_nor_after(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    clock = ticking(0.5)

    def look() -> float:
        seen.append(os.listdir(tmp_path))
        return clock()

    disk_rates(str(tmp_path), look)
    assert len(seen) > 10
    assert [names for names in seen if names] == []
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["missing", "a file", "full"])
def test_a_disk_that_cannot_be_used_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path, said = tmp_path, "expected 16 MiB of free space, got 3"
    if kind == "missing":
        path, said = tmp_path / "none", "No such file or directory"
    elif kind == "a file":
        path, said = tmp_path / "file", "Not a directory"
        path.write_text("")
    else:
        space = SimpleNamespace(f_bavail=3 * 256, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda path: space)
    diagnosis = examine(str(path), gpu_probe=no_torch)
    assert finding(diagnosis, "disk") == Finding("disk", False, f"{path}: {said}", "no disk tier there")
    assert {each.way for each in diagnosis.measurements} == {"host"}


FULL_DISK = """
import resource, sys
from itertools import count
from ssmcache_sim.doctor import examine
def no_gpu():
    raise ImportError
# a fast disk, by this clock: it is to take as much as any
clock = count(0, 0.001).__next__
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
(found,) = [each for each in examine(sys.argv[1], clock=clock, gpu_probe=no_gpu).findings if each.what == "disk"]
print(found.is_there, found.found)
"""


@pytest.mark.parametrize("limit_mib", [4, 12])
def test_a_disk_that_fills_up_while_it_is_measured_is_a_line(tmp_path: Path, limit_mib: int) -> None:
    # the first 8 MiB do not fit, or a later piece does not
    script = FULL_DISK.format(limit=limit_mib * MIB)
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout == f"False {tmp_path}: File too large\n"
    assert os.listdir(tmp_path) == []


def test_slots_for_which_the_space_runs_out_are_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiskTier, "resize", lambda self, num_slots: False)
    with pytest.raises(OSError, match="No space left on device"):
        disk_rates(str(tmp_path), ticking(0.5))
    assert os.listdir(tmp_path) == []


def test_a_disk_that_gives_back_other_bytes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = DiskTier.read

    def flip(self: DiskTier, layer_group: int, slots: Any, rows: Any) -> dict[int, str]:
        lost = read(self, layer_group, slots, rows)
        rows[0, 0] ^= 1
        return lost

    monkeypatch.setattr(DiskTier, "read", flip)
    with pytest.raises(Exception, match="what came from the disk is not what went there"):
        disk_rates(str(tmp_path), ticking(0.5))


@pytest.mark.parametrize(
    ("told", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", "550.54.15"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12.3",
            "580.95.05",
        ),
        ("NVRM version: NVIDIA UNIX aarch64 Kernel Module  570.124  x", "570.124"),
        ("something else\nGCC version:  gcc version 12.3.0\n", None),
        ("", None),
    ],
)
def test_the_driver_s_version_is_found_in_what_the_kernel_tells(told: str, version: str | None) -> None:
    assert driver_version(told) == version
