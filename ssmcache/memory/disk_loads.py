"""Slots of host memory that are still being read from the disk."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from ssmcache.memory.base import TransferError
from ssmcache.memory.batches import SlotArray
from ssmcache.memory.disk import ByteArray
from ssmcache.memory.disk_queue import DiskQueue


class LoadedSlots:
    """Which slots of a host tier a background load is to fill, so that whoever needs one waits for it, and only then.

    A load that fails has lost its slots: whoever copies them says so, until something else is put there.

    Args:
        tier: its index, for errors.
        queue: that reads the disk.
        num_groups: pools, all without slots until `resize`.
    """

    def __init__(self, tier: int, queue: DiskQueue, num_groups: int) -> None:
        self._tier = tier
        self._queue = queue
        # number of the load that a slot waits for, 0 for none
        self._by: list[npt.NDArray[np.int64]] = [np.zeros(0, dtype=np.int64) for _ in range(num_groups)]
        self._lost: list[npt.NDArray[np.bool_]] = [np.zeros(0, dtype=np.bool_) for _ in range(num_groups)]
        self._loads: dict[int, tuple[int, SlotArray, Future[dict[int, str]]]] = {}
        self._num_loads = 0
        self._why_lost = ""

    def resize(self, num_slots: Sequence[int]) -> None:
        """Pools of so many slots. Call `wait` before the pools change."""
        for group, count in enumerate(num_slots):
            kept = self._lost[group][:count]
            self._lost[group] = np.concatenate((kept, np.zeros(count - kept.size, dtype=np.bool_)))
            self._by[group] = np.zeros(count, dtype=np.int64)

    def load(
        self, pool: int, sources: SlotArray, rows: ByteArray, destinations: SlotArray, ready: Callable[[], None]
    ) -> None:
        """Fill `rows[destinations]` from slots of the disk, [n] each and not empty, once `ready` has returned: when
        nothing reads or writes these rows any more. Returns at once.

        Args:
            rows: the pool, [num_slots, slot_bytes].
        """
        earlier = [self._loads[number][2] for number in self._numbers(pool, destinations)]

        def all_ready() -> None:
            for future in earlier:
                future.exception()
            ready()

        self._num_loads += 1
        future = self._queue.load_later(pool, sources, rows, destinations, all_ready)
        self._loads[self._num_loads] = pool, destinations.copy(), future
        self._by[pool][destinations] = self._num_loads
        self._lost[pool][destinations] = False

    def read(self, pool: int, slots: SlotArray) -> None:
        """Wait until slots, [n], have what was loaded into them.

        Errors: TransferError with the positions of those that could not be.
        """
        self._settle(pool, slots)
        lost = np.flatnonzero(self._lost[pool][slots])
        if lost.size:
            reason = f"disk tier: cannot read {lost.size} of {slots.size} slots: {self._why_lost}"
            raise TransferError(self._tier, lost.tolist(), reason)

    def overwrite(self, pool: int, slots: SlotArray) -> None:
        """Wait until nothing is loaded into slots, [n], which are written now."""
        self._settle(pool, slots)
        self._lost[pool][slots] = False

    def under_way(self) -> list[Future[dict[int, str]]]:
        """The loads that are not done yet."""
        return [future for _, _, future in self._loads.values() if not future.done()]

    def wait(self) -> None:
        """Until nothing is loaded any more."""
        for number in list(self._loads):
            self._finish(number)

    def _numbers(self, pool: int, slots: SlotArray) -> list[int]:
        """Of the loads that these slots wait for."""
        if not self._loads:
            return []
        numbers = np.unique(self._by[pool][slots])
        return [number for number in numbers.tolist() if number]

    def _settle(self, pool: int, slots: SlotArray) -> None:
        for number in self._numbers(pool, slots):
            self._finish(number)

    def _finish(self, number: int) -> None:
        group, into, future = self._loads.pop(number)
        try:
            lost = future.result()
        except Exception as error:  # of the stream: whatever it is, the slots do not have their bytes
            lost = dict.fromkeys(range(into.size), str(error))
        still = self._by[group][into] == number  # the others belong to a later load
        for position, why in lost.items():
            if still[position]:
                self._lost[group][into[position]] = True
                self._why_lost = why
        self._by[group][into[still]] = 0
