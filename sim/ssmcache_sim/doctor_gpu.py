"""What torch and a CUDA device can do for `CudaMemory`, line by line, and how fast its copies are there."""

import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Protocol

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
from ssmcache_sim.sizes import format_size

_BYTES = 256 << 20  # of one copy
_REPEATS = 5
_PINNED_BYTES = 64 << 20  # as much as the ring of a disk tier
_GPU, _HOST = 0, 1
_DRIVER = Path("/proc/driver/nvidia/version")  # of the kernel's module; no library here tells it
_TIERS = {"gpu": (_GPU, _GPU), "host_to_gpu": (_HOST, _GPU), "gpu_to_host": (_GPU, _HOST)}

_NO_CUDA_MEMORY = "no CudaMemory; simulations and HostMemory do without"
_LINK_BY_KERNEL = "large slots go over the link as small ones do"
_PLAIN_POOLS = "GPU pools are plain torch memory, and a change of size copies them"


class Device(Protocol):
    """A CUDA device, see `cuda_probe.CudaDevice`."""

    index: int
    name: str
    capability: str
    total_bytes: int
    free_bytes: int


def gpu_findings(diagnosis: Diagnosis, load_probe: Callable[[], Any], device_index: int) -> tuple[Any, Device | None]:
    """Finds what there is. Returns the module that was asked, and the device to measure; None without one.

    Args:
        load_probe: gives `ssmcache.memory.cuda_probe`, or fails as its import does.
    """
    findings, software = diagnosis.findings, diagnosis.software
    try:
        probe = load_probe()
        why_not = probe.why_no_device()
    except Exception as error:  # an import can fail in as many ways as there are installations
        why = one_line(error) if "torch" in software else "not installed"
        findings.append(Finding("torch", False, why, _NO_CUDA_MEMORY))
        findings.append(Finding("CUDA device", False, "cannot be asked without torch", _NO_CUDA_MEMORY))
        findings.extend(_packages(software))
        return None, None
    built_for = probe.torch_cuda_version()
    if built_for:
        software["cuda"] = built_for
    build = f"for CUDA {built_for}" if built_for else "without CUDA"
    findings.append(Finding("torch", True, f"{software.get('torch', UNKNOWN_VERSION)}, {build}", ""))
    if why_not is not None:
        findings.append(Finding("CUDA device", False, why_not, _NO_CUDA_MEMORY))
        findings.extend(_packages(software))
        return probe, None
    device = _device(findings, probe, device_index)
    if device is not None:
        diagnosis.device = device.name
        findings.extend(_abilities(probe, device, software))
    return probe, device


def _abilities(probe: Any, device: Device, software: dict[str, str]) -> Iterator[Finding]:
    """What can be done with a device. Versions that are found on the way go into `software`."""
    questions: tuple[tuple[str, Callable[[], Finding], str], ...] = (
        ("CUDA driver", lambda: _driver(software), "CudaMemory may not work"),
        ("CUDA virtual memory", lambda: _virtual_memory(probe, device, software), _PLAIN_POOLS),
        ("copy engines", lambda: _copy_engine(probe, device), _LINK_BY_KERNEL),
        ("Triton", lambda: _triton(probe, device, software), "CudaMemory cannot copy slots: mend or remove Triton"),
        ("pinned memory", lambda: _pinned(probe), "no host tier and no disk tier of CudaMemory"),
    )
    for what, ask, meaning in questions:
        try:
            yield ask()
        except Exception as error:  # a driver fails in as many ways as there are drivers
            yield Finding(what, False, one_line(error), meaning)


def _packages(software: dict[str, str]) -> list[Finding]:
    """What has nothing to do without a device."""
    found = [
        Finding(what, package in software, software.get(package, "not installed"), "not used without a device")
        for what, package in (("CUDA virtual memory", "cuda-bindings"), ("Triton", "triton"))
    ]
    return [*found, Finding("pinned memory", False, "needs a device", "not used without one")]


def _device(findings: list[Finding], probe: Any, index: int) -> Device | None:
    try:
        devices: tuple[Device, ...] = probe.devices()
    except Exception as error:
        findings.append(Finding("CUDA device", False, one_line(error), _NO_CUDA_MEMORY))
        return None
    for each in devices:
        memory = f"{format_size(each.total_bytes)}, {format_size(each.free_bytes)} free"
        found = f"{each.name}, compute capability {each.capability}, {memory}"
        findings.append(
            Finding(f"CUDA device {each.index}", True, found, "measured below" if each.index == index else "")
        )
    chosen = next((each for each in devices if each.index == index), None)
    if chosen is None:
        why = f"expected one of {len(devices)} devices"
        findings.append(Finding(f"CUDA device {index}", False, why, "nothing is measured on a GPU"))
    return chosen


def driver_version(told: str) -> str | None:
    """The version in what the kernel tells of its NVIDIA driver, such as 580.95.05; None where there is none."""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", told)
    return found.group() if found else None


def _driver(software: dict[str, str]) -> Finding:
    try:
        told = _DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:  # a device can be there without it, in a container
        told = ""
    version = driver_version(told)
    if version is not None:
        software["nvidia-driver"] = version
    return Finding("CUDA driver", True, version or "does not tell its version", "")


def _virtual_memory(probe: Any, device: Device, software: dict[str, str]) -> Finding:
    page_bytes = probe.page_bytes(device.index)
    if page_bytes is None:
        return Finding("CUDA virtual memory", False, "cuda-bindings is not installed", _PLAIN_POOLS)
    found = f"cuda-bindings {software.get('cuda-bindings', UNKNOWN_VERSION)}, pages of {format_size(page_bytes)}"
    return Finding("CUDA virtual memory", True, found, "GPU pools grow and shrink where they are")


def _copy_engine(probe: Any, device: Device) -> Finding:
    if probe.has_copy_engine(device.index):
        return Finding("copy engines", True, "cuMemcpyBatchAsync", "large slots go over the link without a kernel")
    return Finding("copy engines", False, "needs cuda-bindings and a driver of CUDA 13", _LINK_BY_KERNEL)


def _triton(probe: Any, device: Device, software: dict[str, str]) -> Finding:
    probe.move_a_few_slots(device.index)
    if "triton" not in software:
        return Finding("Triton", False, "not installed", "torch copies slots, within the GPU at about half the speed")
    return Finding("Triton", True, software["triton"], "one launch copies a batch of slots")


def _pinned(probe: Any) -> Finding:
    probe.pin(_PINNED_BYTES)
    return Finding("pinned memory", True, f"{format_size(_PINNED_BYTES)} at once", "host tier, and buffers of the disk")


def gpu_rates(diagnosis: Diagnosis, probe: Any, device: Device, progress: Callable[[float], None]) -> None:
    """Times copies of `CudaMemory` beside plain ones of as many bytes, each way, with small and large slots.

    Args:
        progress: called with the share done, 0 to 1.
    """
    cases = list(product(_TIERS, (SMALL_SLOT_BYTES, LARGE_SLOT_BYTES)))
    for done, (way, slot_bytes) in enumerate(cases, start=1):
        with diagnosis.measuring(f"{WAYS[way]}, slots of {format_size(slot_bytes)}"):
            num_slots = _BYTES // slot_bytes
            took = probe.copy_seconds(device.index, *_TIERS[way], slot_bytes, num_slots, _REPEATS)
            diagnosis.measurements.append(Measurement(way, slot_bytes, _BYTES / took.slots))
            if slot_bytes == LARGE_SLOT_BYTES:
                diagnosis.measurements.append(Measurement(way, None, _BYTES / took.plain))
        progress(done / len(cases))
