import gzip
import json
import lzma
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssmcache_sim.errors import TraceError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.formats.binary import write_binary
from ssmcache_sim.trace_info import describe

pytestmark = pytest.mark.usefixtures("wherever_ids_lie")

WriteTrace = Callable[..., Path]


def row(**changes: Any) -> dict[str, Any]:
    """A good row of 3 blocks of 512, with fields changed; None leaves a field out."""
    fields = {"timestamp": 5, "input_length": 1300, "output_length": 7, "hash_ids": [0, 1, 2], **changes}
    return {name: value for name, value in fields.items() if value is not None}


def error_of(path: Path, tokens_per_block: int | None = None) -> str:
    with pytest.raises(TraceError) as caught:
        read_trace(path, tokens_per_block)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_rows_become_arrays_with_a_key_for_each_full_block(write_trace: WriteTrace) -> None:
    path = write_trace([row(), row(timestamp=9, input_length=1024, hash_ids=[0, 40])])
    trace = read_trace(path)
    assert (trace.name, trace.num_requests, trace.tokens_per_block) == ("trace.jsonl", 2, 512)
    assert trace.arrival_ms.tolist() == [5, 9]
    assert trace.prompt_tokens.tolist() == [1300, 1024]
    assert trace.output_tokens.tolist() == [7, 7]
    assert trace.offsets.tolist() == [0, 2, 4]
    first, second = (prompt.keys.tolist() for prompt in trace.prompts())
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert [len(prompt) for prompt in trace.prompts()] == [1300, 1024]


def test_a_prompt_is_a_read_only_view_of_the_trace(write_trace: WriteTrace) -> None:
    trace = read_trace(write_trace([row(), row(timestamp=6)]))
    for prompt in (trace.prompt(1), list(trace.prompts())[1]):
        assert np.shares_memory(prompt.keys, trace.block_keys)
        assert not prompt.keys.flags.writeable


def test_requests_are_sorted_by_arrival_and_ties_keep_the_order_of_the_file(write_trace: WriteTrace) -> None:
    rows = [row(timestamp=t, input_length=1025 + i) for i, t in enumerate([30, 10, 30, 10])]
    trace = read_trace(write_trace(rows))
    assert trace.arrival_ms.tolist() == [10, 10, 30, 30]
    assert trace.prompt_tokens.tolist() == [1026, 1028, 1025, 1027]
    assert [count for _, count in trace.repairs] == [2]


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress, lzma.compress])
def test_compression_is_told_by_the_content_and_the_hash_is_of_what_is_inside(
    tmp_path: Path, write_trace: WriteTrace, compress: Callable[[bytes], bytes]
) -> None:
    plain = write_trace([row()])
    packed = tmp_path / "no-suffix"
    packed.write_bytes(compress(plain.read_bytes()))
    assert read_trace(packed).sha256 == read_trace(plain).sha256


def test_rows_of_full_blocks_only_are_read(write_trace: WriteTrace) -> None:
    trace = read_trace(write_trace([row(hash_ids=[0, 1]), row(input_length=5000, hash_ids=list(range(9)))]))
    assert trace.offsets.tolist() == [0, 2, 11]
    assert trace.partial_ids.tolist() == [-1, -1]


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("full_only", [False, True])
def test_the_block_size_is_told_by_the_number_of_ids(
    write_trace: WriteTrace, rows_of: Callable[..., Any], block: int, full_only: bool
) -> None:
    prompts = [range(start, start + length) for start, length in ((0, 5000), (10_000, 3333), (20_000, 4097))]
    assert read_trace(write_trace(rows_of(prompts, block, full_only))).tokens_per_block == block


def test_a_block_size_that_the_ids_do_not_tell_is_asked_for(write_trace: WriteTrace) -> None:
    path = write_trace([row(input_length=130, hash_ids=[0, 1])])  # two blocks of 128, or 96 as well
    assert error_of(path) == "trace.jsonl: block size: expected --trace-block, because 96, 128 all fit the ids"
    assert read_trace(path, 128).tokens_per_block == 128


