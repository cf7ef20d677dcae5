"""Siblings: the children of one run, found by the tokens that they begin with.

Two tries over the first blocks of the children, with a node only where these part: one of all children, and one of
those that have a page of every sliding window, as far as is known: who has none is taken out when it comes up, and
comes back with its next page. A node lists the children below it, the oldest first, since that one is taken of those
that have equally many tokens in common with a prompt. Who left is dropped from the lists when it comes up, or with all
others when they are the majority.

Cost, with blocks of n tokens and whatever the number of siblings: O(n) to look up, O(n log siblings) to add, each
amortised. O(n) memory for each sibling, usually much less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush

import numpy as np

FEW = 8
"""Up to so many children looking at each is as fast."""

_TOKEN_BYTES = 8
_MIN_LEFT = 64


class _Node:
    """Siblings whose first `end` bytes are those of `sample`: `below`, by the next token, nodes or the only sibling;
    `members`, a heap of all of them. Siblings are named by their numbers.
    """

    __slots__ = ("below", "end", "members", "sample")

    def __init__(self, end: int, sample: bytes, members: list[int]) -> None:
        self.end = end
        self.sample = sample
        self.members = members
        self.below: dict[bytes, _Node | int] = {}


class _Trie:
    """`edges`: the first block of each sibling, by number; lower numbers are older."""

    __slots__ = ("_num_listed", "_root", "edges")

    def __init__(self, edges: dict[int, bytes]) -> None:
        self.edges = edges
        self._list_anew()

    def _list_anew(self) -> None:
        self._root = _Node(0, b"", [])
        self._num_listed = 0
        for number in sorted(self.edges):
            self._list(number)

    def add(self, number: int, edge: bytes) -> None:
        """Add a sibling, which may have left before."""
        self.edges[number] = edge
        self._list(number)
        self._forget_left()

    def remove(self, number: int) -> None:
        if self.edges.pop(number, None) is not None:
            self._forget_left()

    def _forget_left(self) -> None:
        if self._num_listed > 2 * len(self.edges) + _MIN_LEFT:
            self._list_anew()

    def _list(self, number: int) -> None:
        self._num_listed += 1
        edge, node = self.edges[number], self._root
        while True:
            heappush(node.members, number)
            token = edge[node.end : node.end + _TOKEN_BYTES]
            if not token:  # a partial block that others begin with
                return
            child = node.below.get(token)
            if child is None or child == number or (isinstance(child, int) and child not in self.edges):
                node.below[token] = number
                return
            sample, end, members = (
                (self.edges[child], len(edge), [child])
                if isinstance(child, int)
                else (child.sample, child.end, child.members)
            )
            common = _common(edge, sample, node.end, end)
            if isinstance(child, int) or common < end:  # they part here
                parting = node.below[token] = _Node(common, sample, members[:])
                if common < len(sample):
                    parting.below[sample[common : common + _TOKEN_BYTES]] = child
                child = parting
            node = child

    def _path(self, tail: bytes) -> list[tuple[_Node | int, int]]:
        """Nodes, and at last a sibling, that begin like `tail`, from the top down, each with the bytes in common."""
        path: list[tuple[_Node | int, int]] = []
        node = self._root
        while True:
            child = node.below.get(tail[node.end : node.end + _TOKEN_BYTES])
            if child is None or (isinstance(child, int) and child not in self.edges):
                return path
            if isinstance(child, int):
                path.append((child, _common(self.edges[child], tail, node.end, len(tail))))
                return path
            common = _common(child.sample, tail, node.end, child.end)
            path.append((child, common))
            if common < child.end:
                return path
            node = child

    def best(self, tail: bytes) -> tuple[int, int] | None:
        """The sibling that has most tokens in common with `tail`, of equal ones the oldest, and their number."""
        for step, common in reversed(self._path(tail)):
            number = step if isinstance(step, int) else self._oldest(step.members)
            if number is not None:
                return number, common // _TOKEN_BYTES
        return None

    def _oldest(self, members: list[int]) -> int | None:
        while members and members[0] not in self.edges:
            heappop(members)
        return members[0] if members else None

    def prefixes(self, block: bytes) -> list[bytes]:
        """What siblings can be that `block` begins with."""
        return [
            self.edges[step] if isinstance(step, int) else block[:common]
            for step, common in self._path(block)
            if common == (len(self.edges[step]) if isinstance(step, int) else step.end)
        ]


class Siblings:
    """See the module. `edges`: the children's, in the order in which they came."""

    __slots__ = ("_all", "_next", "_numbers", "_usable")

    def __init__(self, edges: Iterable[bytes]) -> None:
        self._all = _Trie(dict(enumerate(edges)))
        self._numbers = {edge: number for number, edge in self._all.edges.items()}
        self._next = len(self._numbers)
        self._usable: _Trie | None = None

    @property
    def edges(self) -> list[bytes]:
        """Of the children, in the order in which they came."""
        return list(self._numbers)

    def add(self, edge: bytes) -> None:
        """A child came."""
        number = self._numbers[edge] = self._next
        self._next += 1
        self._all.add(number, edge)
        if self._usable is not None:
            self._usable.add(number, edge)

    def remove(self, edge: bytes) -> None:
        """A child left."""
        number = self._numbers.pop(edge)
        self._all.remove(number)
        if self._usable is not None:
            self._usable.remove(number)

    def regain(self, edge: bytes) -> None:
        """A child got a window page of its first block."""
        if self._usable is not None and self._numbers[edge] not in self._usable.edges:
            self._usable.add(self._numbers[edge], edge)

    def best(self, tail: bytes) -> tuple[bytes, int] | None:
        """The child that has most tokens in common with `tail`, of equal ones the oldest, and their number; None if
        none begins with the first token.
        """
        found = self._all.best(tail)
        return None if found is None else (self._all.edges[found[0]], found[1])

    def best_usable(self, tail: bytes, has_pages: Callable[[bytes], bool]) -> tuple[bytes, int] | None:
        """`best` of the children that have the pages of every window."""
        if self._usable is None:
            self._usable = _Trie(self._all.edges.copy())
        while (found := self._usable.best(tail)) is not None:
            edge = self._usable.edges[found[0]]
            if has_pages(edge):
                return edge, found[1]
            self._usable.remove(found[0])
        return None

    def prefixes(self, block: bytes) -> list[bytes]:
        """The children that `block` begins with, in the order in which they came."""
        found = (edge for edge in self._all.prefixes(block) if edge in self._numbers)
        return sorted(found, key=self._numbers.__getitem__)


def _common(left: bytes, right: bytes, start: int, end: int) -> int:
    """Bytes of whole tokens, up to `end`, that both begin with, given that they do so up to `start`."""
    end = min(end, len(left), len(right))
    if left[start:end] == right[start:end]:
        return end
    differs = np.frombuffer(left[start:end], np.int64) != np.frombuffer(right[start:end], np.int64)
    return start + int(differs.argmax()) * _TOKEN_BYTES
