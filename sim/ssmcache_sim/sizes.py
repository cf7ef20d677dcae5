"""Sizes of memory as people write them: `40GiB`, `1.5TB`, `512MB`, plain bytes, `unlimited`."""

import re
from decimal import Decimal

from ssmcache_sim.errors import SizeError

UNLIMITED = "unlimited"
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_BYTES_PER_UNIT = {
    **{unit.lower(): 1024**power for power, unit in enumerate(_BINARY_UNITS)},
    **{unit.lower(): 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB", "PB"))},
}
_EXPECTED_LIMITED = "a size such as 40GiB, 1.5TB, 512MB, a number of bytes"
_EXPECTED = f"{_EXPECTED_LIMITED}, or unlimited"
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)", re.ASCII)
_MAX_BYTES = 1 << 62  # products of sizes and counts must stay within 64 bits


def parse_size(text: str) -> int | None:
    """Bytes of a written size, None for `unlimited`. Fractions of a byte are cut off.

    Errors: SizeError unless it is a known unit and at least one byte.
    """
    if text.strip().lower() == UNLIMITED:
        return None
    return _parse_bytes(text, "memory size", _EXPECTED)


def parse_tier_size(text: str, what: str) -> int:
    """Bytes of a tier below the GPU; 0 where it is written as 0: no such tier.

    Errors: SizeError naming `what`, also for `unlimited`: only the GPU can be.
    """
    return 0 if text.strip() == "0" else _parse_bytes(text, what, f"{_EXPECTED_LIMITED}, or 0 for none")


def _parse_bytes(text: str, what: str, expected: str) -> int:
    stripped = text.strip()
    match = _SIZE.fullmatch(stripped)
    unit = (match.group(2).lower() or "b") if match else ""
    if match is None or unit not in _BYTES_PER_UNIT:
        raise SizeError(f"{what}: expected {expected}, got {text!r}")
    num_bytes = int(Decimal(match.group(1)) * _BYTES_PER_UNIT[unit])
    if not 1 <= num_bytes <= _MAX_BYTES:
        raise SizeError(f"{what}: expected between 1 byte and {format_size(_MAX_BYTES)}, got {text!r}")
    return num_bytes


def format_size(num_bytes: int | None) -> str:
    """A size for people, in binary units: `40 GiB`, `1.36 TiB`, `unlimited` for None."""
    if num_bytes is None:
        return UNLIMITED
    power = _power(num_bytes)
    return f"{num_bytes / 1024**power:.4g} {_BINARY_UNITS[power]}"


def format_size_up(num_bytes: int) -> str:
    """A size for people that is enough where `num_bytes` are: rounded up to four digits."""
    power = _power(num_bytes)
    unit = 1024**power
    digits = max(0, 4 - len(str(num_bytes // unit)))
    rounded_up = -(-num_bytes * 10**digits // unit) / 10**digits
    return f"{rounded_up:g} {_BINARY_UNITS[power]}"


def _power(num_bytes: int) -> int:
    return min(max(num_bytes.bit_length() - 1, 0) // 10, len(_BINARY_UNITS) - 1)
