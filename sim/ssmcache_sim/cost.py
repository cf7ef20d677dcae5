"""How long a prefill takes, by a stated model: what a skipped token is worth, and what keeping snapshots costs.

A prefill of n new tokens behind c cached ones does, in floating-point operations,

    2 * P * n                            linear layers: P active parameters, a multiplication and an addition each
    + 2 * (q + o) * A * (c * n + n**2/2)  attention: A layers, q and o elements of all heads' queries and outputs;
                                         with heads of one size that is 4 * (c * n + n**2/2) * heads * head_dim
    + s * n                              recurrences: s as `ssm_flops_per_token` says

which is the forward pass of Kaplan et al. (2001.08361, section 2.1: 2 N + 2 n_layer n_ctx d_attn a token, the mean over
a causal prompt) with a cached prefix. It takes

    seconds = FLOPs / (peak FLOP/s * utilisation) + passes * pass_seconds + copies of snapshots + lifts

What passes and copies count depends on how snapshots inside a prompt are made:

- `chunked`, which every engine can do: a pass ends at each boundary of the interval that may get a snapshot (all, or
  with admission `last` that of the prompt alone), and at `pass_tokens`; each new snapshot is a copy of the live state.
- `reserved`: the kernel writes the states while it passes, so a pass ends at `pass_tokens` alone, as it does without a
  prefix cache; and a snapshot is written, not copied.

Both copy one snapshot into the live state where a request starts from one. A copy reads and writes its bytes:
launch_seconds + bytes / gpu_bytes_per_second; writing alone takes half as long, without a launch. Pages of KV are read
where they lie: nothing is gathered. What lies in host memory or on disk is lifted to the GPU first, bytes / bandwidth
of that tier, and nothing is computed meanwhile; what moves down does so in the other direction, beside the
computation, and is not counted.

What this leaves out: other requests in the same pass (each request is served alone), decoding (also the copies of
snapshots of outputs: one in an interval of decode steps, each of which takes longer than a copy), the embedding and the
short convolutions; and parameters are the vendor's count, embeddings included, so the linear part is a little high
(Nemotron-H-8B by an eighth), while weights used at several places count once (Zamba2's part is low).
"""

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from ssmcache.config import Admission
from ssmcache.memory.bandwidths import DEFAULT_BANDWIDTHS, BandwidthProfile
from ssmcache.models import ModelSpec, SsmSpec
from ssmcache_sim.errors import SettingsError
from ssmcache_sim.machine_profile import MachineProfile
from ssmcache_sim.settings import Prefill
from ssmcache_sim.trace import Float64Array, Int64Array

_NS_PER_SECOND = 1e9
_MAMBA2_CHUNK = 256  # tokens that the scans compute at once: mamba_ssm's default, and that of the delta rules of fla
_DELTA_CHUNK = 64
_BILLION = 10**9


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """How fast a device is.

    Attributes:
        peak_flops_per_second: of dense matrix products in the model's dtype.
        utilisation: share of the peak that a whole prefill sustains, 0..1.
        bandwidths: of copies within the GPU, and up to it.
        launch_seconds: before a copy of one snapshot moves a byte.
        pass_tokens: the most tokens of one prompt in one pass over the layers, a setting of the engine.
        pass_seconds: what one pass costs beyond its operations.
    """

    name: str
    peak_flops_per_second: float
    utilisation: float
    bandwidths: BandwidthProfile
    launch_seconds: float
    pass_tokens: int
    pass_seconds: float


# Peak: NVIDIA's data sheet of the H100 SXM, bf16 without sparsity. Copies: measured. Tokens of a pass: vLLM's default
# when it serves on such a device (max_num_batched_tokens). Utilisation, launch and time of a pass are round estimates,
# not measurements: compiled prefills reach about half of the peak; a pass has some thousand launches, or reads the
# 16 GB of an 8B model's weights once more, which takes 6 ms.
H100 = DeviceProfile(
    name="H100 SXM",
    peak_flops_per_second=989e12,
    utilisation=0.5,
    bandwidths=DEFAULT_BANDWIDTHS,
    launch_seconds=10e-6,
    pass_tokens=8192,
    pass_seconds=5e-3,
)


def with_copies_of(device: DeviceProfile, machine: MachineProfile) -> DeviceProfile:
    """The device with copies as they were measured on a machine; as it is where none were measured on a GPU."""
    if "gpu_bytes_per_second" in machine.not_measured:
        return device
    name = f"{device.name} with the copies of {machine.device}"
    return replace(device, name=name, bandwidths=machine.bandwidths)


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
        new, cached = new_tokens.astype(np.float64), cached_tokens.astype(np.float64)
        each_token = float(self.linear_flops_per_token + self.ssm_flops_per_token)
        return new * each_token + float(self.attention_flops_per_pair) * (cached * new + new * new / 2)

    def plain_ns(self, prompt_tokens: Int64Array) -> Int64Array:
        """Without a prefix cache."""
        nothing = np.zeros_like(prompt_tokens)
        return _whole_ns(self._compute_seconds(prompt_tokens, nothing, self._num_passes(prompt_tokens)))

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
        new_tokens = prompt_tokens - start
        if not self.snapshot_bytes or self.prefill != "chunked":
            num_passes = self._num_passes(new_tokens)
        elif admission == "every":
            last_start = np.maximum(prompt_tokens - 1, 0) // step * step
            passes_of_step = -(-step // self.device.pass_tokens)
            num_passes = (last_start - start) // step * passes_of_step + self._num_passes(prompt_tokens - last_start)
        else:
            cut = np.maximum(prompt_tokens // step * step, start)
            num_passes = self._num_passes(cut - start) + self._num_passes(prompt_tokens - cut)
        return self._compute_seconds(new_tokens, start, num_passes)

    def front_ns(self, tokens: Int64Array) -> Int64Array:
        """Operations of the first `tokens` of a prompt."""
        return _whole_ns(self._compute_seconds(tokens, np.zeros_like(tokens), np.zeros_like(tokens)))

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

    def _num_passes(self, new_tokens: Int64Array) -> Int64Array:
        return -(-new_tokens // self.device.pass_tokens)

    def _compute_seconds(
        self, new_tokens: Int64Array, cached_tokens: Int64Array, num_passes: Int64Array
    ) -> Float64Array:
        rate = self.device.peak_flops_per_second * self.device.utilisation
        return self.flops(new_tokens, cached_tokens) / rate + num_passes * self.device.pass_seconds


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
