"""Which slots of snapshots and window pages are needed, and by whom: counted slot by slot."""

from __future__ import annotations

from collections.abc import Iterable


class Pin:
    """One slot that sequences depend on, wherever it moves: `soft` of them were created only, `held` are suspended,
    `locked` are ACTIVE and need it on the GPU. `slot` is -1 once it was lost.
    """

    __slots__ = ("held", "locked", "slot", "soft", "tier")

    def __init__(self, tier: int, slot: int) -> None:
        self.tier, self.slot = tier, slot
        self.soft = self.held = self.locked = 0


class PinTable:
    """The pins of one layer group.

    Attributes, by tier: `by_slot`, the pins; `locked`, the number that are locked; `held`, of those that are held and
    not locked.
    """

    __slots__ = ("by_slot", "held", "locked")

    def __init__(self, num_tiers: int) -> None:
        self.by_slot: list[dict[int, Pin]] = [{} for _ in range(num_tiers)]
        self.locked = [0] * num_tiers
        self.held = [0] * num_tiers

    def pin(self, tier: int, slot: int) -> Pin:
        """The pin of a slot, for the caller to count on: `soft` by hand, the rest with `count`."""
        pins = self.by_slot[tier]
        pin = pins.get(slot)
        if pin is None:
            pin = pins[slot] = Pin(tier, slot)
        return pin

    def count(self, pin: Pin, held: int = 0, locked: int = 0) -> None:
        """Add to the counts of a pin; without counts it is gone."""
        if pin.slot < 0:
            return
        self._count_class(pin, -1)
        pin.held += held
        pin.locked += locked
        self._count_class(pin, 1)
        if not (pin.soft or pin.held or pin.locked):
            del self.by_slot[pin.tier][pin.slot]

    def end_soft(self, pin: Pin) -> None:
        """One less of those who were created only."""
        pin.soft -= 1
        if not (pin.soft or pin.held or pin.locked) and pin.slot >= 0:
            del self.by_slot[pin.tier][pin.slot]

    def _count_class(self, pin: Pin, change: int) -> None:
        if pin.locked:
            self.locked[pin.tier] += change
        elif pin.held:
            self.held[pin.tier] += change

    def move(self, tier: int, slot: int, new_tier: int, new_slot: int) -> None:
        """What lies in a slot lies in another one now."""
        pin = self.by_slot[tier].pop(slot, None)
        if pin is not None:
            self._count_class(pin, -1)
            pin.tier, pin.slot = new_tier, new_slot
            self._count_class(pin, 1)
            self.by_slot[new_tier][new_slot] = pin

    def break_off(self, tier: int, slot: int) -> None:
        """What lies in a slot leaves the tree, whoever depends on it."""
        pin = self.by_slot[tier].pop(slot, None)
        if pin is not None:
            self._count_class(pin, -1)
            pin.slot = -1

    def of(self, tier: int, slots: Iterable[int]) -> list[Pin]:
        """The pins of those of the slots that have one."""
        pins = self.by_slot[tier]
        return [pins[slot] for slot in slots if slot in pins]

    def num_locked_of(self, tier: int, slots: Iterable[int]) -> int:
        return sum(bool(pin.locked) for pin in self.of(tier, slots))

    def all(self) -> list[tuple[int, int, Pin]]:
        """Every pin, with the tier and slot that it is known by, for checks."""
        return [(tier, slot, pin) for tier, pins in enumerate(self.by_slot) for slot, pin in pins.items()]
