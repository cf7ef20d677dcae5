"""The same trace on simulated and on real memory: equal decisions, line for line, and every reused byte."""

import gzip
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ssmcache import KVCacheManagerConfig, SimulatedMemory
from ssmcache_sim.accounting import ReplayResult
from ssmcache_sim.payload_check import PayloadCheck
from ssmcache_sim.real_memory import MemoryRunner, RealMemory, replay_on
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import Prefill
from ssmcache_sim.trace import Trace


@dataclass(frozen=True, slots=True)
class Difference:
    """The first line of two decision logs that differs; None where a log had ended."""

    line_number: int
    request: str
    simulated: str | None
    real: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Verification:
    """What came of running a trace on both memories.

    Attributes:
        num_decisions: lines that were compared and equal.
        result: of the replay on the real memory.
    """

    num_decisions: int
    difference: Difference | None
    payload: PayloadCheck
    result: ReplayResult

    @property
    def passed(self) -> bool:
        """Whether both decided the same, and every byte was right."""
        return self.difference is None and self.payload.passed


class _DifferenceError(Exception):
    def __init__(self, difference: Difference) -> None:
        super().__init__()
        self.difference = difference


def verify(
    trace: Trace,
    config: KVCacheManagerConfig,
    real: RealMemory,
    *,
    prefill: Prefill = "reserved",
    progress: Callable[[int], None] | None = None,
    log: Path | None = None,
) -> Verification:
    """Replays a trace on `real`, with a payload that is checked on each reuse, then on simulated memory with pools of
    the same sizes. The second run ends at the first decision that differs.

    Args:
        progress: called with the requests served so far, of both runs together: twice those of the trace at the end.
        log: where the decision log of the real memory is kept.

    Errors: as `replay`; SettingsError where the memory cannot have the tiers, or has not enough; OutputError.
    """
    report = progress or (lambda done: None)
    coarse = trace.with_block(config.tokens_per_block)
    with ExitStack() as end:
        path = log or Path(end.enter_context(tempfile.TemporaryDirectory())) / "decisions.log.gz"
        result, payload = replay_on(real, trace, config, prefill=prefill, progress=report, log=path)
        assert payload is not None, "a payload was asked for"
        grains = tuple(real.memory.grain(tier) for tier in range(len(config.cache_tiers)))
        comparison = _Comparison(end.enter_context(gzip.open(path, "rt", encoding="utf-8")))
        streams = tuple(range(len(real.streams)))
        simulation = MemoryRunner(coarse, SimulatedMemory(grains=grains), streams, write=comparison.add)

        def report_second(done: int) -> None:
            report(trace.num_requests + done)

        try:
            replay(trace, config, prefill=prefill, runner=simulation, progress=report_second)
            comparison.finish()
        except _DifferenceError as error:
            return Verification(comparison.num_lines, error.difference, payload, result)
        return Verification(comparison.num_lines, None, payload, result)


class _Comparison:
    """Compares the lines of a simulation with those of the real log. Errors: _DifferenceError where they part."""

    def __init__(self, real: Iterator[str]) -> None:
        self._real = real
        self._request = "before the first request"
        self.num_lines = 0

    def add(self, line: str | None) -> None:
        real = next(self._real, None)
        real = None if real is None else real.rstrip("\n")
        if line != real:
            raise _DifferenceError(Difference(self.num_lines + 1, self._request, line, real))
        if line is not None:
            self.num_lines += 1
            if line.startswith("request "):
                self._request = line.partition(":")[0]

    def finish(self) -> None:
        self.add(None)
