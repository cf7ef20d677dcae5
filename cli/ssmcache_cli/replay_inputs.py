"""What `replay`, `verify` and `explain` make of their options: a trace, settings and a config."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ssmcache import KVCacheManagerConfig
from ssmcache.memory.bandwidths import DEFAULT_BANDWIDTHS, BandwidthProfile
from ssmcache.models import ModelSpec, load_model
from ssmcache_cli.console import note_broken_rows, read_machine, read_shown
from ssmcache_sim.errors import SettingsError, SizeError, UserError
from ssmcache_sim.formats import ReadOptions, read_trace
from ssmcache_sim.settings import ReplaySettings, build_config, make_settings, parse_admission, parse_prefill
from ssmcache_sim.sizes import parse_size, parse_tier_size
from ssmcache_sim.trace import Trace

SIMULATED = "simulated"

DiskPathOption = Annotated[
    Path | None,
    typer.Option(
        help="Directory for the disk tier of a real memory. A simulated disk has no files: then the path only goes "
        "into the manifest.",
        metavar="DIR",
    ),
]


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of a replay as they were given; see `ReplaySettings`."""

    model: str
    tokens_per_block: int | None
    ssm_reuse_interval: int | None
    gpu_memory: str
    host_memory: str
    disk_memory: str
    disk_path: Path | None
    ssm_fraction: float | None
    kv_dtype: str | None
    state_dtype: str | None
    prefill: str
    memory: str = SIMULATED
    bandwidth_profile: Path | None = None
    admission: str = "every"


@dataclass(frozen=True, slots=True, eq=False)
class ReplayInputs:
    """A trace, a model, what to replay with, the manager's config for that, and how fast copies are taken to be."""

    requests: Trace
    spec: ModelSpec
    settings: ReplaySettings
    config: KVCacheManagerConfig
    bandwidths: BandwidthProfile


def read_inputs(
    asked: Asked, trace: Path, trace_block: int | None, reading: ReadOptions, num_requests: int | None, shown: bool
) -> ReplayInputs:
    """Checks the options, the cheap ones before the trace is read, which is `shown`. Errors: UserError, ModelError."""
    gpu_bytes, how = parse_size(asked.gpu_memory), parse_prefill(asked.prefill)
    admitted = parse_admission(asked.admission)
    host_bytes = parse_tier_size(asked.host_memory, "--host-memory")
    disk_bytes = parse_tier_size(asked.disk_memory, "--disk-memory")
    path = asked.disk_path
    if path is not None and not disk_bytes:
        raise SizeError(f"--disk-path: expected --disk-memory beside it, got {str(path)!r} alone")
    if asked.memory != SIMULATED:
        _check_real(asked.memory, gpu_bytes, disk_bytes, path)
    elif path is not None:
        print(f"--disk-path: the disk is simulated, nothing is read or written at {path}", file=sys.stderr)
    profile = asked.bandwidth_profile
    if profile is not None and not (host_bytes or disk_bytes):
        raise UserError(
            "--bandwidth-profile: expected --host-memory or --disk-memory beside it, without which no copy is timed"
        )
    bandwidths = DEFAULT_BANDWIDTHS if profile is None else read_machine(profile).bandwidths
    spec = load_model(asked.model)
    requests = read_shown(read_trace, trace, trace_block, reading, shown)
    note_broken_rows(requests)
    if num_requests is not None:
        requests = requests.first_requests(num_requests)
    settings = make_settings(
        spec,
        requests.tokens_per_block if asked.tokens_per_block is None else asked.tokens_per_block,
        gpu_memory_bytes=gpu_bytes,
        ssm_reuse_interval=asked.ssm_reuse_interval,
        ssm_fraction=asked.ssm_fraction,
        kv_dtype=asked.kv_dtype,
        state_dtype=asked.state_dtype,
        prefill=how,
        host_memory_bytes=host_bytes,
        disk_memory_bytes=disk_bytes,
        disk_path=None if path is None else str(path),
        admission=admitted,
    )
    return ReplayInputs(requests, spec, settings, build_config(spec, settings), bandwidths)


def _check_real(memory: str, gpu_bytes: int | None, disk_bytes: int, path: Path | None) -> None:
    if gpu_bytes is None:
        raise SettingsError(f"--gpu-memory: expected a size for --memory {memory}, got unlimited")
    if disk_bytes and path is None:
        raise SettingsError(f"--disk-path: expected a directory for the disk tier of --memory {memory}, got none")
    if path is not None and not path.is_dir():
        raise SettingsError(f"--disk-path: expected a directory, got {str(path)!r}")
