"""What `recommend` chooses from: block sizes with intervals, each with every split of the memory, and their order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ssmcache.config import Admission
from ssmcache.layout import LayerGroupKind
from ssmcache.models import ModelSpec
from ssmcache_sim.cost import PrefillCost
from ssmcache_sim.device_profile import H100, DeviceProfile
from ssmcache_sim.errors import MemoryTooSmallError, SettingsError
from ssmcache_sim.grid import StackDistances
from ssmcache_sim.settings import Prefill, ReplaySettings, build_config, make_settings, slot_bytes_of
from ssmcache_sim.sizes import format_size
from ssmcache_sim.splits import Splits, SplitTotals, possible_splits, split_totals
from ssmcache_sim.trace import MAX_INTERVAL, Trace

_MOST_TOKENS_PER_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of `recommend`.

    Attributes:
        tokens_per_block: block sizes to choose from; None: the trace's own, doubled up to 1,024 tokens. Pages of
            running sequences are half empty at their end, which no replay sees, so larger blocks must be asked for.
        ssm_reuse_intervals: to choose from; None: 1, 2, 3, 4, 6, 8, 12 .. blocks of the trace, up to its longest
            prompt.
        billion_parameters: that a token passes through; None: what the vendor says.
        host_memory_bytes, disk_memory_bytes: below the GPU; 0: no such tier.
        admissions: to choose from.
        num_replays: at most so many settings are replayed where the grid cannot tell what they save; at least 1.
        num_pieces, seed: contiguous pieces of half the trace that the choice is repeated on, and of where they begin.
        num_phases: shifts of all prompts that it is repeated with.
    """

    gpu_memory_bytes: int
    tokens_per_block: tuple[int, ...] | None = None
    ssm_reuse_intervals: tuple[int, ...] | None = None
    kv_dtype: str | None = None
    state_dtype: str | None = None
    prefill: Prefill = "chunked"
    device: DeviceProfile = H100
    billion_parameters: float | None = None
    num_pieces: int = 8
    seed: int = 0
    host_memory_bytes: int = 0
    disk_memory_bytes: int = 0
    admissions: tuple[Admission, ...] = ("every", "last")
    num_replays: int = 24
    num_phases: int = 3

    @property
    def has_tiers(self) -> bool:
        return self.host_memory_bytes > 0 or self.disk_memory_bytes > 0


@dataclass(frozen=True, slots=True)
class Shape:
    """A block size, an interval (None: no SSM layers), and which of its multiples get a snapshot."""

    tokens_per_block: int
    ssm_reuse_interval: int | None
    admission: Admission = "every"

    @property
    def step(self) -> int:
        """Tokens between the places that a request can resume from."""
        return self.ssm_reuse_interval or self.tokens_per_block


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shape with all splits of the memory that hold the largest request."""

    shape: Shape
    splits: Splits


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A shape that was not judged: its largest request needs so much memory, and below it the grid is not exact."""

    shape: Shape
    least_memory_bytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """The best split of a candidate: its index, and that of the split."""

    candidate: int
    split: int


def find_candidates(
    trace: Trace, model: ModelSpec, question: Question, longest_path: int
) -> tuple[tuple[Candidate, ...], tuple[LeftOut, ...]]:
    """All shapes, in order of interval, block and admission: those that hold the longest prompt, and the others.

    Errors: SettingsError for a block size or an interval that cannot be; MemoryTooSmallError where nothing fits.
    """
    candidates, left_out = [], []
    for shape in _shapes(trace, bool(model.num_ssm_layers), question, longest_path):
        config = build_config(model, settings_of(model, question, shape))
        page_bytes, slot_bytes = (
            slot_bytes_of(config, kind) for kind in (LayerGroupKind.ATTENTION, LayerGroupKind.SSM)
        )
        splits = _splits_of(shape, longest_path, question.gpu_memory_bytes, page_bytes, slot_bytes)
        if isinstance(splits, int):
            left_out.append(LeftOut(shape, splits))
        else:
            candidates.append(Candidate(shape, splits))
    if not candidates:
        least = min(shape.least_memory_bytes for shape in left_out)
        raise MemoryTooSmallError(
            f"memory too small for the largest request ({longest_path} tokens): expected at least {least} bytes "
            f"({format_size(least)}), got {question.gpu_memory_bytes} bytes ({format_size(question.gpu_memory_bytes)})"
        )
    return tuple(candidates), tuple(left_out)


def settings_of(model: ModelSpec, question: Question, shape: Shape) -> ReplaySettings:
    """Those of a replay of this shape, with the manager's own split."""
    return make_settings(
        model,
        shape.tokens_per_block,
        gpu_memory_bytes=question.gpu_memory_bytes,
        ssm_reuse_interval=shape.ssm_reuse_interval,
        kv_dtype=question.kv_dtype,
        state_dtype=question.state_dtype,
        prefill=question.prefill,
        host_memory_bytes=question.host_memory_bytes,
        disk_memory_bytes=question.disk_memory_bytes,
        admission=shape.admission,
    )


