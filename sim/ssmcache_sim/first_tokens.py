"""Times a real model to its first token, for `ssmcache doctor --calibrate`. Needs torch and transformers."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from os import sysconf
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ssmcache.config import BatchDesc, GpuCacheTierConfig, KVCacheDesc
from ssmcache.integrations.transformers import cache_config
from ssmcache.integrations.transformers_memory import manager_with_room
from ssmcache.integrations.transformers_runner import SequenceRunner
from ssmcache.integrations.transformers_sequence import Prefilled
from ssmcache.integrations.transformers_shapes import probe
from ssmcache.models import ModelSpec
from ssmcache_sim.calibration import Calibration, FirstTokenTime
from ssmcache_sim.cost import prefill_cost
from ssmcache_sim.device_profile import H100, calibrated
from ssmcache_sim.prefill_fit import fit_calibration, relative_errors
from ssmcache_sim.trace import Float64Array

BLOCK_TOKENS = 32
POINTS_PER_PROMPT = 16  # places of the longest prompt at which snapshots are kept
_NEW = (256, 64, 16, 4, 2)  # the longest prompt by these
_CACHED = (None, 4, 2)
_WARM_UPS, REPEATS = 2, 5


def load_config(path: str) -> Any:
    """The config.json of a file or a directory, as transformers reads it. Errors: OSError, ValueError."""
    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def random_model(config: Any, device: str, dtype: torch.dtype) -> Any:
    """A model with random weights, made on the device, in evaluation mode.

    Errors: MemoryError where the host has too little, OutOfMemoryError of torch where the GPU has.
    """
    with torch.device("meta"):
        num_parameters = count_parameters(AutoModelForCausalLM.from_config(config, dtype=dtype))
    needed = num_parameters * dtype.itemsize
    free = sysconf("SC_AVPHYS_PAGES") * sysconf("SC_PAGE_SIZE")
    if device == "cpu" and needed > free:
        raise MemoryError(f"expected {needed / 1e9:.1f} GB of free memory for its weights, got {free / 1e9:.1f} GB")
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def count_parameters(model: Any) -> int:
    """Those that a token is multiplied with: without the embeddings of its input."""
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embedding
    total = sum(int(parameter.numel()) for parameter in model.parameters())
    return total - (0 if tied else int(embedding.numel()))


def first_token(
    runner: SequenceRunner, prompt: Any, *, reuse: bool, cuts: Iterable[int] = ()
) -> tuple[Prefilled, float]:
    """The open sequence, and seconds from the call to its first token on the host; the device is idle before."""
    if runner.model.device.type == "cuda":
        torch.cuda.synchronize(runner.model.device)
    start = time.perf_counter()
    run = runner.prefill(prompt, reuse=reuse, cuts=cuts)
    assert run.logits is not None
    int(run.logits.argmax())
    return run, time.perf_counter() - start


def calibrate_model(
    model: Any, spec: ModelSpec, longest: int, progress: Callable[[float], None]
) -> tuple[Calibration, Float64Array]:
    """What `measure` found, fitted, and the relative errors of the cost model there.

    Args:
        spec: of the same config, for the operations of a token.
    """
    times = list(measure(model, longest, progress))
    num_parameters = count_parameters(model)
    cost = prefill_cost(spec, billion_parameters=num_parameters / 1e9)
    found = fit_calibration(cost, spec.name, str(model.dtype).removeprefix("torch."), num_parameters, times)
    return found, relative_errors(cost, calibrated(H100, found), times)


def measure(model: Any, longest: int, progress: Callable[[float], None]) -> Iterator[FirstTokenTime]:
    """Medians of prefills in one pass: short and long ones, behind nothing, a quarter and half of the longest prompt.

    All cases take turns. What they skip is in the cache, with a snapshot.

    Args:
        longest: tokens of a prompt, a multiple of 512.
        progress: called with the share done, 0 to 1.
    """
    cases = [(0 if part is None else longest // part, longest // each) for part in _CACHED for each in _NEW]
    cases.append((0, longest))
    rng = np.random.default_rng(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prefix = rng.integers(0, vocabulary, longest // 2)
    seconds: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    with _runner(model, longest) as runner:
        for repeat in range(_WARM_UPS + REPEATS):
            for number, (cached, new) in enumerate(cases):
                prompt = np.concatenate((prefix[:cached], rng.integers(0, vocabulary, new)))
                if cached:  # also makes it the last one that would go
                    runner.close(runner.prefill(prefix[: cached + 1], cuts=(cached,)))
                run, took = first_token(runner, prompt, reuse=cached > 0)
                assert run.num_reused_tokens == cached, run.shortage
                runner.close(run)
                if repeat >= _WARM_UPS:
                    seconds[cached, new].append(took)
                progress((repeat + (number + 1) / len(cases)) / (_WARM_UPS + REPEATS))
    for (cached, new), found in seconds.items():
        median = statistics.median(found)
        yield FirstTokenTime(cached, new, median, (max(found) - min(found)) / median)


@contextmanager
def _runner(model: Any, longest: int) -> Iterator[SequenceRunner]:
    """Over a cache for the prefix and two more prompts, with their snapshots."""
    snapshots = (KVCacheDesc(BLOCK_TOKENS),) * (POINTS_PER_PROMPT + 4)
    room = BatchDesc((KVCacheDesc(longest + BLOCK_TOKENS),) * 3 + snapshots)

    def config(quota: int) -> Any:
        return cache_config(
            model,
            tokens_per_block=BLOCK_TOKENS,
            cache_tiers=[GpuCacheTierConfig(quota)],
            ssm_reuse_interval=longest // POINTS_PER_PROMPT,
            typical_step=room,
        )

    with manager_with_room(model, room, 1.1, config) as manager, torch.no_grad():
        yield SequenceRunner(model, manager, probe(model), max_tokens=longest + BLOCK_TOKENS)
