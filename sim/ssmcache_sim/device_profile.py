"""How fast a device prefills and copies, as the cost model takes it."""

from dataclasses import dataclass, replace

from ssmcache.memory.bandwidths import DEFAULT_BANDWIDTHS, BandwidthProfile
from ssmcache_sim.calibration import Calibration
from ssmcache_sim.machine_profile import MachineProfile


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """How fast a device is.

    Attributes:
        peak_flops_per_second: of dense matrix products in the model's dtype.
        utilisation: share of the peak that a whole prefill sustains, 0..1.
        bandwidths: of copies within the GPU, and up to it.
        launch_seconds: before a copy of one snapshot moves a byte.
        pass_tokens: the most tokens of one prompt in one pass over the layers, a setting of the engine.
        pass_seconds: what one pass costs beyond its operations.
        attention_factor: time of an operation between queries and keys, as multiples of one of a linear layer.
        cached_attention_factor: the same, in passes behind cached tokens: libraries have other kernels for them.
        pass_floor_seconds: the least that a pass takes, however few its tokens: what the host needs to launch it.
    """

    name: str
    peak_flops_per_second: float
    utilisation: float
    bandwidths: BandwidthProfile
    launch_seconds: float
    pass_tokens: int
    pass_seconds: float
    attention_factor: float = 1.0
    cached_attention_factor: float = 1.0
    pass_floor_seconds: float = 0.0


# Peak: NVIDIA's data sheet of the H100 SXM, bf16 without sparsity. Copies: measured. Tokens of a pass: vLLM's default
# when it serves on such a device (max_num_batched_tokens). Utilisation, launch and time of a pass are round estimates,
# not measurements: compiled prefills reach about half of the peak; a pass has some thousand launches, or reads the
# 16 GB of an 8B model's weights once more, which takes 6 ms.
H100 = DeviceProfile(
    name="H100 SXM",
    peak_flops_per_second=989e12,
    utilisation=0.5,
    bandwidths=DEFAULT_BANDWIDTHS,
    launch_seconds=10e-6,
    pass_tokens=8192,
    pass_seconds=5e-3,
)


def with_copies_of(device: DeviceProfile, machine: MachineProfile) -> DeviceProfile:
    """The device with copies as they were measured on a machine; as it is where none were measured on a GPU."""
    if "gpu_bytes_per_second" in machine.not_measured:
        return device
    name = f"{device.name} with the copies of {machine.device}"
    return replace(device, name=name, bandwidths=machine.bandwidths)


def calibrated(device: DeviceProfile, calibration: Calibration) -> DeviceProfile:
    """The device with prefills as they were measured: its rate is what they sustained, not a peak."""
    return replace(
        device,
        name=f"{device.name}, calibrated with {calibration.model}",
        peak_flops_per_second=calibration.flops_per_second,
        utilisation=1.0,
        pass_seconds=calibration.pass_seconds,
        attention_factor=calibration.attention_factor,
        cached_attention_factor=calibration.cached_attention_factor,
        pass_floor_seconds=calibration.pass_floor_seconds,
    )
