"""Tiny hybrids over real GPU memory: what is reused has the logits of what is computed, bit for bit.

PYTHONPATH=.:sim python -m pytest tests/gpu/test_transformers_gpu.py -m gpu -q

Without flash-linear-attention the families run on transformers' own functions.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

from tiny_models import HYBRIDS, VOCABULARY, tiny_model  # noqa: E402

from ssmcache import GpuCacheTierConfig, HostCacheTierConfig, KVCacheManager  # noqa: E402
from ssmcache.integrations.transformers import cache_config, check_resumable  # noqa: E402
from ssmcache.integrations.transformers_runner import SequenceRunner  # noqa: E402
from ssmcache.integrations.transformers_shapes import probe  # noqa: E402
from ssmcache.memory.cuda import CudaMemory  # noqa: E402

MIB = 1 << 20
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", HYBRIDS)
def test_families_of_hybrids_are_resumable_on_a_gpu(family, dtype):
    result = check_resumable(tiny_model(family, dtype).cuda())
    assert result.placement_error == 0
    assert not [failure for failure in result.failures if failure.startswith("placement-identical")]
    assert result.cut_error < (1e-2 if dtype == torch.float32 else 5)
    assert all(error > 0.5 for _, error in result.control_errors)


@pytest.mark.parametrize("family", ["qwen3_5", "falcon_h1", "kimi_linear"])
def test_what_came_back_from_pinned_memory_has_the_same_logits(family):
    model = tiny_model(family, torch.bfloat16).cuda()
    tiers = [GpuCacheTierConfig(8 * MIB), HostCacheTierConfig(64 * MIB)]
    config = cache_config(model, tokens_per_block=16, cache_tiers=tiers, ssm_reuse_interval=64)
    memory = CudaMemory()
    manager = KVCacheManager(config, memory)
    for group in manager.groups:
        memory.view(group.pool).fill_(0xFF)
    runner = SequenceRunner(model, manager, probe(model), max_tokens=2048)
    prompts = np.random.default_rng(0).integers(3, VOCABULARY, (40, 1000))
    cuts = range(64, 1000, 64)
    expected = runner.prefill(prompts[0], reuse=False, cuts=cuts)
    tokens = runner.decode(expected, 8)
    for prompt in prompts:
        runner.close(runner.prefill(prompt, cuts=cuts))
    run = runner.prefill(prompts[0], cuts=cuts)
    assert run.num_reused_tokens >= 960
    assert manager.stats().usable_tokens_by_tier[1] > 0
    assert runner.decode(run, 8) == tokens
    assert torch.equal(run.logits, expected.logits)
    runner.close(run)
    runner.close(expected)
    manager.check()
    manager.shutdown()
