"""What happened to the reusable blocks, for whoever mirrors the cache: a router, a log, a test."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ssmcache.keys import Int64Array, ReuseScope, TokenIds
from ssmcache.memory.base import GPU_TIER
from ssmcache.tree import Run, root_of, runs_below


class EventKind(Enum):
    STORED = "stored"
    REMOVED = "removed"
    MOVED = "moved"


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """Blocks of one path that a layer group got, lost or moved.

    Attributes:
        id: grows by one with each event; a gap says that the buffer was too short and events were dropped.
        digests: the blocks: SHA-256 of the parent's digest and the bytes of the block's tokens, each a 64-bit integer,
            little-endian, or for a multimodal item the integer -1 and its 32 bytes. A ready key is one such integer.
        parents: for each block, the digest of the block before it; for the first SHA-256 of `repr` of the scope.
        tier, source_tier: indices of tiers; where the slots lie now (for REMOVED: lay), and where a move came from.
    """

    id: int
    kind: EventKind
    layer_group: int
    scope: ReuseScope
    digests: tuple[bytes, ...]
    parents: tuple[bytes, ...]
    tier: int
    source_tier: int | None = None


class CacheObserver(Protocol):
    """Who is told of every change of the reusable blocks, in order and at once: under the manager's lock, so it must be
    quick, and not call the manager. `layer_group` is that of the slots; `ordinals` are ascending blocks, counted from
    the start of the path. Arrays that it is given are the tree's.
    """

    def stored(self, run: Run, num_blocks: int, layer_group: int | None) -> None:
        """The last blocks of a run are new in the tree, with pages of a layer group (None: without)."""

    def added(self, cursor: Run, layer_group: int, ordinals: Iterable[int]) -> None:
        """Blocks of the path of `cursor`, ascending, got slots of a layer group."""

    def skipped(self, cursor: Run, layer_group: int, ordinal: int, reason: str) -> None:
        """The end of a block of the path of `cursor` was wanted as a snapshot, and none was taken: `crossed`, `no_room`
        or `history`, as in `CacheStats`. Or one that was taken is wanted no more: `not_admitted`, after `removed`.
        """

    def removed(self, layer_group: int, tier: int, run: Run, ordinals: Iterable[int]) -> None:
        """Blocks of a run lost slots that lay on a tier; the run may be about to lose the blocks themselves."""

    def moved(self, layer_group: int, source_tier: int, tier: int, run: Run, ordinals: Iterable[int]) -> None:
        """Slots of blocks of a run lie on another tier now."""

    def lost(self, run: Run, page_group: int | None) -> None:
        """A run and all below it leave the tree, though somebody may hold them for some time yet."""


class EventLog:
    """The last `capacity` events.

    A set of (layer group, digest) to which STORED adds and from which REMOVED takes is what the cache has; a block can
    be matched if its layer groups have what the rules of matching ask for. Partial blocks have no events.

    Args:
        token_ids: tells which items negative tokens stand for.
    """

    def __init__(self, capacity: int, token_ids: TokenIds) -> None:
        self._token_ids = token_ids
        self._events: deque[CacheEvent] = deque(maxlen=capacity)
        self._next_id = 0

    def take(self) -> list[CacheEvent]:
        """The events since the last call, oldest first; the log is empty then."""
        events = list(self._events)
        self._events.clear()
        return events

    def stored(self, run: Run, num_blocks: int, layer_group: int | None) -> None:
        """The last blocks of a run are new in the tree, with pages of a layer group (None: without)."""
        width = run.kind.width
        digest = self._digest_before(run, run.end - num_blocks)
        digests = []
        for block in range(run.end - num_blocks - run.start, run.end - run.start):
            keys = run.keys[block * width : (block + 1) * width]
            content = _bytes(keys) if run.kind.prefix_unique else self._bytes_of_tokens(keys)
            digest = sha256(digest + content).digest()
            digests.append(digest)
        run.digests += tuple(digests)
        if layer_group is not None:
            self._add(EventKind.STORED, layer_group, run, range(run.end - num_blocks, run.end), GPU_TIER)

    def _bytes_of_tokens(self, tokens: Int64Array) -> bytes:
        if tokens.min() >= 0:
            return _bytes(tokens)
        item = _bytes(np.array([-1]))
        return b"".join(
            item + self._token_ids.digest_of(int(token)) if token < 0 else _bytes(token) for token in tokens
        )

    def added(self, cursor: Run, layer_group: int, ordinals: Iterable[int]) -> None:
        """Blocks of the path of `cursor`, ascending, got slots of a layer group."""
        left = list(ordinals)
        for run in cursor.path():
            here = [ordinal for ordinal in left if ordinal >= run.start]
            if here:
                self._add(EventKind.STORED, layer_group, run, here, GPU_TIER)
                left = left[: -len(here)]

    def skipped(self, cursor: Run, layer_group: int, ordinal: int, reason: str) -> None:
        """Nothing: what can be matched is as before."""

    def removed(self, layer_group: int, tier: int, run: Run, ordinals: Iterable[int]) -> None:
        self._add(EventKind.REMOVED, layer_group, run, ordinals, tier)

    def moved(self, layer_group: int, source_tier: int, tier: int, run: Run, ordinals: Iterable[int]) -> None:
        self._add(EventKind.MOVED, layer_group, run, ordinals, tier, source_tier)

    def lost(self, run: Run, page_group: int | None) -> None:
        """A run and all below it leave the tree, though somebody may hold them for some time yet."""
        runs = [run, *runs_below(run)]
        for below in runs:
            if below.pages is not None and page_group is not None:
                self.removed(page_group, below.pages.tier, below, range(below.start, below.end))
            for segment in below.items:
                self.removed(segment.store.layer_group, segment.tier, below, segment.ordinals)
        for below in runs:
            below.digests = ()

    def _add(
        self, kind: EventKind, layer_group: int, run: Run, ordinals: Iterable[int], tier: int,
        source_tier: int | None = None,
    ) -> None:  # fmt: skip
        blocks = list(ordinals)
        if not run.digests or not blocks:
            return  # a partial block, or not in the tree: parked by a suspended sequence, or lost
        digests = tuple(run.digests[block - run.start] for block in blocks)
        parents = tuple(self._digest_before(run, block) for block in blocks)
        scope = root_of(run).scope
        self._events.append(CacheEvent(self._next_id, kind, layer_group, scope, digests, parents, tier, source_tier))
        self._next_id += 1

    def _digest_before(self, run: Run, block: int) -> bytes:
        if block > run.start:
            return run.digests[block - run.start - 1]
        assert run.parent is not None
        if run.parent.digests:
            return run.parent.digests[-1]
        return sha256(repr(root_of(run).scope).encode()).digest()


def _bytes(keys: npt.NDArray[np.int64] | np.int64) -> bytes:
    return keys.astype("<i8").tobytes()


def matchable(events: Iterable[CacheEvent]) -> Iterator[tuple[int, bytes]]:
    """(layer group, digest) of what there is after all events of a cache, from the first on."""
    there: dict[tuple[int, bytes], None] = {}
    for event in events:
        for digest in event.digests:
            if event.kind is EventKind.STORED:
                there[event.layer_group, digest] = None
            elif event.kind is EventKind.REMOVED:
                there.pop((event.layer_group, digest), None)
    return iter(there)
