"""Fits the numbers of the cost model to measured times to the first token.

Of one pass over n new tokens behind c cached ones:

    seconds = max(floor, pass_seconds + linear FLOPs / rate + factor * attention FLOPs / rate)

a roofline whose floor is the host, which needs so long to launch a pass however little the device has to do. The factor
is one number for c = 0 and another one for c > 0, where libraries have other kernels. None of the five numbers is
negative, and the sum of the squared relative errors is the least that was found: for every number of points at the
floor, least squares on the points as they lie on both sides, until no point changes sides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from ssmcache_sim.calibration import Calibration, FirstTokenTime
from ssmcache_sim.cost import PrefillCost, pairs_seen
from ssmcache_sim.device_profile import DeviceProfile
from ssmcache_sim.errors import SettingsError
from ssmcache_sim.trace import BoolArray, Float64Array, Int64Array

_MAX_ROUNDS = 20
_ROUNDING = 1e-12
_MIN_SHARE = 0.05  # of the longest time, that its tokens must make
_FLOOR, _PASS, _LINEAR, _ATTENTION, _CACHED = range(5)
# the rate of linear layers is what the others are relative to
_COLUMNS = [
    (_LINEAR, *others) for count in range(5) for others in combinations((_FLOOR, _PASS, _ATTENTION, _CACHED), count)
]


def fit_calibration(
    cost: PrefillCost, model: str, dtype: str, num_parameters: int, times: Sequence[FirstTokenTime]
) -> Calibration:
    """The numbers for a model, whose FLOPs `cost` counts.

    Where no time above the floor is behind cached tokens, or all are, both factors of attention are the same.

    Cost: O(n) small least squares for n times.
    Errors: SettingsError where the times do not grow with the tokens, or are fewer than five.
    """
    if len(times) < 5:
        raise SettingsError(f"calibration: expected at least 5 times for 5 numbers, got {len(times)}")
    cached, new, seconds = _arrays(times)
    tokens_flops = new.astype(np.float64) * float(cost.linear_flops_per_token + cost.ssm_flops_per_token)
    attention_flops = pairs_seen(new, cached) * float(cost.attention_flops_per_pair)
    numbers = _fit(tokens_flops, attention_flops, cached > 0, seconds)
    if numbers is None or numbers[_LINEAR] * tokens_flops.max() < _MIN_SHARE * seconds.max():
        raise SettingsError(
            f"calibration: expected times that grow with the tokens, got {seconds.min() * 1e3:.4g} to "
            f"{seconds.max() * 1e3:.4g} ms for {new.min():,} to {new.max():,} tokens: take longer prompts"
        )
    return Calibration(
        model=model,
        dtype=dtype,
        num_parameters=num_parameters,
        flops_per_second=float(1 / numbers[_LINEAR]),
        attention_factor=float(numbers[_ATTENTION] / numbers[_LINEAR]),
        cached_attention_factor=float(numbers[_CACHED] / numbers[_LINEAR]),
        pass_seconds=float(numbers[_PASS]),
        pass_floor_seconds=float(numbers[_FLOOR]),
        times=tuple(times),
    )


def relative_errors(cost: PrefillCost, device: DeviceProfile, times: Sequence[FirstTokenTime]) -> Float64Array:
    """[n], predicted / measured - 1 of prefills in one pass."""
    cached, new, seconds = _arrays(times)
    in_one = replace(device, pass_tokens=int(new.max()))
    uncut = replace(cost, device=in_one, prefill="reserved")
    return uncut.prefill_ns(cached + new, cached, 1, "every") / 1e9 / seconds - 1


def _arrays(times: Sequence[FirstTokenTime]) -> tuple[Int64Array, Int64Array, Float64Array]:
    cached = np.array([each.cached_tokens for each in times], dtype=np.int64)
    new = np.array([each.new_tokens for each in times], dtype=np.int64)
    return cached, new, np.array([each.seconds for each in times])


def _fit(
    linear: Float64Array, attention: Float64Array, is_cached: BoolArray, seconds: Float64Array
) -> Float64Array | None:
    """The five numbers, or None where no rate of linear layers explains the times."""
    best, least = None, np.inf
    order = np.argsort(linear + attention, kind="stable")
    for count in range(seconds.size):
        at_floor = np.zeros(seconds.size, dtype=np.bool_)
        at_floor[order[:count]] = True
        for _ in range(_MAX_ROUNDS):
            numbers = _least_squares(at_floor, linear, attention, is_cached, seconds)
            if numbers is None:
                break
            factors = np.where(is_cached, numbers[_CACHED], numbers[_ATTENTION])
            device = numbers[_PASS] + numbers[_LINEAR] * linear + factors * attention
            error = float(((np.maximum(numbers[_FLOOR], device) / seconds - 1) ** 2).sum())
            if error < least - _ROUNDING:  # as good with fewer points at the floor: there may be none
                best, least = numbers, error
            before, at_floor = at_floor, device < numbers[_FLOOR]
            if np.array_equal(before, at_floor):
                break
    return best


def _least_squares(
    at_floor: BoolArray, linear: Float64Array, attention: Float64Array, is_cached: BoolArray, seconds: Float64Array
) -> Float64Array | None:
    """The best numbers of which none is negative and the rate is finite, with the points on these sides."""
    above = ~at_floor
    is_cold = ~is_cached
    is_one = not (above & is_cached).any() or not (above & is_cold).any()
    if is_one:
        is_cold, is_cached = np.ones_like(is_cached), np.zeros_like(is_cached)
    kinds = np.stack((at_floor, above, above, above & is_cold, above & is_cached), axis=1)
    ones = np.ones_like(linear)
    values = np.stack((ones, ones, linear, attention, attention), axis=1)
    design: Float64Array = kinds * values / seconds[:, None]
    scales = np.abs(design).max(axis=0)
    best, least = None, np.inf
    for chosen, found in _solutions(design, scales):
        if (found >= 0).all() and found[0] > 0:
            numbers = np.zeros(5)
            numbers[list(chosen)] = found
            error = float(((design @ numbers - 1) ** 2).sum())
            if error < least:
                best, least = numbers, error
    if best is not None and is_one:
        best[_CACHED] = best[_ATTENTION]
    return best


def _solutions(design: Float64Array, scales: Float64Array) -> Iterator[tuple[tuple[int, ...], Float64Array]]:
    for columns in _COLUMNS:
        chosen = list(columns)
        if (scales[chosen] > 0).all():
            found, *_ = np.linalg.lstsq(design[:, chosen] / scales[chosen], np.ones(len(design)), rcond=None)
            yield columns, found / scales[chosen]
