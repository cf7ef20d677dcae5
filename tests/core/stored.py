"""What a manager has stored, read from its tree block by block, and the brute-force match: every length from the prompt
down, until everything exists that a sequence needs which goes on there.
"""

from __future__ import annotations

from dataclasses import dataclass

from ssmcache import KVCacheManager, ReuseScope
from ssmcache.layout import LayerGroupKind
from ssmcache.tree import Run

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class StoredBlock:
    """One block, named by all tokens up to its end. `windows`: the layer groups that have a window page of it."""

    tokens: Tokens
    has_page: bool
    windows: frozenset[int]
    has_snapshot: bool


class Stored:
    """The blocks of one scope, as they are now. Only for prompts of tokens, not of ready keys."""

    def __init__(self, manager: KVCacheManager, scope: ReuseScope) -> None:
        self.block = manager.tokens_per_block
        self.groups = manager.groups
        self.manager = manager
        self.full: dict[Tokens, StoredBlock] = {}
        self.partial: list[StoredBlock] = []
        root = manager.store.roots.get(scope)
        for child in [] if root is None else root.children.values():
            self._read(child, ())

    def _read(self, run: Run, above: Tokens) -> None:
        keys = above + tuple(run.keys.tolist())
        for block in range(run.start, run.end):
            tokens = keys[: (block + 1) * self.block]
            there = {segment.store.layer_group for segment in run.items if block in segment.ordinals}
            is_window = [group.kind is LayerGroupKind.WINDOW for group in self.groups]
            stored = StoredBlock(
                tokens,
                run.pages is not None,
                frozenset(group for group in there if is_window[group]),
                self.manager.state_group in there,
            )
            if run.num_tokens:
                self.partial.append(stored)
            else:
                self.full[tokens] = stored
        for child in run.children.values():
            self._read(child, keys)

    # -- matching ----------------------------------------------------------------------------------------------------

    def match(self, prompt: Tokens, partly: bool = True) -> tuple[int, int, int]:
        """Tree, attention and usable tokens of `ReuseMatch`; a last block may match in part, where that is on."""
        self.partly = partly and self.manager.partly
        return (
            self._longest(prompt, attention=False, states=False),
            self._longest(prompt, attention=True, states=False),
            self._longest(prompt, attention=True, states=True),
        )

    def _longest(self, prompt: Tokens, attention: bool, states: bool) -> int:
        for length in range(len(prompt), 0, -1):
            for path in self._paths(prompt[:length]):
                if (not attention or self._attends(path, length)) and (not states or self._has_state(path, length)):
                    return length
        return 0

    def _paths(self, tokens: Tokens) -> list[list[StoredBlock]]:
        """Every way to have blocks for all of some tokens: only the last block, if it is not full, leaves a choice."""
        num_full = len(tokens) // self.block
        path = [self.full.get(tokens[: (b + 1) * self.block]) for b in range(num_full)]
        known = [block for block in path if block is not None]
        if len(known) < num_full:
            return []
        if len(tokens) % self.block == 0:
            return [known]
        if not self.partly:
            return []
        lasts = [
            block
            for block in (*self.full.values(), *self.partial)
            if (len(block.tokens) - 1) // self.block == num_full and block.tokens[: len(tokens)] == tokens
        ]
        return [[*known, last] for last in lasts]

    def _attends(self, path: list[StoredBlock], length: int) -> bool:
        """Whether there is, in every layer, a page of every block with a key that a query at position `length` sees, or
        that later ones will see there: the rest of the last block is written into it.
        """
        for index, group in enumerate(self.groups):
            for token in range(len(path) * self.block):
                block = path[token // self.block]
                if group.kind is LayerGroupKind.ATTENTION and not block.has_page:
                    return False
                if group.kind is LayerGroupKind.WINDOW:
                    assert group.window_size is not None
                    is_seen = token < group.num_sink_tokens or token > length - group.window_size
                    if is_seen and index not in block.windows:
                        return False
        return True

    def _has_state(self, path: list[StoredBlock], length: int) -> bool:
        if self.manager.state_group < 0:
            return True
        return length % self.block == 0 and path[-1].has_snapshot

    def adopted_blocks(self, prompt: Tokens, usable: int) -> int:
        """Blocks of the prompt's path that a sequence takes up which starts at `usable`, a whole number of blocks."""
        num_blocks = usable // self.block
        windows = {index for index, group in enumerate(self.groups) if group.kind is LayerGroupKind.WINDOW}
        while num_blocks < len(prompt) // self.block:
            stored = self.full.get(prompt[: (num_blocks + 1) * self.block])
            if stored is None or stored.windows != windows:
                break
            num_blocks += 1
        return num_blocks
