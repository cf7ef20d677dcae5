"""Fits to made-up times, whose numbers are known, and calibrations as profiles keep them."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache.models import load_model
from ssmcache_sim.calibration import Calibration, FirstTokenTime
from ssmcache_sim.cost import prefill_cost
from ssmcache_sim.device_profile import H100, calibrated
from ssmcache_sim.errors import ProfileError, SettingsError
from ssmcache_sim.machine_profile import profile_json, read_profile, write_profile
from ssmcache_sim.prefill_fit import fit_calibration, relative_errors

COST = prefill_cost(load_model("qwen3.5-9b"))
LINEAR = COST.linear_flops_per_token + COST.ssm_flops_per_token
FITTED = [*product((0, 8192, 16384), (128, 512, 2048, 8192, 16384)), (0, 32768)]
OTHERS = list(product((0, 2048, 16384, 32768), (64, 1024, 4096, 8192)))


def seconds(cached: int, new: int, floor: float, fixed: float, rate: float, factor: float, behind: float) -> float:
    pairs = (behind if cached else factor) * (cached * new + new**2 / 2)
    device = fixed + (new * LINEAR + pairs * COST.attention_flops_per_pair) / rate
    return max(floor, device)


def times(points: list[tuple[int, int]], *numbers: float, noise: float = 0, seed: int = 0) -> list[FirstTokenTime]:
    rng = np.random.default_rng(seed)
    return [
        FirstTokenTime(*point, seconds(*point, *numbers) * (1 + noise * float(rng.uniform(-1, 1)))) for point in points
    ]


def fit(found: list[FirstTokenTime]) -> Calibration:
    return fit_calibration(COST, "some model", "bfloat16", 9_000_000_000, found)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([0, 0.03, 0.1]), st.sampled_from([0, 0.005]), st.floats(1e14, 8e14), st.floats(0, 4),
    st.floats(0, 4),
)  # fmt: skip
def test_exact_times_of_other_lengths_are_predicted_exactly(
    floor: float, fixed: float, rate: float, factor: float, behind: float
) -> None:
    numbers = floor, fixed, rate, factor, behind
    device = calibrated(H100, fit(times(FITTED, *numbers)))
    np.testing.assert_allclose(relative_errors(COST, device, times(OTHERS, *numbers)), 0, atol=1e-6)


def test_the_numbers_themselves_are_found() -> None:
    found = fit(times(FITTED, 0.1, 0.004, 3.5e14, 2.5, 3.5))
    assert found.pass_floor_seconds == pytest.approx(0.1)
    assert found.pass_seconds == pytest.approx(0.004)
    assert found.flops_per_second == pytest.approx(3.5e14)
    assert found.attention_factor == pytest.approx(2.5)
    assert found.cached_attention_factor == pytest.approx(3.5)
    assert (found.model, found.dtype, found.num_parameters) == ("some model", "bfloat16", 9_000_000_000)


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_a_few_percent_stays_a_few_percent(seed: int) -> None:
    numbers = 0.1, 0.002, 3.5e14, 1.0, 2.0
    device = calibrated(H100, fit(times(FITTED, *numbers, noise=0.05, seed=seed)))
    assert np.abs(relative_errors(COST, device, times(OTHERS, *numbers))).max() < 0.08


@pytest.mark.parametrize("points", [[each for each in FITTED if not each[0]], [(8192, new) for _, new in FITTED[:5]]])
def test_times_of_one_kind_give_one_factor_of_attention(points: list[tuple[int, int]]) -> None:
    found = fit(times(points, 0.03, 0.004, 3.5e14, 2.5, 2.5))
    assert found.attention_factor == pytest.approx(2.5)
    assert found.cached_attention_factor == found.attention_factor


def test_a_device_without_a_floor_is_predicted_as_the_plain_cost_model_has_it() -> None:
    rate = H100.peak_flops_per_second * H100.utilisation
    found = times(FITTED, 0, H100.pass_seconds, rate, 1, 1)
    np.testing.assert_allclose(relative_errors(COST, replace(H100, pass_tokens=1 << 20), found), 0, atol=1e-6)


def test_times_that_do_not_grow_are_refused_in_one_line() -> None:
    expected = "calibration: expected times that grow with the tokens, got 50 to 50 ms for 128 to 32,768 tokens"
    with pytest.raises(SettingsError, match=re.escape(expected)) as e:
        fit([FirstTokenTime(*point, 0.05) for point in FITTED])
    assert "\n" not in str(e.value)
    with pytest.raises(SettingsError, match="expected at least 5 times for 5 numbers, got 4"):
        fit(times(FITTED[:4], 0, 0, 1e14, 1, 1))


def stored(tmp_path: Path, **changes: Any) -> Path:
    """A profile with a calibration of which some fields were changed by hand."""
    profile = profile_json(None, {}, {}, [], fit(times(FITTED, 0.1, 0, 3e14, 1, 2)))
    profile["calibration"] |= changes
    path = tmp_path / "machine.json"
    write_profile(path, profile)
    return path


def test_a_profile_keeps_a_calibration(tmp_path: Path) -> None:
    assert read_profile(stored(tmp_path)).calibration == fit(times(FITTED, 0.1, 0, 3e14, 1, 2))


def test_a_profile_without_a_calibration_is_as_good_as_before(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    profile = profile_json(None, {}, {}, [])
    assert profile["calibration"] is None
    del profile["calibration"]
    path.write_text(json.dumps(profile))
    assert read_profile(path).calibration is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops_per_second": 0}, "flops_per_second: expected a positive number, got 0"),
        ({"flops_per_second": 10**400}, "flops_per_second: expected a positive number, got 1000"),
        ({"pass_seconds": -1}, "pass_seconds: expected a non-negative number, got -1"),
        ({"attention_factor": True}, "attention_factor: expected a non-negative number, got True"),
        ({"flops_per_second": 1e-300}, "flops_per_second: expected a positive number, got 1e-300"),
        ({"pass_seconds": 1e300}, "pass_seconds: expected a non-negative number, got 1e+300"),
        ({"num_parameters": 1.5}, "num_parameters: expected a whole number of 1 or more, got 1.5"),
        ({"model": "\ud800"}, "model: expected text, got "),
        ({"model": 3}, "model: expected text, got 3"),
        ({"times": {}}, "times: expected a list, got dict"),
        (
            {"times": [{"cached_tokens": 0}]},
            "expected cached_tokens, new_tokens, seconds, spread, got ['cached_tokens']",
        ),
        ({"more": 1}, "expected attention_factor, cached_attention_factor,"),
    ],
)
def test_a_broken_calibration_is_an_error_of_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = stored(tmp_path, **changes)
    with pytest.raises(ProfileError, match=re.escape(f"{path}: calibration: {message}")) as e:
        read_profile(path)
    assert "\n" not in str(e.value)
