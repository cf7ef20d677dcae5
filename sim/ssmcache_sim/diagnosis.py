"""What `ssmcache doctor` says of a machine: findings, measured bandwidths, and the profile made of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from ssmcache_sim.calibration import Calibration
from ssmcache_sim.machine_profile import profile_json

# what is copied, as people read it; the order of tables
WAYS = {
    "gpu": "within the GPU",
    "host_to_gpu": "host to GPU",
    "gpu_to_host": "GPU to host",
    "host": "within the host",
    "to_disk": "to the disk",
    "from_disk": "from the disk",
}
UNKNOWN_VERSION = "of unknown version"
SMALL_SLOT_BYTES, LARGE_SLOT_BYTES = 64 << 10, 2 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a machine has (True), has not (False), or that was not asked (None).

    Attributes:
        found: version, name or size; or why it is not there.
        meaning: for ssmcache: what is used, or what is done instead.
    """

    what: str
    is_there: bool | None
    found: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """Payload a second in one direction, a key of `WAYS`, by slots of a memory of ours or by one plain copy (None)."""

    way: str
    slot_bytes: int | None
    bytes_per_second: float


@dataclass(slots=True)
class Diagnosis:
    """Everything, as it is found.

    Attributes:
        device: name of the GPU that was measured.
        software: versions by name.
        failures: what could not be measured, and why, one line each.
        notes: how things were measured, one line each.
        calibration: of prefills, if it was asked for and could be had.
    """

    device: str | None = None
    software: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    calibration: Calibration | None = None

    def bytes_per_second(self, way: str, slot_bytes: int | None) -> float | None:
        """None where it was not measured."""
        for each in self.measurements:
            if (each.way, each.slot_bytes) == (way, slot_bytes):
                return each.bytes_per_second
        return None

    @contextmanager
    def measuring(self, what: str) -> Iterator[None]:
        """Whatever goes wrong inside is one line: a probe may fail in every way that a driver or a disk has."""
        try:
            yield
        except Exception as error:
            self.failures.append((what, one_line(error)))

    def to_json(self) -> dict[str, Any]:
        """The profile for replays. Its bandwidths are those of large slots: what the memories reach where they can."""
        large = {f"{way}_bytes_per_second": self.bytes_per_second(way, LARGE_SLOT_BYTES) for way in WAYS}
        return profile_json(
            self.device,
            {name: round(value) for name, value in large.items() if value is not None},
            self.software,
            [{**asdict(each), "bytes_per_second": round(each.bytes_per_second)} for each in self.measurements],
            self.calibration,
        )


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
