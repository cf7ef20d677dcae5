"""Where snapshots are taken."""

from typing import Protocol


class SnapshotAdmission(Protocol):
    """Chooses the positions of a sequence, in tokens, at which a snapshot is worth its memory."""

    def points(self, start: int, end: int) -> range:
        """Wanted positions p with start < p <= end, ascending."""

    def next_point(self, start: int) -> int:
        """The first wanted position after `start`."""


class IntervalAdmission:
    """The default: every multiple of `ssm_reuse_interval`."""

    __slots__ = ("interval",)

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def points(self, start: int, end: int) -> range:
        interval = self.interval
        return range(start - start % interval + interval, end + 1, interval)

    def next_point(self, start: int) -> int:
        return start - start % self.interval + self.interval
