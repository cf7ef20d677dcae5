"""Who has to wait for whom: slots that change hands between streams."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from ssmcache.memory.base import Memory

_NO_STREAM, _SEVERAL = object(), object()


class StreamOrder:
    """Makes a stream that takes or reads slots wait for every other that has used them.

    Each call that queues something on a stream, or after which others may take what its stream has used, begins with
    `acquire` and ends with `release`. A release is an event; it stands for all that its stream had been given and had
    waited for, so the earlier ones that it covers are forgotten: there is one for each stream at most, however many
    readers a page had, and few where streams come and go. As long as there is one stream nothing is recorded at all.

    Cost: O(releases that are not covered) for each call, and two integers for each stream ever seen.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.only: object = _NO_STREAM  # the one stream that there is: its own calls need not come here
        self._releases: dict[Hashable, tuple[int, Any]] = {}  # stream -> (number, event), if not covered by a later one
        self._waited: dict[Hashable, int] = {}  # stream -> the release up to which it has waited for all
        self._count = 0
        self._latest: Any = None

    def acquire(self, stream: Hashable) -> None:
        """`stream` is about to use slots that others may have released, or read what they have written."""
        self._latest = stream
        waited = self._waited
        if stream not in waited:
            self._add(stream)
        if waited[stream] == self._count:
            return
        for other, (number, event) in self._releases.items():
            if other != stream and number > waited[stream]:
                self._memory.wait(stream, event)
        waited[stream] = self._count

    def acquire_any(self) -> Any:
        """`acquire` for work that is nobody's: returns the stream that it goes on, the one that was used last."""
        if self._waited:  # else there is nothing to do yet
            self.acquire(self._latest)
        return self._latest

    def _add(self, stream: Hashable) -> None:
        if len(self._waited) == 1:  # what the first stream did so far was not worth an event
            self._record(*self._waited)
        self._waited[stream] = 0
        self.only = stream if len(self._waited) == 1 else _SEVERAL

    def release(self, stream: Hashable) -> None:
        """What was queued on `stream` so far may be followed by others. It has acquired before."""
        if self.only is _SEVERAL:
            self._record(stream)

    def _record(self, stream: Hashable) -> None:
        covered = self._waited[stream]
        self._releases = {other: release for other, release in self._releases.items() if release[0] > covered}
        if covered == self._count:
            self._waited[stream] += 1  # its own is the only one that is new
        self._count += 1
        self._releases[stream] = (self._count, self._memory.record(stream))

    def switch(self, old: Hashable, new: Hashable) -> None:
        """A sequence goes on on another stream."""
        if old != new:
            if new not in self._waited:
                self._add(new)
            self.release(old)
            self.acquire(new)
