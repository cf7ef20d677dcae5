"""Who has to wait for whom: slots that change hands between streams."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ssmcache.fences import Clock, Event, Fence, Fences
from ssmcache.memory.base import GPU_TIER, Memory, MovedSlots, SlotMoves
from ssmcache.pins import Pin
from ssmcache.pools import SlotArray, SlotPool
from ssmcache.tree import Run

if TYPE_CHECKING:
    from ssmcache.sequence_pages import SequencePages

_NO_STREAM, _SEVERAL = object(), object()
_MAX_STREAMS = 32  # whose waits are exact; torch makes no more of one kind
_MAX_READS_BY_NEW = 5
_NOTHING: Clock = {}
_SlotsOf = Iterable[tuple[SlotPool[Any], MovedSlots]]


class Uses(NamedTuple):
    """What a sequence may read and write, at some moment: `num_shared` blocks of its path and the pinned window pages
    are read, the rest is its own. `end`: blocks of the path, also beyond the capacity.
    """

    num_shared: int
    end: int
    own_pages: SlotArray
    windows: tuple[tuple[dict[int, int], dict[int, int]], ...]  # own slots, and those of pins, by block
    states: list[int]


class StreamOrder:
    """Makes a stream wait for what it reads, and for the last uses of slots that it takes for new content; no more.

    What kernels do with the slots of an ACTIVE sequence is not known call by call: they may use them from the call that
    hands them out (`acquire`, `follow`) to the one that takes them back or offers them to others (`follow`, `release`).
    At the end of such a call one event is recorded on the stream for all slots that it concerns. Copies of the manager
    are uses, too. A stream that waits for an event has waited for all that the event's stream had, so of several events
    only those are waited for that no other covers.

    As long as there is one stream nothing is recorded and no slot is looked at. When a second one comes, one event
    stands for all that the first did so far.

    State: for each slot an event of its last write, and one for each stream that has read it since, however often. So
    that they stay few where streams come and go, a stream that is new, or one of more than `_MAX_STREAMS`, waits for
    the oldest readers of what it reads, if there are several, and stands for them: more than is needed.
    Cost: O(slots) NumPy work for a sequence that begins or ends, and for slots that change hands; O(different events).
    """

    def __init__(self, memory: Memory, pools: Sequence[Sequence[SlotPool[Any]]]) -> None:
        self._memory = memory
        self._pools = pools  # by pool and tier
        self.only: object = _NO_STREAM  # the one stream that there is: its own calls need not come here
        self.latest: Any = None  # the stream that was used last, for work that is nobody's
        self._fences: dict[SlotPool[Any], Fences] = {}
        self._known: set[Hashable] = set()  # streams of calls that are over
        self._clocks: dict[Hashable, Clock] = {}  # of those that waited last
        self._open: dict[Hashable, Event] = {}  # by stream: that of the call under way, if it needs one
        self._num_events = 0

    def enter(self, stream: Hashable) -> None:
        """A call is about to queue something on a stream, which may be a new one."""
        self.latest = stream
        if self.only is _NO_STREAM:
            self.only = stream
        elif self.only is not _SEVERAL and stream != self.only:
            first = Event(self.only)
            self._record(first)
            fence = Fence(first)
            self._known.add(self.only)
            self._fences = {pool: Fences(pool, fence) for tiers in self._pools for pool in tiers}
            self.only = _SEVERAL

    def end(self, stream: Hashable) -> None:
        """A call that used slots on a stream is over."""
        event = self._open.get(stream)
        if event is not None:
            self._record(event)
        if len(self._known) < _MAX_STREAMS:
            self._known.add(stream)

    # -- sequences ---------------------------------------------------------------------------------------------------

    def acquire(self, sequence: SequencePages) -> None:
        """A sequence is ACTIVE from now on."""
        if self.only is _SEVERAL:
            self._acquire(sequence, sequence.stream)

    def _acquire(self, sequence: SequencePages, stream: Hashable) -> None:
        self._take(stream, list(_read_by(sequence)), list(_own_of(sequence)))

    def release(self, sequence: SequencePages) -> None:
        """A sequence that is still ACTIVE computes no more."""
        if self.only is _SEVERAL:
            self._give_up(sequence.stream, _read_by(sequence), _own_of(sequence))
            self.end(sequence.stream)

    def switch(self, sequence: SequencePages, stream: Hashable) -> None:
        """An ACTIVE sequence goes on on another stream."""
        if sequence.stream != stream:
            self.enter(stream)
            self.release(sequence)
            self._acquire(sequence, stream)
            self.end(stream)

    def uses(self, sequence: SequencePages) -> Uses | None:
        """What an ACTIVE sequence uses before a call that may change it; None if nobody wants to know."""
        if self.only is not _SEVERAL:
            return None
        end = sequence.num_blocks
        windows = tuple((window.own.copy(), _pinned(window.pins, end)) for window in sequence.windows)
        states = [] if sequence.states is None else sequence.states.slots()
        return Uses(min(sequence.cursor.end, end), sequence.cursor.end, sequence.own_pages, windows, states)

    def follow(self, sequence: SequencePages, before: Uses) -> None:
        """The call is over: wait for what came, and let others have what went."""
        stream, store, cursor = sequence.stream, sequence.store, sequence.cursor
        read, taken, read_before, given_up = list[Any](), list[Any](), list[Any](), list[Any]()
        old, own = before.own_pages, sequence.own_pages
        num_shared, num_offered = min(cursor.end, sequence.num_blocks), cursor.end - before.end
        if store.pages is not None and (own is not old or num_shared != before.num_shared):
            pages = store.pages.pools[GPU_TIER]
            read += ((pages, slots) for slots in _path_slots(cursor, before.num_shared, num_shared))
            read_before += ((pages, slots) for slots in _path_slots(cursor, num_shared, before.num_shared))
            taken.append((pages, own[max(0, len(old) - num_offered) :]))
            given_up += (pages, old[:num_offered]), (pages, old[num_offered + len(own) :])
        for window, (old_own, old_pins) in zip(sequence.windows, before.windows, strict=True):
            pool, pins = window.store.gpu_pool, _pinned(window.pins, sequence.num_blocks)
            read.append((pool, _others(pins, old_pins)))
            read_before.append((pool, _others(old_pins, pins)))
            taken.append((pool, _others(window.own, old_own)))
            given_up.append((pool, _others(old_own, window.own)))
        if sequence.states is not None and store.snapshots is not None:
            now, pool = sequence.states.slots(), store.snapshots.gpu_pool
            if now != before.states:
                taken.append((pool, [slot for slot in now if slot not in before.states]))
                given_up.append((pool, [slot for slot in before.states if slot not in now]))
        if read or taken:
            self._take(stream, read, taken)
        if read_before or given_up:
            self._give_up(stream, read_before, given_up)
        self.end(stream)

    # -- copies ------------------------------------------------------------------------------------------------------

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        """Queue a batch of copies that is in order; the call that it belongs to says when it is over (`end`).

        Errors: TransferError.
        """
        if self.only is not _SEVERAL:
            self._memory.copy(moves, stream)
            return
        pools = self._pools[moves.pool]
        sources: _SlotsOf = ((pools[moves.source_tier], moves.sources),)
        destinations: _SlotsOf = ((pools[moves.destination_tier], moves.destinations),)
        self._wait_for(stream, sources, destinations)
        try:
            self._memory.copy(moves, stream)
        finally:  # one that failed may have been queued in part
            self._give_up(stream, sources, destinations)

    # -- events ------------------------------------------------------------------------------------------------------

    def _take(self, stream: Hashable, read: _SlotsOf, own: _SlotsOf) -> None:
        """A sequence may read some slots and write others from now on."""
        self._wait_for(stream, read, own)
        for pool, slots in own:
            if len(slots):
                self._fences[pool.physical].take(slots)

    def _wait_for(self, stream: Hashable, read: _SlotsOf, written: _SlotsOf) -> None:
        """Make a stream wait before it reads some slots and writes others."""
        events: set[Event] = set()
        crowded: list[tuple[SlotPool[Any], MovedSlots]] = []
        most = _MAX_STREAMS if stream in self._known else _MAX_READS_BY_NEW
        for pool, slots in read:
            if len(slots):
                for fence in self._fences[pool.physical].of(slots):
                    too_old = fence.too_old(stream, most)
                    events.update(too_old)
                    if too_old:
                        crowded.append((pool, slots))
                    if fence.write is not None:
                        events.add(fence.write)
        for pool, slots in written:
            if len(slots):
                for fence in self._fences[pool.physical].of(slots):
                    events.update(fence.before_writing())
        clock = self._clocks.get(stream, _NOTHING)
        missing = [event for event in events if not event.is_before(stream, clock)]
        if missing:
            self._wait(stream, missing)
        self._give_up(stream, crowded, ())

    def _wait(self, stream: Hashable, events: list[Event]) -> None:
        for event in events:
            if not event.number:  # of a call under way, which has called somebody else, or was cut short
                self._record(event)
        known = dict(self._clocks.pop(stream, _NOTHING))
        for event in sorted(events, key=lambda event: -event.number):  # what covers others comes first
            if event.is_before(stream, known):
                continue
            self._memory.wait(stream, event.handle)
            known[event.stream] = event.number
            for other, number in event.seen.items():
                if number > known.get(other, 0):
                    known[other] = number
        if len(known) > _MAX_STREAMS:
            known = dict(sorted(known.items(), key=lambda item: item[1])[_MAX_STREAMS // 2 :])
        self._clocks[stream] = known  # as the one that has changed last
        if len(self._clocks) > _MAX_STREAMS:
            del self._clocks[next(iter(self._clocks))]

    def _give_up(self, stream: Hashable, read: _SlotsOf, written: _SlotsOf) -> None:
        """A stream has read some slots and written others, or could have."""
        for pool, slots in read:
            if len(slots):
                self._fences[pool.physical].read(slots, self._event(stream), self._clocks.get(stream, _NOTHING))
        for pool, slots in written:
            if len(slots):
                self._fences[pool.physical].write(slots, self._event(stream))

    def _event(self, stream: Hashable) -> Event:
        """The event of the call under way."""
        event = self._open.get(stream)
        if event is None:
            event = self._open[stream] = Event(stream)
        return event

    def _record(self, event: Event) -> None:
        stream = event.stream
        event.handle = self._memory.record(stream)
        self._open.pop(stream, None)
        self._num_events += 1
        event.number = self._num_events
        event.seen = self._clocks.get(stream, _NOTHING)


def _path_slots(cursor: Run, first: int, end: int) -> Iterator[SlotArray]:
    """Slots of the pages of blocks `first`..`end - 1` of a path."""
    run = cursor
    while first < min(run.end, end) and run.parent is not None:
        if run.pages is not None and run.start < end:
            yield run.pages.slots[max(0, first - run.start) : end - run.start]
        run = run.parent


def _read_by(sequence: SequencePages) -> Iterator[tuple[SlotPool[Any], MovedSlots]]:
    """What an ACTIVE sequence shares with others."""
    if sequence.store.pages is not None:
        pool = sequence.store.pages.pools[GPU_TIER]
        yield from ((pool, slots) for slots in _path_slots(sequence.cursor, 0, sequence.num_blocks))
    for window in sequence.windows:
        yield window.store.gpu_pool, list(_pinned(window.pins, sequence.num_blocks).values())


def _own_of(sequence: SequencePages) -> Iterator[tuple[SlotPool[Any], MovedSlots]]:
    """What an ACTIVE sequence has for itself."""
    store = sequence.store
    if store.pages is not None:
        yield store.pages.pools[GPU_TIER], sequence.own_pages
    for window in sequence.windows:
        yield window.store.gpu_pool, list(window.own.values())
    if sequence.states is not None and store.snapshots is not None:
        yield store.snapshots.gpu_pool, sequence.states.slots()


def _pinned(pins: dict[int, Pin], end: int) -> dict[int, int]:
    """Slots on the GPU by block, of blocks before `end`."""
    return {block: pin.slot for block, pin in pins.items() if block < end and pin.tier == GPU_TIER}


def _others(slots: dict[int, int], known: dict[int, int]) -> list[int]:
    """Slots by block that are not among those that are known."""
    return [] if slots == known else [slot for block, slot in slots.items() if known.get(block) != slot]
