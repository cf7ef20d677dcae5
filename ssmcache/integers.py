"""Integers as callers hand them in: Python's and NumPy's, within a range, and nothing else."""

import numpy as np

MAX_BLOCKS = 1 << 22
"""Blocks of one sequence at most: a billion activities then have times that stay below a rank."""


def is_integer(value: object) -> bool:
    """Whether a value is an integer of Python or NumPy. A bool is an int to Python, and certainly a mistake."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def to_integer(call: str, noun: str, value: object, low: int = 0, high: int | None = None) -> int:
    """A caller's integer as Python's. Errors: ValueError for anything else, and outside `low`..`high`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ValueError(f"{call}: expected {noun}, an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        limits = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{call}: expected {noun} {limits}, got {value!r}")
    return int(value)
