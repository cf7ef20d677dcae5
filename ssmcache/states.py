"""The states of one sequence: the live one, and the slots reserved for snapshots ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ssmcache.memory.base import GPU_TIER, TransferError
from ssmcache.pins import Pin
from ssmcache.pools import IntArray, int_array
from ssmcache.priority import Priority, by_rank
from ssmcache.segments import SparseSegment
from ssmcache.stats import Shortage
from ssmcache.tree import Run

if TYPE_CHECKING:
    from ssmcache.manager import KVCacheManager


_NONE: frozenset[int] = frozenset()
_NO_SLOTS = int_array()
_NOTHING = (-1, 0)


class SequenceStates:
    """SSM slots of one sequence. The live slot is overwritten at each token; a snapshot is a copy of it, or a slot
    that a kernel wrote in passing.
    """

    __slots__ = (
        "_manager", "_points", "_priority", "_refused", "_slots", "_snapshots", "_taken", "admission", "live_slot",
        "prompt_tokens", "stream",
    )  # fmt: skip

    def __init__(self, manager: KVCacheManager, priority: Priority | None, prompt_tokens: int) -> None:
        snapshots = manager.store.snapshots
        assert snapshots is not None
        self._manager = manager
        self._snapshots = snapshots
        self._priority = priority
        self.admission = manager.admission
        self.prompt_tokens = prompt_tokens
        self._taken = _NOTHING  # block and stamp of the snapshot that it decoded last, where it keeps but that one
        self.stream: Any = None
        self._refused: frozenset[int] = _NONE  # points that a reservation had no room for
        self.live_slot = -1
        self._points: Sequence[int] = ()  # that have a slot reserved, ascending unless reserved by several calls,
        self._slots: IntArray = _NO_SLOTS  # and the slots

    def shortage_of_live_state(
        self, source: Pin | None, softly_held: int, leaving: Sequence[int] | None = None, others: int = 0
    ) -> Shortage | None:
        """Whether a live state can be had, from a slot beside the snapshot that it starts from, which this sequence
        holds softly so many times (0 or 1), or from that itself. `others`: slots of the same pool that are needed
        beside it, `leaving` of them, by tier, about to move up.
        """
        snapshots = self._snapshots
        if snapshots.has_room_for(2 + others):
            return None
        if source is None:
            room = snapshots.obtainable(GPU_TIER, leaving) - others
        else:  # in whatever tier it lies, it stays there until it was copied
            snapshots.pins.count(source, locked=1)
            room = snapshots.obtainable(GPU_TIER, leaving) - others
            snapshots.pins.count(source, locked=-1)
            others_wait = source.soft > softly_held and self._manager.num_active > 0
            if room >= 0 and source.tier == GPU_TIER and not source.locked and not others_wait:
                return None  # if no other can go, the source itself becomes the live state
        if room > 0:
            return None
        return self._manager.shortage("slots", snapshots, 1 + others)

    def start(self, cursor: Run, source: Pin | None) -> None:
        """Take the live slot, and queue the copy of the source into it: a snapshot of the path of `cursor` that the
        caller holds softly until this returns.

        Errors: TransferError; the live slot is not taken then.
        """
        manager, snapshots = self._manager, self._snapshots
        if source is None:
            self.live_slot = snapshots.take_one(self.stream)
            return
        tier, pool = source.tier, snapshots.gpu_pool
        crowded = pool.used >= pool.capacity and not snapshots.has_room_for(2)
        if crowded and tier == GPU_TIER and snapshots.obtainable() <= 1:
            # the source is all there is: it becomes the live state itself; if others would start from it, nobody is
            # ACTIVE, so they would wait for each other for ever
            self.live_slot = source.slot
            snapshots.pins.end_soft(source)
            manager.store.drop_soft_holds_from(source)
            snapshots.take_over(cursor, tier, self.live_slot)
        else:
            slot = self._take_one_beside(source)
            try:
                manager.copy_state(tier, source.slot, slot, self.stream)
            except TransferError as error:
                snapshots.gpu_pool.give_back_one(slot)
                if error.lost:
                    snapshots.lose_slot(cursor, tier, source.slot)
                raise
            snapshots.note_reuse(tier, source.slot)
            self.live_slot = slot
            snapshots.pins.end_soft(source)
        manager.counters.snapshots_reused += 1

    def _take_one_beside(self, source: Pin) -> int:
        """A slot, while the source stays where it is."""
        snapshots = self._snapshots
        if snapshots.last_tier == GPU_TIER:  # nothing that is pinned can move
            return snapshots.take_one(self.stream)
        snapshots.pins.count(source, locked=1)
        try:
            return snapshots.take_one(self.stream)
        finally:
            snapshots.pins.count(source, locked=-1)

    def _room_beside(self, cursor: Run, wanted: int) -> int:
        """Slots, up to `wanted`, that can be had without giving up a snapshot of one's own path that is to be kept."""
        snapshots = self._snapshots
        # counting the own ones takes a walk; they are never more than the points of the path
        num_points = len(self.admission.points(0, cursor.end * self._manager.tokens_per_block, self.prompt_tokens))
        if snapshots.has_room_for(wanted + num_points):
            return wanted
        with self._kept(cursor):
            return min(wanted, snapshots.obtainable())

    def _take_beside(self, cursor: Run, count: int) -> IntArray:
        """Slots that were found to be obtainable beside the own path; none if a tier below failed."""
        snapshots = self._snapshots
        pool = snapshots.gpu_pool
        if count <= pool.capacity - pool.used:
            return pool.take(count)
        with self._kept(cursor):
            try:
                return snapshots.take(count, self.stream)
            except TransferError:
                return _NO_SLOTS

    @contextmanager
    def _kept(self, cursor: Run) -> Iterator[None]:
        """Meanwhile nothing goes that this sequence is to keep: the snapshots of its path, or that of its prompt."""
        snapshots = self._snapshots
        if self.admission.keeps_path:
            snapshots.protect(cursor)
            try:
                yield
            finally:
                snapshots.protect(None)
            return
        found = self._find(cursor, self._block_at(self.prompt_tokens))
        pin = None if found is None else snapshots.pins.pin(found[0].tier, found[0].slots[found[1]])
        if pin is not None:
            snapshots.pins.count(pin, locked=1)
        try:
            yield
        finally:
            if pin is not None:
                snapshots.pins.count(pin, locked=-1)

    def _block_at(self, num_tokens: int) -> int:
        """The block at the end of which the last boundary of so many tokens is; -1 without one."""
        interval = self.admission.interval
        return num_tokens // interval * interval // self._manager.tokens_per_block - 1

    def _find(self, cursor: Run, block: int) -> tuple[SparseSegment, int] | None:
        """Where the snapshot of a block of the path is: segment, and position in it."""
        return self._snapshots.find(cursor, block, block + 1).get(block) if block >= 0 else None

    def reserve(self, points: Sequence[int], cursor: Run) -> dict[int, int]:
        """Take slots for ascending points; returns all points that have a reserved slot now, with it."""
        if points:
            wanted = self._worth_reserving(points, cursor)
            pool = self._snapshots.gpu_pool
            if len(wanted) > pool.capacity - pool.used:
                room = self._room_beside(cursor, len(wanted))
                self._refused = self._refused.union(wanted[room:])
                wanted = wanted[:room]
            if wanted:
                self._reserve(wanted, self._take_beside(cursor, len(wanted)))
        return dict(zip(self._points, self._slots, strict=True))

    def _reserve(self, wanted: Sequence[int], slots: IntArray) -> None:
        if not slots:
            self._refused = self._refused.union(wanted)
        elif self._slots:
            self._points, self._slots = [*self._points, *wanted], self._slots + slots
        else:
            self._points, self._slots = wanted, slots

    def _worth_reserving(self, points: Sequence[int], cursor: Run) -> Sequence[int]:
        """The points that are admitted, and have neither a snapshot nor a reserved slot yet."""
        admitted = self.admission.points(points[0] - 1, points[-1], self.prompt_tokens)
        if points != admitted:
            interval = self.admission.interval  # what is not wanted of its multiples, the commit counts
            self._manager.counters.snapshots_skipped_not_admitted += sum(point % interval > 0 for point in points)
            points = [point for point in points if point in admitted]
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
            self._snapshots.gpu_pool.give_back(self._slots)
            self._points, self._slots = (), _NO_SLOTS
        self._refused = _NONE

    def commit(self, cursor: Run, start: int, end: int, history_length: int) -> None:
        """Keep the snapshots of a commit of tokens `start`..`end - 1`; its blocks are in the tree already."""
        points = self.admission.points(start, end, self.prompt_tokens)
        keeps_path = self.admission.keeps_path
        if not keeps_path:
            interval = self.admission.interval
            passed_over = end // interval - start // interval - len(points)
            self._manager.counters.snapshots_skipped_not_admitted += passed_over
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
            self._manager.counters.snapshots_taken += len(slots)
            if not keeps_path:
                self._add_last(cursor, points[-1], present, ordinals, slots)
            elif slots:
                self._add(cursor, ordinals, slots)
        if self._slots or self._refused:
            self.give_back_reserved()

    def pass_over(self, start: int, end: int) -> None:
        """Tokens `start`..`end - 1` were committed, and nothing of them is offered."""
        interval = self.admission.interval
        self._manager.counters.snapshots_skipped_not_admitted += end // interval - start // interval
        self.give_back_reserved()

    def _add_last(self, cursor: Run, last: int, present: set[int], ordinals: IntArray, slots: IntArray) -> None:
        """Attach the states of the prompt's boundary and of what was decoded, up to `last`: each with a time of its
        own, since they are not touched together, the deepest as the oldest. What was decoded takes the place of what
        this sequence took so before.
        """
        block = self._manager.tokens_per_block
        if last // block - 1 in present or last // block - 1 in ordinals:
            self._give_up_taken(cursor)
        for ordinal, slot in zip(reversed(ordinals), reversed(slots), strict=True):
            stamp = self._add(cursor, int_array((ordinal,)), int_array((slot,)))
            if (ordinal + 1) * block > self.prompt_tokens:
                self._taken = ordinal, stamp

    def _give_up_taken(self, cursor: Run, on_gpu: bool = False) -> None:
        """The snapshot that this sequence decoded before has a successor: it goes, unless others have touched it,
        started from it, or are about to. `on_gpu`: only if its slot is of use at once, else this is to be called again.
        """
        snapshots, (block, stamp) = self._snapshots, self._taken
        found = self._find(cursor, block)
        if on_gpu and (found is None or found[0].tier != GPU_TIER):
            return
        self._taken = _NOTHING
        if found is None:
            return
        segment, index = found
        if segment.stamp == stamp and not snapshots.is_of_use(segment.tier, segment.slots[index]):
            slot = int_array((segment.slots[index],))
            tier = segment.tier
            snapshots.take_over(cursor, tier, slot[0])
            snapshots.pools[tier].give_back(slot)
            self._manager.counters.snapshots_superseded += 1
            self._tell_skipped(cursor, (block + 1) * self._manager.tokens_per_block, "not_admitted")

    def touch_own(self, cursor: Run, num_committed: int, stamp: int) -> list[int]:
        """Stamp the snapshots at the last boundary of the committed tokens and at that of the prompt, if there are two
        the latter as the younger; returns their blocks.
        """
        touched: list[int] = []
        ends = num_committed, min(num_committed, self.prompt_tokens)
        for block in sorted(set(map(self._block_at, ends)), reverse=True):
            found = self._find(cursor, block)
            if found is None:
                continue
            segment, _ = found
            if touched:  # no two that are stamped together
                stamp = self._manager.store.clock.touch(block)
            if self._taken == (block, segment.stamp):
                self._taken = block, stamp
            segment.stamp = stamp
            touched.append(block)
        return touched

    def _add(self, cursor: Run, ordinals: IntArray, slots: IntArray) -> int:
        """Attach the states to their blocks, each with the priority of its block; returns the last stamp."""
        store, priority = self._manager.store, self._priority
        if priority is None:
            return store.add_snapshots(cursor, ordinals, slots)
        stamp = 0
        for rank, indices in by_rank(priority, self._snapshots.layer_group, ordinals).items():
            chosen = int_array(ordinals[index] for index in indices), int_array(slots[index] for index in indices)
            stamp = store.add_snapshots(cursor, *chosen, rank)
        return stamp

    def _collect(
        self, points: range, present: set[int], cursor: Run, end: int, history_length: int
    ) -> tuple[IntArray, IntArray]:
        """Blocks of those points that get a snapshot now, and the slots of their states."""
        block = self._manager.tokens_per_block
        reserved = dict(zip(self._points, self._slots, strict=True))
        # what this commit does not need goes back first, so that a copy at its end can have the room
        for point in [point for point in reserved if point not in points or point // block - 1 in present]:
            self._snapshots.gpu_pool.give_back_one(reserved.pop(point))
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
                return self._tell_skipped(cursor, point, "no_room")
            counters.snapshots_skipped_crossed += 1
            return self._tell_skipped(cursor, point, "crossed")
        if history_length > end:
            counters.snapshots_skipped_history += 1
            return self._tell_skipped(cursor, point, "history")
        pool = self._snapshots.gpu_pool
        if pool.used == pool.capacity and point > self.prompt_tokens:
            self._give_up_taken(cursor, on_gpu=True)  # rather than what is not this sequence's
        has_room = pool.used < pool.capacity or self._room_beside(cursor, 1)
        taken = self._take_beside(cursor, 1) if has_room else _NO_SLOTS
        if not taken:
            counters.snapshots_skipped_no_room += 1
            return self._tell_skipped(cursor, point, "no_room")
        self._manager.copy_state(GPU_TIER, self.live_slot, taken[0], self.stream)
        return taken[0]

    def _tell_skipped(self, cursor: Run, point: int, reason: str) -> int:
        """No slot, and whoever observes the cache knows why."""
        manager = self._manager
        if manager.store.events is not None:
            ordinal = point // manager.tokens_per_block - 1
            manager.store.events.skipped(cursor, self._snapshots.layer_group, ordinal, reason)
        return -1

    def slots(self) -> list[int]:
        """Every slot that is the sequence's own."""
        live = [] if self.live_slot < 0 else [self.live_slot]
        return live + self._slots.tolist()

    def give_up_live(self) -> int:
        """The live slot, which is not the sequence's from now on."""
        slot, self.live_slot = self.live_slot, -1
        return slot

    def close(self) -> None:
        self.give_back_reserved()
        if self.live_slot >= 0:
            self._snapshots.gpu_pool.give_back_one(self.give_up_live())
