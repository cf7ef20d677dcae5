"""Who goes first: one queue of segments for each layer group."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from ssmcache.tree import Segment

_COMPACT_ABOVE = 64


class EvictionQueue:
    """Evictable segments, the one with the oldest tail first.

    A segment that is touched, held or taken out leaves its old entry behind; such entries are dropped when they come
    up, and all at once when they are the majority, so that the heap stays within twice the live segments.

    Cost: O(1) to put the most recent segment, the usual case; O(log n) otherwise.
    """

    __slots__ = ("_heap", "_num_live")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Segment]] = []
        self._num_live = 0

    def put(self, segment: Segment) -> None:
        """Enter a segment, or move it to where its stamp and tail belong now."""
        if segment.entry is None:
            self._num_live += 1
        # the serial decides nothing: it only keeps the heap from comparing segments if a stale entry has the same time
        segment.entry = entry = (segment.stamp - segment.tail, segment.serial, segment)
        heap = self._heap
        heappush(heap, entry)
        if len(heap) > 2 * self._num_live + _COMPACT_ABOVE:
            self._heap = [entry for entry in heap if entry[2].entry is entry]
            heapify(self._heap)

    def remove(self, segment: Segment) -> None:
        if segment.entry is not None:
            segment.entry = None
            self._num_live -= 1

    def pop(self) -> Segment | None:
        """Take out the segment with the oldest tail; None if there is none."""
        heap = self._heap
        while heap:
            entry = heappop(heap)
            segment = entry[2]
            if segment.entry is entry:
                segment.entry = None
                self._num_live -= 1
                return segment
        return None

    def __len__(self) -> int:
        return self._num_live
