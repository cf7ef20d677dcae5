"""`check_resumable` accepts the families that go on exactly, refuses those that do not, and finds faults of ours."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

from tiny_models import HYBRIDS, tiny_model  # noqa: E402

from ssmcache import GpuCacheTierConfig, HostMemory, KVCacheManager  # noqa: E402
from ssmcache.integrations import transformers_layers, transformers_pools  # noqa: E402
from ssmcache.integrations.transformers import (  # noqa: E402
    HybridRunner,
    NotResumableError,
    cache_config,
    check_resumable,
)

TIERS = [GpuCacheTierConfig(1 << 20)]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", HYBRIDS)
def test_ten_families_of_hybrids_are_resumable(family, dtype):
    result = check_resumable(tiny_model(family, dtype))
    assert result.failures == ()
    assert result.placement_error == 0
    assert result.cut_error < (1e-4 if dtype == torch.float32 else 0.25)
    assert result.cut_share == 1
    assert [name for name, _ in result.control_errors] == ["zeros", "another sequence", "the boundary before"]
    assert all(error > 1 for _, error in result.control_errors)
    if dtype == torch.float32:
        assert result.token_share == 1


def test_a_model_of_states_alone_is_resumable():
    result = check_resumable(tiny_model("mamba2"))
    assert (result.failures, result.placement_error, result.token_share) == ((), 0, 1)
    assert result.cut_error < 1e-4


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_models_without_states_are_resumable(family):
    result = check_resumable(tiny_model(family))
    assert (result.failures, result.placement_error, result.token_share) == ((), 0, 1)
    assert result.cut_error < 1e-4
    assert result.control_errors == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_jamba_is_refused_for_what_it_gets_wrong(dtype):
    result = check_resumable(tiny_model("jamba", dtype))
    assert result.placement_error == 0  # wrong in the same way each time: that test alone would let it pass
    assert [failure.split(":")[0] for failure in result.failures] == ["cut-identical", "which is known of this family"]
    with pytest.raises(
        NotResumableError, match=r"JambaForCausalLM: .*cut-identical.*Mamba-1 scan takes no initial state"
    ):
        result.require()


def test_models_of_mamba_1_alone_are_refused_for_what_they_get_wrong():
    result = check_resumable(tiny_model("falcon_mamba"))
    with pytest.raises(NotResumableError, match=r"cut-identical.*scan takes no initial state"):
        result.require()


def test_a_model_with_a_cache_class_of_its_own_is_refused_with_the_reason():
    model = tiny_model("minimax")
    for call in (check_resumable, lambda model: cache_config(model, tokens_per_block=16, cache_tiers=TIERS)):
        with pytest.raises(NotResumableError, match=r"MiniMaxForCausalLM: .* it has a cache class of its own"):
            call(model)


def test_the_runner_refuses_what_the_check_refuses():
    model = tiny_model("jamba")
    config = cache_config(model, tokens_per_block=16, cache_tiers=TIERS, ssm_reuse_interval=32)
    manager = KVCacheManager(config, HostMemory())
    with pytest.raises(NotResumableError, match="cut-identical"):
        HybridRunner(model, manager, max_tokens=64)


def test_a_model_that_counts_positions_from_zero_again_is_found():
    model = tiny_model("bamba")
    forward = model.forward
    model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    assert any(failure.startswith("cut-identical") for failure in check_resumable(model).failures)


def test_a_model_whose_state_hardly_matters_is_not_taken_on_trust():
    model = tiny_model("qwen3_5")
    for name, parameter in model.named_parameters():
        if name.endswith("linear_attn.out_proj.weight"):
            parameter.data.zero_()
    (failure,) = check_resumable(model).failures
    assert failure.startswith("controls: a state that is wrong (zeros, another sequence, the boundary before)")


def is_misplaced(model):
    return any(failure.startswith("placement-identical") for failure in check_resumable(model).failures)


def test_a_state_that_is_not_restored_is_found(monkeypatch):
    layer = transformers_layers.SlotStateLayer
    bind = layer.bind_states

    def bind_copies(self, convs, recurrents, has_state):
        bind(self, convs, [state.clone() for state in recurrents], has_state)

    monkeypatch.setattr(layer, "bind_states", bind_copies)
    assert is_misplaced(tiny_model("bamba"))


@pytest.mark.parametrize("call", ["gather", "write"])
def test_kv_that_is_not_moved_is_found(monkeypatch, call):
    monkeypatch.setattr(transformers_pools.ModelPools, call, lambda *_: None)
    assert is_misplaced(tiny_model("bamba"))


def test_pages_in_the_wrong_order_are_found(monkeypatch):
    gather = transformers_pools.ModelPools.gather

    def gather_backwards(self, tables, into):
        gather(self, [table if table is None else table[::-1] for table in tables], into)

    monkeypatch.setattr(transformers_pools.ModelPools, "gather", gather_backwards)
    assert is_misplaced(tiny_model("olmo_hybrid"))


def test_a_bound_of_ones_own_is_hard():
    model = tiny_model("qwen3_5")
    error = check_resumable(model).cut_error
    assert error > 0
    assert any("cut-identical" in failure for failure in check_resumable(model, bound=error / 2).failures)
    assert check_resumable(model, bound=error * 2).is_resumable
