"""Who is oldest: path touch, deepest first.

A touch stamps every full-attention block and snapshot of a path at once. Within it the deepest block is the oldest,
so an ancestor is always more recent than its descendants and the oldest page is always the tail of a leaf. That makes
the content of a cache of any size the most recent blocks of the trace: LRU is a stack algorithm.
"""


class Clock:
    """Gives each touched block a time of its own without a counter per block.

    A touch of a path of `depth` blocks advances the clock by `depth + 1` and returns its stamp: block i of the path
    was touched at `stamp - i`. Times are unique over all touches, so order never needs a tie-break.
    """

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0

    def touch(self, depth: int) -> int:
        self.now += depth + 1
        return self.now
