"""What a manager is told: layers, buffers, tiers and reuse settings, with every check in one place.

Sizes are in bytes, lengths in tokens. A wrong value raises `ValueError` that says what, expected and got.
"""

from dataclasses import dataclass

DEFAULT_SSM_REUSE_INTERVAL = 512


def _require(condition: bool, what: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{what}: expected {expected}, got {got!r}")


def _require_positive_int(what: str, value: object) -> None:
    # bool is an int to Python, and `tokens_per_block=True` is certainly a mistake
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(is_int and value > 0, what, "a positive integer", value)  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class BufferConfig:
    """One buffer of a layer. `size` is bytes per block for attention, the bytes of the whole state for SSM."""

    role: str
    size: int

    def __post_init__(self) -> None:
        _require(bool(self.role), "buffer role", "a name", self.role)
        _require_positive_int(f"size of buffer {self.role!r}", self.size)


def _check_buffers(layer_id: int, buffers: tuple[BufferConfig, ...]) -> None:
    _require(len(buffers) > 0, f"buffers of layer {layer_id}", "at least one", buffers)
    roles = [buffer.role for buffer in buffers]
    _require(len(set(roles)) == len(roles), f"buffer roles of layer {layer_id}", "each role once", roles)


@dataclass(frozen=True, slots=True)
class AttentionLayerConfig:
    """A full attention layer: one page of KV for every block of tokens."""

    layer_id: int
    buffers: tuple[BufferConfig, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffers", tuple(self.buffers))
        _check_buffers(self.layer_id, self.buffers)


@dataclass(frozen=True, slots=True)
class SsmLayerConfig:
    """A recurrent layer: one state of fixed size for a sequence, overwritten at each token."""

    layer_id: int
    buffers: tuple[BufferConfig, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffers", tuple(self.buffers))
        _check_buffers(self.layer_id, self.buffers)


LayerConfig = AttentionLayerConfig | SsmLayerConfig


@dataclass(frozen=True, slots=True)
class GpuCacheTierConfig:
    """GPU memory for the cache, in bytes. `quota=None` means unlimited: simulated memory only."""

    quota: int | None

    def __post_init__(self) -> None:
        if self.quota is not None:
            _require_positive_int("quota of the GPU tier", self.quota)


@dataclass(frozen=True, slots=True)
class HostCacheTierConfig:
    """Host memory for what the GPU has no room for, in bytes."""

    quota: int

    def __post_init__(self) -> None:
        _require_positive_int("quota of the host tier", self.quota)


@dataclass(frozen=True, slots=True)
class DiskCacheTierConfig:
    """Disk space for what the tiers above have no room for, in bytes, in files of its own in the directory `path`."""

    quota: int
    path: str

    def __post_init__(self) -> None:
        _require_positive_int("quota of the disk tier", self.quota)
        _require(bool(self.path), "path of the disk tier", "a directory", self.path)


CacheTierConfig = GpuCacheTierConfig | HostCacheTierConfig | DiskCacheTierConfig


@dataclass(frozen=True, slots=True)
class KVCacheDesc:
    """One sequence of a batch: room for `capacity` tokens, the first `history_length` of them computed already."""

    capacity: int
    history_length: int = 0

    def __post_init__(self) -> None:
        _require_positive_int("capacity of a KVCacheDesc", self.capacity)
        within = 0 <= self.history_length <= self.capacity
        _require(within, "history_length of a KVCacheDesc", f"0..{self.capacity}", self.history_length)


@dataclass(frozen=True, slots=True)
class BatchDesc:
    """The sequences that are active at the same time in one step."""

    kv_caches: tuple[KVCacheDesc, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_caches", tuple(self.kv_caches))
        _require(len(self.kv_caches) > 0, "sequences of a BatchDesc", "at least one", self.kv_caches)


@dataclass(frozen=True, slots=True)
class KVCacheManagerConfig:
    """Everything that a `KVCacheManager` needs to know.

    `typical_step` sets how the bytes of a tier are split between layer groups (one sequence of 2,048 tokens if
    None); `ssm_fraction` overrides it with the share of the bytes, in 0..1, that goes to SSM slots. The interval
    is checked only where an SSM layer exists. `enable_partial_reuse=None` means: on without SSM layers, off with
    them; reuse of partial blocks is not available yet, so an explicit True is refused.

    Errors: ValueError for anything out of range.
    """

    tokens_per_block: int
    layers: tuple[LayerConfig, ...]
    cache_tiers: tuple[GpuCacheTierConfig, ...]
    ssm_reuse_interval: int = DEFAULT_SSM_REUSE_INTERVAL
    enable_partial_reuse: bool | None = None
    max_util_for_resume: float = 0.97
    typical_step: BatchDesc | None = None
    ssm_fraction: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "cache_tiers", tuple(self.cache_tiers))
        _require_positive_int("tokens_per_block", self.tokens_per_block)
        _require(len(self.layers) > 0, "layers", "at least one", self.layers)
        layer_ids = [layer.layer_id for layer in self.layers]
        _require(len(set(layer_ids)) == len(layer_ids), "layer ids", "each id once", layer_ids)
        _require(len(self.cache_tiers) == 1, "cache_tiers", "one GpuCacheTierConfig", self.cache_tiers)
        _require(
            0 < self.max_util_for_resume <= 1, "max_util_for_resume", "above 0, at most 1", self.max_util_for_resume
        )
        if self.has_ssm:
            self._check_ssm()
        if self.ssm_fraction is not None:
            _require(self.has_ssm, "ssm_fraction", "None without SSM layers", self.ssm_fraction)
            low, high = (self.ssm_fraction > 0), (self.ssm_fraction < 1 or not self.has_attention)
            _require(low and high, "ssm_fraction", "a share between 0 and 1", self.ssm_fraction)
        _require(self.enable_partial_reuse is not True, "enable_partial_reuse", "None or False", True)

    def _check_ssm(self) -> None:
        _require_positive_int("ssm_reuse_interval", self.ssm_reuse_interval)
        _require(
            self.ssm_reuse_interval % self.tokens_per_block == 0,
            "ssm_reuse_interval",
            f"a multiple of tokens_per_block ({self.tokens_per_block})",
            self.ssm_reuse_interval,
        )

    @property
    def has_ssm(self) -> bool:
        return any(isinstance(layer, SsmLayerConfig) for layer in self.layers)

    @property
    def has_attention(self) -> bool:
        return any(isinstance(layer, AttentionLayerConfig) for layer in self.layers)
