"""The decision log: what a manager decides in a replay, a line each, in order.

The same trace and settings give the same lines on any memory, since no decision reads when a copy ends. A line begins
with what happened; layer groups are named by kind and number, slots are listed in the order of their blocks, `3-7` for
neighbours; blocks by the key that the trace has for the last of a stretch, which stands for all tokens up to its end.

    request 17: 6758 tokens in its prompt
    found: tree 6656, attention 6656, usable 6144
    allocated attention0: slots 12-13             pages for tokens to compute
    live state ssm1: slot 4
    reserved ssm1: 6656 in slot 9                 a state that will be written at token 6656
    skipped ssm1: 7168, no_room                   a snapshot that was wanted and not taken
    copied ssm1: gpu 3 > gpu 4                    slots, as the memory was told
    moved attention0: gpu > host 2 to 2713        blocks in the tree
    stored attention0: gpu 13 to 2724             13 blocks, the last of them this one
    removed attention0: host 1 to 903
"""

import gzip
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ssmcache import KVCache, KVCacheManager, KVCacheManagerConfig
from ssmcache.config import CacheTierConfig
from ssmcache.events import CacheObserver
from ssmcache.layout import LayerGroupKind, pool_members
from ssmcache.memory.base import GPU_TIER, Memory, SlotMoves
from ssmcache.tree import Run
from ssmcache_sim.errors import OutputError
from ssmcache_sim.trace import Int64Array


