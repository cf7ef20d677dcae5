"""The radix tree of runs: structure only. Who may go, and what is counted, is decided elsewhere.

A *run* is a maximal stretch of consecutive blocks that were last touched together and lie in one tier: one node of the
tree. It carries the keys of its blocks, their pages of full attention in one segment, and what sliding windows and SSM
have there as sparse segments (`segments.py`).

A sequence remembers one run, the deepest of its path, and means all of that run's blocks. Hence the rule of a split:
the lower part keeps its identity, the upper part is the new object.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ssmcache.keys import EdgeKey, Int64Array, KeyKind, ReuseScope
from ssmcache.pools import fitting
from ssmcache.segments import GROWTH, PageSegment, SparseSegment
from ssmcache.siblings import FEW, Siblings


class Run:
    """One node: blocks `start`..`end - 1` of the paths through it.

    `key_buffer` begins with the keys of the run and may have room behind them, or be a part of a longer array, but
    keeps at most twice their memory alive (see `fitting`).

    `holds` counts the sequences that were resumed and whose path goes through the run, `idle_holds` those of them that
    are suspended: while there are others, the run is locked. `soft_holds` counts the sequences that were created but
    not yet resumed, and only at the deepest run of their path: nothing above a run that has a child can go anyway.
    `warm_children` are the children whose pages lie in the same tier; the others lie further down. `siblings` finds
    children by what they begin with, from the first time that this was asked for, while they are many.
    """

    __slots__ = (
        "children", "digests", "edge", "end", "holds", "idle_holds", "items", "key_buffer", "kind", "pages", "parent",
        "siblings", "soft_holds", "start", "warm_children",
    )  # fmt: skip
    num_tokens = 0  # less than a whole block

    def __init__(
        self, parent: Run | None, kind: KeyKind, edge: EdgeKey, start: int, end: int, keys: Int64Array
    ) -> None:
        self.parent = parent
        self.kind = kind
        self.edge = edge
        self.start = start
        self.end = end
        self.key_buffer = fitting(keys, keys.size)
        self.children: dict[EdgeKey, Run] = {}
        self.siblings: Siblings | None = None
        self.holds = 0
        self.idle_holds = 0
        self.soft_holds = 0
        self.warm_children = 0
        self.pages: PageSegment | None = None
        self.items: tuple[SparseSegment, ...] = ()
        self.digests: tuple[bytes, ...] = ()

    @property
    def keys(self) -> Int64Array:
        return self.key_buffer[: (self.end - self.start) * self.kind.width]

    def add_child(self, child: Run) -> None:
        """The child has a new edge."""
        self.children[child.edge] = child
        if self.siblings is not None:
            self.siblings.add(child.edge)  # type: ignore[arg-type]  # tokens

    def remove_child(self, child: Run) -> None:
        del self.children[child.edge]
        if self.siblings is not None:
            self.siblings.remove(child.edge)  # type: ignore[arg-type]
            if len(self.children) <= FEW:
                self.siblings = None

    def children_by_tokens(self) -> Siblings:
        """Finds children of a scope of tokens, in blocks of several."""
        if self.siblings is None:
            self.siblings = Siblings(edge for edge in self.children if isinstance(edge, bytes))
        return self.siblings

    def append_keys(self, keys: Int64Array, num_blocks: int) -> None:
        """Grow the run in place by the blocks of `keys`. Amortised O(blocks added)."""
        width = self.kind.width
        used = (self.end - self.start) * width
        needed = used + num_blocks * width
        if needed > self.key_buffer.size or not self.key_buffer.flags.writeable:
            grown = np.empty((int(needed * GROWTH) // width + 1) * width, dtype=np.int64)
            grown[:used] = self.key_buffer[:used]
            self.key_buffer = grown
        self.key_buffer[used:needed] = keys
        self.end += num_blocks

    def prepend_keys(self, upper: Run) -> None:
        self.key_buffer = np.concatenate((upper.keys, self.keys))
        self.start = upper.start

    def split_keys(self, at: int) -> Int64Array:
        """Leave the keys from block `at` on here, with the room to grow, and return the ones before it."""
        size = (at - self.start) * self.kind.width
        above = self.key_buffer[:size]
        self.key_buffer = fitting(self.key_buffer[size:], (self.end - at) * self.kind.width)
        self.start = at
        self.edge = self.kind.edge_key(self.key_buffer, 0)
        return above

    def path(self) -> Iterator[Run]:
        """This run and those above it, deepest first, without the root."""
        run = self
        while run.parent is not None:
            yield run
            run = run.parent


class PartialRun(Run):
    """A leaf of one block that is not full, with the tokens `keys`."""

    __slots__ = ("num_tokens",)

    def __init__(self, parent: Run, keys: Int64Array) -> None:
        super().__init__(parent, parent.kind, keys.tobytes(), parent.end, parent.end + 1, keys)
        self.num_tokens = keys.size


class Root(Run):
    """Where the paths of one scope start; holds no block. `num_sequences` are the open sequences of the scope; `lost`
    says that what is below cannot be reached any more, since a page above it, or of it, could not be read; `retired`,
    that it was cleared while sequences held it, who go on with it and offer nothing more.
    """

    __slots__ = ("lost", "num_sequences", "retired", "scope")

    def __init__(self, kind: KeyKind, scope: ReuseScope) -> None:
        super().__init__(None, kind, b"", 0, 0, np.empty(0, dtype=np.int64))
        self.scope = scope
        self.num_sequences = 0
        self.lost = self.retired = False


def root_of(run: Run) -> Root:
    """Where the path of a run starts."""
    root = run
    while root.parent is not None:
        root = root.parent
    assert isinstance(root, Root)
    return root


def runs_below(root: Run) -> list[Run]:
    """Every run below one, parents before their children."""
    runs: list[Run] = []
    stack = list(root.children.values())
    while stack:
        run = stack.pop()
        runs.append(run)
        stack.extend(run.children.values())
    return runs
