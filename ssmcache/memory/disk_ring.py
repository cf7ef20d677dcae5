"""The bounded ring of buffers between streams and the disk."""

from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Protocol

from ssmcache.memory.disk import ByteArray, staging_bytes

RING_BYTES = 64 << 20
_PAGE_BYTES = 4096
_MIN_BUFFERS = 3


class Event(Protocol):
    """Of something queued on a stream."""

    def synchronize(self) -> None:
        """Block until it has happened."""


def ring_shape(slot_bytes: Sequence[int]) -> tuple[int, int]:
    """(buffers, bytes of each) of a ring for these pools: about 64 MiB, or three slots of the largest. The bytes
    are whole memory pages.
    """
    num_bytes = -(-staging_bytes(slot_bytes) // _PAGE_BYTES) * _PAGE_BYTES
    return max(_MIN_BUFFERS, RING_BYTES // num_bytes), num_bytes


class BufferRing:
    """Buffers that are lent out, the one that has been back for longest first. Any thread may give one back.

    Args:
        buffers: of equal size, the caller's own.
    """

    def __init__(self, buffers: Sequence[ByteArray]) -> None:
        self.buffers = tuple(buffers)
        self._free: SimpleQueue[tuple[int, Event | None]] = SimpleQueue()
        for index in range(len(self.buffers)):
            self._free.put((index, None))

    def take(self) -> int:
        """The index of a buffer that nothing reads any more. Blocks until there is one."""
        return self._ready(*self._free.get())

    def try_take(self) -> int | None:
        """The same if one is back; blocks only for what is still queued on it."""
        try:
            return self._ready(*self._free.get_nowait())
        except Empty:
            return None

    def give(self, index: int, event: Event | None = None) -> None:
        """Give a buffer back that may be used once `event` has happened."""
        self._free.put((index, event))

    def _ready(self, index: int, event: Event | None) -> int:
        if event is not None:
            try:
                event.synchronize()
            except BaseException:
                self._free.put((index, None))  # else the next one who asks would wait for ever
                raise
        return index
