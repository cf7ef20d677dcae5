"""Where snapshots are taken, and which of them a touch of a path reaches."""

from typing import Protocol

from ssmcache.config import Admission


class SnapshotAdmission(Protocol):
    """Chooses the positions of a sequence, in tokens, at which a snapshot is worth its memory.

    Attributes:
        interval: all positions are multiples of it.
        keeps_path: whether all snapshots of a path are touched with it, and none is given up for one more of the same
            sequence; else a sequence has one of its own, and the others on its path are as good as anybody's.
    """

    interval: int
    keeps_path: bool

    def points(self, start: int, end: int, prompt_tokens: int) -> range:
        """Wanted positions p with start < p <= end, ascending, of a sequence whose prompt is so long."""

    def next_point(self, start: int, prompt_tokens: int) -> int:
        """The first wanted position after `start`."""


class EveryBoundary:
    """The default: every multiple of `ssm_reuse_interval`."""

    __slots__ = ("interval",)
    keeps_path = True

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def points(self, start: int, end: int, prompt_tokens: int) -> range:
        interval = self.interval
        return range(start - start % interval + interval, end + 1, interval)

    def next_point(self, start: int, prompt_tokens: int) -> int:
        return start - start % self.interval + self.interval


class LastBoundary:
    """The last multiple of `ssm_reuse_interval` alone: within the prompt that of its whole length, however it is cut
    into commits; while decoding, the last one so far, in place of the one before.
    """

    __slots__ = ("interval",)
    keeps_path = False

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def points(self, start: int, end: int, prompt_tokens: int) -> range:
        point = max(end, prompt_tokens) // self.interval * self.interval
        return range(point, point + 1, self.interval) if start < point <= end else range(0)

    def next_point(self, start: int, prompt_tokens: int) -> int:
        return max(start // self.interval + 1, prompt_tokens // self.interval) * self.interval


def admission_of(name: Admission, interval: int) -> SnapshotAdmission:
    """The policy of that name."""
    return EveryBoundary(interval) if name == "every" else LastBoundary(interval)
