"""What this machine can do for ssmcache: what is there, what is done where something is missing, how fast copies are.

Nothing that is wrong with the machine is an error here: each finding and each failed measurement is a line. A GPU is
asked through `ssmcache.memory.cuda_probe`, which needs torch and is imported only here.
"""

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import numpy as np

from ssmcache.config import GpuCacheTierConfig, HostCacheTierConfig
from ssmcache.memory.host import HostMemory
from ssmcache.memory.slot_timing import RandomMoves, check_moved, medians, wall_seconds
from ssmcache_sim.diagnosis import (
    LARGE_SLOT_BYTES,
    SMALL_SLOT_BYTES,
    UNKNOWN_VERSION,
    WAYS,
    Diagnosis,
    Finding,
    Measurement,
    one_line,
)
from ssmcache_sim.doctor_disk import Clock, disk_rates
from ssmcache_sim.doctor_gpu import gpu_findings, gpu_rates
from ssmcache_sim.sizes import format_size

_GPU, _HOST = 0, 1
_HOST_BYTES = 128 << 20  # of one copy; four times as much is in use
_HOST_REPEATS = 3
_MODULES = {"numpy": "numpy", "torch": "torch", "triton": "triton", "cuda-bindings": "cuda.bindings"}


def import_gpu_probe() -> Any:
    """Errors: ImportError without torch, and whatever a broken one raises."""
    return import_module("ssmcache.memory.cuda_probe")


def examine(
    disk_path: str | None = None,
    device_index: int = 0,
    progress: Callable[[int], None] = lambda percentage: None,
    clock: Clock = time.perf_counter,
    gpu_probe: Callable[[], Any] = import_gpu_probe,
) -> Diagnosis:
    """Look at everything and measure what can be measured.

    Args:
        disk_path: a directory to write to; None: no disk is measured.
        device_index: the CUDA device whose copies are timed.
        progress: called now and then with the percentage done.
        clock: seconds, for what the host does.
        gpu_probe: gives the module to ask, or fails as its import does.

    Cost: at most 512 MiB of host memory, with a GPU 1 GiB on it and 512 MiB of pinned memory, and 0.8 GB written to the
    disk; a few seconds, or about 20 where torch has to start and Triton to compile.
    """
    diagnosis = Diagnosis(software={"python": platform.python_version(), **_versions()})
    diagnosis.findings += [_python(), _numpy()]
    progress(2)
    probe, device = gpu_findings(diagnosis, gpu_probe, device_index)
    progress(20)
    if device is not None:
        gpu_rates(diagnosis, probe, device, lambda share: progress(20 + round(45 * share)))
    progress(65)
    _measure_host(diagnosis, clock)
    progress(75)
    diagnosis.findings.append(_measure_disk(diagnosis, disk_path, clock))
    progress(100)
    return diagnosis


def _versions() -> dict[str, str]:
    """Of what is installed. A module may come from a package of another name, which tells no version."""
    found = {}
    for package, module in _MODULES.items():
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            with suppress(ModuleNotFoundError):  # of a parent
                if find_spec(module) is not None:
                    found[package] = UNKNOWN_VERSION
    return found


def _python() -> Finding:
    where = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return Finding("Python", True, f"{platform.python_version()}, {where}", "")


def _numpy() -> Finding:
    return Finding("NumPy", True, np.__version__, "simulations and HostMemory need no more")


def _measure_host(diagnosis: Diagnosis, clock: Clock) -> None:
    """Copies by one thread of NumPy: what `HostMemory` does between its tiers."""
    for slot_bytes in (SMALL_SLOT_BYTES, LARGE_SLOT_BYTES):
        with diagnosis.measuring(f"{WAYS['host']}, slots of {format_size(slot_bytes)}"):
            plain, slots = _host_seconds(slot_bytes, clock)
            diagnosis.measurements.append(Measurement("host", slot_bytes, _HOST_BYTES / slots))
            if slot_bytes == LARGE_SLOT_BYTES:
                diagnosis.measurements.append(Measurement("host", None, _HOST_BYTES / plain))


def _host_seconds(slot_bytes: int, clock: Clock) -> tuple[float, float]:
    """Of a plain copy, and of a batch of slots. Errors: MemoryError; WrongBytesError."""
    num_slots = _HOST_BYTES // slot_bytes
    memory = HostMemory()
    memory.open([GpuCacheTierConfig(1), HostCacheTierConfig(1)], [slot_bytes])
    if not (memory.resize(_GPU, [num_slots + 1]) and memory.resize(_HOST, [num_slots])):
        raise MemoryError(f"expected {2 * _HOST_BYTES >> 20} MiB of memory, got less")
    pool = memory.view(0)
    pool[...] = np.random.default_rng(0).integers(0, 256, pool.shape, dtype=np.uint8)
    moves = RandomMoves(_GPU, _HOST, num_slots)
    into = np.empty_like(pool[:num_slots])

    def plain_copy() -> None:
        into[...] = pool[:num_slots]

    def slot_copies() -> None:
        memory.copy(moves.next(), None)

    plain, slots = medians(_HOST_REPEATS, partial(wall_seconds, clock=clock), plain_copy, slot_copies)
    check_moved(memory, moves.last, scratch=num_slots)
    memory.close()
    return plain, slots


def _measure_disk(diagnosis: Diagnosis, path: str | None, clock: Clock) -> Finding:
    """Measures a disk, and says what it is. Its failure is the finding."""
    if path is None:
        return Finding("disk", None, "not asked", "`--disk-path DIR` measures the disk of a directory")
    try:
        rates = disk_rates(path, clock)
        space = os.statvfs(path)
    except Exception as error:  # a disk fails in as many ways as there are disks
        return Finding("disk", False, f"{path}: {one_line(error)}", "no disk tier there")
    diagnosis.measurements += rates.measurements
    diagnosis.notes.append(
        f"Disk: {rates.written_bytes / 1e6:,.0f} MB were written to files without a name and are gone. Writes end with "
        "fsync; "
        + (
            "before reads the system dropped the file from its memory (POSIX_FADV_DONTNEED)."
            if rates.is_uncached
            else "reads may come from the system's memory, which keeps the file or does not tell."
        )
    )
    return Finding("disk", True, f"{path}, {format_size(space.f_bavail * space.f_frsize)} free", "a disk tier")