def _splits_of(shape: Shape, longest_path: int, memory_bytes: int, page_bytes: int, slot_bytes: int) -> Splits | int:
    return possible_splits(
        longest_path,
        shape.step,
        memory_bytes,
        tokens_per_block=shape.tokens_per_block,
        page_bytes=page_bytes,
        slot_bytes=slot_bytes,
        admission=shape.admission,
    )


def narrowed(candidate: Candidate, longest_path: int) -> Candidate | None:
    """The splits of a candidate that hold a longer prompt too; None if there is none."""
    old = candidate.splits
    splits = _splits_of(candidate.shape, longest_path, old.memory_bytes, old.page_bytes, old.slot_bytes)
    return None if isinstance(splits, int) else replace(candidate, splits=splits)


def _shapes(trace: Trace, has_ssm: bool, question: Question, longest_path: int) -> Iterator[Shape]:
    native = trace.tokens_per_block
    blocks = sorted(question.tokens_per_block or _doubled(native, max(native, _MOST_TOKENS_PER_BLOCK)))
    for block in blocks:
        trace.with_block(block)  # a TraceError names a block that is not recorded
    if not has_ssm:
        yield from (Shape(block, None) for block in blocks)
        return
    longest = min(longest_path, MAX_INTERVAL)
    ladder = _doubled(native, max(native, longest)) + _doubled(3 * native, longest)
    intervals = sorted(question.ssm_reuse_intervals or ladder)
    for interval in intervals:
        if interval > MAX_INTERVAL:
            raise SettingsError(f"ssm_reuse_interval: expected up to {MAX_INTERVAL:,} tokens, got {interval}")
        fitting = [block for block in blocks if interval % block == 0]
        if not fitting and question.ssm_reuse_intervals is not None:
            expected = " or ".join(map(str, blocks))
            raise SettingsError(f"ssm_reuse_interval: expected a multiple of a block size ({expected}), got {interval}")
        yield from (Shape(block, interval, admission) for block in fitting for admission in question.admissions)


def _doubled(first: int, last: int) -> list[int]:
    sizes = []
    while first <= last:
        sizes.append(first)
        first *= 2
    return sizes


def sizes_of(candidates: Sequence[Candidate]) -> set[int]:
    """Sizes that `stack_distances` must be asked for."""
    shapes = [candidate.shape for candidate in candidates]
    return {shape.tokens_per_block for shape in shapes} | {shape.step for shape in shapes}


def measure(
    trace: Trace,
    distances: StackDistances,
    candidates: Sequence[Candidate],
    cost: PrefillCost,
    front_tokens: int = 0,
) -> list[SplitTotals]:
    """Totals of every split of every candidate, on the GPU alone and with a snapshot at every boundary."""
    return [
        split_totals(trace, distances, each.shape.tokens_per_block, each.shape.step, each.splits, cost, front_tokens)
        for each in candidates
    ]


def rank(candidates: Sequence[Candidate], totals: Sequence[SplitTotals]) -> list[Place]:
    """The best split of each candidate, the candidate that saves most time first.

    Equal splits: the middle one, as far as can be from doing worse. Equal candidates: more hits, then the longer
    interval, then the smaller block.
    """
    places = [Place(index, _best_split(each)) for index, each in enumerate(totals)]

    def key(place: Place) -> tuple[int, int, int, int]:
        shape, sums = candidates[place.candidate].shape, totals[place.candidate]
        return order_of(shape, int(sums.saved_ns[place.split]), int(sums.hit_tokens[place.split]))

    return sorted(places, key=key)


def _best_split(totals: SplitTotals) -> int:
    best = np.flatnonzero(totals.saved_ns == totals.saved_ns.max())
    return int(best[best.size // 2])


def order_of(shape: Shape, saved_ns: int, hit_tokens: int) -> tuple[int, int, int, int]:
    """Sorts the best first: time, then hits, then the longer interval, then the smaller block."""
    return -saved_ns, -hit_tokens, -(shape.ssm_reuse_interval or 0), shape.tokens_per_block


def near_best(totals: SplitTotals, split: int, tolerance: float) -> tuple[int, int]:
    """First and last split around the given one that all save as much time, less a share of it."""
    least = totals.saved_ns[split] - tolerance * abs(int(totals.saved_ns[split]))
    worse = np.flatnonzero(totals.saved_ns < least)
    below, above = worse[worse < split], worse[worse > split]
    first = int(below[-1]) + 1 if below.size else 0
    return first, (int(above[0]) - 1 if above.size else totals.saved_ns.size - 1)
