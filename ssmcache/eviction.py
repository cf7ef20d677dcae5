"""Who goes first: one queue of segments for each layer group and tier."""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace

from ssmcache.segments import Segment

_MIN_DEAD = 64


class EvictionQueue:
    """Segments that may go, the one with the lowest priority first, of equal ones the one with the oldest tail.

    A touch or a higher priority only ever makes a segment younger, so nobody tells the queue of it: an entry remembers
    a time that its segment had once, and when it comes up it is compared with the present one and sinks to where it
    belongs. Entries of segments that may not go now are dropped when they come up; whoever makes a segment free to go
    puts it in again. Entries of segments that left the tree are dropped when they come up, or all at once when they are
    the majority.

    Cost: O(log n) once for each time a segment comes up; none for a touch.
    """

    __slots__ = ("_heap", "_num_dead")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Segment]] = []
        self._num_dead = 0

    def put(self, segment: Segment) -> None:
        """Enter a segment, unless it is in the queue already."""
        if not segment.queued:
            segment.queued = True
            # the serial decides nothing: it keeps the heap from comparing segments where a dead entry has the same time
            heappush(self._heap, (segment.rank + segment.stamp - segment.tail, segment.serial, segment))

    def retire(self, segment: Segment) -> None:
        """Note that a segment has left the tree for good."""
        segment.run = None
        if not segment.queued:
            return
        heap = self._heap
        if heap[0][2] is segment:  # it was the oldest, and has just gone
            heappop(heap)
            return
        if heap[-1][2] is segment:  # it was the youngest, like the snapshots of a commit that the close joins to others
            heap.pop()
            return
        self._num_dead += 1
        if self._num_dead > _MIN_DEAD and 2 * self._num_dead > len(heap):
            self._heap = [entry for entry in heap if entry[2].run is not None]
            heapify(self._heap)
            self._num_dead = 0

    def oldest(self) -> Segment | None:
        """The segment with the oldest tail of those that may go, which stays in the queue; None if there is none."""
        heap = self._heap
        while heap:
            time, serial, segment = heap[0]
            if segment.run is None:
                heappop(heap)
                self._num_dead -= 1
                continue
            now = segment.rank + segment.stamp - segment.tail
            if now != time:
                heapreplace(heap, (now, serial, segment))
            elif segment.may_go():
                return segment
            else:
                heappop(heap)
                segment.queued = False
        return None

    def take_out(self, segment: Segment) -> None:
        """Take out the segment that `oldest` has just returned."""
        heappop(self._heap)
        segment.queued = False

    def segments(self) -> list[Segment]:
        """The segments with an entry, for checks. What may go must be no older than its entry."""
        alive = [(time, segment) for time, _, segment in self._heap if segment.run is not None]
        for time, segment in alive:
            if segment.may_go() and time > segment.rank + segment.stamp - segment.tail:
                raise AssertionError("a segment in the queue became older")
        if len(self._heap) - len(alive) != self._num_dead:
            raise AssertionError(f"{len(self._heap) - len(alive)} dead entries, counted {self._num_dead}")
        return [segment for _, segment in alive]
