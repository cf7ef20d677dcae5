"""The payload of pages and states on `HostMemory`, by NumPy."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from ssmcache_sim.payload import GOLDEN, Pages, PayloadBuffer, Step, UInt64Array, mix
from ssmcache_sim.trace import Int64Array

_PIECE_WORDS = 1 << 16  # computed at once: half a MiB stays in the processor's caches
_MASK = (1 << 64) - 1


class HostKernels:
    """See `Kernels`."""

    word = np.uint64

    def __init__(self, num_requests: int, num_buffers: int) -> None:
        self._wrong = np.zeros((num_requests, num_buffers), dtype=np.int64)

    def on(self, stream: Any) -> AbstractContextManager[object]:
        return nullcontext()

    def upload(self, pages: Pages) -> Pages:
        return pages

    def write_pages(self, buffer: PayloadBuffer, pages: Pages, start: int, stop: int) -> None:
        for blocks, offsets, words in _pieces(buffer, pages, start, stop):
            buffer.view[blocks, offsets] = words

    def check_pages(self, buffer: PayloadBuffer, pages: Pages, start: int, stop: int, request: int) -> None:
        for blocks, offsets, words in _pieces(buffer, pages, start, stop):
            self._compare(buffer.view[blocks, offsets], words, request, buffer)

    def write_states(
        self, buffer: PayloadBuffer, live_slot: int, is_new: bool, steps: Sequence[Step], slots: Sequence[int]
    ) -> None:
        digest = 0 if is_new else int(buffer.view[live_slot, 0])
        for step, slot in zip(steps, slots, strict=True):
            digest = (digest * step.factor + step.addend) & _MASK
            buffer.view[slot] = _state(buffer, digest)

    def check_state(self, buffer: PayloadBuffer, slot: int, digest: int, request: int) -> None:
        self._compare(buffer.view[slot], _state(buffer, digest), request, buffer)

    def wrong_bytes(self) -> Int64Array:
        return self._wrong

    def _compare(self, found: UInt64Array, expected: UInt64Array, request: int, buffer: PayloadBuffer) -> None:
        if not np.array_equal(found, expected):
            self._wrong[request, buffer.number] += np.count_nonzero((found ^ expected).view(np.uint8))


def _pieces(buffer: PayloadBuffer, pages: Pages, start: int, stop: int) -> Any:
    """(slots, offsets within them, words) of tokens start..stop - 1 that have a page, a piece at a time."""
    tokens_per_block = buffer.view.shape[1]
    steps = np.arange(buffer.words, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(buffer.seed)
    num_tokens = max(1, _PIECE_WORDS // buffer.words)
    for first in range(start, stop, num_tokens):
        positions = np.arange(first, min(first + num_tokens, stop))
        blocks, offsets = np.divmod(positions, tokens_per_block)
        slots = pages.slots[blocks]
        there = slots >= 0
        tokens = mix(pages.seeds[blocks[there]] + positions[there].astype(np.uint64))
        yield slots[there], offsets[there], mix(tokens[:, np.newaxis] + steps)


def _state(buffer: PayloadBuffer, digest: int) -> UInt64Array:
    state = np.arange(buffer.words, dtype=np.uint64) * np.uint64(GOLDEN)
    state = mix(state + np.uint64((buffer.seed + digest) & _MASK))
    state[0] = digest
    return state
