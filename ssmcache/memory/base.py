"""The contract of a memory. One contract test runs on every implementation."""

from collections.abc import Sequence
from typing import Any, Protocol


class Memory(Protocol):
    """Owns the bytes of all pools. The manager decides; a memory executes.

    No decision may depend on when a copy ends: an event is only ever handed to `wait`.
    """

    def reserve(self, layer_group: int, slot_bytes: int, num_slots: int | None) -> None:
        """Provide a pool of `num_slots` slots (None: unlimited, which only a simulation can promise).

        Errors: ValueError if this memory cannot provide it; nothing is reserved then.
        """

    def copy(self, layer_group: int, sources: Sequence[int], destinations: Sequence[int], stream: Any) -> Any:
        """Queue a batch of copies between slots of one layer group on `stream`: source i goes to destination i.
        Returns the event of its end.
        """

    def wait(self, stream: Any, event: Any) -> None:
        """Make `stream` wait for `event`, without blocking the caller."""

    @property
    def bytes_in_use(self) -> int:
        """Bytes reserved by the pools that have a limit."""

    def close(self) -> None:
        """Give everything back. Safe to call twice."""
