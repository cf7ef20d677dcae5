"""The settings of one replay, and the manager's config that follows from them and a model."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

from ssmcache.config import (
    DEFAULT_SSM_REUSE_INTERVAL,
    Admission,
    CacheTierConfig,
    DiskCacheTierConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    KVCacheManagerConfig,
)
from ssmcache.layout import LayerGroupKind, layer_groups
from ssmcache.models import ModelSpec, dtype_name
from ssmcache_sim.errors import SettingsError
from ssmcache_sim.schemas import Positive, Share
from ssmcache_sim.sizes import format_size
from ssmcache_sim.trace import MAX_BLOCK, MAX_INTERVAL

Prefill = Literal["reserved", "chunked"]
# a disk tier has to have a path, but a simulated one has no files
_SIMULATED_DISK = "simulated"


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """What a replay depends on besides its trace.

    Attributes:
        model: name of the model, for titles and manifests.
        ssm_reuse_interval: tokens between snapshots; None for a model without SSM layers.
        gpu_memory_bytes: for the cache; None: unlimited.
        host_memory_bytes, disk_memory_bytes: for what the tiers above have no room for; 0: no such tier.
        ssm_fraction: share of the memory that goes to SSM slots; None: the manager's rule.
        kv_dtype, state_dtype: of KV and of SSM states.
        prefill: how snapshots inside a prompt are made: slots reserved ahead and one commit, or one commit a chunk.
        disk_path: directory for the files of the disk tier; None where none was named. A simulated disk has no files.
        admission: whether every multiple of the interval gets a snapshot, or the last one of a request; None for a
            model without SSM layers.
    """

    model: str
    tokens_per_block: Positive
    ssm_reuse_interval: Positive | None
    gpu_memory_bytes: Positive | None
    ssm_fraction: Share | None
    kv_dtype: str
    state_dtype: str
    prefill: Prefill
    host_memory_bytes: int = 0
    disk_memory_bytes: int = 0
    disk_path: str | None = None
    admission: Admission | None = "every"

    def in_words(self) -> str:
        """Block, interval and memory, for people."""
        interval = self.ssm_reuse_interval
        snapshots = "no SSM layers" if interval is None else f"interval {interval:,}"
        if self.admission == "last":
            snapshots += ", last boundary only"
        below = (("host", self.host_memory_bytes), ("disk", self.disk_memory_bytes))
        tiers = "".join(f", {name} {format_size(size)}" for name, size in below if size)
        memory = f"{'GPU' if tiers else 'memory'} {format_size(self.gpu_memory_bytes)}{tiers}"
        return f"{self.model}, block {self.tokens_per_block:,}, {snapshots}, {memory}"


def parse_admission(text: str) -> Admission:
    """Errors: SettingsError."""
    if text not in get_args(Admission):
        raise SettingsError(f"admission: expected {' or '.join(get_args(Admission))}, got {text!r}")
    return cast(Admission, text)


def parse_admissions(text: str) -> tuple[Admission, ...]:
    """A list with commas, `every` first, each once. Errors: SettingsError."""
    given = {parse_admission(part.strip()) for part in text.split(",")}
    return tuple(name for name in get_args(Admission) if name in given)


def parse_prefill(text: str) -> Prefill:
    """Errors: SettingsError."""
    if text not in get_args(Prefill):
        raise SettingsError(f"prefill: expected {' or '.join(get_args(Prefill))}, got {text!r}")
    return cast(Prefill, text)


def make_settings(
    model: ModelSpec,
    tokens_per_block: int,
    *,
    gpu_memory_bytes: int | None,
    ssm_reuse_interval: int | None = None,
    ssm_fraction: float | None = None,
    kv_dtype: str | None = None,
    state_dtype: str | None = None,
    prefill: Prefill = "reserved",
    host_memory_bytes: int = 0,
    disk_memory_bytes: int = 0,
    disk_path: str | None = None,
    admission: Admission = "every",
) -> ReplaySettings:
    """Settings with the defaults of the model filled in, and without interval and admission where the model has no SSM
    layers.

    Args:
        ssm_reuse_interval: None: the smallest multiple of the block that is not below the manager's default.
        kv_dtype, state_dtype: None: what the model's config says.

    Errors: ModelError for an unknown dtype.
    """
    if not model.num_ssm_layers:
        ssm_reuse_interval = None
    elif ssm_reuse_interval is None and tokens_per_block > 0:
        ssm_reuse_interval = -(-DEFAULT_SSM_REUSE_INTERVAL // tokens_per_block) * tokens_per_block
    return ReplaySettings(
        model=model.name,
        tokens_per_block=tokens_per_block,
        ssm_reuse_interval=ssm_reuse_interval,
        gpu_memory_bytes=gpu_memory_bytes,
        ssm_fraction=ssm_fraction,
        kv_dtype=dtype_name(kv_dtype or model.kv_dtype),
        state_dtype=dtype_name(state_dtype or model.state_dtype),
        prefill=prefill,
        host_memory_bytes=host_memory_bytes,
        disk_memory_bytes=disk_memory_bytes,
        disk_path=disk_path,
        admission=admission if model.num_ssm_layers else None,
    )


def build_config(model: ModelSpec, settings: ReplaySettings) -> KVCacheManagerConfig:
    """The manager's config for these settings.

    Errors: SettingsError for a combination that no manager can have.
    """
    interval = DEFAULT_SSM_REUSE_INTERVAL if settings.ssm_reuse_interval is None else settings.ssm_reuse_interval
    if settings.tokens_per_block > MAX_BLOCK or interval > MAX_INTERVAL:
        expected = f"blocks of up to {MAX_BLOCK:,} and intervals of up to {MAX_INTERVAL:,} tokens"
        raise SettingsError(f"settings: expected {expected}, got {settings.tokens_per_block:,} and {interval:,}")
    try:
        return KVCacheManagerConfig(
            tokens_per_block=settings.tokens_per_block,
            layers=model.cache_layers(settings.tokens_per_block, settings.kv_dtype, settings.state_dtype),
            cache_tiers=_tiers(settings),
            ssm_reuse_interval=interval,
            ssm_fraction=settings.ssm_fraction,
            admission=settings.admission or "every",
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _tiers(settings: ReplaySettings) -> tuple[CacheTierConfig, ...]:
    """Errors: SettingsError for tiers that could never be used."""
    sizes = {"host": settings.host_memory_bytes, "disk": settings.disk_memory_bytes}
    if settings.gpu_memory_bytes is None and any(sizes.values()):
        name, size = next((name, size) for name, size in sizes.items() if size)
        raise SettingsError(f"{name} memory: expected none below unlimited GPU memory, got {format_size(size)}")
    tiers: list[CacheTierConfig] = [GpuCacheTierConfig(quota=settings.gpu_memory_bytes)]
    if settings.host_memory_bytes:
        tiers.append(HostCacheTierConfig(quota=settings.host_memory_bytes))
    if settings.disk_memory_bytes:
        tiers.append(DiskCacheTierConfig(settings.disk_memory_bytes, settings.disk_path or _SIMULATED_DISK))
    elif settings.disk_path is not None:
        raise SettingsError(f"disk path: expected a size of the disk tier beside it, got {settings.disk_path!r} alone")
    return tuple(tiers)


def slot_bytes_of(config: KVCacheManagerConfig, kind: LayerGroupKind) -> int:
    """Bytes of a slot: of a block's KV, or of a state; 0 if the model has no such layers."""
    return next((group.slot_bytes for group in layer_groups(config) if group.kind is kind), 0)
