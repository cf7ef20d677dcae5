"""A device and its events, as torch has them."""

from __future__ import annotations

import torch


def recorded(stream: torch.cuda.Stream, blocking: bool = False) -> torch.cuda.Event:
    """`blocking`: a thread that waits for it sleeps."""
    event = torch.cuda.Event(blocking=blocking)
    event.record(stream)
    return event


def cuda_device(device: torch.device | str | int | None) -> torch.device:
    """Errors: ValueError."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    expected = f"expected one of {count} CUDA devices" if count else "expected a CUDA device, but torch sees none"
    try:
        asked = torch.device("cuda") if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: {expected}, got {device!r}") from error
    if asked.type != "cuda" or not count or (asked.index or 0) >= count:
        raise ValueError(f"device: {expected}, got {device!r}")
    return torch.device("cuda", torch.cuda.current_device() if asked.index is None else asked.index)
