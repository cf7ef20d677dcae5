"""What the settings of `recommend` save, each told in the cheapest way that is exact: by the grid, else by a replay.

| model, tiers, admission | by |
|---|---|
| attention alone, any tiers | the grid |
| hybrid, the GPU alone, `every` | the grid, all splits at once (`candidates.py`) |
| hybrid, the GPU alone, `last` | the grid where it is exact (`grid_last.py`), else a replay |
| hybrid, several tiers | a replay |

What would need more replays than there may be is estimated, and never recommended.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ssmcache.layout import LayerGroupKind
from ssmcache.models import ModelSpec
from ssmcache_sim.candidates import Candidate, Question, Shape, settings_of
from ssmcache_sim.certainty import Contender
from ssmcache_sim.cost import PrefillCost
from ssmcache_sim.grid import StackDistances, stack_distances
from ssmcache_sim.grid_last import LastBoundaries, last_boundaries, last_needs_replay
from ssmcache_sim.measured import Measured, attention_on_tiers, estimate, measure_by_replay, pool_slots
from ssmcache_sim.replay_tiers import check_lower_tiers
from ssmcache_sim.search import Option, SearchResult, search
from ssmcache_sim.settings import ReplaySettings, build_config, slot_bytes_of
from ssmcache_sim.splits import Splits
from ssmcache_sim.trace import Trace

By = Literal["grid", "replay", "estimate"]
_SAMPLES = 6  # of the splits of a shape, of each spacing


@dataclass(slots=True, eq=False)
class Rater:
    """Measures and estimates settings of one question on its trace, and on parts and shifts of it.

    Attributes:
        distances: of the trace, with all blocks and intervals of the candidates.
    """

    trace: Trace
    model: ModelSpec
    question: Question
    cost: PrefillCost
    distances: StackDistances
    candidates: Mapping[Shape, Candidate]
    _found: dict[int, LastBoundaries] = field(default_factory=dict)
    _measured: dict[tuple[int, Option], Measured] = field(default_factory=dict)
    _estimated: dict[Option, Measured] = field(default_factory=dict)
    _by_grid: dict[Option, bool] = field(default_factory=dict)

    def settings(self, shape: Shape, num_slots: int) -> ReplaySettings:
        """Settings from which a manager makes exactly this split: the fraction with the fewest digits that does."""
        return exact_settings(self.model, self.question, shape, self.candidates[shape].splits, num_slots)

    def search(self, known: Mapping[Shape, int], progress: Callable[[int], None]) -> SearchResult:
        """Looks for the best of the candidates that are not among `known`, whose best split saves so many ns.

        Errors: MemoryTooSmallError where a tier below the GPU holds nothing.
        """
        options: list[Option] = []
        for shape, candidate in self.candidates.items():
            if shape not in known:
                check_lower_tiers(build_config(self.model, self.settings(shape, candidate.splits.first)))
                options += [(shape, slots) for slots in _sampled(candidate.splits)]
        return search(
            options,
            estimate=lambda option: self.estimate(option).saved_ns(self.trace, self.cost),
            measure=lambda option: self.measure(option).saved_ns(self.trace, self.cost),
            known=known,
            num_replays=self.question.num_replays,
            costs_replay=lambda option: not self.is_by_grid(option),
            progress=progress,
        )

    def is_by_grid(self, option: Option) -> bool:
        """Whether the grid is exact for a setting on the whole trace."""
        if option not in self._by_grid:
            self._by_grid[option] = self._can_grid(option)
        return self._by_grid[option]

    def _can_grid(self, option: Option) -> bool:
        shape, num_slots = option
        if shape.ssm_reuse_interval is None:
            return True
        if self.question.has_tiers:
            return False
        num_blocks = self.candidates[shape].splits.num_pages(num_slots) - 1
        in_blocks = self.trace.with_block(shape.tokens_per_block)
        return not last_needs_replay(in_blocks, shape.ssm_reuse_interval, num_blocks, num_slots - 1)

    def measure(self, option: Option) -> Measured:
        """On the whole trace, exactly."""
        return self.estimate(option) if self.is_by_grid(option) else self.measure_on(self.trace, option)

    def measure_on(self, trace: Trace, option: Option) -> Measured:
        """On any trace whose largest request fits, exactly: without SSM layers by the grid, else by a replay."""
        key = id(trace), option
        if key not in self._measured:
            shape, num_slots = option
            settings = self.settings(shape, num_slots)
            if shape.ssm_reuse_interval is None:
                distances = stack_distances(trace, [shape.tokens_per_block])
                self._measured[key] = self._attention(trace, distances, settings)
            else:
                self._measured[key] = measure_by_replay(trace, self.model, settings)
        return self._measured[key]

    def measure_contender(self, trace: Trace, contender: Contender) -> Measured:
        option = contender.shape, contender.num_slots
        return self.measure(option) if trace is self.trace else self.measure_on(trace, option)

    def estimate(self, option: Option) -> Measured:
        """By the grid's distances: exact where `is_by_grid`."""
        if option not in self._estimated:
            shape, num_slots = option
            settings = self.settings(shape, num_slots)
            if shape.ssm_reuse_interval is None:
                self._estimated[option] = self._attention(self.trace, self.distances, settings)
            else:
                self._estimated[option] = self._hybrid(shape, settings)
        return self._estimated[option]

    def unlimited(self, shape: Shape) -> Measured:
        """With unlimited memory on the GPU."""
        settings = replace(self.settings(shape, self.candidates[shape].splits.first), gpu_memory_bytes=None)
        return self._hybrid(shape, replace(settings, host_memory_bytes=0, disk_memory_bytes=0))

    def _attention(self, trace: Trace, distances: StackDistances, settings: ReplaySettings) -> Measured:
        config = build_config(self.model, settings)
        return attention_on_tiers(trace, distances, config, slot_bytes_of(config, LayerGroupKind.ATTENTION))

    def _hybrid(self, shape: Shape, settings: ReplaySettings) -> Measured:
        interval = shape.ssm_reuse_interval
        assert interval is not None
        found = None
        if shape.admission == "last":
            if interval not in self._found:
                self._found[interval] = last_boundaries(self.trace, interval)
            found = self._found[interval]
        splits = self.candidates[shape].splits
        config = build_config(self.model, settings)
        return estimate(self.trace, self.distances, config, found, (splits.page_bytes, splits.slot_bytes))


