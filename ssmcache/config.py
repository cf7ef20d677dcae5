"""What a manager is told: layers, buffers, tiers and reuse settings, with every check in one place.

Sizes are in bytes, lengths in tokens. A wrong value raises `ValueError` that says what, expected and got.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from ssmcache.integers import is_integer
from ssmcache.units import format_size

DEFAULT_SSM_REUSE_INTERVAL = 512
# which multiples of the interval get a snapshot: every one, or a request's last one only
Admission = Literal["every", "last"]


def _require(condition: bool, what: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{what}: expected {expected}, got {got!r}")


def _set_integer(record: object, name: str, what: str, low: int = 1) -> None:
    """Make a field of a frozen record an integer of Python, which is at least `low`."""
    value = getattr(record, name)
    expected = "a positive integer" if low else "an integer >= 0"
    _require(is_integer(value) and value >= low, what, expected, value)
    object.__setattr__(record, name, int(value))


@dataclass(frozen=True, slots=True)
class BufferConfig:
    """One buffer of a layer. `size` is bytes per block for attention, the bytes of the whole state for SSM.

    `tokens_per_block_override`: kernels see the page of a block as smaller pages of so many tokens each, which must
    divide the block. The manager keeps counting in whole blocks.
    """

    role: str
    size: int
    tokens_per_block_override: int | None = None

    def __post_init__(self) -> None:
        _require(bool(self.role), "buffer role", "a name", self.role)
        _set_integer(self, "size", f"size of buffer {self.role!r}")
        if self.tokens_per_block_override is not None:
            _set_integer(self, "tokens_per_block_override", f"tokens_per_block_override of buffer {self.role!r}")

    def pages_per_block(self, tokens_per_block: int) -> int:
        """Pages that a kernel sees in one block. Errors: ValueError unless block and size are whole multiples."""
        if self.tokens_per_block_override is None:
            return 1
        pages, rest = divmod(tokens_per_block, self.tokens_per_block_override)
        what = f"tokens_per_block_override of buffer {self.role!r}"
        _require(rest == 0, what, f"a divisor of tokens_per_block ({tokens_per_block})", self.tokens_per_block_override)
        _require(self.size % pages == 0, f"size of buffer {self.role!r}", f"a multiple of its {pages} pages", self.size)
        return pages


def _check_buffers(layer_id: int, buffers: tuple[BufferConfig, ...]) -> None:
    _require(len(buffers) > 0, f"buffers of layer {layer_id}", "at least one", buffers)
    roles = [buffer.role for buffer in buffers]
    _require(len(set(roles)) == len(roles), f"buffer roles of layer {layer_id}", "each role once", roles)


@dataclass(frozen=True, slots=True)
class AttentionLayerConfig:
    """An attention layer: one page of KV for every block of tokens, or, with a sliding window, for the blocks that its
    last `sliding_window_size` tokens and its first `num_sink_tokens` lie in.
    """

    layer_id: int
    buffers: tuple[BufferConfig, ...]
    sliding_window_size: int | None = None
    num_sink_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffers", tuple(self.buffers))
        _check_buffers(self.layer_id, self.buffers)
        where = f"of layer {self.layer_id}"
        if self.sliding_window_size is not None:
            _set_integer(self, "sliding_window_size", f"sliding_window_size {where}")
        if self.num_sink_tokens is not None:
            windowed = self.sliding_window_size is not None
            _require(windowed, f"num_sink_tokens {where}", "None without a sliding window", self.num_sink_tokens)
            _set_integer(self, "num_sink_tokens", f"num_sink_tokens {where}", 0)


@dataclass(frozen=True, slots=True)
class SsmLayerConfig:
    """A recurrent layer: one state of fixed size for a sequence, overwritten at each token."""

    layer_id: int
    buffers: tuple[BufferConfig, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffers", tuple(self.buffers))
        _check_buffers(self.layer_id, self.buffers)
        for buffer in self.buffers:
            override = buffer.tokens_per_block_override
            _require(
                override is None, f"tokens_per_block_override of layer {self.layer_id}", "None for a state", override
            )


LayerConfig = AttentionLayerConfig | SsmLayerConfig


@dataclass(frozen=True, slots=True)
class GpuCacheTierConfig:
    """GPU memory for the cache, in bytes. `quota=None` means unlimited: simulated memory only."""

    name: ClassVar[str] = "gpu"
    quota: int | None

    def __post_init__(self) -> None:
        if self.quota is not None:
            _set_integer(self, "quota", "quota of the GPU tier")


@dataclass(frozen=True, slots=True)
class HostCacheTierConfig:
    """Host memory for what the GPU has no room for, in bytes."""

    name: ClassVar[str] = "host"
    quota: int

    def __post_init__(self) -> None:
        _set_integer(self, "quota", "quota of the host tier")


@dataclass(frozen=True, slots=True)
class DiskCacheTierConfig:
    """Disk space for what the tiers above have no room for, in bytes, in files of its own in the directory `path`."""

    name: ClassVar[str] = "disk"
    quota: int
    path: str

    def __post_init__(self) -> None:
        _set_integer(self, "quota", "quota of the disk tier")
        _require(bool(self.path), "path of the disk tier", "a directory", self.path)


CacheTierConfig = GpuCacheTierConfig | HostCacheTierConfig | DiskCacheTierConfig


@dataclass(frozen=True, slots=True)
class KVCacheDesc:
    """One sequence of a batch: room for `capacity` tokens, the first `history_length` of them computed already."""

    capacity: int
    history_length: int = 0

    def __post_init__(self) -> None:
        _set_integer(self, "capacity", "capacity of a KVCacheDesc")
        within = is_integer(self.history_length) and 0 <= self.history_length <= self.capacity
        _require(within, "history_length of a KVCacheDesc", f"0..{self.capacity}", self.history_length)
        _set_integer(self, "history_length", "history_length of a KVCacheDesc", 0)


@dataclass(frozen=True, slots=True)
class BatchDesc:
    """The sequences that are active at the same time in one step. All of them begin with the same
    `system_prompt_length` tokens, whose pages they share: these are counted once.
    """

    kv_caches: tuple[KVCacheDesc, ...]
    system_prompt_length: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_caches", tuple(self.kv_caches))
        _require(len(self.kv_caches) > 0, "sequences of a BatchDesc", "at least one", self.kv_caches)
        length, shortest = self.system_prompt_length, min(desc.capacity for desc in self.kv_caches)
        is_length = isinstance(length, int) and not isinstance(length, bool) and 0 <= length <= shortest
        what = "system_prompt_length of a BatchDesc"
        _require(is_length, what, f"an integer in 0..{shortest} (the shortest capacity)", length)


def _check_tiers(tiers: tuple[CacheTierConfig, ...]) -> None:
    order = (GpuCacheTierConfig, HostCacheTierConfig, DiskCacheTierConfig)
    places = [order.index(type(tier)) for tier in tiers]
    sorted_once = places == sorted(set(places)) and places[:1] == [0]
    _require(sorted_once, "cache_tiers", "a GPU tier, then a host and a disk tier, if any", tiers)
    unlimited = isinstance(tiers[0], GpuCacheTierConfig) and tiers[0].quota is None
    _require(not (unlimited and len(tiers) > 1), "cache_tiers", "no tier below an unlimited GPU", tiers)


@dataclass(frozen=True, slots=True)
class KVCacheManagerConfig:
    """Everything that a `KVCacheManager` needs to know.

    Attributes:
        cache_tiers: the GPU, then host memory and disk, as far as they are used.
        ssm_reuse_interval: tokens between snapshots; checked only where an SSM layer exists.
        admission: which multiples of it get a snapshot. "every": each. "last": of a prompt the last one alone, and
            while decoding also the last one so far, which takes the place of the one decoded before unless others have
            made use of that. A sequence touches these two; all others stay until it is their turn to go.
        enable_partial_reuse: whether a last block may match in part; None: on without SSM layers, off with them.
        max_util_for_resume: share of a pool that other sequences may lock for one more to be let in.
        constraints: batches that must always fit on the GPU; they are floors of its pools.
        typical_step: how the bytes of a tier are split between layer groups; one sequence of 2,048 tokens if None.
        ssm_fraction: overrides that with the share of the bytes, in 0..1, that goes to SSM slots.
        event_buffer_size: events that are kept until they are taken; 0: none are made.

    Errors: ValueError for anything out of range.
    """

    tokens_per_block: int
    layers: tuple[LayerConfig, ...]
    cache_tiers: tuple[CacheTierConfig, ...]
    ssm_reuse_interval: int = DEFAULT_SSM_REUSE_INTERVAL
    enable_partial_reuse: bool | None = None
    max_util_for_resume: float = 0.97
    constraints: tuple[BatchDesc, ...] = ()
    typical_step: BatchDesc | None = None
    ssm_fraction: float | None = None
    event_buffer_size: int = 0
    admission: Admission = "every"

    def __post_init__(self) -> None:
        for name in ("layers", "cache_tiers", "constraints"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _set_integer(self, "tokens_per_block", "tokens_per_block")
        _require(len(self.layers) > 0, "layers", "at least one", self.layers)
        layer_ids = [layer.layer_id for layer in self.layers]
        _require(len(set(layer_ids)) == len(layer_ids), "layer ids", "each id once", layer_ids)
        _check_tiers(self.cache_tiers)
        for layer in self.layers:
            for buffer in layer.buffers:
                buffer.pages_per_block(self.tokens_per_block)
        _require(
            0 < self.max_util_for_resume <= 1, "max_util_for_resume", "above 0, at most 1", self.max_util_for_resume
        )
        if self.has_ssm:
            self._check_ssm()
        if self.ssm_fraction is not None:
            _require(self.has_ssm, "ssm_fraction", "None without SSM layers", self.ssm_fraction)
            low, high = (self.ssm_fraction > 0), (self.ssm_fraction < 1 or not self.has_attention)
            _require(low and high, "ssm_fraction", "a share between 0 and 1", self.ssm_fraction)
        _set_integer(self, "event_buffer_size", "event_buffer_size", 0)

    def _check_ssm(self) -> None:
        _require(self.admission in get_args(Admission), "admission", "'every' or 'last'", self.admission)
        _set_integer(self, "ssm_reuse_interval", "ssm_reuse_interval")
        _require(
            self.ssm_reuse_interval % self.tokens_per_block == 0,
            "ssm_reuse_interval",
            f"a multiple of tokens_per_block ({self.tokens_per_block})",
            self.ssm_reuse_interval,
        )
        off = self.enable_partial_reuse is not True
        _require(off, "enable_partial_reuse", "None or False with SSM layers", self.enable_partial_reuse)

    def __repr__(self) -> str:
        kinds = {"attention": 0, "sliding-window": 0, "SSM": 0}
        for layer in self.layers:
            is_windowed = isinstance(layer, AttentionLayerConfig) and layer.sliding_window_size is not None
            kind = "SSM" if isinstance(layer, SsmLayerConfig) else "sliding-window" if is_windowed else "attention"
            kinds[kind] += 1
        layers = " + ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        interval = f", interval {self.ssm_reuse_interval:,}" if self.has_ssm else ""
        tiers = ", ".join(f"{tier.name} {format_size(tier.quota)}" for tier in self.cache_tiers)
        return f"KVCacheManagerConfig(block {self.tokens_per_block:,}{interval}, {layers} layers, {tiers})"

    @property
    def tier_names(self) -> tuple[str, ...]:
        """The tiers that there are, from the GPU down: "gpu", "host", "disk"."""
        return tuple(tier.name for tier in self.cache_tiers)

    @property
    def partial_reuse(self) -> bool:
        return not self.has_ssm if self.enable_partial_reuse is None else self.enable_partial_reuse

    @property
    def has_windows(self) -> bool:
        return any(isinstance(layer, AttentionLayerConfig) and layer.sliding_window_size for layer in self.layers)

    @property
    def has_ssm(self) -> bool:
        return any(isinstance(layer, SsmLayerConfig) for layer in self.layers)

    @property
    def has_attention(self) -> bool:
        return any(isinstance(layer, AttentionLayerConfig) for layer in self.layers)
