"""The radix tree of runs: structure and matching. Who may go, and what is counted, is decided elsewhere.

A *run* is a maximal stretch of consecutive blocks that were last touched together: one node of the tree. It carries
the keys of its blocks and, for each layer group, *segments*: the slots of blocks that were stamped together.
Attention has a page for every block of a run (`PageSegment`), SSM a few snapshots (`SnapshotSegment`).

A sequence remembers one run, the deepest of its path, and means all of that run's blocks. Hence the rule of a split:
the lower part keeps its identity, the upper part is the new object.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import numpy as np

from ssmcache.keys import EdgeKey, Int64Array, KeyKind, ReuseScope
from ssmcache.pools import IntArray, SlotArray, int_array

# a run that grows gets this much room ahead: long conversations copy each block O(1) times
_GROWTH = 1.25


class Segment:
    """Blocks of one run in one layer group, stamped by the same touch. `tail` is its deepest, hence oldest, block.

    `run` is None once the segment has left the tree, which also breaks the circle between the two; `queued` says that
    the eviction queue has an entry for it.
    """

    __slots__ = ("queued", "run", "serial", "stamp")

    run: Run | None
    stamp: int
    serial: int
    queued: bool

    @property
    def tail(self) -> int:
        raise AssertionError("a segment is of pages or of snapshots")

    def may_go(self) -> bool:
        """Whether eviction may take the tail of this segment, which is in the tree."""
        raise AssertionError("a segment is of pages or of snapshots")


class PageSegment(Segment):
    """The pages of all blocks of a run: block `start + i` lies in slot `slots[i]`."""

    __slots__ = ("_buffer", "count", "start")

    def __init__(self, run: Run, stamp: int, serial: int, start: int, slots: SlotArray) -> None:
        self.run, self.stamp, self.serial, self.queued = run, stamp, serial, False
        self.start = start
        self.count = len(slots)
        self._buffer = slots

    @property
    def tail(self) -> int:
        return self.start + self.count - 1

    def may_go(self) -> bool:
        run = self.run
        return run is not None and not (run.children or run.holds or run.soft_holds)

    @property
    def slots(self) -> SlotArray:
        return self._buffer[: self.count]

    def extend(self, slots: SlotArray) -> None:
        end = self.count + len(slots)
        if end > self._buffer.size:
            grown = np.empty(int(end * _GROWTH) + 1, dtype=np.int32)
            grown[: self.count] = self._buffer[: self.count]
            self._buffer = grown
        self._buffer[self.count : end] = slots
        self.count = end

    def prepend(self, slots: SlotArray) -> None:
        self._buffer = np.concatenate((slots, self.slots))
        self.count = len(self._buffer)
        self.start -= len(slots)

    def drop_tail(self, count: int) -> SlotArray:
        """Forget the last `count` blocks and return their slots, in memory that is not written again."""
        if count == self.count:
            self.count = 0
            return self._buffer if self._buffer.size == count else self._buffer[:count]
        left = self.count - count
        dropped = self._buffer[left : self.count]
        self._buffer = self._buffer[:left]
        self.count = left
        return dropped

    def split_upper(self, upper: Run, at: int, serial: int) -> PageSegment:
        """Leave the blocks from `at` on here; return the ones before it as a segment of `upper`."""
        count = at - self.start
        above = PageSegment(upper, self.stamp, serial, self.start, self._buffer[:count])
        self._buffer = self._buffer[count:]
        self.count -= count
        self.start = at
        return above


class SnapshotSegment(Segment):
    """Some snapshots of a run, by ascending block ordinal: the state after block `ordinals[i]` is in `slots[i]`.

    Both are machine integers: lists would be of objects all over the memory, each a cache miss when its turn comes.
    """

    __slots__ = ("ordinals", "slots")

    def __init__(self, run: Run, stamp: int, serial: int, ordinals: IntArray, slots: IntArray) -> None:
        self.run, self.stamp, self.serial, self.queued = run, stamp, serial, False
        self.ordinals = ordinals
        self.slots = slots

    @property
    def tail(self) -> int:
        return self.ordinals[-1]

    def may_go(self) -> bool:
        return True

    def drop_tail(self, from_ordinal: int) -> IntArray:
        """Forget the snapshots of blocks `from_ordinal` and deeper and return their slots."""
        keep = bisect_left(self.ordinals, from_ordinal)
        dropped = self.slots[keep:]
        del self.ordinals[keep:], self.slots[keep:]
        return dropped

    def drop_oldest(self, count: int, held: dict[int, int]) -> IntArray:
        """Forget up to `count` snapshots whose slots are not held, the deepest first, and return their slots."""
        if not held:
            dropped = self.slots[-count:]
            del self.ordinals[-count:], self.slots[-count:]
            return dropped
        deepest_first = range(len(self.slots) - 1, -1, -1)
        victims = [index for index in deepest_first if self.slots[index] not in held][:count]
        dropped = int_array(self.slots[index] for index in victims)
        for index in victims:
            del self.ordinals[index], self.slots[index]
        return dropped

    def split_upper(self, upper: Run, at: int, serial: int) -> SnapshotSegment | None:
        """Leave the snapshots from block `at` on here; return the ones before it, if any, as a segment of `upper`."""
        count = bisect_left(self.ordinals, at)
        if count == 0:
            return None
        above = SnapshotSegment(upper, self.stamp, serial, self.ordinals[:count], self.slots[:count])
        del self.ordinals[:count], self.slots[:count]
        return above

    def absorb(self, other: SnapshotSegment) -> None:
        """Take over the snapshots of another segment, in the order of their blocks. Cost: O(1) each if it is deeper."""
        if other.ordinals[0] > self.ordinals[-1]:
            self.ordinals += other.ordinals
            self.slots += other.slots
            return
        pairs = sorted(zip(self.ordinals + other.ordinals, self.slots + other.slots, strict=True))
        self.ordinals = int_array(ordinal for ordinal, _ in pairs)
        self.slots = int_array(slot for _, slot in pairs)


class Run:
    """One node: blocks `start`..`end - 1` of the paths through it.

    `key_buffer` begins with the keys of the run and may have room behind them. `holds` counts the sequences whose path
    goes through the run; `soft_holds` those that were created but not yet resumed, and only at the deepest run of their
    path: nothing above a run that has a child can go anyway.
    """

    __slots__ = (
        "children",
        "edge",
        "end",
        "holds",
        "key_buffer",
        "kind",
        "pages",
        "parent",
        "snapshots",
        "soft_holds",
        "start",
    )

    def __init__(
        self, parent: Run | None, kind: KeyKind, edge: EdgeKey, start: int, end: int, keys: Int64Array
    ) -> None:
        self.parent = parent
        self.kind = kind
        self.edge = edge
        self.start = start
        self.end = end
        self.key_buffer = keys
        self.children: dict[EdgeKey, Run] = {}
        self.holds = 0
        self.soft_holds = 0
        self.pages: PageSegment | None = None
        self.snapshots: tuple[SnapshotSegment, ...] = ()

    @property
    def keys(self) -> Int64Array:
        return self.key_buffer[: (self.end - self.start) * self.kind.width]

    def append_keys(self, keys: Int64Array, num_blocks: int) -> None:
        """Grow the run in place by the blocks of `keys`. Amortised O(blocks added)."""
        width = self.kind.width
        used = (self.end - self.start) * width
        needed = used + num_blocks * width
        if needed > self.key_buffer.size or not self.key_buffer.flags.writeable:
            grown = np.empty((int(needed * _GROWTH) // width + 1) * width, dtype=np.int64)
            grown[:used] = self.key_buffer[:used]
            self.key_buffer = grown
        self.key_buffer[used:needed] = keys
        self.end += num_blocks

    def prepend_keys(self, upper: Run) -> None:
        self.key_buffer = np.concatenate((upper.keys, self.keys))
        self.start = upper.start

    def split_keys(self, at: int) -> Int64Array:
        """Leave the keys from block `at` on here and return the ones before it. The two share one buffer, in which
        only the lower part has room to grow.
        """
        size = (at - self.start) * self.kind.width
        above = self.key_buffer[:size]
        self.key_buffer = self.key_buffer[size:]
        self.start = at
        self.edge = self.kind.edge_key(self.key_buffer, 0)
        return above

    def path(self) -> Iterator[Run]:
        """This run and those above it, deepest first, without the root."""
        run = self
        while run.parent is not None:
            yield run
            run = run.parent


class Root(Run):
    """Where the paths of one scope start; holds no block. `num_sequences` are the open sequences of the scope."""

    __slots__ = ("num_sequences", "scope")

    def __init__(self, kind: KeyKind, scope: ReuseScope) -> None:
        super().__init__(None, kind, b"", 0, 0, np.empty(0, dtype=np.int64))
        self.scope = scope
        self.num_sequences = 0


def match_blocks(root: Run, keys: Int64Array, num_blocks: int) -> tuple[Run, int]:
    """Longest known prefix of `num_blocks` blocks: (run that holds its last block, its length in blocks).

    Pure. Cost: one dictionary look-up and at most one vectorised comparison a run.
    """
    run: Run = root
    depth = 0
    kind = root.kind
    while depth < num_blocks:
        child = run.children.get(kind.edge_key(keys, depth))
        if child is None:
            break
        run = child
        length = run.end - run.start
        comparable = num_blocks - depth
        if comparable > length:
            comparable = length
        common = kind.common_blocks(run.key_buffer, 0, keys, depth, comparable)
        depth += common
        if common < length:
            break
    return run, depth


def deepest_snapshot(run: Run, max_blocks: int) -> tuple[int, int]:
    """Deepest snapshot of the path of `run` after at most `max_blocks` blocks: (blocks before it, slot), or (0, -1)."""
    while run.parent is not None:
        best, slot = 0, -1
        for segment in run.snapshots:
            index = bisect_right(segment.ordinals, max_blocks - 1)
            if index > 0 and segment.ordinals[index - 1] + 1 > best:
                best, slot = segment.ordinals[index - 1] + 1, segment.slots[index - 1]
        if best > 0:
            return best, slot
        run = run.parent
    return 0, -1