def _sampled(splits: Splits) -> list[int]:
    """SSM slots of some splits, evenly and logarithmically spaced, the first and the last among them."""
    even = np.linspace(splits.first, splits.last, _SAMPLES)
    spaced = np.geomspace(splits.first, splits.last, _SAMPLES) if splits.first else even
    samples: list[int] = np.unique(np.concatenate((even, spaced)).round().astype(np.int64)).tolist()
    return samples


def exact_settings(
    model: ModelSpec, question: Question, shape: Shape, splits: Splits, num_slots: int
) -> ReplaySettings:
    """Settings from which a manager makes exactly this split of the GPU's memory, and the tiers below in the same way:
    the fraction with the fewest digits that does.
    """
    settings = settings_of(model, question, shape)
    wanted = splits.num_pages(num_slots), num_slots
    if not num_slots:
        assert _on_gpu(model, settings) == wanted
        return settings
    least = num_slots * splits.slot_bytes / splits.memory_bytes
    for digits in range(2, 18):
        fraction = math.ceil(least * 10**digits) / 10**digits
        exact = replace(settings, ssm_fraction=fraction)
        if fraction < 1 and _on_gpu(model, exact) == wanted:
            return exact
    raise AssertionError(f"no share of {splits.memory_bytes} bytes gives {num_slots} slots and {wanted[0]} pages")


def _on_gpu(model: ModelSpec, settings: ReplaySettings) -> tuple[int, int]:
    """Pages and SSM slots on the GPU."""
    gpu_alone = replace(settings, host_memory_bytes=0, disk_memory_bytes=0)
    pages, slots = pool_slots(build_config(model, gpu_alone))
    return pages[0], slots[0]
