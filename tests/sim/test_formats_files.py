"""What all formats share: compression, streaming, detection, options, broken rows, and the converted form."""

import gzip
import json
import lzma
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats import ReadOptions, format_names, read_trace, source
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


@pytest.fixture
def members(write_trace: WriteTrace, tmp_path: Path) -> dict[str, Any]:
    """The arrays of a converted trace: four requests of two sessions, two of them with a partial block."""
    ids = ([0, 1, 2], [0, 1], [0, 1, 2], [0, 9])
    lengths = (1300, 1024, 1300, 1024)
    rows = [
        row(timestamp=10 * n, input_length=length, hash_ids=named, session_id=f"s{n % 2}")
        for n, (length, named) in enumerate(zip(lengths, ids, strict=True))
    ]
    path = tmp_path / "whole.npz"
    write_binary(read_trace(write_trace(rows), options=ReadOptions(outputs=True)), path)
    with np.load(path) as archive:
        return dict(archive)


def changed(members: dict[str, Any], name: str, index: int, value: Any) -> dict[str, Any]:
    array = members[name].copy()
    array[index] = value
    return {**members, name: array}


def with_header(members: dict[str, Any], **changes: Any) -> dict[str, Any]:
    header = {**json.loads(members["header"].tobytes()), **changes}
    return {**members, "header": np.frombuffer(json.dumps(header).encode(), np.uint8)}


WRONG_VALUES = [
    ("arrival_ms", 1, np.nan, "arrival_ms: expected numbers from 0 to 9,007,199,254,740,992, got NaN"),
    ("arrival_ms", 3, np.inf, "arrival_ms: expected numbers from 0 to 9,007,199,254,740,992, got Infinity"),
    ("arrival_ms", 3, 1e308, "arrival_ms: expected numbers from 0 to 9,007,199,254,740,992, got 1e+308"),
    ("arrival_ms", 0, -1, "arrival_ms: expected numbers from 0 to"),
    ("arrival_ms", 0, 15, "arrival_ms: expected times that do not fall, got -5.0"),
    ("prompt_tokens", 0, -1, "prompt_tokens: expected numbers from 0 to 1,073,741,824, got -1"),
    ("output_tokens", 2, -7, "output_tokens: expected numbers from 0 to 1,073,741,824, got -7"),
    ("output_tokens", 2, 1 << 62, "output_tokens: expected numbers from 0 to 1,073,741,824, got 4611686018427387904"),
    ("partial_ids", 0, -2, "partial_ids: expected numbers from -1 to"),
    ("partial_ids", 0, 1 << 40, "expected a whole file of `ssmcache trace convert`, got: keys beyond their number"),
    ("partial_ids", 1, 0, "partial_ids: expected -1 for a prompt of full blocks"),
    ("session_index", 1, 2, "session_index: expected numbers from -1 to 1, got 2"),
    ("session_index", 1, -2, "session_index: expected numbers from -1 to 1, got -2"),
    ("session_index", 1, -1, "session_turns: expected 0 for a request of no session and only there"),
    ("session_turns", 0, 0, "session_turns: expected 0 for a request of no session and only there"),
    ("session_turns", 0, -1, "session_turns: expected numbers from 0 to"),
    ("key_steps", 0, -1, "expected a whole file of `ssmcache trace convert`, got: keys beyond their number"),
    (
        "key_steps",
        7,
        0,
        "expected a whole file of `ssmcache trace convert`, got: a key that follows two different keys",
    ),
]


@pytest.mark.parametrize(("name", "index", "value", "message"), WRONG_VALUES)
def test_a_wrong_value_of_a_converted_trace_is_one_line(
    members: dict[str, Any], tmp_path: Path, name: str, index: int, value: float, message: str
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **changed(members, name, index, value))
    assert error_of(path).startswith(f"a.npz: {message}")


def test_every_array_of_a_converted_trace_has_its_type_and_shape(members: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for name, array in members.items():
        if name == "header":
            continue
        wrong_types = [array.astype(dtype) for dtype in (np.float32, np.int8, np.uint64, "U8", ">i8")]
        for wrong in wrong_types:
            np.savez(path, **{**members, name: wrong})
            types = "int32 or int64" if name == "key_steps" else array.dtype.name
            assert error_of(path).startswith(f"a.npz: {name}: expected {types}, got ")
        for wrong in (array.reshape(1, -1), array.reshape(-1, 1), array[:1].reshape(())):
            np.savez(path, **{**members, name: wrong})
            assert error_of(path).startswith(f"a.npz: {name}: expected one dimension, got ")
        for wrong in (array[:-1], array[:0], np.concatenate((array, array[-1:]))):
            np.savez(path, **{**members, name: wrong})
            assert "arrays of different lengths" in error_of(path) or "at least one request" in error_of(path)
        rest = {other: values for other, values in members.items() if other != name}
        np.savez(path, **rest)
        if name != "output_known":
            assert "no item named" in error_of(path)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("split_factor", "x", "an integer from 1 to"),
        ("split_factor", 0, "an integer from 1 to"),
        ("split_factor", True, "an integer from 1 to"),
        ("tokens_per_block", 0, "an integer from 1 to 1,048,576"),
        ("tokens_per_block", 512.0, "an integer from 1 to 1,048,576"),
        ("tokens_per_block", 1 << 60, "an integer from 1 to 1,048,576"),
        ("num_keys", "5", "an integer from 0 to"),
        ("num_keys", 10**18, "at most "),
        ("num_broken", -1, "an integer from 0 to"),
        ("name", None, "a string"),
        ("name", "\ud800", "a string"),
        ("sha256", "abc", "64 hex digits"),
        ("reading", ["x"], "a string"),
        ("source_format", 3, "a string"),
        ("repairs", [["late"]], "a list of [what, how many] pairs"),
        ("repairs", [["late", -1]], "a list of [what, how many] pairs"),
        ("session_names", ["a", 3], "null or a list of strings"),
        ("session_names", "ab", "null or a list of strings"),
        ("inferred_block", [512, 1], "null or three positive integers"),
        ("inferred_block", [512, 1, "x"], "null or three positive integers"),
    ],
)
def test_a_wrong_field_of_the_header_is_one_line(
    members: dict[str, Any], tmp_path: Path, field: str, value: Any, expected: str
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **with_header(members, **{field: value}))
    assert error_of(path).startswith(f"a.npz: {field}: expected {expected}")


