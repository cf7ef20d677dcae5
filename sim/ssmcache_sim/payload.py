"""What a replay on real memory writes into pages and states, and finds there again, byte for byte.

Nothing is modelled; each byte only depends on all that it must depend on. Numbers are 64 bits wide and wrap around;
`mix` is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

    token at position p:  t(p) = mix(mix(key of its block) + p)
    KV:                   word w of its part of a buffer = mix(t(p) + seed of (layer, buffer) + w * GOLDEN)
    state after n tokens: d(n) = d(n - 1) * MULTIPLIER + t(n - 1), from d(0) = 0;
                          word 0 of a buffer = d(n), word w = mix(d(n) + seed + w * GOLDEN)

A key names its block and all before it, so KV shows a page of another prompt, layer, buffer or place. The digest is a
recurrence like the state that it plays: a request goes on from word 0 of what it found in its live slot, so a wrong
state spoils all that follow; what it should be is computed from the prompt alone. A last block that is not full has a
key that no other request has.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ssmcache import KVCache, KVCacheManager
from ssmcache.layout import BufferPlace, LayerGroupKind
from ssmcache.pools import SlotArray
from ssmcache_sim.errors import SettingsError
from ssmcache_sim.trace import Int64Array, Trace

UInt64Array = npt.NDArray[np.uint64]
WORD_BYTES = 8
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, the increment of SplitMix64
MULTIPLIER = 0xD1342543DE82EF95  # of a generator of 64 bits (Steele and Vigna, 2021); any odd number would do
FIRST_SHIFT, FIRST_FACTOR = 30, 0xBF58476D1CE4E5B9
SECOND_SHIFT, SECOND_FACTOR = 27, 0x94D049BB133111EB
LAST_SHIFT = 31


def mix(values: UInt64Array) -> UInt64Array:
    """SplitMix64's finaliser, of each value."""
    mixed = (values ^ (values >> np.uint64(FIRST_SHIFT))) * np.uint64(FIRST_FACTOR)
    mixed = (mixed ^ (mixed >> np.uint64(SECOND_SHIFT))) * np.uint64(SECOND_FACTOR)
    return mixed ^ (mixed >> np.uint64(LAST_SHIFT))


