"""Replays on memory with bytes: which memory, who computes on it, and what of it is written down."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmcache import HostMemory, KVCache, KVCacheManager, KVCacheManagerConfig
from ssmcache.events import CacheObserver
from ssmcache.memory.bandwidths import DEFAULT_BANDWIDTHS, BandwidthProfile
from ssmcache.memory.base import Memory
from ssmcache_sim.accounting import ReplayResult
from ssmcache_sim.decisions import DecisionLog, log_file
from ssmcache_sim.errors import SettingsError
from ssmcache_sim.payload import Kernels, Payload
from ssmcache_sim.payload_check import PayloadCheck, WrongBytes
from ssmcache_sim.payload_host import HostKernels
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import Prefill
from ssmcache_sim.trace import Int64Array, Trace

NUM_STREAMS = 4  # requests take turns, so pages and slots change streams all the time
_MEMORIES = "host, cuda or cuda:INDEX"


@dataclass(frozen=True, slots=True, eq=False)
class RealMemory:
    """A memory with bytes, and what computes there.

    Attributes:
        name: of the memory and its device, for titles.
        kernels: makes them, for so many requests and buffers.
    """

    name: str
    memory: Memory
    streams: tuple[Any, ...]
    kernels: Callable[[int, int], Kernels]


@contextmanager
def real_memory(kind: str) -> Iterator[RealMemory]:
    """A memory by its name, `host`, `cuda` or `cuda:1`; it is closed at the end of the block.

    Errors: SettingsError for another name, and for a GPU where torch, Triton or the device is missing.
    """
    if kind == "host":
        real = RealMemory("host memory", HostMemory(), tuple(range(NUM_STREAMS)), HostKernels)
    elif kind == "cuda" or kind.startswith("cuda:"):
        real = _cuda(kind)
    else:
        raise SettingsError(f"memory: expected {_MEMORIES}, got {kind!r}")
    try:
        yield real
    finally:
        real.memory.close()


def _cuda(kind: str) -> RealMemory:
    try:
        import torch

        from ssmcache.memory.cuda import CudaMemory
        from ssmcache_sim.payload_cuda import CudaKernels
    except ImportError as error:
        raise SettingsError(f"memory {kind}: expected the extra `cuda` to be installed, got {error}") from error
    try:
        memory = CudaMemory(kind)
    except ValueError as error:
        raise SettingsError(f"memory {kind}: {error}") from error
    device = memory.device
    with torch.cuda.device(device):
        streams = tuple(torch.cuda.Stream() for _ in range(NUM_STREAMS))

    def kernels(num_requests: int, num_buffers: int) -> Kernels:
        return CudaKernels(device, num_requests, num_buffers)

    return RealMemory(f"{torch.cuda.get_device_name(device)} ({device})", memory, streams, kernels)


class MemoryRunner:
    """A `Runner` on any memory, with a payload, a decision log, or both.

    Args:
        trace: in the blocks of the replay.
        streams: requests take turns on them.
        kernels: None: nothing is computed.
        write: takes the lines of the decision log; None: there is none.
    """

    def __init__(
        self,
        trace: Trace,
        memory: Memory,
        streams: tuple[Any, ...],
        kernels: Callable[[int, int], Kernels] | None = None,
        write: Callable[[str], None] | None = None,
    ) -> None:
        self._trace = trace
        self._memory = memory
        self._streams = streams
        self._make_kernels = kernels
        self._log = None if write is None else DecisionLog(write)
        self._kernels: Kernels | None = None
        self._payload: Payload | None = None
        self._started = self._capacity = -1  # the last request that has begun to compute, and its capacity

    def manager(self, config: KVCacheManagerConfig, observer: CacheObserver | None) -> KVCacheManager:
        make = KVCacheManager if self._log is None else self._log.manager
        try:
            manager = make(config, self._memory, observer)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        if self._make_kernels is not None:
            num_buffers = sum(len(group.buffers) for group in manager.groups)
            self._kernels = self._make_kernels(self._trace.num_requests, num_buffers)
            self._payload = Payload(manager, self._trace, self._kernels)
        return manager

    def stream(self, request: int) -> Any:
        return self._streams[request % len(self._streams)]

    def found(self, kv: KVCache) -> None:
        if self._log is not None:
            request = _number(kv)
            keys = self._trace.block_keys[self._trace.offsets[request] : self._trace.offsets[request + 1]]
            self._log.found(kv, int(self._trace.prompt_tokens[request]), keys)

    def compute(self, kv: KVCache, end: int, reserved: Mapping[int, int]) -> None:
        request = _number(kv)
        is_first = request != self._started
        if self._log is not None:
            if is_first or kv.capacity != self._capacity:
                self._log.allocated(kv)
            self._log.reserved(kv, reserved)
        if self._payload is not None:
            if is_first:
                self._payload.started(kv, request)
            self._payload.compute(kv, request, end, reserved)
        self._started, self._capacity = request, kv.capacity

    def check(self) -> PayloadCheck:
        """What was found wrong. Waits for the device."""
        assert self._kernels is not None, "nothing was computed"
        assert self._payload is not None, "nothing was computed"
        wrong = self._kernels.wrong_bytes()
        return PayloadCheck(
            self._payload.checked_bytes, int(wrong.sum()), self._payload.missing_pages, self._first(wrong)
        )

    def _first(self, wrong: Int64Array) -> WrongBytes | None:
        assert self._payload is not None, "nothing was computed"
        requests, buffers = wrong.nonzero()
        if not requests.size:
            return None
        request, buffer = int(requests[0]), int(buffers[0])
        return WrongBytes(request, self._payload.buffer_names[buffer], int(wrong[request, buffer]))


def replay_on(
    real: RealMemory,
    trace: Trace,
    config: KVCacheManagerConfig,
    *,
    prefill: Prefill = "reserved",
    bandwidths: BandwidthProfile = DEFAULT_BANDWIDTHS,
    progress: Callable[[int], None] | None = None,
    payload: bool = True,
    log: Path | None = None,
) -> tuple[ReplayResult, PayloadCheck | None]:
    """A replay on real memory, which may be used for one only.

    Args:
        bandwidths: what the copies would take, for the totals; nothing is measured.
        payload: write into every page and state, and check what is reused.
        log: where the decision log goes, compressed with gzip; None: there is none.

    Errors: as `replay`; SettingsError where the memory cannot have the tiers, or has not enough; OutputError.
    """
    coarse = trace.with_block(config.tokens_per_block)
    with nullcontext() if log is None else log_file(log) as write:
        runner = MemoryRunner(coarse, real.memory, real.streams, real.kernels if payload else None, write)
        result = replay(trace, config, prefill=prefill, bandwidths=bandwidths, progress=progress, runner=runner)
        return result, runner.check() if payload else None


def _number(kv: KVCache) -> int:
    assert isinstance(kv.id, int), "a replay numbers its sequences"
    return kv.id
