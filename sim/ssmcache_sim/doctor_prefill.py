"""`ssmcache doctor --calibrate`: how fast this machine prefills a model, as numbers of the cost model.

The model has the shape of a config.json and random weights, and runs as `ssmcache.integrations.transformers` runs it:
eager, one sequence at a time. An engine that compiles and batches is faster than these numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ssmcache.models import ModelSpec, load_model
from ssmcache_sim.cost import prefill_cost
from ssmcache_sim.diagnosis import Diagnosis, one_line
from ssmcache_sim.errors import SettingsError

TOKENS_STEP = 512
_WHAT = "time to the first token"


@dataclass(frozen=True, slots=True)
class CalibrationTask:
    """A model to calibrate with.

    Attributes:
        config: of transformers.
        longest: tokens of the longest prompt.
    """

    spec: ModelSpec
    config: Any
    longest: int
    first_tokens: Any


def calibration_task(model: str, longest: int) -> CalibrationTask:
    """What is asked for, checked as far as it can be without a model.

    Args:
        model: a config.json, or its directory.
        longest: a positive multiple of 512.

    Errors: SettingsError; ModelError for a config that the cost model cannot read.
    """
    if longest < TOKENS_STEP or longest % TOKENS_STEP:
        raise SettingsError(f"--calibrate-tokens: expected a positive multiple of {TOKENS_STEP}, got {longest:,}")
    spec = load_model(model)
    expected = "--calibrate: expected a config.json, or its directory, that transformers reads"
    if not Path(model).exists():
        raise SettingsError(f"{expected}, got the name {model!r}")
    try:
        first_tokens = import_module("ssmcache_sim.first_tokens")
    except ImportError as error:
        raise SettingsError(
            f"--calibrate: expected torch and transformers (extra transformers), got {error}"
        ) from error
    try:
        config = first_tokens.load_config(model)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{expected}, got {model}: {one_line(error)}") from error
    prefill_cost(spec, billion_parameters=1)  # its heads are known
    return CalibrationTask(spec, config, longest, first_tokens)


def calibrate(diagnosis: Diagnosis, task: CalibrationTask, device_index: int, progress: Callable[[int], None]) -> None:
    """Measures and fits, on a CUDA device in bfloat16, or in float32 on the CPU where there is none.

    Args:
        progress: called now and then with the percentage done.

    What fails is a line of the diagnosis. Cost: on a GPU a minute or more, most of it for compiling kernels.
    """
    with diagnosis.measuring(f"{_WHAT} of {task.spec.name}"):
        torch = import_module("torch")
        on_gpu = diagnosis.device is not None
        dtype = torch.bfloat16 if on_gpu else torch.float32
        model = task.first_tokens.random_model(task.config, f"cuda:{device_index}" if on_gpu else "cpu", dtype)
        found, errors = task.first_tokens.calibrate_model(
            model, task.spec, task.longest, lambda share: progress(round(100 * share))
        )
        errors = np.abs(errors)
        diagnosis.calibration = found
        diagnosis.notes.append(
            f"{_WHAT.capitalize()}: {task.spec.name}, {found.num_parameters / 1e9:.3g} B parameters in {found.dtype} "
            f"with random weights on {'the GPU' if on_gpu else 'the CPU'}, eager, one sequence; medians of "
            f"{task.first_tokens.REPEATS} runs; fitted to {len(found.times)} of them with a median error of "
            f"{np.median(errors):.1%}, at most {errors.max():.1%}."
        )
