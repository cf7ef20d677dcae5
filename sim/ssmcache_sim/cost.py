"""How long a prefill takes, by a stated model: what a skipped token is worth, and what keeping snapshots costs.

A prefill of n new tokens behind c cached ones does, in floating-point operations,

    2 * P * n                            linear layers: P active parameters, a multiplication and an addition each
    + 2 * (q + o) * A * (c * n + n**2/2)  attention: A layers, q and o elements of all heads' queries and outputs;
                                         with heads of one size that is 4 * (c * n + n**2/2) * heads * head_dim
    + s * n                              recurrences: s as `ssm_flops_per_token` says

which is the forward pass of Kaplan et al. (2001.08361, section 2.1: 2 N + 2 n_layer n_ctx d_attn a token, the mean over
a causal prompt) with a cached prefix. It takes

    seconds = sum over passes of max(floor, pass_seconds + FLOPs / (peak FLOP/s * utilisation))
            + copies of snapshots + lifts

with the FLOPs of attention times a factor, which is another one in passes behind cached tokens. The floor is 0 and the
factors are 1 unless they were measured (`calibration.py`).

What passes and copies count depends on how snapshots inside a prompt are made:

- `chunked`, which every engine can do: a pass ends at each boundary of the interval that may get a snapshot (all, or
  with admission `last` that of the prompt alone), and at `pass_tokens`; each new snapshot is a copy of the live state.
- `reserved`: the kernel writes the states while it passes, so a pass ends at `pass_tokens` alone, as it does without a
  prefix cache; and a snapshot is written, not copied.

Both copy one snapshot into the live state where a request starts from one. A copy reads and writes its bytes:
launch_seconds + bytes / gpu_bytes_per_second; writing alone takes half as long, without a launch. Pages of KV are read
where they lie: gathering them, as a runner of unmodified models does, is left out (about a millisecond a GB). What lies
in host memory or on disk is lifted to the GPU first, bytes / bandwidth of that tier, and nothing is computed meanwhile;
what moves down does so in the other direction, beside the computation, and is not counted.

What this leaves out: other requests in the same pass (each request is served alone), decoding (also the copies of
snapshots of outputs: one in an interval of decode steps, each of which takes longer than a copy), the embedding and the
short convolutions; and parameters are the vendor's count, embeddings included, so the linear part is a little high
(Nemotron-H-8B by an eighth), while weights used at several places count once (Zamba2's part is low).
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from ssmcache.config import Admission
from ssmcache.models import ModelSpec, SsmSpec
from ssmcache_sim.device_profile import H100, DeviceProfile
from ssmcache_sim.errors import SettingsError
from ssmcache_sim.settings import Prefill
from ssmcache_sim.trace import BoolArray, Float64Array, Int64Array

_NS_PER_SECOND = 1e9
_MAMBA2_CHUNK = 256  # tokens that the scans compute at once: mamba_ssm's default, and that of the delta rules of fla
_DELTA_CHUNK = 64
_MAX_BILLIONS = 10**6  # sums over a trace stay within 64 bits
_BILLION = 10**9


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """The cost model for one model, device and way of making snapshots. See the module for the formula.

    Times are whole nanoseconds, so that sums are exact and equal settings tie.
    """

    device: DeviceProfile
    prefill: Prefill
    linear_flops_per_token: int
    ssm_flops_per_token: int
    attention_flops_per_pair: int
    snapshot_bytes: int

    def flops(self, new_tokens: Int64Array, cached_tokens: Int64Array) -> Float64Array:
        """Floating-point operations of a prefill of new tokens behind cached ones; arrays of one shape."""
        each_token = float(self.linear_flops_per_token + self.ssm_flops_per_token)
        pairs = pairs_seen(new_tokens, cached_tokens)
        return new_tokens.astype(np.float64) * each_token + float(self.attention_flops_per_pair) * pairs

    def plain_ns(self, prompt_tokens: Int64Array) -> Int64Array:
        """Without a prefix cache."""
        return _whole_ns(self._passes_seconds(prompt_tokens, np.zeros_like(prompt_tokens)))

    def reuse_ns(self, prompt_tokens: Int64Array, known_tokens: Int64Array, step: int) -> Int64Array:
        """With a prefix cache, new snapshots included.

        Args:
            known_tokens: up to the deepest place that a request could resume from, multiples of `step`, at most the
                prompt. A request starts there, or one step before where no token would be left to compute.
            step: tokens between snapshots; without SSM layers, tokens of a block.
        """
        last_start = np.maximum(prompt_tokens - 1, 0) // step * step
        start = np.minimum(known_tokens, last_start)
        seconds = self._prefill_seconds(prompt_tokens, start, step, "every")
        if self.snapshot_bytes:
            new_snapshots = prompt_tokens // step - known_tokens // step
            seconds += new_snapshots * self.new_snapshot_seconds + (start > 0) * self.copy_seconds
        return _whole_ns(seconds)

    def prefill_ns(
        self, prompt_tokens: Int64Array, start_tokens: Int64Array, step: int, admission: Admission
    ) -> Int64Array:
        """With a prefix cache, what snapshots cost left out: operations and passes alone.

        Args:
            start_tokens: that a request skips, multiples of `step` below the prompt.
        """
        return _whole_ns(self._prefill_seconds(prompt_tokens, start_tokens, step, admission))

    def _prefill_seconds(
        self, prompt_tokens: Int64Array, start: Int64Array, step: int, admission: Admission
    ) -> Float64Array:
        if not self.snapshot_bytes or self.prefill != "chunked":
            return self._passes_seconds(prompt_tokens - start, start)
        if admission == "last":
            cut = np.maximum(prompt_tokens // step * step, start)
            return self._passes_seconds(cut - start, start) + self._passes_seconds(prompt_tokens - cut, cut)
        last_start = np.maximum(prompt_tokens - 1, 0) // step * step
        num_steps = (last_start - start) // step
        seconds = np.zeros(prompt_tokens.shape)
        for offset in range(0, step, self.device.pass_tokens):  # the passes of each step, in turn
            size = np.full_like(start, min(self.device.pass_tokens, step - offset))
            seconds = seconds + self._equal_passes_seconds(size, start + offset, step, num_steps)
        return seconds + self._passes_seconds(prompt_tokens - last_start, last_start)

    def front_ns(self, tokens: Int64Array) -> Int64Array:
        """Operations of the first `tokens` of a prompt."""
        return _whole_ns(self._operations_seconds(tokens, np.zeros_like(tokens)))

    def snapshots_ns(self, taken: int, started_from: int) -> int:
        """So many snapshots taken, and copied to start from."""
        return round((taken * self.new_snapshot_seconds + started_from * self.copy_seconds) * _NS_PER_SECOND)

    def lifts_ns(self, host_bytes: int, disk_bytes: int) -> int:
        """Bytes that come up to the GPU from each tier."""
        bandwidths = self.device.bandwidths
        seconds = host_bytes / bandwidths.host_to_gpu_bytes_per_second
        seconds += disk_bytes / bandwidths.from_disk_bytes_per_second
        return round(seconds * _NS_PER_SECOND)

    @property
    def new_snapshot_seconds(self) -> float:
        """Of one new snapshot: a copy of the live state, or what the kernel writes."""
        return self.copy_seconds if self.prefill == "chunked" else self.write_seconds

    @property
    def copy_seconds(self) -> float:
        """Of one snapshot, within the device."""
        return self.device.launch_seconds + self.snapshot_bytes / self.device.bandwidths.gpu_bytes_per_second

    @property
    def write_seconds(self) -> float:
        """Of one snapshot by the kernel that computes it: a copy reads as much as it writes."""
        return self.snapshot_bytes / (2 * self.device.bandwidths.gpu_bytes_per_second)

    def _passes_seconds(self, new_tokens: Int64Array, cached_tokens: Int64Array) -> Float64Array:
        """As few passes as there can be."""
        size = np.full_like(new_tokens, self.device.pass_tokens)
        num_full = new_tokens // size
        before = num_full * size
        full = self._equal_passes_seconds(size, cached_tokens, self.device.pass_tokens, num_full)
        rest = self._equal_passes_seconds(new_tokens - before, cached_tokens + before, 0, (new_tokens > before) * 1)
        return full + rest

    def _equal_passes_seconds(
        self, size: Int64Array, cached_tokens: Int64Array, stride: int, num_passes: Int64Array
    ) -> Float64Array:
        """Passes of one size, each behind `stride` tokens more than the one before."""
        if self.device.cached_attention_factor == self.device.attention_factor:  # not measured: half the work
            return self._series_seconds(size, cached_tokens, stride, num_passes)
        cold = np.where(cached_tokens == 0, np.minimum(num_passes, 1), 0)
        alone = self._series_seconds(size, np.zeros_like(size), 0, cold)
        return alone + self._series_seconds(size, cached_tokens + cold * stride, stride, num_passes - cold)

    def _series_seconds(
        self, size: Int64Array, cached_tokens: Int64Array, stride: int, num_passes: Int64Array
    ) -> Float64Array:
        """Passes that are all behind cached tokens, or none.

        Each takes as much longer than the one before, so the first ones are at the floor, if any, and the others are a
        series whose sum is known.
        """
        first = self._operations_seconds(size, cached_tokens) + self.device.pass_seconds
        more = self._attention_seconds(size.astype(np.float64) * stride, cached_tokens > 0)
        below = self.device.pass_floor_seconds - first
        with np.errstate(divide="ignore", invalid="ignore"):  # passes that do not get longer: all at the floor, or none
            num_below = np.where(more > 0, np.ceil(below / more), np.inf)
        at_floor = np.where(below > 0, np.minimum(num_below, num_passes), 0)
        above = num_passes - at_floor
        series = above * first + more * (above * at_floor + above * (above - 1) / 2)
        return at_floor * self.device.pass_floor_seconds + series

    def _operations_seconds(self, new_tokens: Int64Array, cached_tokens: Int64Array) -> Float64Array:
        pairs = pairs_seen(new_tokens, cached_tokens)
        tokens = new_tokens.astype(np.float64) * float(self.linear_flops_per_token + self.ssm_flops_per_token)
        return tokens / self._flops_per_second + self._attention_seconds(pairs, cached_tokens > 0)

    def _attention_seconds(self, pairs: Float64Array, is_cached: BoolArray) -> Float64Array:
        factor = np.where(is_cached, self.device.cached_attention_factor, self.device.attention_factor)
        return pairs * (factor * self.attention_flops_per_pair / self._flops_per_second)

    @property
    def _flops_per_second(self) -> float:
        return self.device.peak_flops_per_second * self.device.utilisation


def pairs_seen(new_tokens: Int64Array, cached_tokens: Int64Array) -> Float64Array:
    """Pairs of a query and a key that it sees, in a prefill of new tokens behind cached ones; arrays of one shape."""
    new, cached = new_tokens.astype(np.float64), cached_tokens.astype(np.float64)
    return cached * new + new * new / 2


def _whole_ns(seconds: Float64Array) -> Int64Array:
    return np.rint(seconds * _NS_PER_SECOND).astype(np.int64)


def prefill_cost(
    model: ModelSpec,
    *,
    device: DeviceProfile = H100,
    prefill: Prefill = "chunked",
    state_dtype: str | None = None,
    billion_parameters: float | None = None,
) -> PrefillCost:
    """The cost model of a model.

    Args:
        state_dtype: of SSM states; None: what the model's config says.
        billion_parameters: that a token passes through; None: what the vendor says.

    Errors: SettingsError where the number of parameters or the attention heads are not known; ModelError for an
    unknown dtype.
    """
    if billion_parameters is not None:
        if not 0 < billion_parameters <= _MAX_BILLIONS:
            expected = f"a number of billions up to {_MAX_BILLIONS:,}"
            raise SettingsError(f"billion_parameters: expected {expected}, got {billion_parameters!r}")
        num_parameters = round(billion_parameters * _BILLION)
    else:
        num_parameters = model.num_active_parameters or model.num_parameters or 0
    if num_parameters <= 0:
        raise SettingsError(
            f"billion_parameters: expected a number for the cost of a prefill: the config of {model.name} states none"
        )
    return PrefillCost(
        device=device,
        prefill=prefill,
        linear_flops_per_token=2 * num_parameters,
        ssm_flops_per_token=sum(ssm_flops_per_token(layer.ssm) for layer in model.layers if layer.ssm),
        attention_flops_per_pair=_attention_flops_per_pair(model),
        snapshot_bytes=model.snapshot_bytes(state_dtype),
    )


def _attention_flops_per_pair(model: ModelSpec) -> int:
    """Operations for one query and one key, all layers: a product with the key, and one with the value."""
    total = 0
    for attention in (layer.attention for layer in model.layers if layer.attention):
        if attention.num_query_elements is None or attention.num_output_elements is None:
            raise SettingsError(
                f"{model.name}: expected num_attention_heads, qk_nope_head_dim and v_head_dim for the cost of a "
                "prefill, its config does not state them all"
            )
        total += 2 * (attention.num_query_elements + attention.num_output_elements)
    return total


def ssm_flops_per_token(ssm: SsmSpec) -> int:
    """Operations of one layer's recurrence for one token, without its projections.

    - states [heads, P, N], Mamba-2: 2 * heads * (Q * (N + P) + 2 * N * P), chunks of Q = 256: the four products of the
      state space duality (Dao and Gu, 2405.21060, section 6);
    - delta rules: 2 * heads * (2 * Q * (N + P) + 3 * N * P), Q = 64: the chunkwise form has one pair of products more
      within a chunk and one more with the state (Yang et al., 2406.06484, section 3);
    - states [width, N], Mamba-1: 16 an element of the state (Marconi, 2411.19379, table 1: 16 L D N).
    """
    if len(ssm.state_shape) == 2:
        return 16 * prod(ssm.state_shape)
    heads, value_dim, key_dim = ssm.state_shape
    if ssm.kind == "mamba2":
        return 2 * heads * (_MAMBA2_CHUNK * (key_dim + value_dim) + 2 * key_dim * value_dim)
    return 2 * heads * (2 * _DELTA_CHUNK * (key_dim + value_dim) + 3 * key_dim * value_dim)
