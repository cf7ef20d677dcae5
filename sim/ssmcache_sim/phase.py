"""How far a hit rate hangs on where prompts lie on the grid of snapshots: their phase.

A *shift* of s tokens means: every prompt of the trace gets the same s tokens in front, as from a longer system prompt.
Block ends and snapshot positions then fall s tokens earlier in the content. Only the trace's own tokens are counted,
those in front neither as hits nor as prompt tokens: so the rate of a shift by a whole period (the interval; without SSM
layers the block) is that of no shift, and a spread is due to the phase alone, not to more tokens that are shared.

What is known: a trace tells common prefixes in its own blocks of b tokens. Where prompts part inside a block is not
recorded. So a shift by a multiple of b is exact, for every block size, interval and memory: it is the same trace with
more blocks in front. For all other shifts there are two bounds, one as if prompts parted right after the last common
block, one as if they parted one token before the end of the next.
"""

from dataclasses import dataclass, replace

import numpy as np

from ssmcache_sim.ceilings import blocks_seen_before
from ssmcache_sim.errors import TraceError
from ssmcache_sim.scratch import new_ids
from ssmcache_sim.trace import Int64Array, Trace, offsets_of

# A hit rate hangs on the phase when the worst shift certainly loses this share of what the best one certainly has, ..
HANGS_FROM = 0.25
# .. and when there is something to lose: less than this share of the prompt tokens is noise at any phase.
_WORTH_A_WARNING = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class PhaseCeilings:
    """Own prompt tokens that unlimited memory would hit at each shift by 0 .. period - 1 tokens.

    Attributes:
        period_tokens: the interval; without SSM layers the block.
        step_tokens: of the trace's blocks: at its multiples `low` and `high` are equal, and exact.
        prompt_tokens: of the trace, what rates divide by.
        low, high: [period_tokens] bounds of the hit tokens.
    """

    period_tokens: int
    step_tokens: int
    prompt_tokens: int
    low: Int64Array
    high: Int64Array

    def __repr__(self) -> str:
        found = self.summary()
        return (
            f"PhaseCeilings(period of {self.period_tokens:,} tokens: now {found.now_rate:.2%}, "
            f"worst {found.worst_rate:.2%} shifted by {found.worst_shift_tokens:,}, "
            f"best {found.best_rate:.2%} by {found.best_shift_tokens:,})"
        )

    def summary(self) -> "PhaseSummary":
        """The shifts to look at, and the verdict."""
        worst, best = int(np.argmin(self.high)), int(np.argmax(self.low))
        now, lowest, highest = int(self.low[0]), int(self.high[worst]), int(self.low[best])
        num_tokens = max(self.prompt_tokens, 1)
        matters = highest >= _WORTH_A_WARNING * num_tokens
        return PhaseSummary(
            period_tokens=self.period_tokens,
            step_tokens=self.step_tokens,
            now_rate=now / num_tokens,
            worst_rate=lowest / num_tokens,
            worst_shift_tokens=worst,
            best_rate=highest / num_tokens,
            best_shift_tokens=best,
            hangs_on_phase=matters and highest - lowest >= HANGS_FROM * highest,
        )


@dataclass(frozen=True, slots=True)
class PhaseSummary:
    """The ceiling as recorded and at its worst and best shift, as shares of the prompt tokens.

    `worst_rate` is at most reached at that shift, `best_rate` at least: the spread between them is certain, whatever
    the trace does not record; the real one can be wider.
    """

    period_tokens: int
    step_tokens: int
    now_rate: float
    worst_rate: float
    worst_shift_tokens: int
    best_rate: float
    best_shift_tokens: int
    hangs_on_phase: bool


def phase_ceilings(trace: Trace, period_tokens: int) -> PhaseCeilings:
    """The ceilings of all shifts at once.

    With p tokens in common with an earlier prompt, L prompt tokens, q = min(p, L - 1) and the period P, a shift by s
    hits floor((q + s) / P) * P tokens, of which s are not the trace's own. Over s that is a line that falls by one a
    token and jumps by P where s = P - q mod P.

    Args:
        trace: as recorded, in its own blocks: coarser ones would widen the bounds.
        period_tokens: a multiple of the trace's block.

    Cost: O(period), and that of `infinite_cache`. Errors: TraceError for another period.
    """
    block = trace.tokens_per_block
    if period_tokens < 1 or period_tokens % block:
        raise TraceError(f"phase: expected a period of a multiple of {block} tokens, got {period_tokens}")
    limit = np.maximum(trace.prompt_tokens - 1, 0)
    least = blocks_seen_before(trace) * block
    most = least + (block - 1)
    most[:1] = 0  # before the first prompt there is nothing to have in common
    return PhaseCeilings(
        period_tokens=period_tokens,
        step_tokens=block,
        prompt_tokens=int(trace.prompt_tokens.sum()),
        low=_hits_by_shift(np.minimum(least, limit), period_tokens),
        high=_hits_by_shift(np.minimum(most, limit), period_tokens),
    )


def _hits_by_shift(reusable: Int64Array, period: int) -> Int64Array:
    """[period] sum over the requests of max(0, floor((reusable + s) / period) * period - s)."""
    shifts = np.arange(period, dtype=np.int64)
    whole, rest = np.divmod(reusable, period)
    has_whole, jumps = whole > 0, rest > 0
    jumped_again = _jumped(period - rest[has_whole & jumps], period)
    jumped_first = _jumped(period - rest[~has_whole & jumps], period)
    hits: Int64Array = int(whole.sum()) * period - int(has_whole.sum()) * shifts
    return hits + period * jumped_again + (period - shifts) * jumped_first


def _jumped(at: Int64Array, period: int) -> Int64Array:
    """[period] how many of the shifts `at` are not above each shift."""
    counts: Int64Array = np.cumsum(np.bincount(at, minlength=period)[:period], dtype=np.int64)
    return counts


def shifts_of(period_tokens: int, step_tokens: int, at_most: int) -> tuple[int, ...]:
    """Shifts that are known exactly, evenly spaced over one period, 0 first, no more than `at_most`."""
    steps = period_tokens // step_tokens
    return tuple(range(0, period_tokens, -(-steps // at_most) * step_tokens))


def shifted(trace: Trace, num_tokens: int) -> Trace:
    """The same requests with the same `num_tokens` new tokens in front of each prompt.

    Exact: the blocks in front get keys of their own, and what followed still follows the same.

    Errors: TraceError unless `num_tokens` is a multiple of the trace's block. Cost: O(blocks).
    """
    block = trace.tokens_per_block
    if num_tokens < 0 or num_tokens % block:
        raise TraceError(f"shift of {trace.name}: expected a multiple of {block} tokens, got {num_tokens}")
    if not num_tokens:
        return trace
    front = num_tokens // block
    counts = np.diff(trace.offsets)
    offsets = offsets_of(counts + front)
    is_own = np.ones(int(offsets[-1]), dtype=np.bool_)
    in_front = offsets[:-1, np.newaxis] + np.arange(front)
    is_own[in_front] = False
    keys = new_ids(is_own.size)
    keys[is_own] = trace.block_keys
    keys[in_front] = trace.num_keys + np.arange(front)
    return replace(
        trace,
        prompt_tokens=trace.prompt_tokens + num_tokens,
        block_keys=keys,
        offsets=offsets,
        num_keys=trace.num_keys + front,
    )
