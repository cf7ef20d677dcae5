"""What a sequence holds before it is first resumed: until others need the room."""

from __future__ import annotations

from collections.abc import Sequence

from ssmcache.events import CacheObserver
from ssmcache.match import Found, Partial
from ssmcache.pins import Pin
from ssmcache.structure import TreeStructure
from ssmcache.tree import Root, Run
from ssmcache.windows import WindowStore

Pins = Sequence[tuple[WindowStore, int, Pin]]  # with the block of each


class PathHolder:
    """A sequence as far as the tree knows it: it holds the path of `cursor`, down to and with that run.

    Softly (`soft`) from creation to its first resume, together with the snapshot `source` that it would start from, the
    window pages `pins` that it needs, and the block `partial` that it would copy: such a hold is dropped when room is
    short and nothing else is left to go, and `cursor` is the root from then on. Locked (`locked`) from its first resume
    to its end, or merely held (`idle`, too) while it is suspended.
    """

    __slots__ = ("cursor", "idle", "locked", "partial", "pins", "root", "soft", "source")

    root: Root
    soft: bool
    locked: bool
    idle: bool
    # these are set by `BlockStore.hold_softly`
    cursor: Run
    source: Pin | None
    pins: Pins
    partial: Partial | None

    def touch_own_snapshots(self, stamp: int) -> Sequence[int]:
        """Stamp the snapshots at the last boundary of what was committed and at that of the prompt; returns the blocks
        of those that there are.
        """
        raise NotImplementedError


SoftHold = tuple[Run, Pin | None, Pins, Partial | None]


class SoftHolds(TreeStructure):
    """The tree, and who holds which part of it softly."""

    def __init__(self, tokens_per_block: int, has_tiers: bool, events: CacheObserver | None) -> None:
        super().__init__(tokens_per_block, has_tiers, events)
        self.soft_holders: dict[PathHolder, None] = {}  # oldest first

    def hold_softly(self, holder: PathHolder, found: Found) -> SoftHold | None:
        """Hold what a look-up found until others need the room. Takes the place of a soft hold that the holder has,
        which is returned: the caller ends it, or takes it up again.
        """
        old = (holder.cursor, holder.source, holder.pins, holder.partial) if holder.soft else None
        run, depth, reuse, segment, position, partial = found
        source = None
        if segment is not None and self.snapshots is not None:  # before a split moves it to another segment
            source = self.snapshots.pins.pin(segment.tier, segment.slots[position])
            source.soft += 1
        if depth < run.end:
            while depth <= run.start and run.parent is not None:
                run = run.parent
            if depth < run.end:
                run = self.split(run, depth)
        if partial is not None:
            if partial.block + 1 < partial.run.end:
                partial = partial._replace(run=self.split(partial.run, partial.block + 1))
            partial.run.soft_holds += 1
        run.soft_holds += 1
        pins: Pins = ()
        if self.windows:
            deepest, num_blocks = (run, depth) if partial is None else (partial.run, depth + 1)
            pins = self._pin_windows(deepest, num_blocks, reuse.usable_tokens)
        holder.cursor, holder.source, holder.pins, holder.partial = run, source, pins, partial
        holder.soft = True
        self.soft_holders[holder] = None
        return old

    def _pin_windows(self, deepest: Run, num_blocks: int, usable_tokens: int) -> Pins:
        pins: list[tuple[WindowStore, int, Pin]] = []
        for store in self.windows:
            places = store.find(deepest, 0, num_blocks)
            for block in store.window.needed_blocks(usable_tokens, num_blocks):
                segment, position = places[block]
                pin = store.pins.pin(segment.tier, segment.slots[position])
                pin.soft += 1
                pins.append((store, block, pin))
        return pins

    def take_up_again(self, holder: PathHolder, old: SoftHold | None) -> None:
        """Put the soft hold back that `hold_softly` returned; the present one ends."""
        if old is None:
            self.drop_soft_hold(holder)
            return
        new = holder.cursor, holder.source, holder.pins, holder.partial
        holder.cursor, holder.source, holder.pins, holder.partial = old
        self.end_soft_hold(new)

    def drop_soft_hold(self, holder: PathHolder) -> None:
        """Let go without a touch: the path is as old as it was."""
        del self.soft_holders[holder]
        old = holder.cursor, holder.source, holder.pins, holder.partial
        holder.cursor, holder.source, holder.pins, holder.partial = holder.root, None, (), None
        holder.soft = False
        self.end_soft_hold(old)

    def end_soft_hold(self, hold: SoftHold) -> None:
        run, source, pins, partial = hold
        run.soft_holds -= 1
        if source is not None:
            assert self.snapshots is not None
            self.snapshots.pins.end_soft(source)
        for store, _, pin in pins:
            store.pins.end_soft(pin)
        if partial is not None:
            partial.run.soft_holds -= 1
            self.settle_leaf(partial.run)
        self.settle_leaf(run)

    def drop_newest_soft_hold(self) -> None:
        """Make room: whoever was created last runs last, so it loses its match first."""
        newest = next((holder for holder in reversed(self.soft_holders) if holder.soft), None)
        assert newest is not None, "room was promised that does not exist"
        self.drop_soft_hold(newest)

    def drop_soft_holds_from(self, source: Pin) -> None:
        """Others who would start from a snapshot lose their match."""
        for holder in [holder for holder in self.soft_holders if holder.soft and holder.source is source]:
            self.drop_soft_hold(holder)

    def drop_soft_holds_of(self, run: Run) -> None:
        holders = [holder for holder in self.soft_holders if run in (holder.cursor, _partial_run(holder))]
        for holder in holders:
            if holder.soft:
                self.drop_soft_hold(holder)


def _partial_run(holder: PathHolder) -> Run | None:
    return None if holder.partial is None else holder.partial.run
