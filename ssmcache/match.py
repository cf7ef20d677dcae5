"""What the tree knows of a prompt, and how much of that can be used: walk the keys, then cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ssmcache.keys import Int64Array
from ssmcache.segments import SparseSegment
from ssmcache.siblings import FEW
from ssmcache.stats import ReuseMatch
from ssmcache.tree import Root, Run
from ssmcache.windows import WindowStore

if TYPE_CHECKING:
    from ssmcache.structure import TreeStructure


class Partial(NamedTuple):
    """A block of `run` whose first `num_tokens` tokens go on from the full blocks of a match."""

    run: Run
    block: int
    num_tokens: int


_new = tuple.__new__  # half the price of a NamedTuple's own constructor

Found = tuple[Run, int, ReuseMatch, SparseSegment | None, int, Partial | None]
"""The result of a look-up: the path to take up and its length in blocks (what can be used, and the pages beyond that);
lengths in tokens; the segment of the state to start from and its position there; the block that a last, partly matching
block is copied from. A plain tuple: it is made for every request.
"""


def match_blocks(root: Root, keys: Int64Array, num_blocks: int) -> tuple[Run, int]:
    """Longest known prefix of `num_blocks` blocks: (run that holds its last block, its length in blocks).

    Pure. Cost: one dictionary look-up and at most one vectorised comparison a run.
    """
    run: Run = root
    depth = 0
    kind = root.kind
    one_key, unique = kind.width == 1, kind.prefix_unique
    while depth < num_blocks:
        child = run.children.get(keys.item(depth) if one_key else kind.edge_key(keys, depth))
        if child is None:
            break
        run = child
        length = run.end - run.start
        comparable = num_blocks - depth
        if comparable > length:
            comparable = length
        # as `common_blocks` does, without a call for what is the rule
        if unique and keys.item(depth + comparable - 1) == run.key_buffer.item(comparable - 1):
            depth += comparable
        else:
            common = kind.common_blocks(run.key_buffer, 0, keys, depth, comparable)
            depth += common
            if common < length:
                break
    return run, depth


def match_partial(run: Run, depth: int, tail: Int64Array, windows: Sequence[WindowStore] = ()) -> Partial | None:
    """The block after `depth` blocks of the path of `run` that has most tokens in common with `tail`, the next tokens
    of a prompt, at most one block of them; only blocks that have a page of each of `windows`.

    Cost: O(tokens of a block), however many children there are where the path ends with its run; see `Siblings`.
    """
    if not tail.size:
        return None
    if depth < run.end:
        candidates = [run]
    elif run.kind.width == 1:
        child = run.children.get(tail.item(0))
        candidates = [] if child is None else [child]
    elif len(run.children) > FEW:
        return _match_sibling(run, tail.tobytes(), windows)
    else:
        first = tail.item(0)
        candidates = [child for child in run.children.values() if child.key_buffer.item(0) == first]
    best: Partial | None = None
    for candidate in candidates:
        block = max(depth, candidate.start)
        start = (block - candidate.start) * candidate.kind.width
        known = candidate.keys[start : start + tail.size]
        common = common_prefix(known, tail)
        if common and (best is None or common > best.num_tokens) and _has_pages(candidate, block, windows):
            best = Partial(candidate, block, common)
    return best


def _match_sibling(run: Run, tail: bytes, windows: Sequence[WindowStore]) -> Partial | None:
    """`match_partial` among many children."""
    children, siblings = run.children, run.children_by_tokens()
    if windows:
        found = siblings.best_usable(tail, lambda edge: _has_pages(children[edge], children[edge].start, windows))
    else:
        found = siblings.best(tail)
    return None if found is None else Partial(children[found[0]], run.end, found[1])


def _has_pages(run: Run, block: int, windows: Sequence[WindowStore]) -> bool:
    return all(any(block in segment.ordinals for segment in store.on(run)) for store in windows)


def find(
    structure: TreeStructure, root: Root, keys: Int64Array, num_blocks: int, num_tokens: int, partly: bool, adopt: bool
) -> Found:
    """Look a prompt up. Pure.

    Args:
        keys, num_blocks: keys of so many blocks; one more may be known than the tokens fill.
        num_tokens: tokens that may be skipped.
        partly: whether the last block may match in part; `keys` are tokens then.
        adopt: whether to take up pages beyond what can be used.
    """
    width = root.kind.width
    run, depth = match_blocks(root, keys, num_blocks)
    snapshots = structure.snapshots
    if not partly and not structure.windows:
        # one more block may be known than the tokens fill: it can be adopted, but not skipped
        block = structure.tokens_per_block
        usable = found = min(depth, num_tokens // block)
        segment, position = None, -1
        if snapshots is not None:
            usable, segment, position = snapshots.deepest(run, found)
        if not adopt:
            depth = usable
        reuse = _new(ReuseMatch, (found * block, found * block, usable * block))
        return run, depth, reuse, segment, position, None
    block = structure.tokens_per_block
    cut = _Cut(structure, run)
    if partly:  # there are no states then
        partial = match_partial(run, depth, keys[depth * width : (depth + 1) * width])
        tree = depth * block + (0 if partial is None else partial.num_tokens)
        usable, partial = cut.longest_in_part(keys, depth, partial)
        if partial is None:
            depth = cut.adopted(usable // block, depth) if adopt else usable // block
        else:
            depth = partial.block
        return run, depth, ReuseMatch(tree, usable, usable), None, -1, partial
    tree = min(depth, num_tokens // block) * block
    attention = cut.longest(tree, with_states=False)
    usable = cut.longest(attention, with_states=True)
    segment, position = None, -1
    if snapshots is not None:
        _, segment, position = snapshots.deepest(run, usable // block)
    depth = cut.adopted(usable // block, depth) if adopt else usable // block
    return run, depth, ReuseMatch(tree, attention, usable), segment, position, None


class _Cut:
    """How far a path can be used, given the pages of sliding windows and the snapshots on it."""

    def __init__(self, structure: TreeStructure, run: Run) -> None:
        self._structure = structure
        self._run = run
        self._present: list[tuple[WindowStore, set[int]]] = [
            (store, store.ordinals_on(run, 0)) for store in structure.windows
        ]

    def longest(self, length: int, with_states: bool) -> int:
        """The greatest length, in tokens, of at most `length` at which everything that is needed exists.

        Each life cycle cuts to the greatest length that it allows itself, until none does: a length that is cut off
        is allowed by none of the shorter ones' rules either, so the fixed point is the greatest.
        """
        block = self._structure.tokens_per_block
        snapshots = self._structure.snapshots if with_states else None
        while True:
            before = length
            if snapshots is not None:
                length = snapshots.deepest(self._run, length // block)[0] * block
            for store, present in self._present:
                for needed in store.window.needed_blocks(length, -(-length // block)):
                    if needed not in present:
                        # a length between there and here needs this page too: a window only moves forward
                        length = needed * block
                        break
            if length == before:
                return length

    def longest_in_part(self, keys: Int64Array, depth: int, partial: Partial | None) -> tuple[int, Partial | None]:
        """The greatest length at which everything needed exists where the last block may match in part: `depth` full
        blocks match, and `partial` is the best of the next, whatever it lacks.

        Where the path lacks a page of a block, another block in its place may have it and begin with the same tokens.
        """
        block = self._structure.tokens_per_block
        if not self._present:
            return depth * block + (0 if partial is None else partial.num_tokens), partial
        missing: int | None = depth
        while missing is not None:
            depth = missing
            partial = self._partial_at(keys, depth)
            if partial is not None and self._missing(depth * block + partial.num_tokens, depth) is None:
                return depth * block + partial.num_tokens, partial
            missing = self._missing(depth * block, depth)
        return depth * block, None

    def _partial_at(self, keys: Int64Array, depth: int) -> Partial | None:
        run = self._run
        while run.parent is not None and run.start >= depth:
            run = run.parent
        width = run.kind.width
        return match_partial(run, depth, keys[depth * width : (depth + 1) * width], self._structure.windows)

    def _missing(self, length: int, num_blocks: int) -> int | None:
        """The first of `num_blocks` blocks that is needed at a length and lacks a page."""
        lacking = (
            next((block for block in store.window.needed_blocks(length, num_blocks) if block not in present), None)
            for store, present in self._present
        )
        return min((block for block in lacking if block is not None), default=None)

    def adopted(self, usable: int, depth: int) -> int:
        """Blocks, at most `depth`, up to which every life cycle of attention has a page beyond the usable ones."""
        adopted = usable
        while adopted < depth and all(adopted in present for _, present in self._present):
            adopted += 1
        return adopted


def common_prefix(left: Int64Array, right: Int64Array) -> int:
    """Number of leading equal elements."""
    size = min(left.size, right.size)
    differs = left[:size] != right[:size]
    return int(differs.argmax()) if differs.any() else size
