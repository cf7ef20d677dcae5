"""Sizes of memory as people read them."""

UNLIMITED = "unlimited"
BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_size(num_bytes: int | None) -> str:
    """A size in binary units: `40 GiB`, `1.36 TiB`, `unlimited` for None."""
    if num_bytes is None:
        return UNLIMITED
    power = min(max(num_bytes.bit_length() - 1, 0) // 10, len(BINARY_UNITS) - 1)
    return f"{num_bytes / 1024**power:.4g} {BINARY_UNITS[power]}"


def plural(count: int, noun: str) -> str:
    """`1 page`, `1,200 pages`: the noun takes an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
