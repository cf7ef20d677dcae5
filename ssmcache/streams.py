"""Who has to wait for whom: slots that change hands between streams."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from ssmcache.memory.base import Memory

_NO_STREAM, _SEVERAL = object(), object()


class StreamOrder:
    """Makes a stream that takes slots wait for every other that has given some since.

    For each stream one event is kept, its last release: streams are in order, so it stands for all before it. However
    many readers a page had, nothing grows. As long as there is one stream nothing is recorded at all.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.only: object = _NO_STREAM  # the one stream that there is: its own calls need not come here
        self._releases: dict[Hashable, tuple[int, Any]] = {}  # stream -> (number of its last release, event)
        self._seen: dict[tuple[Hashable, Hashable], int] = {}  # (stream, other) -> release of the other waited for
        self._count = 0

    def acquire(self, stream: Hashable) -> None:
        """`stream` is about to use slots that others may have released, or read what they have written."""
        releases = self._releases
        if stream not in releases:
            if len(releases) == 1:  # what the first stream did so far was not worth an event
                for other in list(releases):
                    self._record(other)
            releases[stream] = (0, None)
            self.only = stream if len(releases) == 1 else _SEVERAL
        if len(releases) == 1:
            return
        for other, (number, event) in releases.items():
            if other != stream and number > self._seen.get((stream, other), 0):
                self._memory.wait(stream, event)
                self._seen[stream, other] = number

    def release(self, stream: Hashable) -> None:
        """What was queued on `stream` so far may be followed by others."""
        if self.only is _SEVERAL:
            self._record(stream)

    def _record(self, stream: Hashable) -> None:
        self._count += 1
        self._releases[stream] = (self._count, self._memory.record(stream))

    def switch(self, old: Hashable, new: Hashable) -> None:
        """A sequence goes on on another stream."""
        if old != new:
            self.acquire(new)
            self.release(old)
            self.acquire(new)