@pytest.mark.parametrize(
    ("lengths", "block", "said"),
    [
        ([5000], 4096, "inferred from a single row"),
        ([5000, 5000, 5000], 4096, "inferred from 3 rows of one length"),
        ([1300], 512, "inferred from a single row"),
        ([5000, 3000], 2048, None),
        ([1300, 700], 512, None),
    ],
)
def test_a_block_size_told_by_one_length_is_named_as_inferred(
    write_trace: WriteTrace, tmp_path: Path, lengths: list[int], block: int, said: str | None
) -> None:
    rows = [row(timestamp=time, input_length=n, hash_ids=list(range(-(-n // block)))) for time, n in enumerate(lengths)]
    path, packed = write_trace(rows), tmp_path / "a.npz"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trace = read_trace(path)
        write_binary(trace, packed)
        again = read_trace(packed)
    warning = f"trace.jsonl: blocks of {block:,} tokens are {said}, where 512 are usual: --trace-block"
    messages = [str(one.message) for one in warned]
    assert len(messages) == (0 if said is None or block == 512 else 2)  # a converted trace says the same
    assert all(message.startswith(warning) for message in messages)
    for one in (trace, again):
        assert one.tokens_per_block == block
        assert (one.inferred_block and str(one.inferred_block)) == said
        assert ((said or "no") in repr(one)) == (said is not None)
        assert describe(one).block_origin == ("" if said is None else f"{block:,} tokens, {said}")
    assert read_trace(path, block).inferred_block is None


def test_the_published_block_size_wins_where_it_fits(write_trace: WriteTrace) -> None:
    assert read_trace(write_trace([row(input_length=10, hash_ids=[4])])).tokens_per_block == 512


BAD_ROWS = [
    ("{", "expected a JSON object, got broken JSON"),
    ("[1, 2]", "expected a JSON object, got [1, 2]"),
    ("[" * 100_000, "expected a JSON object, got broken JSON"),
    (row(input_length=-3), "input_length: expected a positive integer, got -3"),
    (row(input_length=0, hash_ids=[]), "input_length: expected a positive integer, got 0"),
    (row(input_length=1300.0), "input_length: expected a positive integer, got 1300.0"),
    (row(input_length=True), "input_length: expected a positive integer, got true"),
    (row(input_length=None), "input_length: expected a positive integer, got no such field"),
    (row(output_length=-1), "output_length: expected a non-negative integer, got -1"),
    (row(timestamp="5"), 'timestamp: expected a non-negative integer, got "5"'),
    (row(timestamp=float("nan")), "timestamp: expected a non-negative integer, got NaN"),
    (row(timestamp=10**30), "timestamp: expected a non-negative integer, got 1000"),
    (row(hash_ids=None), "hash_ids: expected a list of integers, got no such field"),
    (row(hash_ids={"a": 1}), "hash_ids: expected a list of integers, got {"),
    (row(hash_ids=[0, "x", 2]), 'hash_ids: expected integers from 0 to 2**63 - 1, got "x"'),
    (row(hash_ids=[0, True, 2]), "hash_ids: expected integers from 0 to 2**63 - 1, got true"),
    (row(hash_ids=[0, -1, 2]), "hash_ids: expected integers from 0 to 2**63 - 1, got -1"),
    (row(hash_ids=[0, 1 << 63, 2]), "hash_ids: expected integers from 0 to 2**63 - 1, got 9223372036854775808"),
    (row(hash_ids=[0, 1, 2, 3]), "hash_ids: expected 3 (or 2, full blocks only) ids for 1300 tokens in blocks of 512"),
    (row(input_length=1024), "hash_ids: expected 2 ids for 1024 tokens in blocks of 512, got 3"),
    (row(hash_ids=[1, 0, 2]), "unique per prefix, but id 1 comes as the first of a prompt here and after 0 before"),
    (row(hash_ids=[0, 2, 3]), "unique per prefix, but id 2 comes after 0 here and after 1 before"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS, ids=[message[:40] for _, message in BAD_ROWS])
def test_a_bad_row_is_named_with_file_and_line(write_trace: WriteTrace, bad: Any, message: str) -> None:
    good = [row(), "", row(input_length=20_000, hash_ids=[*range(3), *range(100, 137)])]
    text = error_of(write_trace([*good, bad, row()]))
    assert text.startswith("trace.jsonl:4: ")
    assert message in text


def test_a_forced_block_size_that_does_not_fit_is_an_error(write_trace: WriteTrace) -> None:
    assert "in blocks of 64, got 3" in error_of(write_trace([row()]), 64)
    assert "trace block: expected a positive integer, got 0" in error_of(write_trace([row()]), 0)
    assert "expected a positive integer, got 512.0" in error_of(write_trace([row()]), 512.0)  # type: ignore[arg-type]
    assert read_trace(write_trace([row()]), np.int64(512)).tokens_per_block == 512  # type: ignore[arg-type]
    assert "trace block: expected a positive integer up to 1,048,576, got 10485" in error_of(
        write_trace([row()]), 1048577
    )


def test_a_file_without_requests_is_an_error(write_trace: WriteTrace) -> None:
    assert error_of(write_trace([])) == "trace.jsonl: expected at least one request, got an empty file"
    assert error_of(write_trace(["", "  "])) == "trace.jsonl: expected at least one request, got an empty file"


def test_files_that_cannot_be_read_are_errors(tmp_path: Path, write_trace: WriteTrace) -> None:
    assert "No such file" in error_of(tmp_path / "none.jsonl")
    assert "cannot read the trace" in error_of(tmp_path)
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(write_trace([row()]).read_bytes())[:-12])
    assert "expected whole compressed content" in error_of(cut)
    noise = tmp_path / "noise.bin"
    noise.write_bytes(b"\xff\xfe\x00\x01 nothing\n")
    assert "noise.bin:1: expected a JSON object, got broken JSON" in error_of(noise)


def test_rows_of_another_format_are_not_taken_for_mooncake_rows(write_trace: WriteTrace) -> None:
    chat = {**row(), "chat_id": 1}  # ids of content alone, times in seconds
    expected = "format: expected a row of one of: azure-csv, dynamo-request-trace, flat-tokens, mooncake, "
    assert expected in error_of(write_trace([chat]))
    assert "; got an object with x" in error_of(write_trace([{"x": 1}]))


def test_session_fields_beside_the_known_ones_do_no_harm(write_trace: WriteTrace) -> None:
    rows = [json.dumps({"session_id": "a", "turn": 1, **row()})]
    assert read_trace(write_trace(rows)).num_requests == 1


def test_the_bundled_sample_is_the_head_of_the_conversation_trace(sample_path: Path) -> None:
    sample = read_trace(sample_path)
    assert (sample.num_requests, int(sample.prompt_tokens.sum())) == (1000, 13_732_944)
    assert sample.sha256 == "d289afab1294d376c92b3496d96c27f8f0e36893398fbda7957f3a40e37b70ba"


@pytest.mark.shared
def test_the_bundled_sample_holds_the_first_lines_unchanged(sample_path: Path, shared_traces: Path) -> None:
    whole = gzip.decompress((shared_traces / "mooncake_conversation.jsonl.gz").read_bytes())
    assert whole.startswith(gzip.decompress(sample_path.read_bytes()))