def test_a_header_that_is_no_object_is_one_line(members: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for content in (b"", b"[]", b"[" * 100_000, b"\xff\xfe", b"1" * 10_000, b"{}"):
        np.savez(path, **{**members, "header": np.frombuffer(content, np.uint8)})
        assert error_of(path).startswith("a.npz: ")


@pytest.mark.parametrize("name", ["header", "arrival_ms", "key_steps"])
@pytest.mark.parametrize("size", [10**9, 10**18, 10**30, -1])
def test_a_size_that_the_file_cannot_hold_is_not_believed(
    members: dict[str, Any], tmp_path: Path, name: str, size: int
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **{other: values for other, values in members.items() if other != name})
    with zipfile.ZipFile(path, "a") as archive, archive.open(f"{name}.npy", "w") as member:
        descr = np.lib.format.dtype_to_descr(members[name].dtype)
        np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": (size,)})
    tracemalloc.start()
    message = error_of(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message.startswith("a.npz: ")
    assert peak_bytes < 100 << 20


def test_any_damage_of_a_converted_trace_is_one_line_or_a_whole_trace(members: dict[str, Any], tmp_path: Path) -> None:
    path, random = tmp_path / "a.npz", np.random.default_rng(5)
    np.savez_compressed(path, **members)
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(len(whole), size=random.integers(1, 6)):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged[: random.integers(5, len(whole) + 1)] if random.random() < 0.2 else damaged)
        try:
            trace, message = read_trace(path), ""
        except TraceError as error:
            trace, message = None, str(error)
        assert "\n" not in message
        assert len(message) < 400
        assert trace is None or infinite_cache(trace, None).kv_tokens.size == trace.num_requests == 4


def test_a_part_of_a_trace_is_written_with_the_keys_of_the_part(write_trace: WriteTrace, tmp_path: Path) -> None:
    rows = [row(timestamp=n, input_length=1300, hash_ids=[0, 3 * n + 1, 3 * n + 2]) for n in range(50)]
    rows += [row(timestamp=99, input_length=1024, hash_ids=[0, 148])]
    whole = read_trace(write_trace(rows))
    for part in (whole.part(49, 51), whole.with_block(1024), whole.first_requests(2), whole.part(0, 3).expanded(2)):
        write_binary(part, tmp_path / "part.npz")
        again = read_trace(tmp_path / "part.npz")
        assert infinite_cache(again, None).kv_tokens.tolist() == infinite_cache(part, None).kv_tokens.tolist()
        assert again.num_keys <= again.block_keys.size + again.num_requests
        assert (again.partial_ids < 0).tolist() == (part.partial_ids < 0).tolist()
        distinct = [np.unique(one.block_keys).size for one in (part, again)]
        assert distinct[0] == distinct[1]


def test_converted_traces_of_before_say_nothing_of_an_inferred_block(members: dict[str, Any], tmp_path: Path) -> None:
    header = json.loads(members["header"].tobytes())
    del header["inferred_block"]
    path = tmp_path / "old.npz"
    np.savez(path, **{**members, "header": np.frombuffer(json.dumps(header).encode(), np.uint8)})
    assert read_trace(path).inferred_block is None


# what no file may do


def test_a_row_longer_than_any_is_an_error_and_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_MAX_LINE_BYTES", 4 << 20)
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b" " * (1 << 20))
    tracemalloc.start()
    message = error_of(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message == "bomb.jsonl.gz: expected rows of at most 4,194,304 bytes, got a longer one"
    assert peak_bytes < 24 << 20


def test_names_of_fields_and_values_of_any_kind_stay_on_one_line(write_trace: WriteTrace) -> None:
    assert "; got an object with a\\nb" in error_of(write_trace([{"a\nb": 1}]))
    deep = json.dumps(row()).replace("[0, 1, 2]", "[" * 900 + "]" * 900)
    assert "trace.jsonl:1: hash_ids: expected integers from 0 to 2**63 - 1, got [" in error_of(write_trace([deep]))


def test_a_file_whose_name_is_no_text_is_read_and_converted(write_trace: WriteTrace, tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.jsonl"
    try:
        path.write_bytes(write_trace([row()]).read_bytes())
    except (OSError, UnicodeEncodeError):
        pytest.skip("the file system takes no such name")
    trace = read_trace(path)
    write_binary(trace, tmp_path / "a.npz")
    assert read_trace(tmp_path / "a.npz").name == trace.name == "caf\\udce9.jsonl"