class DecisionLog:
    """Turns what a manager does into lines, as it happens: an observer of its cache, and of its memory.

    Args:
        write: takes each line, without its end.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._groups: tuple[str, ...] = ()
        self._pools: tuple[str, ...] = ()
        self._tiers: tuple[str, ...] = ()
        self._attention: tuple[int, ...] = ()
        self._block = 1
        self._keys: Int64Array = np.empty(0, dtype=np.int64)  # of the request that is served

    def manager(self, config: KVCacheManagerConfig, memory: Memory, observer: CacheObserver | None) -> KVCacheManager:
        """A manager that is watched, beside another observer."""
        told = self if observer is None else Both(observer, self)
        manager = KVCacheManager(config, _WatchedMemory(memory, self), told)
        groups = manager.groups
        self._groups = tuple(f"{group.kind.value}{index}" for index, group in enumerate(groups))
        self._pools = tuple(
            " and ".join(name for name, group in zip(self._groups, groups, strict=True) if group in members)
            for members in pool_members(groups)
        )
        self._attention = tuple(index for index, group in enumerate(groups) if group.kind is not LayerGroupKind.SSM)
        self._tiers = manager.tier_names
        self._block = config.tokens_per_block
        for tier, sizes in zip(self._tiers, manager.memory_usage().tiers, strict=True):
            counts = ", ".join(
                f"{name} {'unlimited' if usage.num_slots is None else usage.num_slots}"
                for name, usage in zip(self._groups, sizes, strict=True)
            )
            self._write(f"slots of {tier}: {counts}")
        return manager

    def found(self, kv: KVCache, num_tokens: int, keys: Int64Array) -> None:
        """A request has looked up its prompt; the keys of its path."""
        self._keys = keys
        tree, attention, usable = kv.reuse_match
        self._write(f"request {kv.id}: {num_tokens} tokens in its prompt")
        self._write(f"found: tree {tree}, attention {attention}, usable {usable}")

    def allocated(self, kv: KVCache) -> None:
        """A request has its pages and its live state."""
        first = kv.num_attention_tokens // self._block
        for group in self._attention:
            self._write(f"allocated {self._groups[group]}: slots {slot_text(kv.page_indices(group)[first:].tolist())}")
        group = kv.manager.state_group
        if group >= 0:
            self._write(f"live state {self._groups[group]}: slot {kv.ssm_slot(group)}")

    def reserved(self, kv: KVCache, reserved: Mapping[int, int]) -> None:
        """A request has slots for states at these positions."""
        for position, slot in reserved.items():
            self._write(f"reserved {self._groups[kv.manager.state_group]}: {position} in slot {slot}")

    def copied(self, moves: SlotMoves) -> None:
        """The memory was told to copy."""
        source, destination = self._tier(moves.source_tier), self._tier(moves.destination_tier)
        self._write(
            f"copied {self._pools[moves.pool]}: {source} {slot_text(moves.sources)} > "
            f"{destination} {slot_text(moves.destinations)}"
        )

    def _tier(self, tier: int) -> str:
        return self._tiers[tier]

    # -- told by the manager -----------------------------------------------------------------------------------------

    def stored(self, run: Run, num_blocks: int, layer_group: int | None) -> None:
        if layer_group is not None:
            self._tell("stored", layer_group, GPU_TIER, run, range(run.end - num_blocks, run.end))

    def added(self, cursor: Run, layer_group: int, ordinals: Iterable[int]) -> None:
        blocks = [(ordinal, self._keys.item(ordinal)) for ordinal in ordinals]
        self._write(f"stored {self._groups[layer_group]}: {self._tier(GPU_TIER)} {_block_text(blocks)}")

    def skipped(self, cursor: Run, layer_group: int, ordinal: int, reason: str) -> None:
        self._write(f"skipped {self._groups[layer_group]}: {(ordinal + 1) * self._block}, {reason}")

    def removed(self, layer_group: int, tier: int, run: Run, ordinals: Iterable[int]) -> None:
        self._tell("removed", layer_group, tier, run, ordinals)

    def moved(self, layer_group: int, source_tier: int, tier: int, run: Run, ordinals: Iterable[int]) -> None:
        self._tell("moved", layer_group, tier, run, ordinals, f"{self._tier(source_tier)} > ")

    def lost(self, run: Run, page_group: int | None) -> None:
        self._write(f"lost: all from block {run.start} on below {run.key_buffer.item(0)}")

    def _tell(
        self, what: str, layer_group: int, tier: int, run: Run, ordinals: Iterable[int], source: str = ""
    ) -> None:
        blocks = [(ordinal, run.key_buffer.item(ordinal - run.start)) for ordinal in ordinals]
        if blocks:
            self._write(f"{what} {self._groups[layer_group]}: {source}{self._tier(tier)} {_block_text(blocks)}")


class Both:
    """Two observers that are told of everything, one after the other."""

    def __init__(self, first: CacheObserver, second: CacheObserver) -> None:
        self._observers = first, second

    def stored(self, run: Run, num_blocks: int, layer_group: int | None) -> None:
        for observer in self._observers:
            observer.stored(run, num_blocks, layer_group)

    def added(self, cursor: Run, layer_group: int, ordinals: Iterable[int]) -> None:
        blocks = tuple(ordinals)
        for observer in self._observers:
            observer.added(cursor, layer_group, blocks)

    def skipped(self, cursor: Run, layer_group: int, ordinal: int, reason: str) -> None:
        for observer in self._observers:
            observer.skipped(cursor, layer_group, ordinal, reason)

    def removed(self, layer_group: int, tier: int, run: Run, ordinals: Iterable[int]) -> None:
        blocks = tuple(ordinals)
        for observer in self._observers:
            observer.removed(layer_group, tier, run, blocks)

    def moved(self, layer_group: int, source_tier: int, tier: int, run: Run, ordinals: Iterable[int]) -> None:
        blocks = tuple(ordinals)
        for observer in self._observers:
            observer.moved(layer_group, source_tier, tier, run, blocks)

    def lost(self, run: Run, page_group: int | None) -> None:
        for observer in self._observers:
            observer.lost(run, page_group)


class _WatchedMemory:
    """A memory whose copies are told to a log, before they are made."""

    def __init__(self, memory: Memory, log: DecisionLog) -> None:
        self._memory = memory
        self._log = log
        self.check_stream = memory.check_stream
        self.record = memory.record
        self.wait = memory.wait
        self.view = memory.view
        self.grain = memory.grain
        self.resize = memory.resize
        self.close = memory.close

    def open(self, tiers: Sequence[CacheTierConfig], slot_bytes: Sequence[int]) -> None:
        self._memory.open(tiers, slot_bytes)

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        self._log.copied(moves)
        self._memory.copy(moves, stream)

    def loads(self) -> Sequence[Future[Any]]:
        return self._memory.loads()

    @property
    def bytes_in_use(self) -> int:
        return self._memory.bytes_in_use


def slot_text(slots: Sequence[int] | np.ndarray[Any, Any]) -> str:
    """Slots in order, ascending neighbours as a range: `3-7, 2`; `none` without any."""
    array = np.asarray(slots, dtype=np.int64)
    if array.size == 0:
        return "none"
    ends = np.flatnonzero(np.diff(array) != 1) + 1
    return ", ".join(str(part[0]) if part.size == 1 else f"{part[0]}-{part[-1]}" for part in np.split(array, ends))


def _block_text(blocks: Sequence[tuple[int, int]]) -> str:
    """The stretches of (ordinal, key) of blocks, ascending, each as its length and its last key."""
    ends = [index for index, (ordinal, _) in enumerate(blocks[:-1], 1) if blocks[index][0] != ordinal + 1]
    starts = [0, *ends]
    return ", ".join(
        f"{end - start} to {blocks[end - 1][1]}" for start, end in zip(starts, [*ends, len(blocks)], strict=True)
    )


@contextmanager
def log_file(path: Path) -> Iterator[Callable[[str], None]]:
    """Takes lines for a file, compressed with gzip; the same lines give the same bytes. Errors: OutputError."""
    try:
        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=0) as compressed,
            io.TextIOWrapper(compressed, encoding="utf-8") as text,
        ):
            yield lambda line: print(line, file=text)
    except OSError as error:
        raise OutputError(f"{path}: expected to write a decision log, got {error.strerror or error}") from error
