"""Arena cells of the grid against one piece of memory that is kept page by page and snapshot by snapshot."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache.models import load_model
from ssmcache_sim.formats import read_trace
from ssmcache_sim.grid import UNLIMITED, attention_hits, hybrid_hits, stack_distances
from ssmcache_sim.grid_arena import arena_hits
from ssmcache_sim.grid_cells import arena_capacity, grid_totals
from ssmcache_sim.settings import build_config, make_settings
from ssmcache_sim.trace import Trace

TraceOf = Callable[..., Trace]
# stretches of equal tokens: long shared prefixes that part anywhere
stretches = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 16)), min_size=1, max_size=4)
branching_prompts = st.lists(
    stretches.map(lambda parts: [token for token, length in parts for _ in range(length)]), min_size=1, max_size=30
)


@dataclass
class Arena:
    """A memory of some bytes for both kinds of items; the latest used is in front, the oldest goes.

    An item is (is_snapshot, node), a node is whatever names a block of a path.
    """

    num_bytes: int
    block: int
    interval: int
    page_bytes: int
    snapshot_bytes: int
    items: list[tuple[bool, Hashable]] = field(default_factory=list)

    def size(self, item: tuple[bool, Hashable]) -> int:
        return self.snapshot_bytes if item[0] else self.page_bytes

    def serve(self, nodes: Sequence[Hashable], num_tokens: int) -> tuple[int, int]:
        """(tokens whose KV is there, tokens skipped) of a request."""
        held = set(self.items)
        num_pages = next((index for index, node in enumerate(nodes) if (False, node) not in held), len(nodes))
        attention = min(num_pages, (num_tokens - 1) // self.block) * self.block
        at = {end: nodes[end // self.block - 1] for end in range(self.interval, num_tokens + 1, self.interval)}
        usable = max((end for end, node in at.items() if end <= attention and (True, node) in held), default=0)
        path: list[tuple[bool, Hashable]] = []
        for index, node in enumerate(nodes):
            path.append((False, node))
            end = (index + 1) * self.block
            # a state that is not passed again cannot be taken again
            if end in at and (end > usable or (True, node) in held):
                path.append((True, node))
        protected = set(path)
        used = sum(map(self.size, self.items)) + self.page_bytes + self.snapshot_bytes  # at work: a page, a state
        for item in path:
            if item not in held:
                used = self.make_room(used + self.size(item), protected)
        self.items = path + [item for item in self.items if item not in protected]
        return attention, usable

    def make_room(self, used: int, protected: set[tuple[bool, Hashable]]) -> int:
        while used > self.num_bytes:
            victim = next(item for item in reversed(self.items) if item not in protected)
            self.items.remove(victim)
            used -= self.size(victim)
        return used


def serve_all(arena: Arena, trace: Trace) -> tuple[int, int, int]:
    """Sums: attention, the same down to boundaries, usable."""
    keys = trace.with_block(arena.block)
    hits = np.array([arena.serve(prompt.keys.tolist(), prompt.stop) for prompt in keys.prompts()])
    return int(hits[:, 0].sum()), int((hits[:, 0] // arena.interval * arena.interval).sum()), int(hits[:, 1].sum())


def assert_equals_an_arena(
    trace: Trace, block: int, interval: int, page_bytes: int, snapshot_bytes: int, budgets: Sequence[int]
) -> None:
    distances = stack_distances(trace, [block, interval])
    hits = arena_hits(distances, block, interval, page_bytes, snapshot_bytes, budgets)
    for index, budget in enumerate(budgets):
        memory = budget + page_bytes + snapshot_bytes
        expected = serve_all(Arena(memory, block, interval, page_bytes, snapshot_bytes), trace)
        assert (hits.attention[index], hits.aligned[index], hits.usable[index]) == expected, budget


@settings(max_examples=400, deadline=None)
@given(
    prompts=branching_prompts,
    factor=st.integers(1, 3),
    multiple=st.integers(1, 4),
    page_bytes=st.integers(1, 5),
    snapshot_bytes=st.integers(1, 12),
    more_bytes=st.lists(st.integers(0, 300), min_size=1, max_size=3),
)
def test_every_budget_equals_an_arena_that_drops_the_oldest_until_the_new_fits(
    trace_of: TraceOf,
    prompts: list[list[int]],
    factor: int,
    multiple: int,
    page_bytes: int,
    snapshot_bytes: int,
    more_bytes: list[int],
) -> None:
    block, interval = 2 * factor, 2 * factor * multiple
    longest = max(map(len, prompts))
    least = longest // block * page_bytes + longest // interval * snapshot_bytes
    budgets = [least + more for more in more_bytes]
    assert_equals_an_arena(trace_of(prompts, 2), block, interval, page_bytes, snapshot_bytes, budgets)


@pytest.mark.parametrize(("block", "interval"), [(512, 1024), (512, 2048), (1024, 4096)])
def test_budgets_of_a_real_trace_equal_an_arena(sample_path: Path, block: int, interval: int) -> None:
    trace = read_trace(sample_path)
    longest = int(trace.prompt_tokens.max())
    page_bytes, snapshot_bytes = 3 * block, 5000
    least = longest // block * page_bytes + longest // interval * snapshot_bytes
    budgets = [least, 5 * least]
    assert_equals_an_arena(trace, block, interval, page_bytes, snapshot_bytes, budgets)


def test_a_cell_of_an_arena_has_the_memory_that_the_arena_has(sample_path: Path) -> None:
    trace, model = read_trace(sample_path), load_model("marconi-7b")
    page_bytes, state_bytes = 65_536 * 512, 26_787_840  # published for this model
    cells = []
    for gib in (20, 60):
        setting = make_settings(model, 512, gpu_memory_bytes=gib << 30, ssm_reuse_interval=2048)
        config = build_config(model, setting)
        cells.append((config, arena_capacity(trace, config)))
    assert {(cell.page_bytes, cell.snapshot_bytes) for _, cell in cells} == {(page_bytes, state_bytes)}
    for (config, _), totals in zip(cells, grid_totals(trace, cells), strict=True):
        quota = config.cache_tiers[0].quota
        assert quota is not None
        attention, aligned, usable = serve_all(Arena(quota, 512, 2048, page_bytes, state_bytes), trace)
        assert (totals.attention_hit_tokens, totals.usable_hit_tokens) == (attention, usable)
        assert (totals.lost_alignment_tokens, totals.lost_snapshot_tokens) == (attention - aligned, aligned - usable)


@settings(max_examples=50, deadline=None)
@given(prompts=branching_prompts, multiple=st.integers(1, 3), page_bytes=st.integers(1, 5))
def test_snapshots_of_no_bytes_leave_the_whole_budget_to_pages(
    trace_of: TraceOf, prompts: list[list[int]], multiple: int, page_bytes: int
) -> None:
    interval = 2 * multiple
    distances = stack_distances(trace_of(prompts, 2), [2, interval])
    budgets = [*range(0, 60, 7), UNLIMITED]
    blocks = [budget // page_bytes for budget in budgets]
    hits = arena_hits(distances, 2, interval, page_bytes, 0, budgets)
    assert hits.attention.tolist() == attention_hits(distances, 2, blocks).tolist()
    plane = hybrid_hits(distances, 2, interval, blocks, [UNLIMITED])
    assert hits.aligned.tolist() == hits.usable.tolist() == plane[:, 0].tolist()
