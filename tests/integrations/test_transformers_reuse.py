"""What is reused has the logits of what is computed, bit for bit, on ten families of hybrids, whatever happened to the
pages and states in between.

The runner without reuse, in memory of its own, is the oracle here; test_transformers_check.py compares with the models
alone.
"""

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

from small_runners import CUTS, PROMPT_TOKENS, REUSED, Small, prompt, small_runner  # noqa: E402
from tiny_models import HYBRIDS, tiny_model  # noqa: E402

from ssmcache import ReuseScope  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)
PAGES, STATES = 7, 4  # of one prompt: 100 tokens in blocks of 16; snapshots at 32, 64, 96 and the live state


@pytest.fixture(scope="module", params=[(family, dtype) for family in HYBRIDS for dtype in DTYPES], ids=str)
def model(request: pytest.FixtureRequest) -> Iterator[object]:
    return tiny_model(*request.param)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first, second) and bool(torch.isfinite(first).all())


def finish(small: Small) -> None:
    assert not small.manager.open_sequences
    small.manager.check()
    small.manager.shutdown()


def test_what_is_reused_has_the_logits_of_what_is_computed(model):
    small = small_runner(model, 4 * PAGES, 4 * STATES)
    _, expected = small.all_logits(prompt(1), reuse=False)
    assert small.all_logits(prompt(1))[0] == 0
    small.all_logits(prompt(2))
    reused, logits = small.all_logits(prompt(1))
    assert reused == REUSED
    assert same(logits, expected[REUSED:])
    finish(small)


def test_what_came_back_from_the_host_tier_has_the_same_logits(model):
    small = small_runner(model, PAGES + 1, STATES + 1, host_factor=4)
    _, expected = small.all_logits(prompt(1), reuse=False)
    for seed in (1, 2):
        small.all_logits(prompt(seed))
    reused, logits = small.all_logits(prompt(1))
    assert reused == REUSED
    assert same(logits, expected[REUSED:])
    assert small.manager.stats().usable_tokens_by_tier[1] > 0
    finish(small)


def test_a_prompt_that_was_evicted_in_part_is_computed_from_what_is_left(model):
    small = small_runner(model, PAGES + 4, STATES + 2)
    _, expected = small.all_logits(prompt(1), reuse=False)
    for seed in (1, 2):
        small.all_logits(prompt(seed))
    assert small.manager.stats().snapshots_evicted > 0
    reused, logits = small.all_logits(prompt(1))
    assert reused < REUSED
    assert same(logits, expected[reused:])
    finish(small)


def test_a_scope_reuses_nothing_of_another(model):
    small = small_runner(model, 4 * PAGES, 4 * STATES)
    _, expected = small.all_logits(prompt(1), reuse=False)
    small.all_logits(prompt(1), scope=ReuseScope(lora_id=1))
    reused, logits = small.all_logits(prompt(1), scope=ReuseScope(lora_id=2))
    assert reused == 0
    assert same(logits, expected)
    assert small.all_logits(prompt(1), scope=ReuseScope(lora_id=1))[0] == REUSED
    finish(small)


def test_sequences_that_take_turns_decode_as_if_each_were_alone(model):
    small = small_runner(model, 6 * PAGES, 6 * STATES)
    runner = small.runner
    prompts = [prompt(1), prompt(1)[:70], prompt(2)]
    alone = []
    for tokens in prompts:
        run = runner.prefill(tokens, reuse=False, cuts=CUTS)
        alone.append((runner.decode(run, 12), run.logits))
        runner.close(run)
    runs = [runner.prefill(tokens) for tokens in prompts]
    assert [run.num_reused_tokens for run in runs] == [0, 64, 0]
    decoded: list[list[int]] = [[], [], []]
    for _ in range(3):
        for tokens, run in zip(decoded, runs, strict=True):
            tokens += runner.decode(run, 4)
    for run, tokens, (expected, logits) in zip(runs, decoded, alone, strict=True):
        assert tokens == expected
        assert same(run.logits, logits)
        runner.close(run)
    finish(small)


def test_kv_that_another_prompt_left_beyond_the_snapshot_is_equal_up_to_rounding(model):
    small = small_runner(model, 6 * PAGES, 6 * STATES)
    runner, short = small.runner, prompt(1)[:60]
    expected = runner.prefill(short, reuse=False, cuts=CUTS)
    others = [runner.prefill(prompt(1)), runner.prefill(prompt(2))]
    run = runner.prefill(short)  # tokens 32..47 have KV of a pass with another end, which is kept
    assert (run.num_reused_tokens, run.kv.num_attention_tokens) == (32, 48)
    assert same(run.logits, expected.logits)
    first = runner.decode(expected, 1)
    runner.decode(others[1], 1)
    assert runner.decode(run, 1) == first  # reads that KV now
    bound = 1e-3 if run.logits.dtype == torch.float32 else 0.25
    assert (run.logits - expected.logits).abs().max() < bound
    for sequence in (run, expected, *others):
        runner.close(sequence)
    finish(small)


def test_a_suspended_sequence_goes_on_from_the_host_tier(model):
    small = small_runner(model, PAGES + 3, STATES + 1, host_factor=6)
    runner = small.runner
    expected = runner.prefill(prompt(1), reuse=False, cuts=CUTS)
    tokens = runner.decode(expected, 24)
    run = runner.prefill(prompt(1))
    decoded = runner.decode(run, 12)
    runner.suspend(run)
    small.all_logits(prompt(2))
    assert any(moved.source_tier == "gpu" and moved.tier == "host" for moved in small.manager.stats().transfers)
    decoded += runner.decode(run, 12)
    assert run.is_cached
    assert decoded == tokens
    assert same(run.logits, expected.logits)
    runner.close(run)
    runner.close(expected)
    finish(small)


def test_without_room_it_runs_without_reuse_and_says_why(model):
    small = small_runner(model, PAGES - 2, STATES)
    expected = small.runner.prefill(prompt(1), reuse=False, cuts=CUTS)
    run = small.runner.prefill(prompt(1))
    assert not run.is_cached
    assert run.shortage is not None
    assert (run.shortage.reason, run.shortage.needed) == ("slots", PAGES)
    assert same(run.logits, expected.logits)
    assert small.runner.decode(run, 4) == small.runner.decode(expected, 4)
    small.runner.close(run)
    small.runner.close(expected)
    finish(small)


def test_a_sequence_that_outgrows_the_cache_leaves_it_and_goes_on(model):
    small = small_runner(model, PAGES + 1, STATES + 1)
    expected = small.runner.prefill(prompt(1), reuse=False, cuts=CUTS)
    tokens = small.runner.decode(expected, 40)
    run = small.runner.prefill(prompt(1))
    assert run.is_cached
    assert small.runner.decode(run, 40) == tokens
    assert not run.is_cached
    assert run.shortage is not None
    assert same(run.logits, expected.logits)
    assert run.num_tokens == PROMPT_TOKENS + 40
    small.runner.close(run)
    small.runner.close(expected)
    finish(small)
