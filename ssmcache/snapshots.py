"""The snapshots in the tree: their slots, their queue, and who wants to start from them."""

from __future__ import annotations

from collections.abc import Sequence

from ssmcache.eviction import EvictionQueue
from ssmcache.pools import IntArray, StatePool
from ssmcache.tree import Run, SnapshotSegment


class SnapshotStore:
    """Slots of the SSM layer group as far as snapshots own them. Live states are private slots of the sequences.

    Unlike a page, a snapshot may go while a sequence goes on below it: only a *source*, that somebody is about to
    copy, is held.
    """

    def __init__(self, pool: StatePool) -> None:
        self.pool = pool
        self.queue = EvictionQueue()
        self.num_cached = 0
        self.held_sources: dict[int, int] = {}  # slot -> sequences about to start from it
        self._was_reused = bytearray()  # by slot, for the slots of snapshots: whether anybody has started from it
        self.num_evicted = 0
        self.num_evicted_unused = 0
        self._num_segments = 0

    # -- sources -----------------------------------------------------------------------------------------------------

    def hold_source(self, slot: int) -> None:
        self.held_sources[slot] = self.held_sources.get(slot, 0) + 1

    def release_source(self, slot: int) -> None:
        left = self.held_sources.pop(slot) - 1
        if left:
            self.held_sources[slot] = left

    def note_reuse(self, slot: int) -> None:
        self._was_reused[slot] = 1

    def reused_slots(self) -> set[int]:
        return {slot for slot, reused in enumerate(self._was_reused) if reused}

    def _forget_reuse(self, slots: Sequence[int]) -> int:
        """These snapshots leave the tree: the number of them that somebody has started from."""
        flags = self._was_reused
        num_reused = sum(map(flags.__getitem__, slots))
        if num_reused:
            for slot in slots:
                flags[slot] = 0
        return num_reused

    # -- following the tree ------------------------------------------------------------------------------------------

    def split(self, run: Run, upper: Run, at: int) -> None:
        """Move the snapshots before block `at` from a run to its new upper part."""
        for segment in run.snapshots:
            above = segment.split_upper(upper, at, self._serial())
            if above is not None:
                upper.snapshots += (above,)
                self.queue.put(above)
        self._drop_empty(run)

    def move_all(self, source: Run, target: Run) -> None:
        for segment in source.snapshots:
            segment.run = target
        target.snapshots = source.snapshots + target.snapshots

    def drop_from(self, run: Run, new_end: int) -> None:
        """The blocks from `new_end` on leave the tree: so do the snapshots there."""
        if new_end == run.start:
            for segment in run.snapshots:
                self._evict(segment.slots)
                self.queue.retire(segment)
            run.snapshots = ()
            return
        for segment in run.snapshots:
            if segment.ordinals[-1] >= new_end:
                self._evict(segment.drop_tail(new_end))
        self._drop_empty(run)

    def _drop_empty(self, run: Run) -> None:
        for segment in run.snapshots:
            if not segment.slots:
                self.queue.retire(segment)
                run.snapshots = tuple(segment for segment in run.snapshots if segment.slots)

    def join(self, run: Run) -> None:
        """Make one segment of all snapshots of a run, which the caller is about to stamp together."""
        segment, *others = run.snapshots
        for other in others:
            segment.absorb(other)
            self.queue.retire(other)
        run.snapshots = (segment,)

    # -- taking and evicting -----------------------------------------------------------------------------------------

    def num_on(self, cursor: Run) -> int:
        """Snapshots on the path of `cursor`. Cost: O(runs)."""
        return sum(len(segment.slots) for run in cursor.path() for segment in run.snapshots)

    def evict(self, short: int, own: Run | None) -> tuple[int, list[Run]]:
        """Free up to `short` slots, oldest snapshots first, passing over held sources and the path of `own`.

        Returns how many are still missing, and the runs that lost snapshots.
        """
        own_runs: set[Run] | None = None
        passed_over: list[SnapshotSegment] = []
        losers: list[Run] = []
        while short > 0:
            segment = self.queue.oldest()
            if segment is None:
                break
            assert isinstance(segment, SnapshotSegment)
            run = segment.run
            assert run is not None
            if run.holds and own is not None:
                if own_runs is None:
                    own_runs = set(own.path())
                if run in own_runs:
                    self.queue.take_out(segment)
                    passed_over.append(segment)
                    continue
            freed = segment.drop_oldest(short, self.held_sources)
            short -= len(freed)
            self._evict(freed)
            losers.append(run)
            if not segment.slots:
                self._drop_empty(run)
            elif short > 0:  # what is left of it are held sources
                self.queue.take_out(segment)
                passed_over.append(segment)
        for segment in passed_over:
            self.queue.put(segment)
        return short, losers

    def _evict(self, slots: IntArray) -> None:
        self.pool.give_back(slots)
        count = len(slots)
        self.num_cached -= count
        self.num_evicted += count
        self.num_evicted_unused += count - self._forget_reuse(slots)

    # -- adding and removing -----------------------------------------------------------------------------------------

    def ordinals_on(self, cursor: Run, from_block: int) -> set[int]:
        """Blocks from `from_block` on, on the path of `cursor`, that have a snapshot."""
        found: set[int] = set()
        run = cursor
        while run.end > from_block and run.parent is not None:
            for segment in run.snapshots:
                if segment.ordinals[-1] >= from_block:
                    found.update(ordinal for ordinal in segment.ordinals if ordinal >= from_block)
            run = run.parent
        return found

    def add(self, cursor: Run, ordinals: IntArray, slots: IntArray, stamp: int) -> None:
        """Attach states to blocks of the path of `cursor` that have none: ascending ordinals, a slot for each.
        The arrays become the tree's.
        """
        missing_flags = self.pool.num_ever_used - len(self._was_reused)
        if missing_flags > 0:
            self._was_reused.extend(bytes(missing_flags))
        end = len(ordinals)
        run: Run | None = cursor
        while end > 0:
            assert run is not None
            begin = end if ordinals[0] < run.start else 0
            while begin > 0 and ordinals[begin - 1] >= run.start:
                begin -= 1
            if begin < end:
                if begin > 0 or end < len(ordinals):
                    segment = SnapshotSegment(run, stamp, self._serial(), ordinals[begin:end], slots[begin:end])
                else:
                    segment = SnapshotSegment(run, stamp, self._serial(), ordinals, slots)
                run.snapshots += (segment,)
                self.queue.put(segment)
                end = begin
            run = run.parent
        self.num_cached += len(slots)

    def take_over(self, cursor: Run, slot: int) -> None:
        """Take a snapshot of the path of `cursor` out of the tree; its slot becomes the caller's."""
        for run in cursor.path():
            for segment in run.snapshots:
                if slot in segment.slots:
                    index = segment.slots.index(slot)
                    del segment.ordinals[index], segment.slots[index]
                    self._drop_empty(run)
                    self.num_cached -= 1
                    self._forget_reuse((slot,))
                    return
        raise AssertionError(f"slot {slot} is no snapshot of this path")

    def clear(self, runs: list[Run]) -> None:
        """Give the slots of all runs of the tree back; the caller forgets the runs."""
        for run in runs:
            for segment in run.snapshots:
                self.pool.give_back(segment.slots)
                segment.run = None
        self.queue = EvictionQueue()
        self.num_cached = 0
        self._was_reused.clear()

    def _serial(self) -> int:
        self._num_segments += 1
        return self._num_segments
