"""Traces for the tests: made from token lists, so that what they share is known without looking at ids."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import pytest

from ssmcache import AttentionLayerConfig, BufferConfig, GpuCacheTierConfig, KVCacheManagerConfig, SsmLayerConfig
from ssmcache_sim import scratch
from ssmcache_sim.formats import ReadOptions, read_trace
from ssmcache_sim.trace import Trace

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=[None, (8, 3)], ids=["in_memory", "in_files"])
def wherever_ids_lie(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that use this run twice: the second time ids lie in files, and are worked on three at a time."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param is not None:
            patch.setattr(scratch, "LARGE", request.param[0])
            patch.setattr(scratch, "PIECE", request.param[1])
        yield


class TinyConfig(Protocol):
    def __call__(
        self, block: int, *, num_pages: int | None, interval: int | None = None, num_states: int = 0
    ) -> KVCacheManagerConfig: ...


def _rows_of(prompts: Sequence[Sequence[int]], block: int, full_only: bool = False) -> list[dict[str, Any]]:
    ids: dict[tuple[int, ...], int] = {}
    rows = []
    for index, prompt in enumerate(prompts):
        ends = range(block, len(prompt) + (1 if full_only else block), block)
        hash_ids = [ids.setdefault(tuple(prompt[:end]), 7 * len(ids) + 3) for end in ends]
        rows.append({"timestamp": index, "input_length": len(prompt), "output_length": 1, "hash_ids": hash_ids})
    return rows


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., list[dict[str, Any]]]:
    """Mooncake rows of prompts given as tokens: an id stands for all tokens up to the end of its block."""
    return _rows_of


@pytest.fixture(scope="session")
def write_trace(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes rows (objects, or raw lines) as a trace file of that name, each time in a new folder."""

    def write(rows: Sequence[Any], name: str = "trace.jsonl") -> Path:
        path = tmp_path_factory.mktemp("trace") / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def trace_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trace]:
    """The trace of prompts given as tokens, through a file."""
    folder, numbers = tmp_path_factory.mktemp("traces"), count()

    def make(prompts: Sequence[Sequence[int]], block: int, full_only: bool = False) -> Trace:
        path = folder / f"{next(numbers)}.jsonl"
        path.write_text("\n".join(map(json.dumps, _rows_of(prompts, block, full_only))))
        return read_trace(path, block)

    return make


@pytest.fixture(scope="session")
def trace_with_outputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trace]:
    """The trace of (prompt, output) pairs given as tokens, through a file that records both."""
    folder, numbers = tmp_path_factory.mktemp("outputs"), count()

    def make(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], block: int) -> Trace:
        path = folder / f"{next(numbers)}.jsonl"
        rows = [
            {"arrival_time_ns": time * 1_000_000, "input_toks": len(prompt), "output_toks": len(output)}
            | {"input_tok_ids": list(prompt), "output_tok_ids": list(output)}
            for time, (prompt, output) in enumerate(pairs)
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
        return read_trace(path, block, ReadOptions(outputs=True))

    return make


@pytest.fixture(scope="session")
def sample_path() -> Path:
    """The bundled sample."""
    return REPOSITORY / "examples" / "traces" / "mooncake_conversation_1000.jsonl.gz"


@pytest.fixture(scope="session")
def shared_traces() -> Path:
    """The traces beside the repository, which are not part of the product."""
    folder = REPOSITORY.parent / "shared" / "traces"
    if not folder.is_dir():
        pytest.skip("no ../shared/traces")
    return folder


@pytest.fixture(scope="session")
def conversation(shared_traces: Path) -> Trace:
    """The whole conversation trace."""
    return read_trace(shared_traces / "mooncake_conversation.jsonl.gz")


@pytest.fixture(scope="session")
def tiny_config() -> TinyConfig:
    """A manager with exactly so many pages and SSM slots (None: unlimited); no SSM layer without an interval."""
    return _tiny_config


def _tiny_config(
    block: int, *, num_pages: int | None, interval: int | None = None, num_states: int = 0
) -> KVCacheManagerConfig:
    if interval is None:
        attention = AttentionLayerConfig(0, (BufferConfig("key", block),))
        tier = GpuCacheTierConfig(None if num_pages is None else num_pages * block)
        return KVCacheManagerConfig(tokens_per_block=block, layers=(attention,), cache_tiers=(tier,))
    # page bytes * pages = state bytes * states, so that half the quota is exactly each pool
    attention = AttentionLayerConfig(0, (BufferConfig("key", block * max(num_states, 1)),))
    state = SsmLayerConfig(1, (BufferConfig("ssm_state", block * (num_pages or 1)),))
    quota = None if num_pages is None else 2 * block * num_states * num_pages
    return KVCacheManagerConfig(block, (attention, state), (GpuCacheTierConfig(quota),), interval, ssm_fraction=0.5)