def block_seeds(keys: Int64Array, num_tokens: int, tokens_per_block: int, request: int) -> UInt64Array:
    """`mix(key)` of each block of a prompt, a last one that is not full included: [blocks]."""
    named = keys[: num_tokens // tokens_per_block]
    if num_tokens % tokens_per_block:
        named = np.append(named, -1 - request)
    return mix(named.astype(np.int64).view(np.uint64))


def token_values(seeds: UInt64Array, start: int, stop: int, tokens_per_block: int) -> UInt64Array:
    """t(p) for start <= p < stop: [stop - start]."""
    positions = np.arange(start, stop, dtype=np.uint64)
    return mix(
        seeds[start // tokens_per_block : -(-stop // tokens_per_block)].repeat(tokens_per_block)[
            start % tokens_per_block :
        ][: stop - start]
        + positions
    )


@dataclass(frozen=True, slots=True)
class Step:
    """So many tokens of the recurrence at once: d becomes d * factor + addend."""

    factor: int
    addend: int


class Recurrence:
    """Digests of tokens, with the powers that they need."""

    def __init__(self, max_tokens: int) -> None:
        powers = np.full(max_tokens + 1, MULTIPLIER, dtype=np.uint64)
        powers[0] = 1
        np.multiply.accumulate(powers, out=powers)
        self._powers = powers

    def step(self, tokens: UInt64Array) -> Step:
        """What these tokens do to a digest. Cost: O(tokens) of NumPy work."""
        addend = (tokens * self._powers[: tokens.size][::-1]).sum(dtype=np.uint64)
        return Step(int(self._powers[tokens.size]), int(addend))


@dataclass(frozen=True, slots=True, eq=False)
class PayloadBuffer:
    """One buffer of the model.

    Attributes:
        number: among all buffers.
        words: of a token for attention, of the whole state for SSM.
        view: the pool on the GPU, in words: [slots, tokens_per_block, words] or [slots, words].
    """

    number: int
    name: str
    words: int
    seed: int
    view: Any


class Pages(NamedTuple):
    """Blocks of one sequence, from the first on: their slots (-1: no page), [n] int32, and their seeds, [n]."""

    slots: SlotArray
    seeds: UInt64Array


class Kernels(Protocol):
    """Writes and checks words where they lie. What is found wrong is counted for each request and buffer."""

    word: Any  # dtype of the views

    def on(self, stream: Any) -> AbstractContextManager[object]:
        """What is called inside is queued on a stream of the memory."""

    def upload(self, pages: Pages) -> Any:
        """The pages as `write_pages` and `check_pages` take them."""

    def write_pages(self, buffer: PayloadBuffer, pages: Any, start: int, stop: int) -> None:
        """Write the KV of tokens start..stop - 1 where there is a page."""

    def check_pages(self, buffer: PayloadBuffer, pages: Any, start: int, stop: int, request: int) -> None:
        """Compare it."""

    def write_states(
        self, buffer: PayloadBuffer, live_slot: int, is_new: bool, steps: Sequence[Step], slots: Sequence[int]
    ) -> None:
        """Go on from the digest in the live slot (from 0 if the state is new): after step i write the state into
        slot i.
        """

    def check_state(self, buffer: PayloadBuffer, slot: int, digest: int, request: int) -> None:
        """Compare a state."""

    def wrong_bytes(self) -> Int64Array:
        """[requests, buffers]. Waits for all that was queued."""


class Payload:
    """Writes what each request computes, and checks what it reuses.

    Errors: SettingsError for a model whose buffers are not whole words.
    """

    def __init__(self, manager: KVCacheManager, trace: Trace, kernels: Kernels) -> None:
        self._trace = trace
        self._kernels = kernels
        self._block = trace.tokens_per_block
        self._recurrence = Recurrence(trace.longest_path)
        self._paths = trace.path_tokens.tolist()
        self._groups: list[tuple[int, list[PayloadBuffer]]] = []
        self._states: list[PayloadBuffer] = []
        self.buffer_names: list[str] = []
        self.checked_bytes = 0
        self.missing_pages = 0
        for index, group in enumerate(manager.groups):
            is_state = group.kind is LayerGroupKind.SSM
            buffers = [self._buffer(manager, place, is_state) for place in group.buffers]
            if is_state:
                self._states = buffers
            else:
                self._groups.append((index, buffers))
        self._state_bytes = WORD_BYTES * sum(buffer.words for buffer in self._states)

    def _buffer(self, manager: KVCacheManager, place: BufferPlace, is_state: bool) -> PayloadBuffer:
        parts = 1 if is_state else self._block
        name = f"layer {place.layer_id} {place.role}"
        if place.size % (parts * WORD_BYTES) or place.offset % WORD_BYTES:
            raise SettingsError(
                f"payload of {name}: expected a multiple of {WORD_BYTES} bytes {'a state' if is_state else 'a token'}, "
                f"got {place.size / parts:g} at byte {place.offset} of a slot"
            )
        words = place.size // (parts * WORD_BYTES)
        shape = (words,) if is_state else (parts, words)
        view = manager.buffer(place.layer_id, place.role, self._kernels.word, shape)
        number = len(self.buffer_names)
        self.buffer_names.append(name)
        seed = int.from_bytes(blake2b(name.encode(), digest_size=WORD_BYTES).digest(), "little")
        return PayloadBuffer(number, name, words, seed, view)

    def started(self, kv: KVCache, request: int) -> None:
        """Check all that a resumed request reuses: every page that it does not compute itself, and its state."""
        seeds = self._seeds(request)
        present, usable = kv.num_attention_tokens, kv.num_committed_tokens
        with self._kernels.on(kv.stream):
            for group, buffers in self._groups if present else ():
                slots = kv.page_indices(group)[: present // self._block]
                self._note(kv, group, slots, usable)
                pages = self._kernels.upload(Pages(slots, seeds[: slots.size]))
                for buffer in buffers:
                    self._kernels.check_pages(buffer, pages, 0, present, request)
                    self.checked_bytes += int((slots >= 0).sum()) * self._block * buffer.words * WORD_BYTES
            if usable and self._states:
                digest = self._recurrence.step(token_values(seeds, 0, usable, self._block)).addend
                slot = kv.ssm_slot(kv.manager.state_group)
                for buffer in self._states:
                    self._kernels.check_state(buffer, slot, digest, request)
                self.checked_bytes += self._state_bytes

    def _note(self, kv: KVCache, group: int, slots: SlotArray, usable: int) -> None:
        """Count the pages that attention at `usable` reads and that are not there."""
        wanted = np.ones(slots.size, dtype=np.bool_)
        layers = kv.manager.groups[group]
        if layers.window_size is not None:
            ends = (np.arange(slots.size) + 1) * self._block
            sinks = -(-layers.num_sink_tokens // self._block)
            wanted = (ends > usable + 1 - layers.window_size) & (ends <= usable)
            wanted[: min(sinks, usable // self._block)] = True
        self.missing_pages += int((wanted & (slots < 0)).sum())

    def compute(self, kv: KVCache, request: int, end: int, reserved: Mapping[int, int]) -> None:
        """Write the KV and the states of the tokens up to `end`."""
        seeds = self._seeds(request)
        start, done = max(kv.num_committed_tokens, kv.num_attention_tokens), kv.num_committed_tokens
        with self._kernels.on(kv.stream):
            for group, buffers in self._groups if start < end else ():
                slots = kv.page_indices(group)[: -(-end // self._block)]
                pages = self._kernels.upload(Pages(slots, seeds[: slots.size]))
                for buffer in buffers:
                    self._kernels.write_pages(buffer, pages, start, end)
            if self._states:
                live = kv.ssm_slot(kv.manager.state_group)
                stops = sorted(reserved)
                slots_of_states = [reserved[stop] for stop in stops] + [live]
                steps = []
                for first, last in zip([done, *stops], [*stops, end], strict=True):
                    steps.append(self._recurrence.step(token_values(seeds, first, last, self._block)))
                for buffer in self._states:
                    self._kernels.write_states(buffer, live, done == 0, steps, slots_of_states)

    def _seeds(self, request: int) -> UInt64Array:
        keys = self._trace.block_keys[self._trace.offsets[request] : self._trace.offsets[request + 1]]
        return block_seeds(keys, self._paths[request], self._block, request)
