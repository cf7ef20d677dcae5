"""The states of one sequence: the live one, and the slots reserved for snapshots ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ssmcache.pools import IntArray, int_array
from ssmcache.stats import Shortage
from ssmcache.tree import Run

if TYPE_CHECKING:
    from ssmcache.manager import KVCacheManager


_NONE: frozenset[int] = frozenset()
_NO_SLOTS = int_array()


class SequenceStates:
    """SSM slots of one sequence. The live slot is overwritten at each token; a snapshot is a copy of it, or a slot
    that a kernel wrote in passing.
    """

    __slots__ = ("_manager", "_points", "_refused", "_slots", "_snapshots", "_stream", "live_slot")

    def __init__(self, manager: KVCacheManager) -> None:
        snapshots = manager.store.snapshots
        assert snapshots is not None
        self._manager = manager
        self._snapshots = snapshots
        self._stream: Any = None
        self._refused: frozenset[int] = _NONE  # points that a reservation had no room for
        self.live_slot = -1
        self._points: Sequence[int] = ()  # that have a slot reserved, ascending unless reserved by several calls,
        self._slots: IntArray = _NO_SLOTS  # and the slots

    def shortage_of_live_state(self, source_slot: int, holds_source: bool) -> Shortage | None:
        """Whether a live state can be had without giving up the snapshot that it starts from."""
        snapshots, pool = self._snapshots, self._snapshots.pool
        if pool.used < pool.capacity:
            return None
        if source_slot < 0:
            can_go = snapshots.num_cached > 0
        else:  # another snapshot may go, or the source itself becomes the live state if nobody else waits for it
            can_go = snapshots.num_cached > 1 or snapshots.held_sources.get(source_slot, 0) <= holds_source
        return None if can_go else Shortage("slots", self._manager.state_group, "gpu", 1, 0, 0, pool.used)

    def start(self, cursor: Run, source_slot: int, stream: Any) -> None:
        """Take the live slot, and queue the copy of the source, held by the caller, into it."""
        manager, snapshots = self._manager, self._snapshots
        self._stream = stream
        if source_slot >= 0:
            manager.counters.snapshots_reused += 1
            snapshots.note_reuse(source_slot)
            if snapshots.pool.free == 0 and snapshots.num_cached == 1:
                # the source is all there is: it becomes the live state itself
                snapshots.release_source(source_slot)
                manager.store.take_over_snapshot(cursor, source_slot)
                self.live_slot = source_slot
                return
        self.live_slot = manager.store.take_state(None)
        if source_slot >= 0:
            manager.copy_state(source_slot, self.live_slot, stream)
            snapshots.release_source(source_slot)

    def _room_beside(self, cursor: Run, wanted: int) -> int:
        """Slots, up to `wanted`, that can be had without giving up a snapshot of one's own path."""
        snapshots, manager = self._snapshots, self._manager
        room = snapshots.pool.free + snapshots.num_cached
        # counting the own ones takes a walk; they are never more than the points of the path
        if room - len(manager.admission.points(0, cursor.end * manager.tokens_per_block)) >= wanted:
            return wanted
        return min(wanted, room - snapshots.num_on(cursor))

    def reserve(self, points: Sequence[int], cursor: Run) -> dict[int, int]:
        """Take slots for ascending points; returns all points that have a reserved slot now, with it."""
        if points:
            wanted = self._worth_reserving(points, cursor)
            pool = self._snapshots.pool
            if len(wanted) > pool.capacity - pool.used:
                room = self._room_beside(cursor, len(wanted))
                self._refused = self._refused.union(wanted[room:])
                wanted = wanted[:room]
            if wanted:
                slots = self._manager.store.take_states(len(wanted), cursor)
                if self._slots:
                    wanted, slots = [*self._points, *wanted], self._slots + slots
                self._points, self._slots = wanted, slots
        return dict(zip(self._points, self._slots, strict=True))

    def _worth_reserving(self, points: Sequence[int], cursor: Run) -> Sequence[int]:
        """The points that are admitted, and have neither a snapshot nor a reserved slot yet."""
        admitted = self._manager.admission.points(points[0] - 1, points[-1])
        if points != admitted:
            kept = [point for point in points if point in admitted]
            self._manager.counters.snapshots_skipped_not_admitted += len(points) - len(kept)
            points = kept
        if self._slots:
            points = [point for point in points if point not in self._points]
        # adopted blocks beyond the start may have snapshots already: a slot for them would push out another for nothing
        block = self._manager.tokens_per_block
        if points and cursor.end * block >= points[0]:
            present = self._snapshots.ordinals_on(cursor, points[0] // block - 1)
            if present:
                points = [point for point in points if point // block - 1 not in present]
        return points

    def give_back_reserved(self) -> None:
        if self._slots:
            self._snapshots.pool.give_back(self._slots)
            self._points, self._slots = (), _NO_SLOTS
        self._refused = _NONE

    def commit(self, cursor: Run, start: int, end: int, history_length: int) -> None:
        """Keep the snapshots of a commit of tokens `start`..`end - 1`; its blocks are in the tree already."""
        points = self._manager.admission.points(start, end)
        if points:
            block = self._manager.tokens_per_block
            first = points.start // block - 1
            present = self._snapshots.ordinals_on(cursor, first)
            if points == self._points and not present:
                # the usual case: each point was reserved, by one call
                step = points.step // block
                ordinals = int_array(range(first, first + len(points) * step, step))
                slots = self._slots
                self._points, self._slots = (), _NO_SLOTS
            else:
                ordinals, slots = self._collect(points, present, cursor, end, history_length)
            if slots:
                self._manager.store.add_snapshots(cursor, ordinals, slots)
                self._manager.counters.snapshots_taken += len(slots)
        if self._slots or self._refused:
            self.give_back_reserved()

    def _collect(
        self, points: range, present: set[int], cursor: Run, end: int, history_length: int
    ) -> tuple[IntArray, IntArray]:
        """Blocks of those points that get a snapshot now, and the slots of their states."""
        block = self._manager.tokens_per_block
        reserved = dict(zip(self._points, self._slots, strict=True))
        # what this commit does not need goes back first, so that a copy at its end can have the room
        for point in [point for point in reserved if point > end or point // block - 1 in present]:
            self._snapshots.pool.give_back_one(reserved.pop(point))
        ordinals, slots = int_array(), int_array()
        for point in points:
            ordinal = point // block - 1
            if ordinal in present:
                continue
            slot = reserved.pop(point) if point in reserved else self._slot_at(point, end, history_length, cursor)
            if slot >= 0:
                ordinals.append(ordinal)
                slots.append(slot)
        self._points, self._slots = (), _NO_SLOTS
        return ordinals, slots

    def _slot_at(self, point: int, end: int, history_length: int, cursor: Run) -> int:
        """A copy of the live state for a wanted point without a reserved slot; -1, and the reason counted, if none."""
        counters = self._manager.counters
        if point < end:
            if point in self._refused:
                counters.snapshots_skipped_no_room += 1
            else:
                counters.snapshots_skipped_crossed += 1
            return -1
        if history_length > end:
            counters.snapshots_skipped_history += 1
            return -1
        if not self._room_beside(cursor, 1):
            counters.snapshots_skipped_no_room += 1
            return -1
        slot = self._manager.store.take_state(cursor)
        self._manager.copy_state(self.live_slot, slot, self._stream)
        return slot

    def slots(self) -> list[int]:
        """Every slot that is the sequence's own."""
        live = [] if self.live_slot < 0 else [self.live_slot]
        return live + self._slots.tolist()

    def close(self) -> None:
        self.give_back_reserved()
        if self.live_slot >= 0:
            self._snapshots.pool.give_back_one(self.live_slot)
            self.live_slot = -1
