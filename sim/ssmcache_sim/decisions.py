"""The decision log: what a manager decides in a replay, a line each, in order.

The same trace and settings give the same lines on any memory, since no decision reads when a copy ends. A line begins
with what happened; layer groups are named by kind and number, slots are listed in the order of their blocks, `3-7` for
neighbours; blocks by the digest of the last of a stretch, which stands for all tokens up to its end.

    request 17: 6758 tokens in its prompt
    found: tree 6656, attention 6656, usable 6144
    allocated attention0: slots 12-13             pages for tokens to compute
    live state ssm1: slot 4
    reserved ssm1: 6656 in slot 9                 a state that will be written at token 6656
    copied ssm1: gpu 3 > gpu 4                    slots, as the memory was told
    moved attention0: gpu > host 2 to d04be25f    blocks in the tree
    stored attention0: gpu 13 to 9c0f6a11         13 blocks, the last of them this one
    removed attention0: host 1 to 77ab02ce
"""

import gzip
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ssmcache import KVCache, KVCacheManager, KVCacheManagerConfig
from ssmcache.config import CacheTierConfig
from ssmcache.events import CacheEvent, EventKind
from ssmcache.layout import LayerGroupKind
from ssmcache.memory.base import Memory, SlotMoves
from ssmcache_sim.errors import OutputError

_DIGEST_BYTES_SHOWN = 8


class DecisionLog:
    """Turns what a manager does into lines, as it happens.

    Args:
        write: takes each line, without its end.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._groups: tuple[str, ...] = ()
        self._tiers: tuple[str, ...] = ()
        self._attention: tuple[int, ...] = ()
        self._block = 1

    def manager(self, config: KVCacheManagerConfig, memory: Memory) -> KVCacheManager:
        """A manager that is watched."""
        manager = KVCacheManager(config, _WatchedMemory(memory, self), on_event=self._event)
        groups = manager.groups
        self._groups = tuple(f"{group.kind.value}{index}" for index, group in enumerate(groups))
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

    def found(self, kv: KVCache, num_tokens: int) -> None:
        """A request has looked up its prompt."""
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
            f"copied {self._groups[moves.layer_group]}: {source} {slot_text(moves.sources)} > "
            f"{destination} {slot_text(moves.destinations)}"
        )

    def _tier(self, tier: int) -> str:
        return self._tiers[tier]

    def _event(self, event: CacheEvent) -> None:
        tiers = self._tier(event.tier)
        if event.kind is EventKind.MOVED and event.source_tier is not None:
            tiers = f"{self._tier(event.source_tier)} > {tiers}"
        self._write(f"{event.kind.value} {self._groups[event.layer_group]}: {tiers} {_block_text(event)}")


class _WatchedMemory:
    """A memory whose copies are told to a log, before they are made."""

    def __init__(self, memory: Memory, log: DecisionLog) -> None:
        self._memory = memory
        self._log = log
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


def _block_text(event: CacheEvent) -> str:
    """The stretches of blocks of an event, each as its length and the digest of its last block."""
    return ", ".join(f"{length} to {digest.hex()[: 2 * _DIGEST_BYTES_SHOWN]}" for length, digest in _stretches(event))


def _stretches(event: CacheEvent) -> Iterable[tuple[int, bytes]]:
    length, last = 0, b""
    for digest, parent in zip(event.digests, event.parents, strict=True):
        if length and parent != last:
            yield length, last
            length = 0
        length, last = length + 1, digest
    yield length, last


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
