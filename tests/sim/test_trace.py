"""Block sizes and ceilings against a brute force over the tokens themselves, which knows nothing of ids."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.trace import Trace

pytestmark = pytest.mark.usefixtures("wherever_ids_lie")

TraceOf = Callable[..., Trace]
Prompts = list[list[int]]


@st.composite
def prompt_lists(draw: st.DrawFn) -> Prompts:
    """Prompts that extend, cut or repeat earlier ones, as conversations do."""
    prompts: Prompts = []
    for _ in range(draw(st.integers(1, 12))):
        base = draw(st.sampled_from(prompts)) if prompts and draw(st.booleans()) else []
        kept = base[: draw(st.integers(0, len(base)))]
        prompts.append(kept + draw(st.lists(st.integers(0, 1), min_size=0 if kept else 1, max_size=20)))
    return prompts


def brute_force_ceilings(prompts: Prompts, block: int, interval: int | None) -> list[int]:
    """Longest prefix in full blocks that an earlier prompt has in full blocks too, one token left to compute."""
    known: set[tuple[int, ...]] = set()
    hits = []
    for prompt in prompts:
        ends = range(block, len(prompt) + 1, block)
        usable = [end for end in ends if end < len(prompt) and tuple(prompt[:end]) in known]
        step = interval or block
        hits.append(max(usable, default=0) // step * step)
        known.update(tuple(prompt[:end]) for end in ends)
    return hits


@settings(max_examples=150, deadline=None)
@given(prompts=prompt_lists(), block=st.sampled_from([1, 2, 3, 4]), multiple=st.integers(1, 4), full_only=st.booleans())
def test_ceilings_equal_a_brute_force_over_tokens_at_native_and_coarser_blocks(
    trace_of: TraceOf, prompts: Prompts, block: int, multiple: int, full_only: bool
) -> None:
    trace = trace_of(prompts, block, full_only)
    coarse = trace.with_block(block * multiple)
    assert infinite_cache(trace, None).tokens.tolist() == brute_force_ceilings(prompts, block, None)
    assert infinite_cache(coarse, None).tokens.tolist() == brute_force_ceilings(prompts, block * multiple, None)
    at_interval = infinite_cache(trace, block * multiple)
    assert at_interval.tokens.tolist() == brute_force_ceilings(prompts, block, block * multiple)
    assert at_interval.kv_tokens.tolist() == brute_force_ceilings(prompts, block, None)


@settings(max_examples=100, deadline=None)
@given(prompts=prompt_lists(), block=st.sampled_from([2, 3]), multiples=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_coarsening_in_two_steps_is_coarsening_at_once(
    trace_of: TraceOf, prompts: Prompts, block: int, multiples: tuple[int, int]
) -> None:
    trace = trace_of(prompts, block)
    first, second = multiples
    in_steps = trace.with_block(block * first).with_block(block * first * second)
    at_once = trace.with_block(block * first * second)
    assert np.array_equal(in_steps.block_keys, at_once.block_keys)
    assert np.array_equal(in_steps.offsets, at_once.offsets)
    assert np.array_equal(in_steps.partial_ids, at_once.partial_ids)


@settings(max_examples=100, deadline=None)
@given(prompts=prompt_lists())
def test_an_expansion_lies_between_what_is_recorded_and_what_finer_blocks_would_share(
    trace_of: TraceOf, prompts: Prompts
) -> None:
    trace = trace_of(prompts, 4)
    for factor in (2, 4):
        small = 4 // factor
        expanded = trace.expanded(factor)
        hits = infinite_cache(expanded, None).tokens
        assert (hits <= brute_force_ceilings(prompts, small, None)).all()
        assert (hits >= infinite_cache(trace, None).tokens).all()
        assert [len(prompt.keys) for prompt in expanded.prompts()] == [len(prompt) // small for prompt in prompts]


def test_an_expansion_names_the_parts_of_each_recorded_block_also_of_the_partial_one(trace_of: TraceOf) -> None:
    trace = trace_of([[1] * 11, [1] * 8 + [2]], 4)
    (first_a, first_b), partial_a = trace.prompt(0).keys.tolist(), int(trace.partial_ids[0])
    expanded = trace.expanded(2)
    assert expanded.tokens_per_block == 2
    assert expanded.prompt(0).keys.tolist() == [
        2 * first_a,
        2 * first_a + 1,
        2 * first_b,
        2 * first_b + 1,
        2 * partial_a,
    ]
    assert expanded.partial_ids.tolist() == [2 * partial_a + 1, 2 * int(trace.partial_ids[1])]
    assert expanded.label == f"{trace.name} (blocks split in 2: a lower bound)"


def test_finer_or_odd_blocks_are_refused(trace_of: TraceOf) -> None:
    trace = trace_of([[1] * 11], 4)
    for block in (2, 6, 0, -4):
        with pytest.raises(TraceError, match="expected a multiple of the 4 tokens a block"):
            trace.with_block(block)
    with pytest.raises(TraceError, match="expected a divisor of 4"):
        trace.expanded(3)
    with pytest.raises(TraceError, match="expected ids of partial blocks, request 0 has none"):
        trace_of([[1] * 11], 4, full_only=True).expanded(2)


def test_arrays_cannot_be_written(trace_of: TraceOf) -> None:
    trace = trace_of([[1] * 11], 4)
    with pytest.raises(ValueError, match="read-only"):
        trace.block_keys[0] = 5


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["mooncake_conversation.jsonl.gz", "exgentic_tau2_retail_blk16.jsonl.xz", "sharegpt_derived_blk16.jsonl.xz"]
)
def test_ceilings_equal_the_published_ones_to_the_token(shared_traces: Path, name: str) -> None:
    files: Sequence[dict[str, object]] = json.loads((shared_traces / "expected_infinite_cache.json").read_text())
    (published,) = (entry for entry in files if entry["file"] == name)
    trace = read_trace(shared_traces / name)
    assert trace.sha256 == published["uncompressed_sha256"]
    assert trace.num_requests == published["requests"]
    for expected in published["infinite_cache"]:  # type: ignore[attr-defined]
        coarse = trace.with_block(expected["block"])
        assert infinite_cache(coarse, None).tokens.sum() == expected["usable_hit_tokens"]
        for interval, rate in expected["interval_token_hit"].items():
            tokens = infinite_cache(coarse, int(interval)).tokens.sum()
            assert round(tokens / coarse.prompt_tokens.sum(), 6) == rate
