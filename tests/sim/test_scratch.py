"""Block ids beyond memory: they lie in files, and what is made of them is the same."""

import os
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmcache_sim import scratch
from ssmcache_sim.ceilings import blocks_seen_before, infinite_cache
from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats import ReadOptions, read_trace
from ssmcache_sim.formats.binary import write_binary
from ssmcache_sim.formats.numbering import first_wrong_place
from ssmcache_sim.generate import PRESETS, generate_lines
from ssmcache_sim.scratch import GrowingIds, dense, gather, new_ids
from ssmcache_sim.trace import Trace

SIZES = st.integers(1, 6)


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Arrays of a thousand ids lie in files of this folder."""
    monkeypatch.setattr(scratch, "LARGE", 1000)
    monkeypatch.setattr(scratch, "PIECE", 300)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
@given(values=st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 9), min_size=1, max_size=60), size=SIZES)
def test_ids_are_numbered_in_pieces_as_at_once(dtype: Any, values: list[int], size: int) -> None:
    ids = np.array(values, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "PIECE", size)
        distinct, places = dense(ids)
    assert distinct.tolist() == sorted(set(values))
    assert distinct[places].tolist() == values


@given(rows=st.lists(st.lists(st.integers(0, 4), max_size=5), max_size=8), size=SIZES)
def test_the_first_wrong_id_is_found_in_pieces(rows: list[list[int]], size: int) -> None:
    ids = np.array([each for row in rows for each in row], np.int64)
    expected, before_of, place = None, dict[int, int](), 0
    for row in rows:
        for before, each in zip([-1, *row], row, strict=False):
            if before_of.setdefault(each, before) != before and expected is None:
                expected = place, before, before_of[each]
            place += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "PIECE", size)
        found = first_wrong_place(ids, np.array([len(row) for row in rows], np.int64), 5)
    assert (None if found is None else (found.place, found.previous, found.usual)) == expected


def test_ids_that_come_one_after_the_other_are_all_there(in_files: Path) -> None:
    ids = GrowingIds("Q")
    expected: list[int] = []
    for start in range(0, 5000, 77):
        row = list(range(start, start + 77))
        ids.extend(row if start % 2 else np.array(row))
        expected += row
    found = ids.all()
    assert found.dtype == np.uint64
    assert found.tolist() == expected
    found[0] = 2**64 - 1  # it may be written to
    assert found[0] == 2**64 - 1


def test_files_have_no_name_and_go_with_their_array(in_files: Path) -> None:
    array = new_ids(100_000)
    array[:] = 7
    assert list(in_files.iterdir()) == []
    assert sum(str(in_files) in line for line in _maps()) == 1
    view = array[5:]
    del array
    assert view.sum() == 7 * 99_995
    del view
    assert not any(str(in_files) in line for line in _maps())


def _maps() -> list[str]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what a process has mapped")
    return maps.read_text().splitlines()


def test_a_folder_without_room_is_a_line(in_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"{in_files}: expected room for 80,000 bytes of block ids (TMPDIR names another folder): No space left"
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", lambda *of: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
        with pytest.raises(TraceError) as caught:
            new_ids(10_000)
    assert str(caught.value).startswith(message)
    if not os.path.exists("/dev/full"):
        pytest.skip("no device that is always full")
    ids = GrowingIds("q")
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **of: full)
        with pytest.raises(TraceError) as caught:
            ids.extend(np.arange(10_000))
    assert str(caught.value).startswith(message)


def test_a_folder_that_is_not_there_is_a_line(in_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(in_files / "nowhere"))
    with pytest.raises(TraceError, match=r"expected a folder for temporary files to write to .*, got: .*nowhere"):
        new_ids(10_000)
    with pytest.raises(TraceError):
        GrowingIds("q").extend(np.arange(10_000))


@pytest.mark.parametrize("largest", [2**63 - 1, 2**64 - 1])
@given(data=st.data(), size=st.integers(1, 12), step=st.integers(1, 3))
def test_stretches_are_gathered(largest: int, data: st.DataObject, size: int, step: int) -> None:
    ids = largest - np.arange(40, dtype=np.array(largest).dtype)
    stretch = st.tuples(st.integers(0, 20), st.integers(0, 6))
    stretches = data.draw(st.lists(stretch, min_size=1, max_size=9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "PIECE", size)
        counts = np.array([count for _, count in stretches], np.int64)
        starts = np.array([start for start, _ in stretches], np.int64)
        found = gather(ids, starts, np.concatenate(([0], np.cumsum(counts))), step)
    expected = [largest - start - index * step for start, count in stretches for index in range(count)]
    assert found.tolist() == expected


@pytest.mark.parametrize("outputs", [False, True])
def test_a_trace_is_the_same_in_files(outputs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_bytes(b"".join(generate_lines(replace(PRESETS["chat"], num_sessions=40), seed=0)))
    in_memory = _all_of(chats, outputs, tmp_path / "memory.npz")
    monkeypatch.setattr(scratch, "LARGE", 1000)
    monkeypatch.setattr(scratch, "PIECE", 300)
    assert _all_of(chats, outputs, tmp_path / "files.npz") == in_memory


def _all_of(path: Path, outputs: bool, converted: Path) -> list[Any]:
    trace = read_trace(path, None, ReadOptions(outputs=outputs))
    write_binary(trace, converted)
    again = read_trace(converted, None, ReadOptions(outputs=outputs))
    some = np.arange(trace.num_requests) % 3 > 0
    traces = (trace, again, trace.with_block(trace.tokens_per_block * 3), trace.without_outputs())
    return [
        converted.read_bytes(),
        *(
            (
                *(array.tolist() for array in (one.block_keys, one.offsets, one.partial_ids)),
                one.num_keys,
                infinite_cache(one, None).kv_tokens.tolist(),
                blocks_seen_before(one, some).tolist(),
            )
            for one in traces
        ),
    ]


@settings(deadline=None)
@given(factor=st.integers(1, 5))
def test_coarser_blocks_have_the_key_of_their_last_one(trace_of: Callable[..., Trace], factor: int) -> None:
    trace = trace_of([[*range(23)], [*range(9)], [*range(40)], [1]], 2)
    coarse = trace.with_block(2 * factor)
    for index in range(trace.num_requests):
        fine = trace.prompt(index).keys.tolist()
        assert coarse.prompt(index).keys.tolist() == fine[factor - 1 :: factor]


def test_reading_needs_less_memory_than_the_ids_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ",".join(map(str, range(1000)))
    line = f'{{"timestamp": 0, "input_length": 512000, "output_length": 1, "hash_ids": [{row}]}}\n'
    path = tmp_path / "long.jsonl"
    path.write_text(line * 1000)
    monkeypatch.setattr(scratch, "LARGE", 50_000)
    monkeypatch.setattr(scratch, "PIECE", 20_000)
    tracemalloc.start()
    try:
        trace = read_trace(path)
        write_binary(trace, tmp_path / "long.npz")
        again = read_trace(tmp_path / "long.npz")
        hits = infinite_cache(again.with_block(1024), None).kv_tokens.sum()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert trace.block_keys.size == again.block_keys.size == 1_000_000
    assert hits == 999 * 499 * 1024
    assert peak < 8 * 1_000_000 / 2
