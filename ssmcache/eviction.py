"""Who goes first: one queue of segments for each layer group."""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace

from ssmcache.tree import Segment


class EvictionQueue:
    """Segments that may go, the one with the oldest tail first.

    A touch only ever makes a segment younger, so nobody tells the queue of it: an entry remembers a time that its
    segment had once, and when it comes up it is compared with the present one and sinks to where it belongs. Entries
    of segments that have left the tree, or may not go now, are dropped when they come up; whoever makes a segment
    free to go puts it in again.

    Cost: O(log n) once for each time a segment comes up; none for a touch.
    """

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Segment]] = []

    def put(self, segment: Segment) -> None:
        """Enter a segment, unless it is in the queue already."""
        if not segment.queued:
            segment.queued = True
            # the serial decides nothing: it keeps the heap from comparing segments where a dead entry has the same time
            heappush(self._heap, (segment.stamp - segment.tail, segment.serial, segment))

    def pop(self) -> Segment | None:
        """Take out the segment with the oldest tail of those that may go; None if there is none."""
        heap = self._heap
        while heap:
            time, serial, segment = heap[0]
            if segment.run is not None and segment.may_go():
                now = segment.stamp - segment.tail
                if now == time:
                    heappop(heap)
                    segment.queued = False
                    return segment
                heapreplace(heap, (now, serial, segment))
            else:
                heappop(heap)
                segment.queued = False
        return None

    def segments(self) -> list[Segment]:
        """Everything with an entry, for checks. What may go must be no older than its entry."""
        for time, _, segment in self._heap:
            if segment.run is not None and segment.may_go() and time > segment.stamp - segment.tail:
                raise AssertionError("a segment in the queue became older")
        return [segment for _, _, segment in self._heap]
