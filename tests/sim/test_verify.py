"""Traces on real memory: nothing wrong where nothing is, and everything that is put wrong is found."""

import gzip
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

import ssmcache_sim.verify as verify_module
from ssmcache import (
    AttentionLayerConfig,
    BufferConfig,
    DiskCacheTierConfig,
    GpuCacheTierConfig,
    HostCacheTierConfig,
    HostMemory,
    KVCacheManagerConfig,
    SsmLayerConfig,
)
from ssmcache.memory.base import SlotMoves, TransferError
from ssmcache_sim.accounting import ReplayResult
from ssmcache_sim.errors import SettingsError, TierFailedError
from ssmcache_sim.formats import ReadOptions, read_trace
from ssmcache_sim.payload_host import HostKernels
from ssmcache_sim.real_memory import RealMemory, real_memory, replay_on
from ssmcache_sim.replay import replay
from ssmcache_sim.trace import Trace
from ssmcache_sim.verify import Difference, verify

TraceOf = Callable[..., Trace]
BLOCK = 4
KV_BYTES, STATE_BYTES = 16, 64  # a token, a state


def config_of(
    path: Path, *slots: int, full: bool = True, window: int | None = None, ssm: bool = True, interval: int = 8
) -> KVCacheManagerConfig:
    """So many slots of each layer group in each tier."""
    layers: list[AttentionLayerConfig | SsmLayerConfig] = []
    if full:
        layers.append(AttentionLayerConfig(0, (BufferConfig("key", 8 * BLOCK), BufferConfig("value", 8 * BLOCK))))
    if window:
        layers.append(AttentionLayerConfig(1, (BufferConfig("kv", KV_BYTES * BLOCK),), window, 1))
    if ssm:
        layers.append(SsmLayerConfig(2, (BufferConfig("ssm_state", 48), BufferConfig("conv_state", 16))))
    kinds: list[Callable[[int], Any]] = [
        GpuCacheTierConfig,
        HostCacheTierConfig,
        lambda quota: DiskCacheTierConfig(quota, str(path)),
    ]
    slot_bytes = 64 * (full + bool(window) + ssm)
    tiers = [kind(slot_bytes * count) for kind, count in zip(kinds, slots, strict=False)]
    share = 1 / (full + bool(window) + ssm) if ssm else None
    return KVCacheManagerConfig(BLOCK, layers, tiers, ssm_reuse_interval=interval, ssm_fraction=share)


