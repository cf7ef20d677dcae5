"""Places of the tree where somebody can go on, and what window pages are of use for: this decides which go first.

A place is the length of a path, in tokens, at which a sequence can start: that of each kept snapshot; without SSM
layers each length at which a path ends or paths part. Who goes on where a path ends or parts starts, in hybrids, at the
deepest snapshot above; the other snapshots lie *between*. So a window page is of one of three uses: `UNREAD` at any
place, `READ_BETWEEN` only, or `READ` where a path ends or parts.

Changes of the tree are noted as they happen and settled when room is short: then pages near a place that came or went
get their use anew. Each run counts the places, on it and below, that read pages of it, so that nobody looks for them
among a thousand children.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssmcache.segments import use_of
from ssmcache.tree import Run, runs_below

if TYPE_CHECKING:
    from ssmcache.snapshots import SnapshotStore
    from ssmcache.windows import Window, WindowStore

UNREAD, READ_BETWEEN, READ = range(3)

Places = dict[int, int]  # length -> use of the pages that are read there
Readers = dict[tuple[int, int], int]  # (length, use) -> number of places


class PlaceTable:
    """The places on each run (`_own`), and on it and below those that read pages of it (`_readers`), both as of the
    last `settle`; what was noted since: runs whose places may be others, blocks whose pages may be of another use.
    """

    def __init__(self, windows: Sequence[WindowStore], snapshots: SnapshotStore | None, tokens_per_block: int) -> None:
        self._windows = tuple(windows)
        self._snapshots = snapshots
        self._block = tokens_per_block
        self._size = max(store.window.size for store in windows)
        self._num_sinks = max(store.window.num_sink_blocks for store in windows)
        self._own: dict[Run, Places] = {}
        self._readers: dict[Run, Readers] = {}
        self._changed: dict[Run, None] = {}
        self._pages: dict[Run, tuple[int, int]] = {}

    # -- what happens to the tree ------------------------------------------------------------------------------------

    def note(self, run: Run) -> None:
        """A run ends elsewhere, has other snapshots, or a child more or less."""
        if run.parent is not None and run.parent.children.get(run.edge) is run:  # else it was parked, or has just gone
            self._changed[run] = None

    def note_pages(self, run: Run, first: int, end: int) -> None:
        """Blocks of a run, at least some of `first`..`end - 1`, have new pages."""
        old_first, old_end = self._pages.get(run, (first, end))
        self._pages[run] = min(first, old_first), max(end, old_end)

    def before_change(self, run: Run) -> None:
        """A run is about to be cut, or joined with another: count what was noted of it."""
        if run in self._changed:
            del self._changed[run]
            self._settle_around(run)

    def split(self, upper: Run, run: Run) -> None:
        """A run was cut: `upper` is what was above."""
        length = upper.end * self._block
        if run in self._own:
            own = self._own[run]
            self._own[upper] = {place: use for place, use in own.items() if place <= length}
            self._own[run] = {place: use for place, use in own.items() if place > length}
        if run in self._readers:
            readers, own = self._readers[run], self._own.get(run, {})
            self._readers[upper] = {
                key: n for key, n in readers.items() if key[0] <= length or self._reads(key[0], upper)
            }
            below = {key: n for key, n in readers.items() if key[0] > length}
            self._readers[run] = {key: n for key, n in below.items() if key[0] in own or self._reads(key[0], run)}
        if run in self._pages:
            self._pages[upper] = self._pages[run]

    def absorb(self, parent: Run, run: Run) -> None:
        """A run took over the blocks of the one above it, of which it was the only child."""
        if parent in self._own:
            self._own[run] = {**self._own.pop(parent), **self._own.get(run, {})}
        if parent in self._readers:
            self._readers[run] = {**self._readers.pop(parent), **self._readers.get(run, {})}
        if parent in self._pages:
            self.note_pages(run, *self._pages.pop(parent))

    def forget(self, run: Run) -> None:
        """A run has left the tree."""
        self.cut_off(run)
        for table in (self._own, self._readers, self._changed, self._pages):
            table.pop(run, None)

    def cut_off(self, run: Run) -> None:
        """A run, with all below it, is about to leave its parent, or has just left."""
        assert run.parent is not None
        for below in (run, *runs_below(run)):
            for place, use in self._own.get(below, {}).items():
                self._count(below, run.parent, place, use, -1)

    # -- counting ----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Give every page of the tree the use that it has now."""
        while self._changed:
            run, _ = self._changed.popitem()
            self._settle_around(run)
        if self._pages:
            for run, (first, end) in self._pages.items():
                for store in self._windows:
                    self._settle_pages(store, run, max(first, run.start), min(end, run.end))
            self._pages.clear()

    def _settle_around(self, run: Run) -> None:
        self._settle_places(run)
        if self._snapshots is not None:  # the last one above may lie between now, or not any more
            above = run.parent
            while above is not None and above.parent is not None and len(above.children) == 1:
                if self._has_snapshot(above):
                    self._settle_places(above)
                    break
                above = above.parent

    def _settle_places(self, run: Run) -> None:
        old, new = self._own.get(run, {}), self.places_on(run)
        if old == new:
            return
        for place, use in old.items():
            if new.get(place) != use:
                self._count(run, run, place, use, -1)
        for place, use in new.items():
            if old.get(place) != use:
                self._count(run, run, place, use, 1)
        self._own[run] = new

    def places_on(self, run: Run) -> Places:
        """The places on a run, as the tree is now."""
        if self._snapshots is None:
            if len(run.children) == 1:
                return {}
            return {run.start * self._block + run.num_tokens if run.num_tokens else run.end * self._block: READ}
        blocks = [block for segment in self._snapshots.on(run) for block in segment.ordinals]
        places = dict.fromkeys(((block + 1) * self._block for block in blocks), READ_BETWEEN)
        if places and self._ends_below(run):
            places[max(places)] = READ
        return places

    def _ends_below(self, run: Run) -> bool:
        """Whether the path of a run ends or parts before there is another snapshot below the run."""
        while len(run.children) == 1:
            (run,) = run.children.values()
            if self._has_snapshot(run):
                return False
        return True

    def _has_snapshot(self, run: Run) -> bool:
        assert self._snapshots is not None
        return any(segment.ordinals for segment in self._snapshots.on(run))

    def _first_read(self, place: int) -> int:
        """The first block, sinks aside, that some window reads at a place."""
        return (place + 1 - self._size) // self._block

    def _reads(self, place: int, run: Run) -> bool:
        """Whether a place below a run may read pages of it."""
        return self._first_read(place) < run.end or run.start < self._num_sinks

    def _count(self, run: Run, lowest: Run, place: int, use: int, change: int) -> None:
        """A place of a run more, or less, for `lowest`, the run itself or one above it, and the runs above that."""
        first, end = self._first_read(place), -(-place // self._block)
        above = lowest
        while above.parent is not None:
            if above is run or first < above.end or above.start < self._num_sinks:
                readers = self._readers.setdefault(above, {})
                count = readers.get((place, use), 0) + change
                if count:
                    readers[place, use] = count
                else:
                    del readers[place, use]
                self.note_pages(above, first, end)
            elif not self._num_sinks:
                break
            above = above.parent

    # -- pages -------------------------------------------------------------------------------------------------------

    def uses(self, window: Window, run: Run, first: int, end: int) -> bytearray:
        """The use of a page of each of the blocks `first`..`end - 1` of a run."""
        uses = bytearray(max(0, end - first))
        readers, block, size = self._readers.get(run, {}), self._block, window.size
        shortest, longest = first * block, end * block + size - 1
        near = [reader for reader in readers if shortest < reader[0] < longest]
        for use in READ_BETWEEN, READ:
            for place, read in near:
                if read == use:
                    begin, stop = max(first, (place + 1 - size) // block), min(end, -(-place // block))
                    uses[begin - first : stop - first] = bytes((use,)) * (stop - begin)
        if first < window.num_sink_blocks and readers:
            deepest = -(-max(place for place, _ in readers) // block)  # nothing reads on below it
            sinks = min(end, window.num_sink_blocks, deepest) - first
            uses[: max(0, sinks)] = bytes((READ,)) * sinks
        return uses

    def _settle_pages(self, store: WindowStore, run: Run, first: int, end: int) -> None:
        window = store.window
        if first < end:
            store.set_uses(run, first, self.uses(window, run, first, end))
        if run.start < window.num_sink_blocks:
            end = min(window.num_sink_blocks, run.end)
            store.set_uses(run, run.start, self.uses(window, run, run.start, end))

    def check(self, runs: Sequence[Run]) -> None:
        """Raise AssertionError unless the counts are those of the places, and, if nothing is left to be settled, the
        places and the uses of all pages those of the tree.
        """
        readers: dict[Run, Readers] = {run: {} for run in runs}
        for run in runs:
            for place, use in self._own.get(run, {}).items():
                for above in run.path():
                    if above is run or self._reads(place, above):
                        readers[above][place, use] = readers[above].get((place, use), 0) + 1
        for table in (self._own, self._readers, self._changed, self._pages):
            _expect(table.keys() <= readers.keys(), "places are kept of a run that is not in the tree")
        for run, counts in readers.items():
            _expect(counts == self._readers.get(run, {}), f"run {run.start}..{run.end} has readers {counts}")
        if self._changed or self._pages:
            return
        for run in runs:
            _expect(self.places_on(run) == self._own.get(run, {}), f"run {run.start}..{run.end} has other places")
            for store in self._windows:
                uses = self.uses(store.window, run, run.start, run.end)
                for segment in store.on(run):
                    found = {use_of(segment.rank)}
                    expected = {uses[block - run.start] for block in segment.ordinals}
                    _expect(found == expected, f"run {run.start}..{run.end}: window pages of uses {expected}")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
