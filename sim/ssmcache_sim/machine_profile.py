"""The JSON file of a machine: what `ssmcache doctor` found and measured there, and the bandwidths that replays use."""

import json
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ssmcache.memory.bandwidths import DEFAULT_BANDWIDTHS, BandwidthProfile
from ssmcache_sim.calibration import Calibration, calibration_from_json, finite_number
from ssmcache_sim.directories import TOOL, json_bytes, write_file
from ssmcache_sim.errors import OutputError, ProfileError
from ssmcache_sim.schemas import is_plain, shown

FORMAT = 1
BANDWIDTH_NAMES = tuple(field.name for field in fields(BandwidthProfile))
_KIND = "machine profile"
_MAX_BYTES_PER_SECOND = 1e18
_MAX_FILE_BYTES = 1 << 20  # a few kilobytes are usual; what is named by mistake may be huge


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """A profile read back.

    Attributes:
        device: name of its GPU; None if there was none.
        bandwidths: as measured; what was not measured is that of `DEFAULT_BANDWIDTHS`.
        not_measured: names of these, in the order of the fields.
        calibration: times of prefills there; None if they were not measured.
    """

    device: str | None
    bandwidths: BandwidthProfile
    not_measured: tuple[str, ...]
    calibration: Calibration | None = None


def profile_json(
    device: str | None,
    bandwidths: dict[str, float],
    software: dict[str, str],
    measurements: list[dict[str, Any]],
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """The object that the file holds.

    Args:
        bandwidths: by name of a field of `BandwidthProfile`, those that were measured.
        software: versions by name, for the record.
        measurements: for the record, rows of any keys.
    """
    return {
        "tool": TOOL,
        "kind": _KIND,
        "format": FORMAT,
        "device": device,
        "bandwidths": {name: bandwidths.get(name) for name in BANDWIDTH_NAMES},
        "software": software,
        "measurements": measurements,
        "calibration": None if calibration is None else calibration.to_json(),
    }


def check_profile_place(path: Path) -> None:
    """Errors: OutputError where a profile cannot be written, as far as can be told before, or another file lies."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            _load(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot write here: {error.strerror}") from error
    except ProfileError as error:
        raise OutputError(f"{path}: expected a new file or a profile to replace, got something else") from error


def write_profile(path: Path, profile: dict[str, Any]) -> None:
    """Whole or not at all. Errors: OutputError."""
    write_file(path, json_bytes(profile))


def read_profile(path: Path) -> MachineProfile:
    """Errors: ProfileError for a file that cannot be read, is no profile, or states an impossible bandwidth."""
    profile = _load(path)
    found = profile.get("format")
    if found != FORMAT or isinstance(found, bool):
        raise ProfileError(f"{path}: format: expected {FORMAT}, got {shown(found)}")
    device = profile.get("device")
    if not (device is None or (isinstance(device, str) and is_plain(device))):
        raise ProfileError(f"{path}: device: expected a name or null, got {shown(device)}")
    measured = _bandwidths(path, profile.get("bandwidths"))
    return MachineProfile(
        device=device,
        bandwidths=replace(DEFAULT_BANDWIDTHS, **measured),
        not_measured=tuple(name for name in BANDWIDTH_NAMES if name not in measured),
        calibration=_calibration(path, profile.get("calibration")),  # profiles of before have none
    )


def _load(path: Path) -> dict[str, Any]:
    """A profile of any format. Errors: ProfileError."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read: {error.strerror}") from error
    expected = f"expected a profile that `{TOOL} doctor --out` has written"
    if len(content) > _MAX_FILE_BYTES:
        raise ProfileError(f"{path}: {expected}, got more than {_MAX_FILE_BYTES} bytes")
    try:
        profile = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: {expected}, got no JSON: {error}") from error
    if not isinstance(profile, dict) or (profile.get("tool"), profile.get("kind")) != (TOOL, _KIND):
        raise ProfileError(f"{path}: {expected}, got JSON of something else")
    return profile


def _bandwidths(path: Path, stated: Any) -> dict[str, float]:
    """Those that are not null."""
    if not isinstance(stated, dict):
        raise ProfileError(f"{path}: bandwidths: expected an object, got {shown(stated)}")
    missing, unknown = set(BANDWIDTH_NAMES) - set(stated), set(stated) - set(BANDWIDTH_NAMES)
    if missing or unknown:
        raise ProfileError(
            f"{path}: bandwidths: expected {', '.join(BANDWIDTH_NAMES)}, got "
            + (f"none of {sorted(missing)[0]}" if missing else f"also {shown(sorted(unknown)[0])}")
        )
    return {name: _bandwidth(path, name, stated[name]) for name in BANDWIDTH_NAMES if stated[name] is not None}


def _calibration(path: Path, stated: Any) -> Calibration | None:
    if stated is None:
        return None
    try:
        return calibration_from_json(stated)
    except ValueError as error:
        raise ProfileError(f"{path}: calibration: {_cut(str(error))}") from error


def _bandwidth(path: Path, name: str, value: Any) -> float:
    number = finite_number(value)
    if number is None or number <= 0:
        raise ProfileError(f"{path}: {name}: expected a positive number or null, got {shown(value)}")
    if not 1 <= number <= _MAX_BYTES_PER_SECOND:  # times of copies would not be finite
        limits = f"1 to {_MAX_BYTES_PER_SECOND:g} bytes a second"
        raise ProfileError(f"{path}: {name}: expected {limits} or null, got {shown(value)}")
    return number


def _cut(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
