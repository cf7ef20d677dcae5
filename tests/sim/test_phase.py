"""Shifts against token lists that really get tokens in front."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache import KVCacheManagerConfig
from ssmcache.models import load_model
from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.grid_cells import GridCapacity
from ssmcache_sim.phase import phase_ceilings, shifted, shifts_of
from ssmcache_sim.phase_cells import MAX_SHIFTS, PhaseCell, phase_cells
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import ReplaySettings
from ssmcache_sim.sweep import PlannedCell, SweepSpec, plan_sweep, run_sweep
from ssmcache_sim.trace import Trace

pytestmark = pytest.mark.usefixtures("wherever_ids_lie")

TraceOf = Callable[..., Trace]
TinyConfig = Callable[..., KVCacheManagerConfig]
GIB = 1 << 30
prompts_of_few_tokens = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=26), min_size=1, max_size=14)


def in_front(prompts: Sequence[Sequence[int]], shift: int) -> list[list[int]]:
    return [[*range(100, 100 + shift), *prompt] for prompt in prompts]


def own_hits(prompts: Sequence[Sequence[int]], shift: int, period: int) -> int:
    """Token by token: the longest start that an earlier prompt has, down to the period, less the tokens in front."""
    total = 0
    moved = in_front(prompts, shift)
    for index, prompt in enumerate(moved):
        longest = 0
        for earlier in moved[:index]:
            common = 0
            while common < min(len(prompt) - 1, len(earlier)) and prompt[common] == earlier[common]:
                common += 1
            longest = max(longest, common)
        total += max(longest - longest % period - shift, 0)
    return total


@settings(max_examples=150, deadline=None)
@given(prompts=prompts_of_few_tokens, block=st.integers(1, 4), multiple=st.integers(1, 4))
def test_every_shift_lies_within_its_bounds_and_those_of_whole_blocks_are_exact(
    trace_of: TraceOf, prompts: list[list[int]], block: int, multiple: int
) -> None:
    period = block * multiple
    ceilings = phase_ceilings(trace_of(prompts, block), period)
    expected = [own_hits(prompts, shift, period) for shift in range(period)]
    assert ceilings.low.shape == ceilings.high.shape == (period,)
    assert (ceilings.low <= expected).all()
    assert (expected <= ceilings.high).all()
    assert ceilings.low[::block].tolist() == expected[::block] == ceilings.high[::block].tolist()
    summary = ceilings.summary()
    assert summary.worst_rate * ceilings.prompt_tokens >= min(expected) - 1e-6
    assert summary.best_rate * ceilings.prompt_tokens <= max(expected) + 1e-6


def test_bounds_are_reached_by_traffic_that_records_the_same(trace_of: TraceOf) -> None:
    part_at_once = [[0, 0, 0, 0, 1, 1, 1, 1, 9], [0, 0, 0, 0, 2, 2, 2, 2, 9]]
    part_late = [[0, 0, 0, 0, 1, 1, 1, 1, 9], [0, 0, 0, 0, 1, 1, 1, 2, 9]]
    for prompts, bound in ((part_at_once, "low"), (part_late, "high")):
        ceilings = phase_ceilings(trace_of(prompts, 4), 4)
        assert getattr(ceilings, bound).tolist() == [own_hits(prompts, shift, 4) for shift in range(4)]
    assert phase_ceilings(trace_of(part_late, 4), 4).low.tolist() == [4, 3, 2, 1]


@settings(max_examples=100, deadline=None)
@given(prompts=prompts_of_few_tokens, block=st.integers(1, 3), steps=st.integers(0, 5), factor=st.integers(1, 3))
def test_a_shifted_trace_shares_what_prompts_with_tokens_in_front_share(
    trace_of: TraceOf, prompts: list[list[int]], block: int, steps: int, factor: int
) -> None:
    moved = shifted(trace_of(prompts, block), steps * block)
    real = trace_of(in_front(prompts, steps * block), block)
    assert moved.prompt_tokens.tolist() == real.prompt_tokens.tolist()
    names: dict[int, int] = {}  # of the real trace's keys: the two name the same blocks, by other numbers
    for key, real_key in zip(moved.block_keys.tolist(), real.block_keys.tolist(), strict=True):
        assert names.setdefault(real_key, key) == key
    assert len(set(names.values())) == len(names)
    coarse = moved.with_block(factor * block)
    assert (
        infinite_cache(coarse, None).kv_tokens.tolist()
        == infinite_cache(real.with_block(factor * block), None).kv_tokens.tolist()
    )


@settings(max_examples=60, deadline=None)
@given(
    prompts=prompts_of_few_tokens,
    multiple=st.integers(1, 4),
    num_pages=st.integers(6, 40),
    num_states=st.integers(4, 20),
)
def test_cells_by_grid_and_by_replay_equal_replays_of_prompts_with_tokens_in_front(
    trace_of: TraceOf,
    tiny_config: TinyConfig,
    prompts: list[list[int]],
    multiple: int,
    num_pages: int,
    num_states: int,
) -> None:
    trace, interval = trace_of(prompts, 2), 2 * multiple
    longest = max(map(len, prompts)) + interval
    num_pages, num_states = num_pages + longest // 2, num_states + longest // interval
    setting = ReplaySettings("tiny", 2, interval, None, None, "", "", "reserved")
    config = tiny_config(2, num_pages=num_pages, interval=interval, num_states=num_states)
    # the grid's capacity is made anew for each shift: that there is one says only that the grid may do the cell
    grid, replayed = (planned(setting, config, by_grid=by_grid) for by_grid in (True, False))
    result = phase_cells(trace, [grid, replayed], lambda done: None)
    expected = [
        sum(max(usable - shift, 0) for usable in replay(trace_of(in_front(prompts, shift), 2), config).usable.tolist())
        for shift in range(0, interval, 2)
    ]
    assert [cell.own_hit_tokens for cell in result] == expected * 2
    assert [cell.engine for cell in result] == ["grid"] * multiple + ["replay"] * multiple


def planned(setting: ReplaySettings, config: KVCacheManagerConfig, *, by_grid: bool) -> PlannedCell:
    return PlannedCell(setting, config, Path(), GridCapacity(1, 1) if by_grid else None, "")


def test_attention_alone_hangs_on_the_block(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    prompts = [[1] * 7, [1] * 7, [1] * 3 + [2] * 9]
    setting = ReplaySettings("tiny", 4, None, None, None, "", "", "reserved")
    cell = planned(setting, tiny_config(4, num_pages=20), by_grid=True)
    result = phase_cells(trace_of(prompts, 1), [cell], lambda done: None)
    assert [cell.own_hit_tokens for cell in result] == [own_hits(prompts, shift, 4) for shift in range(4)]


def test_a_memory_that_holds_no_longer_prompt_hits_nothing(trace_of: TraceOf, tiny_config: TinyConfig) -> None:
    prompts = [[1] * 7, [1] * 7]
    setting = ReplaySettings("tiny", 1, 4, None, None, "", "", "reserved")
    config = tiny_config(1, num_pages=9, interval=4, num_states=9)
    result = phase_cells(trace_of(prompts, 1), [planned(setting, config, by_grid=True)], lambda done: None)
    assert [cell.engine for cell in result] == ["grid"] * 2 + ["replay"] * 2
    assert [cell.own_hit_tokens for cell in result] == [4, 3, 0, 0]


def test_the_same_traffic_flips_between_nothing_and_full_reuse(trace_of: TraceOf) -> None:
    """A system prompt of 30 tokens, one below an interval of 32, and questions that share nothing."""
    prompts = [[*range(1000, 1031), *range(50 * user, 50 * user + 9)] for user in range(2, 12)]
    summary = phase_ceilings(trace_of(prompts, 1), 32).summary()
    assert summary.hangs_on_phase
    assert (summary.now_rate, summary.worst_rate, summary.worst_shift_tokens) == (0.0, 0.0, 0)
    assert summary.best_shift_tokens == 1
    assert summary.best_rate == pytest.approx(9 * 31 / 400)


def test_prompts_at_all_phases_do_not_hang_on_it_and_a_tiny_hit_rate_is_not_worth_a_warning(trace_of: TraceOf) -> None:
    spread = [[user] * (40 + user) for user in range(32)]
    assert not phase_ceilings(trace_of([*spread, *spread], 1), 32).summary().hangs_on_phase
    strangers = [[user] * 300 for user in range(2, 40)]
    strangers += [[1] * 31 + [100], [1] * 31 + [200]]
    summary = phase_ceilings(trace_of(strangers, 1), 32).summary()
    assert summary.best_rate > 0 == summary.worst_rate
    assert not summary.hangs_on_phase


def test_shifts_are_evenly_spaced_and_bounded() -> None:
    assert shifts_of(2048, 512, 16) == (0, 512, 1024, 1536)
    assert shifts_of(512, 512, 16) == (0,)
    assert shifts_of(8192, 16, 16) == tuple(range(0, 8192, 512))
    assert shifts_of(160, 16, 4) == (0, 48, 96, 144)
    assert all(len(shifts_of(16 * n, 16, MAX_SHIFTS)) <= MAX_SHIFTS for n in range(1, 99))


@pytest.mark.parametrize("num_tokens", [-2, 1, 3])
def test_shifts_within_a_block_are_refused(trace_of: TraceOf, num_tokens: int) -> None:
    trace = trace_of([[1, 2, 3]], 2)
    with pytest.raises(TraceError, match=f"expected a multiple of 2 tokens, got {num_tokens}"):
        shifted(trace, num_tokens)
    with pytest.raises(TraceError, match=f"expected a period of a multiple of 2 tokens, got {num_tokens}"):
        phase_ceilings(trace, num_tokens)


def test_the_sample_at_no_shift_is_the_sweep_and_its_ceilings(sample_path: Path, tmp_path: Path) -> None:
    trace = read_trace(sample_path)
    sweep = SweepSpec((512, 1024), (1024, 4096), (200 * GIB, None))
    plan = plan_sweep(sweep, trace, load_model("nemotron-h-8b"), tmp_path)
    by_shift = phase_cells(trace, plan.cells, lambda done: None)
    unshifted = [cell.own_hit_tokens for cell in by_shift if cell.shift_tokens == 0]
    swept = run_sweep(trace, plan, 1, lambda done: None)
    assert unshifted == [cell.totals.usable_hit_tokens for cell in swept]
    for interval in (1024, 4096):
        assert at_unlimited_memory(by_shift, interval) == phase_ceilings(trace, interval).low[::512].tolist()
    assert np.unique([cell.engine for cell in by_shift]).tolist() == ["grid"]


def at_unlimited_memory(cells: Sequence[PhaseCell], interval: int) -> list[int]:
    def is_it(setting: ReplaySettings) -> bool:
        return (setting.tokens_per_block, setting.ssm_reuse_interval, setting.gpu_memory_bytes) == (512, interval, None)

    return [cell.own_hit_tokens for cell in cells if is_it(cell.settings)]
