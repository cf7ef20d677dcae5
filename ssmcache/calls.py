"""Public calls of one manager and its sequences: one at a time, and none after one that broke off half-way."""

from __future__ import annotations

import sys
from threading import RLock
from types import TracebackType


class BrokenManagerError(RuntimeError):
    """A call broke off while it was changing the cache, so that nobody knows what lies where: no page of that manager
    may be used any more. `shutdown` gives its memory back.
    """


class Calls:
    """A context around each public call: the lock of a manager, and whether its state is whole.

    A call that changes something checks its arguments first and sets `changing` then. What raises before that is a
    mistake of the caller, and nothing has changed; what raises later, out of the memory or an observer, closes the
    manager: every later call raises `BrokenManagerError`. A call from within a change, such as by an observer, is
    refused too.
    """

    __slots__ = ("_acquire", "_release", "broken_by", "changing", "lock")

    def __init__(self) -> None:
        self.lock = RLock()
        self._acquire, self._release = self.lock.acquire, self.lock.release  # once here: every call needs them
        self.changing = False
        self.broken_by: BaseException | None = None

    def __enter__(self) -> None:
        self._acquire()
        if self.changing:
            self._release()
            raise self._refusal(sys._getframe(1).f_code.co_name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.changing = False
        elif self.changing:
            self.broken_by = error
        self._release()

    def _refusal(self, call: str) -> RuntimeError:
        if self.broken_by is None:
            return RuntimeError(f"{call}: expected no call from within another one that changes the cache")
        error = BrokenManagerError(
            f"{call}: expected a whole manager, got one that an earlier call left broken: {self.broken_by!r}; "
            "shut it down and make another"
        )
        error.__cause__ = self.broken_by
        return error
