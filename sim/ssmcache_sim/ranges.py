"""Lists and ranges of values for a sweep, as written on a command line.

A list is comma-separated. Each item is a value or a range: `512:8192:x2` is 512, 1024, ... 8192 (geometric, up to
the end and including it where it is met); `5GiB:80GiB:8` is 8 sizes from 5 to 80 GiB, equally spaced on a
logarithmic axis, both ends included.
"""

from ssmcache_sim.errors import SizeError
from ssmcache_sim.sizes import parse_size, parse_tier_size

_MAX_VALUES = 10_000


def parse_int_values(text: str, what: str) -> tuple[int, ...]:
    """Values of a list such as `512,1024` or `512:8192:x2`, each once, in the order written.

    Errors: SizeError naming `what`.
    """
    values: list[int] = []
    for item in text.split(","):
        parts = item.strip().split(":")
        if len(parts) == 1:
            values.append(_positive_int(parts[0], what))
        elif len(parts) == 3 and parts[2][:1] == "x":
            values.extend(_geometric(item, parts, what))
        else:
            raise SizeError(f"{what}: expected a list (512,1024) or a range (512:8192:x2), got {item.strip()!r}")
    return tuple(dict.fromkeys(values))


def parse_size_values(text: str, what: str) -> tuple[int | None, ...]:
    """Bytes of a list such as `10GiB,40GiB`, `5GiB:80GiB:8` or `unlimited` (None), each once, in the order written.

    Errors: SizeError naming `what`.
    """
    values: list[int | None] = []
    for item in text.split(","):
        parts = item.strip().split(":")
        if len(parts) == 1:
            values.append(parse_size(parts[0]))
        elif len(parts) == 3:
            values.extend(_log_spaced(item, parts, what))
        else:
            raise SizeError(f"{what}: expected a list (10GiB,40GiB) or a range (5GiB:80GiB:8), got {item.strip()!r}")
    return tuple(dict.fromkeys(values))


def parse_tier_size_values(text: str, what: str) -> tuple[int, ...]:
    """Bytes of a tier below the GPU, of a list such as `0,40GiB` or `40GiB:320GiB:4`; 0: no such tier.

    Errors: SizeError naming `what`, also for `unlimited`.
    """
    values: list[int] = []
    for item in text.split(","):
        if ":" in item:
            values.extend(size for size in parse_size_values(item, what) if size is not None)
        else:
            values.append(parse_tier_size(item, what))
    return tuple(dict.fromkeys(values))


def _positive_int(text: str, what: str) -> int:
    stripped = text.strip()
    if not (stripped.isascii() and stripped.isdigit() and 0 < len(stripped) <= 18 and int(stripped) > 0):
        raise SizeError(f"{what}: expected a positive integer, got {stripped!r}")
    return int(stripped)


def _geometric(item: str, parts: list[str], what: str) -> list[int]:
    first, last, factor = (_positive_int(part, what) for part in (parts[0], parts[1], parts[2][1:]))
    if first > last or factor < 2:
        raise SizeError(f"{what}: expected a rising range such as 512:8192:x2, got {item.strip()!r}")
    values = [first]
    while values[-1] * factor <= last:
        values.append(values[-1] * factor)
    return values


def _log_spaced(item: str, parts: list[str], what: str) -> list[int]:
    first, last, count = parse_size(parts[0]), parse_size(parts[1]), _positive_int(parts[2], what)
    if first is None or last is None or first >= last or not 2 <= count <= _MAX_VALUES:
        raise SizeError(
            f"{what}: expected a rising range of 2 or more sizes such as 5GiB:80GiB:8, got {item.strip()!r}"
        )
    steps = count - 1
    inner = [round(first * (last / first) ** (step / steps)) for step in range(1, steps)]
    return [first, *inner, last]
