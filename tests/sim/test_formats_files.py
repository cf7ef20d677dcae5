"""What all formats share: compression, streaming, detection, options, broken rows, and the converted form."""

import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats import ReadOptions, format_names, read_trace
from ssmcache_sim.formats.binary import write_binary
from ssmcache_sim.sessions import SessionStart
from ssmcache_sim.trace import Trace

pytestmark = pytest.mark.usefixtures("wherever_ids_lie")

WriteTrace = Callable[..., Path]
ARRAYS = ("arrival_ms", "prompt_tokens", "output_tokens", "block_keys", "offsets", "partial_ids")


def row(**changes: Any) -> dict[str, Any]:
    return {"timestamp": 5, "input_length": 1300, "output_length": 7, "hash_ids": [0, 1, 2], **changes}


def error_of(path: Path, tokens_per_block: int | None = None, **options: Any) -> str:
    with pytest.raises(TraceError) as caught:
        read_trace(path, tokens_per_block, ReadOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def skipping(path: Path) -> Trace:
    return read_trace(path, options=ReadOptions(skip_broken=True))


def test_rows_longer_than_a_chunk_and_rows_cut_by_chunks_are_whole(write_trace: WriteTrace) -> None:
    lengths = [1, 300_000 * 512, 700, 2_000 * 512, 3 * 512]  # the second row is more than 2 MB
    rows, first_id = [], 0
    for length in lengths:
        num_ids = -(-length // 512)
        rows.append(row(input_length=length, hash_ids=list(range(first_id, first_id + num_ids))))
        first_id += num_ids
    trace = read_trace(write_trace(rows))
    assert trace.prompt_tokens.tolist() == lengths
    assert np.array_equal(np.unique(trace.block_keys), np.sort(trace.block_keys))


def test_a_file_without_a_last_line_feed_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(row()) + "\r\n" + json.dumps(row(timestamp=6)))
    assert read_trace(path).num_requests == 2


def test_zstd_is_read_also_in_several_frames(write_trace: WriteTrace, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    plain = write_trace([row(timestamp=time) for time in range(50)])
    content, packed = plain.read_bytes(), tmp_path / "packed"
    pieces = (content[:700], content[700:])
    packed.write_bytes(b"".join(zstandard.ZstdCompressor().compress(piece) for piece in pieces))
    assert read_trace(packed).sha256 == read_trace(plain).sha256
    packed.write_bytes(packed.read_bytes()[:-9])
    assert "expected whole compressed content" in error_of(packed)


def test_zstd_without_its_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "a.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd rest")
    assert error_of(path) == "a.zst: expected the package zstandard to read zstd: pip install zstandard"


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_damaged_content_is_an_error_wherever_it_is(
    tmp_path: Path, write_trace: WriteTrace, compress: Callable[[bytes], bytes]
) -> None:
    packed = bytearray(compress(write_trace([row(timestamp=time) for time in range(500)]).read_bytes()))
    packed[len(packed) // 2] ^= 0xFF
    path = tmp_path / "damaged"
    path.write_bytes(packed)
    assert "expected whole compressed content" in error_of(path) or "damaged:" in error_of(path)


# detection and options


def test_a_format_can_be_forced_and_an_unknown_one_lists_the_known(write_trace: WriteTrace) -> None:
    path = write_trace([row()])
    assert read_trace(path, options=ReadOptions(format_name="mooncake")).num_requests == 1
    assert "trace.jsonl:1: block_size: expected a positive integer" in error_of(path, format_name="weka-session")
    assert error_of(path, format_name="moon") == f"format: expected one of {', '.join(format_names())}, got 'moon'"
    assert len(format_names()) == 8


def test_an_option_that_a_format_does_not_know_is_an_error(write_trace: WriteTrace) -> None:
    path = write_trace([row()])
    expected = "expected a trace of the format weka-session, got mooncake"
    assert error_of(path, seed=1) == f"--seed: {expected}"
    assert error_of(path, session_start=SessionStart()) == f"--session-start: {expected}"
    assert error_of(path, tokenizer="x") == "--tokenizer: expected a trace of the format text-sessions, got mooncake"


def test_readers_hold_no_rows(write_trace: WriteTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is gone before the next but one is parsed: what grows is arrays of machine integers."""
    import gc
    import weakref

    from ssmcache_sim.formats import mooncake

    class Fields(dict[str, Any]):
        pass

    alive: weakref.WeakSet[Fields] = weakref.WeakSet()
    most = 0

    def parse(line: bytes) -> Fields:
        nonlocal most
        fields = Fields(json.loads(line))
        alive.add(fields)
        gc.collect(0)
        most = max(most, len(alive))
        return fields

    Fields.__hash__ = object.__hash__  # type: ignore[method-assign,assignment]
    monkeypatch.setattr(mooncake, "parse_object", parse)
    assert read_trace(write_trace([row(timestamp=time) for time in range(100)])).num_requests == 100
    assert most <= 2


# broken rows


def test_broken_rows_are_skipped_and_counted_when_asked(write_trace: WriteTrace) -> None:
    rows = ["{", row(), row(input_length=-1), row(hash_ids=[0, 1]), row(hash_ids=[0] * 7), row(hash_ids=[1, 0, 2])]
    trace = skipping(write_trace(rows))
    assert trace.num_requests == 2
    assert trace.num_broken == 4
    assert trace.reading == "without broken rows"
    assert skipping(write_trace([row()])).reading == ""


def test_a_row_is_judged_by_the_good_rows_before_it(write_trace: WriteTrace) -> None:
    contradiction = row(hash_ids=[0, 8, 1])  # 1 followed 0 before; so 8 is not known from here
    rows = [row(), contradiction, row(hash_ids=[8, 9, 10]), row(hash_ids=[20, 21, 20])]
    trace = skipping(write_trace(rows))
    assert trace.num_broken == 2
    assert [len(prompt.keys) for prompt in trace.prompts()] == [2, 2]


def test_a_file_of_broken_rows_alone_is_an_error(write_trace: WriteTrace) -> None:
    path = write_trace([row(input_length=0), row(hash_ids="x")])
    assert error_of(path, skip_broken=True) == "trace.jsonl: expected at least one request, got none, 2 broken rows"


# the converted form


def talk(name: str) -> dict[str, Any]:
    call = {"t": 1.5, "in": 10, "out": 1, "hash_ids": [1, 2]}
    later = {"t": 3.0, "in": 14, "out": 1, "hash_ids": [1, 2, 5]}
    return {"id": name, "block_size": 4, "hash_id_scope": "local", "requests": [call, later]}


@pytest.mark.parametrize("rows", [[row(), row(timestamp=1, hash_ids=[0, 9])], [talk("a"), talk("b")]])
def test_a_converted_trace_is_the_trace(write_trace: WriteTrace, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    trace = read_trace(write_trace(rows))
    path = tmp_path / "a.npz"
    write_binary(trace, path)
    again = read_trace(path)
    for name in ARRAYS:
        array, copy = getattr(trace, name), getattr(again, name)
        assert np.array_equal(array, copy)
        assert array.dtype == copy.dtype
    facts = ("name", "sha256", "tokens_per_block", "num_keys", "repairs", "num_broken", "format_name", "reading")
    assert [getattr(trace, fact) for fact in facts] == [getattr(again, fact) for fact in facts]
    assert (trace.sessions is None) == (again.sessions is None)
    if trace.sessions is not None and again.sessions is not None:
        assert trace.sessions.names == again.sessions.names
        assert np.array_equal(trace.sessions.index, again.sessions.index)
        assert np.array_equal(trace.sessions.turns, again.sessions.turns)
    first = path.read_bytes()
    write_binary(again, path)
    assert path.read_bytes() == first


def test_a_converted_trace_keeps_its_block_and_takes_no_options(write_trace: WriteTrace, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_binary(read_trace(write_trace([row()])), path)
    assert read_trace(path, 512).tokens_per_block == 512
    assert "trace block: expected the 512 tokens it was converted with, got 16" in error_of(path, 16)
    assert error_of(path, seed=1) == "--seed: expected a trace of the format weka-session, got ssmcache-npz"


def test_a_damaged_or_foreign_archive_is_one_line(write_trace: WriteTrace, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_binary(read_trace(write_trace([row()])), path)
    with np.load(path) as archive:
        members = dict(archive)
    header = json.loads(members["header"].tobytes())
    expected = "a.npz: expected a whole file of `ssmcache trace convert`, got: "

    def error_with(**changes: Any) -> str:
        np.savez(path, **{**members, **changes})
        return error_of(path)

    def packed(**changes: Any) -> Any:
        return np.frombuffer(json.dumps({**header, **changes}).encode(), np.uint8)

    assert error_with(header=packed(version=2)) == (
        "a.npz: format: expected 'ssmcache trace' version 1, got 'ssmcache trace' version 2"
    )
    assert error_with(arrival_ms=np.zeros(3)) == f"{expected}arrays of different lengths"
    assert error_with(key_steps=members["key_steps"][:-1]) == f"{expected}arrays of different lengths"
    assert error_with(header=packed(num_keys=1)) == f"{expected}keys beyond their number"
    assert error_with(header=packed(session_names=["a"])).startswith(expected)
    np.savez(path, something=np.arange(3))
    assert error_of(path).startswith(expected)
    path.write_bytes(b"PK\x03\x04 not an archive")
    assert error_of(path).startswith(expected)
