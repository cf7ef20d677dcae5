"""How fast bytes move between tiers: what a simulation assumes, and what `ssmcache doctor` measures."""

import math
from dataclasses import dataclass, fields

from ssmcache.config import CacheTierConfig, DiskCacheTierConfig, HostCacheTierConfig


@dataclass(frozen=True, slots=True)
class BandwidthProfile:
    """What copies move, in bytes of payload a second. The defaults are ceilings measured on one H100.

    Attributes:
        gpu_bytes_per_second: within the GPU. 2.7 TB/s were measured, bytes read plus bytes written
            (docs/measurements.md): half of it.
        gpu_to_host_bytes_per_second, host_to_gpu_bytes_per_second: over the link. Within the host the GPU copies over
            the same link, both ways at once: at the slower of the two.
        to_disk_bytes_per_second, from_disk_bytes_per_second: whatever is at the other end: the link is no limit to it.

    Errors: ValueError for anything but positive, finite numbers.
    """

    gpu_bytes_per_second: float = 1.35e12
    gpu_to_host_bytes_per_second: float = 54.6e9
    host_to_gpu_bytes_per_second: float = 54.6e9
    to_disk_bytes_per_second: float = 1.1e9
    from_disk_bytes_per_second: float = 1.1e9

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field.name}: expected a positive number, got {value!r}")

    def between(self, source: CacheTierConfig, destination: CacheTierConfig) -> float:
        """Bytes a second from a tier to a tier, or within one. A copy within the disk counts as one to it."""
        if isinstance(destination, DiskCacheTierConfig):
            return self.to_disk_bytes_per_second
        if isinstance(source, DiskCacheTierConfig):
            return self.from_disk_bytes_per_second
        match isinstance(source, HostCacheTierConfig), isinstance(destination, HostCacheTierConfig):
            case False, False:
                return self.gpu_bytes_per_second
            case False, True:
                return self.gpu_to_host_bytes_per_second
            case True, False:
                return self.host_to_gpu_bytes_per_second
        return min(self.gpu_to_host_bytes_per_second, self.host_to_gpu_bytes_per_second)


DEFAULT_BANDWIDTHS = BandwidthProfile()
