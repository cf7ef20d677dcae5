"""Public calls of one manager and its sequences: one at a time, and none after one that broke off half-way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import RLock
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

Params = ParamSpec("Params")
Result = TypeVar("Result")


class BrokenManagerError(RuntimeError):
    """A call broke off while it was changing the cache, so that nobody knows what lies where: no page of that manager
    may be used any more. `shutdown` gives its memory back.
    """


class Calls:
    """The lock of a manager, and whether its state is whole.

    A call that changes something checks its arguments first and sets `changing` then. What raises before that is a
    mistake of the caller, and nothing has changed; what raises later, out of the memory or an observer, closes the
    manager: every later call raises `BrokenManagerError`. A call from within a change, such as by an observer, is
    refused too.
    """

    __slots__ = ("broken_by", "changing", "lock")

    def __init__(self) -> None:
        self.lock = RLock()
        self.changing = False
        self.broken_by: BaseException | None = None

    def refusal(self, call: str) -> RuntimeError:
        """Why no call can be made now."""
        if self.broken_by is None:
            return RuntimeError(f"{call}: expected no call from within another one that changes the cache")
        error = BrokenManagerError(
            f"{call}: expected a whole manager, got one that an earlier call left broken: {self.broken_by!r}; "
            "shut it down and make another"
        )
        error.__cause__ = self.broken_by
        return error


class _Caller(Protocol):
    @property
    def calls(self) -> Calls: ...


Caller = TypeVar("Caller", bound=_Caller)


def public(method: Callable[Concatenate[Caller, Params], Result]) -> Callable[Concatenate[Caller, Params], Result]:
    """Make a method one of the public calls of the `Calls` of its object."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: Caller, /, *args: Any, **kwargs: Any) -> Result:
        calls = self.calls
        with calls.lock:
            if calls.changing:
                raise calls.refusal(name)
            try:
                result = method(self, *args, **kwargs)
            except BaseException as error:
                if calls.changing:
                    calls.broken_by = error
                raise
            calls.changing = False
            return result

    return call
