"""A memory with real bytes whose copies to and from the tiers below the GPU fail when a test says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from ssmcache import HostMemory
from ssmcache.memory.base import GPU_TIER, SlotMoves, TransferError

Fault = Callable[[SlotMoves], Sequence[int] | None]
"""None: the copy succeeds. Empty: the destination cannot be written. Else the positions that cannot be read."""


class FaultyMemory(HostMemory):
    """Like a real one it leaves the sources as they were, and garbage in the destinations."""

    def __init__(self, fault: Fault | None = None) -> None:
        super().__init__()
        self.fault = fault
        self.num_failed = 0
        self.was_lost = False
        self.unreadable: set[tuple[int, int, int]] = set()  # (tier, layer group, slot)

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        between_tiers = moves.source_tier != moves.destination_tier
        lost = self.fault(moves) if self.fault is not None and between_tiers else None
        if lost is None:
            super().copy(moves, stream)
            return
        self.num_failed += 1
        if len(moves.sources) > 1:  # some of it was on its way
            part = SlotMoves(
                moves.pool, moves.source_tier, moves.sources[1:], moves.destination_tier, moves.destinations[:-1]
            )
            super().copy(part, stream)
        if lost:
            self.was_lost = True
            raise TransferError(moves.source_tier, sorted(lost), "cannot be read")
        tier = moves.source_tier if moves.destination_tier == GPU_TIER else moves.destination_tier
        raise TransferError(tier, (), "cannot be written")


def at_random(random: Random, share: float, losses: bool, writes: bool) -> Fault:
    """Faults for a share of all copies: reads that lose one or more positions, writes that fail."""

    def fault(moves: SlotMoves) -> Sequence[int] | None:
        if random.random() >= share:
            return None
        if moves.source_tier != GPU_TIER and losses and (not writes or random.random() < 0.8):
            return random.sample(range(len(moves.sources)), random.randint(1, len(moves.sources)))
        # fewer where reads fail, too: a tier shrinks at each, and there would soon be nothing to be lost
        fails = writes and moves.destination_tier != GPU_TIER and (not losses or random.random() < 0.4)
        return () if fails else None

    return fault


def once(source_tier: int, tier: int, lost: Sequence[int], layer_group: int = 0, after: int = 0) -> Fault:
    """The first batch from a tier to another fails, but for `after` of them."""
    left = [after]

    def fault(moves: SlotMoves) -> Sequence[int] | None:
        if (moves.pool, moves.source_tier, moves.destination_tier) != (layer_group, source_tier, tier):
            return None
        left[0] -= 1
        return lost if left[0] == -1 else None

    return fault
