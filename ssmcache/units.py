"""Sizes of memory as people read them."""

UNLIMITED = "unlimited"
BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_size(num_bytes: int | None) -> str:
    """A size in binary units: `40 GiB`, `1.36 TiB`, `unlimited` for None."""
    if num_bytes is None:
        return UNLIMITED
    power = _power(num_bytes)
    return f"{num_bytes / 1024**power:.4g} {BINARY_UNITS[power]}"


def format_size_up(num_bytes: int) -> str:
    """A size that is enough where `num_bytes` are: rounded up to four digits."""
    power = _power(num_bytes)
    unit = 1024**power
    digits = max(0, 4 - len(str(num_bytes // unit)))
    rounded_up = -(-num_bytes * 10**digits // unit) / 10**digits
    return f"{rounded_up:g} {BINARY_UNITS[power]}"


def _power(num_bytes: int) -> int:
    return min(max(num_bytes.bit_length() - 1, 0) // 10, len(BINARY_UNITS) - 1)


def plural(count: int, noun: str) -> str:
    """`1 page`, `1,200 pages`: the noun takes an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
