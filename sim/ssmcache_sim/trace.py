"""A request trace as arrays: when requests arrive, how long they are, and which blocks of prompt they share."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ssmcache.keys import BlockKeys
from ssmcache_sim.errors import TraceError

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Sessions:
    """Which conversation each request belongs to.

    Attributes:
        names: of the sessions, in order of their first request in the file.
        index: [num_requests] into `names`; -1 where a request belongs to none.
        turns: [num_requests] from 1, as recorded or else counted in order of arrival; 0 where `index` is -1.
    """

    names: tuple[str, ...]
    index: Int64Array
    turns: Int64Array

    def __post_init__(self) -> None:
        for array in (self.index, self.turns):
            array.flags.writeable = False


@dataclass(frozen=True, slots=True, eq=False)
class LengthTrace:
    """Requests in order of arrival of which only the lengths are known: no hits can be told.

    Attributes: as those of `Trace`.
    """

    name: str
    sha256: str
    format_name: str
    arrival_ms: Float64Array
    prompt_tokens: Int64Array
    output_tokens: Int64Array
    repairs: tuple[tuple[str, int], ...] = ()
    num_broken: int = 0
    sessions: Sessions | None = None

    @property
    def num_requests(self) -> int:
        return self.prompt_tokens.size


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in order of arrival, with a key for each full block of each prompt.

    Attributes:
        name: the file's name, without its folder.
        sha256: of the file's uncompressed content, in hex.
        tokens_per_block: tokens that one key stands for.
        arrival_ms: [num_requests] milliseconds, not falling.
        prompt_tokens, output_tokens: [num_requests].
        block_keys: [sum of full blocks] keys of the full blocks of all prompts, one prompt after the other. Unique
            per prefix, dense: 0 <= key < num_keys.
        offsets: [num_requests + 1] where each prompt's keys begin in `block_keys`.
        partial_ids: [num_requests] id of the last block that is not full, from the same numbering; -1 without one.
        num_keys: how many ids the numbering has.
        repairs: (what was repaired, how many rows) pairs.
        num_broken: rows that were left out because they are broken.
        split_factor: 1 as recorded; n where each recorded block was split in n (see `expanded`).
        sessions: None where the file names none.
        format_name: of the file.
        reading: what was chosen while reading that changes the requests, such as a rule for the start of sessions;
            empty where the file alone decides. Equal `sha256`, `reading` and block: the same requests.

    All arrays are read-only; a prompt is a view of them.
    """

    name: str
    sha256: str
    tokens_per_block: int
    arrival_ms: Float64Array
    prompt_tokens: Int64Array
    output_tokens: Int64Array
    block_keys: Int64Array
    offsets: Int64Array
    partial_ids: Int64Array
    num_keys: int
    repairs: tuple[tuple[str, int], ...] = ()
    num_broken: int = 0
    split_factor: int = 1
    sessions: Sessions | None = None
    format_name: str = ""
    reading: str = ""

    def __post_init__(self) -> None:
        for array in self._arrays():
            array.flags.writeable = False
        assert np.array_equal(np.diff(self.offsets), self.prompt_tokens // self.tokens_per_block)

    def _arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        lengths = (self.arrival_ms, self.prompt_tokens, self.output_tokens)
        return (*lengths, self.block_keys, self.offsets, self.partial_ids)

    @property
    def num_requests(self) -> int:
        return self.prompt_tokens.size

    @property
    def label(self) -> str:
        """Name for titles; says so where the blocks are not the recorded ones."""
        if self.split_factor == 1:
            return self.name
        return f"{self.name} (blocks split in {self.split_factor}: a lower bound)"

    def prompt(self, index: int) -> BlockKeys:
        """Keys of one prompt: a view, no copy."""
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return BlockKeys(self.block_keys[start:stop], self.tokens_per_block, int(self.prompt_tokens[index]))

    def prompts(self) -> Iterator[BlockKeys]:
        """All prompts in order of arrival; cheaper than `prompt` for each."""
        keys, tokens_per_block = self.block_keys, self.tokens_per_block
        start = 0
        for stop, num_tokens in zip(self.offsets[1:].tolist(), self.prompt_tokens.tolist(), strict=True):
            yield BlockKeys(keys[start:stop], tokens_per_block, num_tokens)
            start = stop

    def with_block(self, tokens_per_block: int) -> "Trace":
        """The same requests in coarser blocks. Exact: a coarse block's key is the key of its last block here.

        Errors: TraceError unless `tokens_per_block` is a multiple of the trace's.
        """
        if tokens_per_block < 1 or tokens_per_block % self.tokens_per_block:
            raise TraceError(
                f"tokens_per_block: expected a multiple of the {self.tokens_per_block} tokens a block of {self.name} "
                f"(finer blocks are not recorded), got {tokens_per_block}"
            )
        factor = tokens_per_block // self.tokens_per_block
        if factor == 1:
            return self
        num_fine = np.diff(self.offsets)
        num_coarse = num_fine // factor
        offsets = offsets_of(num_coarse)
        last_fine = np.repeat(self.offsets[:-1], num_coarse) + (_positions(offsets) + 1) * factor - 1
        # The rest of a prompt is named by its last id, but only where that id reaches to the prompt's end.
        ends_full = (self.prompt_tokens % self.tokens_per_block == 0) & (num_fine > num_coarse * factor)
        partial_ids = self.partial_ids.copy()
        partial_ids[ends_full] = self.block_keys[self.offsets[1:][ends_full] - 1]
        return replace(
            self,
            tokens_per_block=tokens_per_block,
            block_keys=self.block_keys[last_fine],
            offsets=offsets,
            partial_ids=partial_ids,
        )

    def expanded(self, factor: int) -> "Trace":
        """The same requests with each block split in `factor` blocks that are shared all or none.

        A lower bound of what finer blocks would share: two prompts that part inside a recorded block may agree on
        its first tokens, which is not recorded.

        Errors: TraceError unless the factor divides a block and the ids of partial blocks are recorded.
        """
        if factor < 1 or self.tokens_per_block % factor:
            raise TraceError(f"expansion factor: expected a divisor of {self.tokens_per_block}, got {factor}")
        if factor == 1:
            return self
        small = self.tokens_per_block // factor
        rest_tokens = self.prompt_tokens % self.tokens_per_block
        unnamed = np.flatnonzero((rest_tokens > 0) & (self.partial_ids < 0))
        if unnamed.size:
            raise TraceError(f"expansion of {self.name}: expected ids of partial blocks, request {unnamed[0]} has none")
        num_full = np.diff(self.offsets)
        # one entry for each recorded id: the full blocks of a prompt and then its partial block, if any
        has_partial = rest_tokens > 0
        ends = self.offsets[1:][has_partial]
        ids = np.insert(self.block_keys, ends, self.partial_ids[has_partial])
        pieces = np.insert(np.full(self.block_keys.size, factor), ends, rest_tokens[has_partial] // small)
        keys = np.repeat(ids * factor, pieces)
        keys += _positions(offsets_of(pieces))
        partial_ids = np.where(self.prompt_tokens % small > 0, self.partial_ids * factor + rest_tokens // small, -1)
        return replace(
            self,
            tokens_per_block=small,
            block_keys=keys,
            offsets=offsets_of(num_full * factor + rest_tokens // small),
            partial_ids=partial_ids,
            num_keys=self.num_keys * factor,
            split_factor=self.split_factor * factor,
        )


def offsets_of(counts: Int64Array) -> Int64Array:
    """[n + 1] where each of n consecutive stretches begins, and the end."""
    offsets = np.zeros(counts.size + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _positions(offsets: Int64Array) -> Int64Array:
    """[total] index of each element within its stretch."""
    positions = np.arange(offsets[-1], dtype=np.int64)
    positions -= np.repeat(offsets[:-1], np.diff(offsets))
    return positions
