"""Where snapshots are taken, and which of them a touch of a path reaches."""

from typing import Protocol

from ssmcache.config import Admission


class SnapshotAdmission(Protocol):
    """Chooses the positions of a sequence, in tokens, at which a snapshot is worth its memory.

    Attributes:
        interval: all positions are multiples of it.
        keeps_path: whether all snapshots of a path are touched with it, and none is given up for one more of the same
            sequence; else a sequence has that of its prompt and the last one that it decoded, and the others on its
            path are as good as anybody's.
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
    """The last multiple of `ssm_reuse_interval` within the prompt, however that is cut into commits; while decoding
    also the last one so far, in place of the one decoded before.
    """

    __slots__ = ("interval",)
    keeps_path = False

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def points(self, start: int, end: int, prompt_tokens: int) -> range:
        interval = self.interval
        of_prompt = prompt_tokens // interval * interval
        last = end // interval * interval
        first = of_prompt if start < of_prompt else last
        return range(first, last + 1, last - first or interval) if start < first <= end else range(0)

    def next_point(self, start: int, prompt_tokens: int) -> int:
        return max(start // self.interval + 1, prompt_tokens // self.interval) * self.interval


def admission_of(name: Admission, interval: int) -> SnapshotAdmission:
    """The policy of that name."""
    return EveryBoundary(interval) if name == "every" else LastBoundary(interval)
