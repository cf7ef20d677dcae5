"""The contract of a memory. One contract test runs on every implementation."""

from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ssmcache.config import CacheTierConfig

GPU_TIER = 0
MovedSlots: TypeAlias = "Sequence[int] | array[int] | npt.NDArray[np.integer]"


class TransferError(Exception):
    """A copy from or to a tier failed, such as a file that cannot be read or a disk that is full.

    Attributes:
        tier: index of the tier at fault.
        lost: positions in the batch whose source cannot be read, ascending; empty if it was a destination that could
            not be written. Either way every source is as it was and no destination may be used.
    """

    def __init__(self, tier: int, lost: Sequence[int], reason: str) -> None:
        super().__init__(reason)
        self.tier = tier
        self.lost = tuple(lost)


class SlotMoves(NamedTuple):
    """A batch of copies between the slots of one pool: slot `sources[i]` of one tier to slot `destinations[i]` of
    another or the same. No destination is a source of the batch, and none comes twice. Arrays are lent until the call
    returns.
    """

    pool: int
    source_tier: int
    sources: MovedSlots
    destination_tier: int
    destinations: MovedSlots


def check_any_stream(call: str, stream: Any) -> None:
    """`Memory.check_stream` where copies happen in order anyway: whatever a dict can know is a stream."""
    try:
        hash(stream)
    except TypeError:
        raise TypeError(f"{call}: expected a hashable stream, got {stream!r}") from None


class Copier(Protocol):
    """Whoever takes orders for copies."""

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        """See `Memory.copy`."""


class Memory(Protocol):
    """Owns the bytes of all pools: for each tier several pools of equal slots, numbered from 0, that layer groups
    have or share.

    The manager decides; a memory executes. No decision may depend on when a copy ends: an event is only ever handed to
    `wait`. Calls come from one thread at a time. A stream is whatever the memory takes for one; None is its default.
    """

    def open(self, tiers: Sequence[CacheTierConfig], slot_bytes: Sequence[int]) -> None:
        """Get ready for these tiers, the first being the GPU, and for pools in each of them whose slots have so many
        bytes. All pools are empty until `resize`. Called once.

        Errors: ValueError for a tier that this memory cannot play; nothing is kept then.
        """

    def grain(self, tier: int) -> int:
        """Bytes that the size of a pool of this tier is rounded up to; 1 where any size will do."""

    def resize(self, tier: int, num_slots: Sequence[int | None]) -> bool:
        """Give the pools of a tier so many slots each (None: unlimited, which only a simulation can promise). What lies
        in slots that remain stays as it is. All pools or none: False if there is not enough.

        Errors: ValueError for an unlimited pool that cannot be.
        """

    def check_stream(self, call: str, stream: Any) -> None:
        """Errors: TypeError or ValueError, naming the call of a caller, for anything that the other calls do not take
        as a stream.
        """

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        """Queue a batch of copies on `stream`: it sees what was queued there before, and what is queued there later
        sees it.

        Errors: TransferError. A memory may find out later that a source could not be read: then the slots that it was
        to fill are lost, and the copy that reads one of them says so.
        """

    def record(self, stream: Any) -> Any:
        """An event: all that was queued on `stream` so far."""

    def wait(self, stream: Any, event: Any) -> None:
        """Make what is queued on `stream` from now on wait for `event`, without blocking the caller."""

    def view(self, pool: int) -> Any:
        """A pool of the GPU as an array of bytes, [num_slots, slot_bytes], not a copy; None if there are no
        bytes. It is good until the next `resize`.
        """

    def loads(self) -> Sequence[Future[Any]]:
        """What is still being read from files for copies that were queued; once all of it is done, a copy from where it
        goes to waits for no file. For callers that have other work meanwhile: no decision depends on it.
        """

    @property
    def bytes_in_use(self) -> int:
        """Bytes of all pools that have a limit, as they are taken from the system."""

    def close(self) -> None:
        """Give everything back, files included. Safe to call twice."""