def prompts_at_random(seed: int, count: int = 60, longest: int = 40) -> list[list[int]]:
    """Prompts that begin like earlier ones, more often than not."""
    random = Random(seed)
    prompts: list[list[int]] = []
    for _ in range(count):
        start = random.choice(prompts)[: random.randint(0, longest)] if prompts else []
        prompt = (start + [random.randint(0, 2) for _ in range(random.randint(1, longest // 2))])[:longest]
        prompts.append(prompt)
    return prompts


def host(memory: HostMemory) -> RealMemory:
    return RealMemory("host memory", memory, (0, 1), HostKernels)


@pytest.mark.parametrize("prefill", ["reserved", "chunked"])
@pytest.mark.parametrize("slots", [(16,), (14, 6), (13, 4, 12)])
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"ssm": False},
        {"full": False},
        {"window": 6},
        {"window": 9, "full": False, "ssm": False},
    ],
    ids=["hybrid", "attention", "ssm", "hybrid-window", "window"],
)
@pytest.mark.parametrize("seed", range(3))
def test_random_traces_pass_on_host_memory(
    trace_of: TraceOf, tmp_path: Path, seed: int, model: dict[str, Any], slots: tuple[int, ...], prefill: Any
) -> None:
    trace = trace_of(prompts_at_random(seed), BLOCK)
    answer = verify(trace, config_of(tmp_path, *slots, **model), host(HostMemory()), prefill=prefill)
    assert answer.difference is None
    assert answer.payload.wrong_bytes == answer.payload.missing_pages == 0
    assert answer.passed
    assert answer.num_decisions > trace.num_requests
    assert answer.payload.checked_bytes > 0


def test_all_that_is_reused_is_compared(trace_of: TraceOf, tmp_path: Path) -> None:
    """No prompt ends with a block, so it is the KV that was found, and a state where tokens were skipped."""
    prompts = [[*prompt, 9] if len(prompt) % BLOCK == 0 else prompt for prompt in prompts_at_random(5)]
    answer = verify(trace_of(prompts, BLOCK), config_of(tmp_path, 20), host(HostMemory()))
    result = answer.result
    num_states = int((result.usable > 0).sum())
    assert num_states > 5
    assert answer.payload.checked_bytes == int(result.attention.sum()) * KV_BYTES + num_states * STATE_BYTES


@pytest.mark.parametrize("slots", [(24,), (20, 6, 9)])
def test_what_requests_generate_is_computed_and_reused_too(
    write_trace: Callable[..., Path], tmp_path: Path, slots: tuple[int, ...]
) -> None:
    """Each turn's prompt is the last one, its output of nine tokens, and three new tokens."""
    random = Random(8)
    ids: dict[tuple[int, ...], int] = {}
    rows = []
    texts: dict[str, list[int]] = {name: [] for name in "abcdef"}
    for turn in range(1, 4):
        for name, text in texts.items():
            prompt = text + [random.randint(0, 3) for _ in range(3)]
            ends = range(BLOCK, len(prompt) + BLOCK, BLOCK)
            hash_ids = [ids.setdefault(tuple(prompt[:end]), len(ids)) for end in ends]
            rows.append(
                {"timestamp": len(rows), "input_length": len(prompt), "output_length": 9, "hash_ids": hash_ids}
                | {"session_id": name, "turn": turn}
            )
            texts[name] = prompt + [random.randint(0, 3) for _ in range(9)]
    path = write_trace(rows)
    answers = [
        verify(read_trace(path, BLOCK, ReadOptions(outputs=outputs)), config_of(tmp_path, *slots), host(HostMemory()))
        for outputs in (False, True)
    ]
    assert all(answer.passed for answer in answers)
    hits = [answer.result.totals.usable_hit_tokens for answer in answers]
    assert hits[1] > hits[0]
    assert answers[1].payload.checked_bytes > answers[0].payload.checked_bytes


Fault = Callable[["Broken", SlotMoves], SlotMoves | None]


class Broken(HostMemory):
    """What a fault returns is copied instead; None: nothing."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault
        self.num_faults = 0

    def copy(self, moves: SlotMoves, stream: Any) -> None:
        instead = self.fault(self, moves)
        self.num_faults += instead is not moves
        if instead is not None:
            super().copy(instead, stream)


def lost(source: int, destination: int) -> Fault:
    def fault(memory: Broken, moves: SlotMoves) -> SlotMoves | None:
        return None if (moves.source_tier, moves.destination_tier) == (source, destination) else moves

    return fault


def mixed_up(memory: Broken, moves: SlotMoves) -> SlotMoves:
    return moves._replace(destinations=list(moves.destinations)[::-1])


def flipped(memory: Broken, moves: SlotMoves) -> SlotMoves:
    """One bit of a page of each batch that goes down."""
    if moves.source_tier == 0 and moves.destination_tier and moves.pool == 0:
        memory.view(0)[moves.sources[0], 7] ^= 16
        memory.num_faults += 1
    return moves


@pytest.mark.parametrize(
    "fault",
    [lost(0, 0), lost(0, 1), lost(1, 0), lost(2, 0), mixed_up, flipped],
    ids=["state not copied", "not moved down", "not up", "not from disk", "mixed up", "a bit flipped"],
)
def test_copies_that_go_wrong_are_found(trace_of: TraceOf, tmp_path: Path, fault: Fault) -> None:
    trace = trace_of(prompts_at_random(1, count=150), BLOCK)
    memory = Broken(fault)
    answer = verify(trace, config_of(tmp_path, 13, 6, 30), host(memory))
    assert memory.num_faults
    assert answer.difference is None  # no decision reads a byte
    assert answer.payload.wrong_bytes > 0
    assert not answer.passed
    first = answer.payload.first
    assert first is not None
    assert first.num_bytes > 0
    assert first.buffer in ("layer 0 key", "layer 0 value", "layer 2 ssm_state", "layer 2 conv_state")


def test_a_single_wrong_byte_is_told_with_its_request_and_buffer(trace_of: TraceOf, tmp_path: Path) -> None:
    trace = trace_of([[1] * 9, [2] * 9, [1] * 9, [2] * 9], BLOCK)

    class Spoiled(HostKernels):
        def check_pages(self, buffer: Any, pages: Any, start: int, stop: int, request: int) -> None:
            if request == 2 and buffer.name == "layer 0 value":
                buffer.view[pages.slots[1], 3] ^= 1 << 9
            super().check_pages(buffer, pages, start, stop, request)

    answer = verify(trace, config_of(tmp_path, 30), RealMemory("", HostMemory(), (0,), Spoiled))
    first = answer.payload.first
    assert first is not None
    assert (answer.payload.wrong_bytes, first.request, first.buffer, first.num_bytes) == (1, 2, "layer 0 value", 1)


def test_a_disk_that_cannot_be_read_ends_the_replay_with_one_line(trace_of: TraceOf, tmp_path: Path) -> None:
    """What was never written cannot be read."""
    trace = trace_of(prompts_at_random(1, count=150), BLOCK)
    with pytest.raises(TierFailedError, match=r"request \d+: expected a disk tier that can .* got pages that cannot"):
        verify(trace, config_of(tmp_path, 13, 6, 30), host(Broken(lost(1, 2))))


def test_a_tier_that_cannot_be_written_ends_the_replay_with_one_line(trace_of: TraceOf, tmp_path: Path) -> None:
    class Full(HostMemory):
        def copy(self, moves: SlotMoves, stream: Any) -> None:
            if moves.destination_tier == 1:
                raise TransferError(1, (), "full")
            super().copy(moves, stream)

    trace = trace_of([[index] * 9 for index in range(40)], BLOCK)
    with pytest.raises(TierFailedError, match=r"request \d+: expected a host tier that can be .* got a failed copy"):
        verify(trace, config_of(tmp_path, 8, 8, interval=4), host(Full()))


def test_the_first_decision_that_differs_is_told_with_its_request(
    trace_of: TraceOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulation is given another trace, in which request 2 shares nothing."""
    trace = trace_of([[1] * 9, [2] * 9, [1] * 9, [2] * 9], BLOCK)
    other = trace_of([[1] * 9, [2] * 9, [3] * 9, [2] * 9], BLOCK)

    def replay_other(replayed: Trace, *arguments: Any, **options: Any) -> ReplayResult:
        return replay(other, *arguments, **options)

    monkeypatch.setattr(verify_module, "replay", replay_other)
    answer = verify(trace, config_of(tmp_path, 20), host(HostMemory()), log=tmp_path / "log.gz")
    found = "found: tree {0}, attention {0}, usable {0}"
    line_number = lines_of(tmp_path / "log.gz").index(found.format(8)) + 1
    assert answer.difference == Difference(line_number, "request 2", found.format(0), found.format(8))
    assert answer.num_decisions == line_number - 1
    assert answer.payload.passed
    assert not answer.passed


def test_a_simulation_that_ends_early_differs(
    trace_of: TraceOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, shorter = trace_of([[1] * 9, [1] * 9], BLOCK), trace_of([[1] * 9], BLOCK)

    def replay_shorter(replayed: Trace, *arguments: Any, **options: Any) -> ReplayResult:
        return replay(shorter, *arguments, **options)

    monkeypatch.setattr(verify_module, "replay", replay_shorter)
    difference = verify(trace, config_of(tmp_path, 20), host(HostMemory())).difference
    assert difference is not None
    assert (difference.simulated, difference.real) == (None, "request 1: 9 tokens in its prompt")


def test_pools_of_whole_pages_are_simulated_as_such(trace_of: TraceOf, tmp_path: Path) -> None:
    class Paged(HostMemory):
        def grain(self, tier: int) -> int:
            return 1000

    trace = trace_of(prompts_at_random(2), BLOCK)
    answer = verify(trace, config_of(tmp_path, 11), host(Paged()), log=tmp_path / "log.gz")
    assert answer.passed
    # 1,408 bytes are 2,000 in pages of 1,000, one for each layer group
    assert lines_of(tmp_path / "log.gz")[0] == "slots of gpu: attention0 15, ssm1 15"


def lines_of(path: Path) -> list[str]:
    with gzip.open(path, "rt") as lines:
        return lines.read().splitlines()


def test_the_log_of_three_requests(trace_of: TraceOf, tmp_path: Path) -> None:
    """By hand: 4 pages and 4 states, blocks of 4, snapshots every 8 tokens."""
    trace = trace_of([[1] * 9, [1] * 9, [2] * 13], BLOCK)
    with real_memory("host") as real:
        replay_on(real, trace, config_of(tmp_path, 4), log=tmp_path / "log.gz")
    lines = lines_of(tmp_path / "log.gz")
    one, two, three = (trace.block_keys[place] for place in (1, 5, 6))  # of 8 tokens, of 8 and 12 of the last request
    assert lines == [
        "slots of gpu: attention0 4, ssm1 4",
        "request 0: 9 tokens in its prompt",
        "found: tree 0, attention 0, usable 0",
        "allocated attention0: slots 0-2",
        "live state ssm1: slot 0",
        "reserved ssm1: 8 in slot 1",
        f"stored attention0: gpu 2 to {one}",
        f"stored ssm1: gpu 1 to {one}",
        "request 1: 9 tokens in its prompt",
        "found: tree 8, attention 8, usable 8",
        "copied ssm1: gpu 1 > gpu 0",
        "allocated attention0: slots 2",
        "live state ssm1: slot 0",
        "request 2: 13 tokens in its prompt",
        "found: tree 0, attention 0, usable 0",
        f"removed attention0: gpu 2 to {one}",
        f"removed ssm1: gpu 1 to {one}",
        "allocated attention0: slots 2, 0-1, 3",
        "live state ssm1: slot 0",
        "reserved ssm1: 8 in slot 1",
        f"stored attention0: gpu 3 to {three}",
        f"stored ssm1: gpu 1 to {two}",
    ]


@pytest.mark.parametrize("slots", [(16,), (13, 6, 14)])
def test_the_log_adds_up_to_what_the_replay_counts(trace_of: TraceOf, tmp_path: Path, slots: Sequence[int]) -> None:
    trace = trace_of(prompts_at_random(3, count=200), BLOCK)
    path = tmp_path / "log.gz"
    answer = verify(trace, config_of(tmp_path, *slots), host(HostMemory()), log=path)
    usable = stored = removed = 0
    copied: Counter[str] = Counter()
    for line in lines_of(path):
        what, _, rest = line.partition(": ")
        blocks = [int(part.split(" to ")[0].split()[-1]) for part in rest.split(", ") if " to " in part]
        usable += int(rest.rpartition(" ")[2]) // BLOCK * BLOCK if what == "found" else 0
        stored += sum(blocks) if what == "stored ssm1" else 0
        removed += sum(blocks) if what == "removed ssm1" else 0
        if what.startswith("copied"):
            source, destination = (end.split(" ", 1) for end in rest.split(" > "))
            assert num_slots(source[1]) == num_slots(destination[1])
            copied[f"{source[0]} > {destination[0]}"] += num_slots(source[1])
    totals = answer.result.totals
    assert usable == totals.usable_hit_tokens > 0
    assert stored == totals.snapshots.taken > 0
    assert removed == totals.snapshots.evicted > 0
    if len(slots) > 1:
        counts: Counter[str] = Counter()
        for each in totals.moved:
            counts[f"{each.source_tier} > {each.tier}"] += each.num_slots
        assert copied == counts


def num_slots(text: str) -> int:
    """Of a list like `3-7, 2`."""
    ends = [part.split("-") for part in text.split(", ")]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in ends)


def test_names_of_memories_that_do_not_exist_are_refused() -> None:
    with pytest.raises(SettingsError, match="memory: expected host, cuda or cuda:INDEX, got 'gpu'"), real_memory("gpu"):
        pass


def test_a_gpu_that_is_not_there_is_one_line() -> None:
    with pytest.raises(SettingsError, match=r"memory cuda:77: .*expected") as caught, real_memory("cuda:77"):
        pass
    assert "\n" not in str(caught.value)


def test_buffers_that_are_not_whole_words_are_refused(trace_of: TraceOf) -> None:
    layers = [AttentionLayerConfig(3, (BufferConfig("key", 6 * BLOCK),))]
    config = KVCacheManagerConfig(BLOCK, layers, [GpuCacheTierConfig(4096)])
    with pytest.raises(SettingsError, match="payload of layer 3 key: expected a multiple of 8 bytes a token, got 6 at"):
        verify(trace_of([[1] * 9], BLOCK), config, host(HostMemory()))


def test_a_memory_without_room_for_a_slot_is_refused(trace_of: TraceOf, tmp_path: Path) -> None:
    class NoRoom(HostMemory):
        def resize(self, tier: int, num_slots: Any) -> bool:
            return False

    with pytest.raises(SettingsError, match="expected a memory with room for"):
        verify(trace_of([[1] * 9], BLOCK), config_of(tmp_path, 20), host(NoRoom()))
