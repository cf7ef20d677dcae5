"""What a runner does with lengths, windows, decoded tokens, errors and managers that do not fit."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

from small_runners import BLOCK, CUTS, INTERVAL, MAX_TOKENS, prompt, small_runner  # noqa: E402
from tiny_models import tiny_model  # noqa: E402

from ssmcache import GpuCacheTierConfig, HostMemory, KVCacheManager, SimulatedMemory  # noqa: E402
from ssmcache.integrations.transformers import HybridRunner, cache_config, check_resumable  # noqa: E402
from ssmcache.integrations.transformers_attention import lower_right  # noqa: E402
from ssmcache.integrations.transformers_cache import cache_argument, check_version  # noqa: E402
from ssmcache.integrations.transformers_runner import SequenceRunner  # noqa: E402
from ssmcache.integrations.transformers_shapes import probe  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3_5")


def manager_of(model, memory=None, **settings):
    tiers = [GpuCacheTierConfig(1 << 20)]
    config = cache_config(model, tokens_per_block=BLOCK, cache_tiers=tiers, ssm_reuse_interval=INTERVAL, **settings)
    return KVCacheManager(config, memory or HostMemory())


# -- requests --------------------------------------------------------------------------------------------------------


def test_a_conversation_reuses_its_prompts_and_with_commit_decoded_its_answers(model):
    for commit_decoded, expected in ((False, [0, 64, 96]), (True, [0, 96, 128])):
        runner = small_runner(model, 40, 20, commit_decoded=commit_decoded).runner
        tokens, reused = prompt(1, 80).tolist(), []
        for turn in range(3):
            run = runner.prefill(tokens)
            reused.append(run.num_reused_tokens)
            tokens = [*run.tokens.tolist(), *runner.decode(run, 24), *prompt(10 + turn, 8).tolist()]
            runner.close(run)
        assert reused == expected


def test_decoded_tokens_are_those_of_the_most_likely_logits_one_by_one(model):
    runner = small_runner(model, 40, 20).runner
    run = runner.prefill(prompt(1))
    expected, tokens = [], prompt(1)
    for _ in range(6):
        with torch.inference_mode():
            logits = model(input_ids=torch.as_tensor(tokens)[None], use_cache=False).logits[0, -1]
        expected.append(int(logits.argmax()))
        tokens = [*tokens, expected[-1]]
    assert runner.decode(run, 6) == expected
    assert run.tokens.tolist() == tokens
    assert (run.logits - model(input_ids=torch.as_tensor(tokens)[None]).logits[0, -1]).abs().max() < 1e-3


def test_tokens_may_be_a_list_an_array_or_a_tensor(model):
    runner = small_runner(model, 40, 20).runner
    logits = [
        runner.prefill(form, reuse=False).logits for form in (prompt(1).tolist(), prompt(1), torch.tensor(prompt(1)))
    ]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_a_prompt_of_one_token_and_one_that_ends_on_a_snapshot(model):
    small = small_runner(model, 40, 20)
    assert small.all_logits([5])[1].shape[0] == 1
    assert small.all_logits(prompt(1, INTERVAL))[0] == 0
    assert small.all_logits(prompt(1, INTERVAL))[0] == 0  # its last token must be computed
    assert small.all_logits(prompt(1, INTERVAL + 1))[0] == INTERVAL


def test_reuse_false_neither_reads_nor_writes_the_cache(model):
    small = small_runner(model, 40, 20)
    small.all_logits(prompt(1), reuse=False)
    assert small.all_logits(prompt(1), reuse=True)[0] == 0
    before = small.manager.stats()
    assert small.all_logits(prompt(1), reuse=False)[0] == 0
    assert small.manager.stats() == before


def test_pages_of_others_are_not_written_again(model):
    small = small_runner(model, 40, 20)
    runner = small.runner
    first = runner.prefill(prompt(1))
    run = runner.open(prompt(1)[:60])
    assert (run.num_reused_tokens, run.kv.num_attention_tokens) == (32, 48)
    shared = run.kv.page_indices(0)[2]  # tokens 32..47, which are computed again
    assert shared == first.kv.page_indices(0)[2]
    small.manager.memory.view(0)[shared] = 0x77
    runner.extend(run, prompt(1)[32:60])
    assert (small.manager.memory.view(0)[shared] == 0x77).all()
    runner.close(run)
    runner.close(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_give_up_their_pages_and_decode_the_same(dtype):
    windowed = tiny_model("gemma3", dtype)
    small = small_runner(windowed, 60, 1)
    runner = small.runner
    expected = runner.prefill(prompt(1), reuse=False, cuts=CUTS)
    tokens = runner.decode(expected, 30)
    for _ in range(2):
        run, other = runner.prefill(prompt(1), cuts=CUTS), runner.prefill(prompt(2))
        decoded = runner.decode(run, 15)
        runner.decode(other, 2)
        assert decoded + runner.decode(run, 15) == tokens
        (window_group,) = [index for index, group in enumerate(small.manager.groups) if group.window_size]
        table = run.kv.page_indices(window_group)
        assert (table[: (130 - 24) // BLOCK] == -1).all()
        assert (table[-2:] >= 0).all()
        runner.close(run)
        runner.close(other)
    small.manager.check()


def test_the_pools_may_move_between_requests(model):
    small = small_runner(model, 28, 16)
    _, expected = small.all_logits(prompt(1), reuse=False)
    small.all_logits(prompt(1))
    quota = small.manager.quotas[0]
    for new in (quota * 2, quota):
        assert small.manager.resize_tier(0, new)
        reused, logits = small.all_logits(prompt(1))
        assert reused == 96
        assert torch.equal(logits, expected[reused:])


def test_a_suspended_sequence_that_finds_no_room_computes_again(model):
    small = small_runner(model, 9, 5, host_factor=4)
    runner = small.runner
    expected = runner.prefill(prompt(1), reuse=False, cuts=CUTS)
    tokens = runner.decode(expected, 12)
    run = runner.prefill(prompt(1))
    decoded = runner.decode(run, 6)
    runner.suspend(run)
    other = runner.prefill(prompt(2))  # ACTIVE, so it holds what it has
    assert other.is_cached
    decoded += runner.decode(run, 6)
    assert not run.is_cached
    assert run.shortage is not None
    assert (run.num_tokens, run.num_reused_tokens) == (112, 0)
    assert decoded == tokens
    assert torch.equal(run.logits, expected.logits)
    runner.close(run)
    runner.close(other)
    small.manager.check()


def test_if_the_model_raises_the_sequence_is_closed_and_the_cache_is_whole(model, monkeypatch):
    small = small_runner(model, 40, 20)
    _, expected = small.all_logits(prompt(1), reuse=False)
    small.all_logits(prompt(1))
    layer = model.model.layers[-1]
    with monkeypatch.context() as patch:
        patch.setattr(layer.mlp, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small.runner.prefill(prompt(1))
    assert not small.manager.open_sequences
    small.manager.check()
    reused, logits = small.all_logits(prompt(1))
    assert torch.equal(logits, expected[reused:])


def test_the_model_keeps_its_own_attention_and_may_be_used_alone(model):
    before = model.config._attn_implementation
    runner = small_runner(model, 40, 20).runner
    runner.prefill(prompt(1))
    assert model.config._attn_implementation == before == "sdpa"
    assert check_resumable(model, attention="model").is_resumable


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], r"tokens: expected 1\.\.256 \(max_tokens\), got 0"),
        (range(MAX_TOKENS + 1), r"tokens: expected 1\.\.256 \(max_tokens\), got 257"),
        ([0.5], "tokens: expected ids in one dimension, got float64"),
        ([[1, 2]], r"tokens: expected ids in one dimension, got int64 of shape \(1, 2\)"),
    ],
)
def test_bad_prompts_are_refused_and_nothing_stays_open(model, tokens, message):
    small = small_runner(model, 40, 20)
    with pytest.raises(ValueError, match=message):
        small.runner.prefill(tokens)
    assert not small.manager.open_sequences


def test_decoding_beyond_max_tokens_or_after_the_end_is_refused(model):
    runner = small_runner(model, 40, 20).runner
    run = runner.prefill(prompt(1, MAX_TOKENS))
    with pytest.raises(ValueError, match="got 257"):
        runner.decode(run, 1)
    assert run.is_cached
    runner.close(run)
    runner.close(run)
    with pytest.raises(ValueError, match="decode: expected a sequence with logits"):
        runner.decode(run, 1)
    with pytest.raises(ValueError, match="extend: expected an open sequence"):
        runner.extend(run, [1])


def test_managers_that_do_not_fit_are_refused(model):
    shapes = probe(model)
    with pytest.raises(ValueError, match="expected the layers that cache_config gives for this model"):
        SequenceRunner(model, manager_of(tiny_model("bamba")), shapes, max_tokens=64)
    with pytest.raises(ValueError, match="expected a memory with bytes"):
        SequenceRunner(model, manager_of(model, SimulatedMemory()), shapes, max_tokens=64)
    with pytest.raises(ValueError, match="max_tokens: expected a positive integer, got 0"):
        SequenceRunner(model, manager_of(model), shapes, max_tokens=0)


def test_a_model_in_training_is_refused():
    model = tiny_model("lfm2").train()
    with pytest.raises(ValueError, match="model: expected one in evaluation mode"):
        HybridRunner(model, manager_of(model), max_tokens=64)


@pytest.mark.parametrize("version", ["4.57.1", "5.16.2"])
def test_older_versions_of_transformers_are_refused(version):
    with pytest.raises(ImportError, match=rf"expected transformers >= 5\.17, got {version}"):
        check_version(version)


@pytest.mark.parametrize("version", ["5.17.0", "5.23.0.dev0", "6.0"])
def test_newer_versions_of_transformers_are_not(version):
    check_version(version)


def test_the_cache_goes_by_the_name_that_the_model_has_for_it(model):
    class Newer:
        def forward(self, input_ids, cache=None): ...

    class Older:
        def forward(self, input_ids, past_key_values=None): ...

    class Mamba:
        def forward(self, input_ids, cache_params=None): ...

    names = [cache_argument(one) for one in (Newer(), Older(), Mamba())]
    assert names == ["cache", "past_key_values", "cache_params"]
    assert cache_argument(model) in inspect.signature(model.forward).parameters


def test_the_core_does_not_import_it():
    script = "import sys, ssmcache; assert not {'torch', 'transformers', 'ssmcache.integrations'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


# -- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (7, 7), (4, 11)])
@pytest.mark.parametrize(("key_width", "value_width"), [(8, 8), (12, 6)])
def test_lower_right_is_causal_attention_of_the_last_tokens(window, queries, keys, key_width, value_width):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, queries, key_width, generator=generator)
    key = torch.randn(1, 2, keys, key_width, generator=generator)
    value = torch.randn(1, 2, keys, value_width, generator=generator)
    expected = torch.empty(1, queries, 4, value_width)
    for head in range(4):
        for index in range(queries):
            last = keys - queries + index
            first = 0 if window is None else max(0, last - window + 1)
            scores = key[0, head // 2, first : last + 1] @ query[0, head, index] * 0.3
            expected[0, index, head] = scores.softmax(0) @ value[0, head // 2, first : last + 1]
    out, weights = lower_right(torch.nn.Identity(), query, key, value, None, scaling=0.3, sliding_window=window)
    assert weights is None
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "what"), [({"softcap": 30.0}, "softcap"), ({"s_aux": 1}, "s_aux"), ({"dropout": 0.1}, "dropout")]
)
def test_attention_that_is_not_plain_is_refused(settings, what):
    tensor = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match=f"expected plain causal attention, got {what}: use attention='model'"):
        lower_right(torch.nn.Identity(), tensor, tensor, tensor, None, **settings)


def test_padding_is_refused():
    tensor = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="got a mask"):
        lower_right(torch.nn.Identity(), tensor, tensor, tensor, torch.zeros(1, 1, 1, 1))
