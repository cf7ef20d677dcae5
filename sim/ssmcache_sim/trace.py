"""A request trace as arrays: when requests arrive, how long they are, and which blocks they share.

What a request leaves for others is its *path*: its prompt and, in a trace with outputs, the tokens that it generated,
but for the last one: that was sampled and never computed, so no memory holds anything for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ssmcache.keys import BlockKeys
from ssmcache.units import plural
from ssmcache_sim.errors import TraceError
from ssmcache_sim.scratch import gather

# What files and settings may claim: far beyond anything real, and far from what the arithmetic on it can hold.
MAX_TOKENS = 1 << 30  # of a prompt or an output
MAX_BLOCK = 1 << 20  # tokens of a block
MAX_INTERVAL = 1 << 24  # tokens between snapshots; the phase has an entry for each
MAX_TIME_MS = float(1 << 53)  # whole milliseconds are exact

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_OUTPUTS, _UNKNOWN_OUTPUTS = "outputs", "outputs (none known)"  # parts of `reading`


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


class InferredBlock(NamedTuple):
    """A block size that a file does not state and that only requests of one length tell: a guess.

    Attributes:
        tokens_per_block: as told by the number of their ids.
        num_rows: how many requests of that length there are.
        usual_tokens: what the format is published with.
    """

    tokens_per_block: int
    num_rows: int
    usual_tokens: int

    def __str__(self) -> str:
        rows = "a single row" if self.num_rows == 1 else f"{self.num_rows:,} rows of one length"
        return f"inferred from {rows}"

    @property
    def warning(self) -> str | None:
        """What to tell whoever reads the trace, in a sentence; None where nothing is unusual."""
        if self.tokens_per_block == self.usual_tokens:
            return None
        return (
            f"blocks of {self.tokens_per_block:,} tokens are {self}, where {self.usual_tokens:,} are usual: "
            "--trace-block (tokens_per_block) says what one id stands for"
        )


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

    def __repr__(self) -> str:
        return f"LengthTrace({self.name})\n  {_in_figures(self)}"

    @property
    def num_requests(self) -> int:
        return self.prompt_tokens.size


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in order of arrival, with a key for each full block of each path.

    Attributes:
        name: the file's name, without its folder.
        sha256: of the file's uncompressed content, in hex.
        tokens_per_block: tokens that one key stands for.
        arrival_ms: [num_requests] milliseconds, not falling.
        prompt_tokens, output_tokens: [num_requests].
        block_keys: [sum of full blocks] keys of the full blocks of all paths, one path after the other. Unique per
            prefix, 0 <= key < num_keys. A path's first keys are those of its prompt.
        offsets: [num_requests + 1] where each path's keys begin in `block_keys`.
        partial_ids: [num_requests] id of the prompt's last block that is not full, from the same numbering; -1 without
            one.
        num_keys: how many ids the numbering has.
        repairs: (what was repaired, how many rows) pairs.
        num_broken: rows that were left out because they are broken.
        split_factor: 1 as recorded; n where each recorded block was split in n (see `expanded`).
        sessions: None where the file names none.
        format_name: of the file.
        reading: what was chosen while reading that changes the requests, such as a rule for the start of sessions;
            empty where the file alone decides. Equal `sha256`, `reading` and block: the same requests.
        output_known: [num_requests] bool, whether the content of the output is known; blocks of one that is not have
            keys that nobody else has. None: prompts only, a path is a prompt.
        inferred_block: how the block size was guessed; None where the file or the reader states it.

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
    output_known: BoolArray | None = None
    inferred_block: InferredBlock | None = None

    def __post_init__(self) -> None:
        for array in self._arrays():
            array.flags.writeable = False
        assert np.array_equal(np.diff(self.offsets), self.path_tokens // self.tokens_per_block)

    def __repr__(self) -> str:
        inferred = "" if self.inferred_block is None else f" ({self.inferred_block})"
        return f"Trace({self.label})\n  {_in_figures(self)} in blocks of {self.tokens_per_block:,}{inferred}"

    def _arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        lengths = (self.arrival_ms, self.prompt_tokens, self.output_tokens)
        known = () if self.output_known is None else (self.output_known,)
        return (*lengths, self.block_keys, self.offsets, self.partial_ids, *known)

    @property
    def num_requests(self) -> int:
        return self.prompt_tokens.size

    @property
    def has_outputs(self) -> bool:
        """Whether what a request generated is part of its path."""
        return self.output_known is not None

    @property
    def knows_outputs(self) -> bool:
        """Whether there is one that a later prompt may hold."""
        return self.output_known is not None and bool(self.output_known.any())

    @property
    def path_tokens(self) -> Int64Array:
        """[num_requests] tokens that each request leaves for others."""
        return path_lengths(self.prompt_tokens, self.output_tokens) if self.has_outputs else self.prompt_tokens

    @property
    def longest_path(self) -> int:
        """Tokens of the longest path."""
        return int(self.path_tokens.max())

    @property
    def label(self) -> str:
        """Name for titles; says so where there are outputs, or the blocks are not the recorded ones."""
        if self.has_outputs:
            known = "" if self.knows_outputs else ", none of them known"
            return f"{self.name} (prompts and outputs{known})"
        if self.split_factor == 1:
            return self.name
        return f"{self.name} (blocks split in {self.split_factor}: a lower bound)"

    def prompt(self, index: int) -> BlockKeys:
        """Keys of one prompt: a view, no copy."""
        start, num_tokens = int(self.offsets[index]), int(self.prompt_tokens[index])
        stop = start + num_tokens // self.tokens_per_block
        return BlockKeys(self.block_keys[start:stop], self.tokens_per_block, num_tokens)

    def prompts(self) -> Iterator[BlockKeys]:
        """All prompts in order of arrival; cheaper than `prompt` for each."""
        if not self.has_outputs:
            yield from self.paths()
            return
        for path, num_tokens in zip(self.paths(), self.prompt_tokens.tolist(), strict=True):
            yield BlockKeys(path.keys[: num_tokens // self.tokens_per_block], self.tokens_per_block, num_tokens)

    def paths(self) -> Iterator[BlockKeys]:
        """All paths in order of arrival; the prompt is the first part of each."""
        keys, tokens_per_block = self.block_keys, self.tokens_per_block
        start = 0
        for stop, num_tokens in zip(self.offsets[1:].tolist(), self.path_tokens.tolist(), strict=True):
            yield BlockKeys(keys[start:stop], tokens_per_block, num_tokens)
            start = stop

    def part(self, start: int, stop: int) -> "Trace":
        """Requests `start`..`stop - 1` alone, without their sessions."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return replace(
            self,
            arrival_ms=self.arrival_ms[start:stop],
            prompt_tokens=self.prompt_tokens[start:stop],
            output_tokens=self.output_tokens[start:stop],
            block_keys=self.block_keys[first:last],
            offsets=self.offsets[start : stop + 1] - first,
            partial_ids=self.partial_ids[start:stop],
            output_known=None if self.output_known is None else self.output_known[start:stop],
            sessions=None,
        )

    def first_requests(self, count: int) -> "Trace":
        """The first requests alone, which `reading` says. Errors: TraceError unless there are any, with tokens."""
        if count < 1:
            raise TraceError(f"requests: expected at least 1 of {self.name}, got {count}")
        if count >= self.num_requests:
            return self
        reading = ", ".join(filter(None, (self.reading, f"first {count} requests")))
        return replace(self.part(0, count), reading=reading).with_tokens()

    def with_tokens(self) -> "Trace":
        """The trace itself. Errors: TraceError where all prompts are empty, of which no hit rate can be told."""
        if not self.prompt_tokens.any():
            empty = plural(self.num_requests, "empty prompt")
            raise TraceError(f"{self.name}: hit rates: expected a prompt with tokens, got {empty} and no other")
        return self

    def without_outputs(self) -> "Trace":
        """The same requests, prompts only. Cost: O(blocks)."""
        if not self.has_outputs:
            return self
        num_blocks = self.prompt_tokens // self.tokens_per_block
        offsets = offsets_of(num_blocks)
        return replace(
            self,
            block_keys=gather(self.block_keys, self.offsets[:-1], offsets),
            offsets=offsets,
            reading=", ".join(part for part in self.reading.split(", ") if part not in (_OUTPUTS, _UNKNOWN_OUTPUTS)),
            output_known=None,
        )

    def with_block(self, tokens_per_block: int) -> "Trace":
        """The same requests in coarser blocks. Exact: a coarse block's key is the key of its last block here.

        Errors: TraceError unless `tokens_per_block` is a multiple of the trace's.
        """
        if not 1 <= tokens_per_block <= MAX_BLOCK or tokens_per_block % self.tokens_per_block:
            raise TraceError(
                f"tokens_per_block: expected a multiple of the {self.tokens_per_block} tokens a block of {self.name} "
                f"(finer blocks are not recorded), up to {MAX_BLOCK:,}, got {tokens_per_block}"
            )
        factor = tokens_per_block // self.tokens_per_block
        if factor == 1:
            return self
        num_coarse = np.diff(self.offsets) // factor
        offsets = offsets_of(num_coarse)
        # The rest of a prompt is named by its last id, but only where that id reaches to the prompt's end.
        num_prompt, rest_tokens = np.divmod(self.prompt_tokens, self.tokens_per_block)
        ends_full = (rest_tokens == 0) & (num_prompt % factor > 0)
        partial_ids = self.partial_ids.copy()
        partial_ids[ends_full] = self.block_keys[(self.offsets[:-1] + num_prompt)[ends_full] - 1]
        return replace(
            self,
            tokens_per_block=tokens_per_block,
            block_keys=gather(self.block_keys, self.offsets[:-1] + factor - 1, offsets, factor),
            offsets=offsets,
            partial_ids=partial_ids,
        )

    def expanded(self, factor: int) -> "Trace":
        """The same requests with each block split in `factor` blocks that are shared all or none.

        A lower bound of what finer blocks would share: two prompts that part inside a recorded block may agree on
        its first tokens, which is not recorded.

        Errors: TraceError unless the factor divides a block and the ids of partial blocks are recorded; and with
        outputs, which begin inside a block that is named as a whole.
        """
        if self.has_outputs:
            raise TraceError(f"expansion of {self.name}: expected prompts only, got outputs too")
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


def path_lengths(prompt_tokens: Int64Array, output_tokens: Int64Array) -> Int64Array:
    """Tokens of each path with the output: all but the last generated token, which is never computed."""
    return prompt_tokens + np.maximum(output_tokens - 1, 0)


def reading_with_outputs(trace: Trace) -> str:
    """What `Trace.reading` says where outputs were asked for; `without_outputs` takes it away."""
    return ", ".join(filter(None, (trace.reading, _OUTPUTS if trace.knows_outputs else _UNKNOWN_OUTPUTS)))


def _in_figures(requests: Trace | LengthTrace) -> str:
    sessions = "" if requests.sessions is None else f" of {plural(len(requests.sessions.names), 'session')}"
    seconds = np.ptp(requests.arrival_ms) / 1000 if requests.num_requests else 0
    tokens = plural(int(requests.prompt_tokens.sum()), "prompt token")
    return f"{plural(requests.num_requests, 'request')}{sessions} in {seconds:,.0f} s, {tokens}"


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
