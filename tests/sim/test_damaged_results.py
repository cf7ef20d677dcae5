"""Results that somebody damaged or wrote by hand: every reader says so in one line, and draws and writes nothing.

What is tried on every column and every entry is wrong for each of them, whatever it means.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssmcache_cli.main import app
from ssmcache_sim import load_run, load_sweep
from ssmcache_sim.errors import OutputError
from ssmcache_sim.plots import plot_directory
from ssmcache_sim.report import write_report

Damage = Callable[[pa.Table, int], pa.Table]
RUN_FILES = ("per_request.parquet", "phase_ceilings.parquet")
SWEEP_FILES = (
    "cells.parquet",
    "planes.parquet",
    "splits.parquet",
    "hit_depths.parquet",
    "explorer.parquet",
    "phases.parquet",
    "phase_ceilings.parquet",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A replay with tiers, and a sweep with replayed cells, cells of the grid, one left out, and shifts."""
    folder = tmp_path_factory.mktemp("results")
    trace = folder / "trace.jsonl"
    rows = (
        {"timestamp": 1000 * number, "input_length": 8, "output_length": 1, "hash_ids": ids}
        for number, ids in enumerate([[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5, 6], [0, 1, 2, 3], [7, 8, 9, 10]])
    )
    trace.write_text("\n".join(map(json.dumps, rows)))
    shared = ("--trace-block", "2", "--model", "marconi-7b", "--quiet")
    tiers = ("--gpu-memory", "300MiB", "--host-memory", "1GiB", "--ssm-reuse-interval", "4")
    app(["replay", str(trace), *shared, *tiers, "--out", str(folder / "run")], standalone_mode=False)
    varied = ("--gpu-memory", "60MiB,400MiB,unlimited", "--ssm-reuse-interval", "3,4", "--admission", "every,last")
    app(["sweep", str(trace), *shared, *varied, "--phase", "--out", str(folder / "sweep")], standalone_mode=False)
    assert set(load_sweep(folder / "sweep").cells["engine"]) == {"grid", "replay"}
    assert {path.name for path in (folder / "sweep").glob("*.parquet")} == set(SWEEP_FILES)
    return folder


@pytest.fixture
def run_path(results: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(results / "run", tmp_path / "run"))


@pytest.fixture
def sweep_path(results: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(results / "sweep", tmp_path / "sweep"))


def refusal(path: Path) -> str:
    """What the reader of the directory says against it."""
    with pytest.raises(OutputError) as caught:
        (load_run if path.name == "run" else load_sweep)(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 700
    return message


def with_values(table: pa.Table, index: int, values: Any) -> pa.Table:
    return table.set_column(index, table.schema.names[index], pa.array(values))


def first_one(value: Any) -> Damage:
    """A column whose first value is another one."""
    return lambda table, index: with_values(table, index, [value, *table.column(index).to_pylist()[1:]])


# each is wrong for any column of numbers
NUMBERS: dict[str, Damage] = {
    "negative": first_one(-1),
    "of one and a half": lambda table, index: with_values(table, index, [1.5] * len(table)),
    "not finite": lambda table, index: with_values(table, index, [np.inf] * len(table)),
    "not a number": lambda table, index: with_values(table, index, [np.nan] * len(table)),
    "too large": lambda table, index: with_values(table, index, [2**63 - 1] * len(table)),
    "true": lambda table, index: with_values(table, index, [True] * len(table)),
}
ANY: dict[str, Damage] = {
    "missing": lambda table, index: table.remove_column(index),
    "twice": lambda table, index: table.append_column(table.schema.names[index], table.column(index)),
    "under another name": lambda table, index: table.rename_columns(
        [f"{name}?" if number == index else name for number, name in enumerate(table.schema.names)]
    ),
    "of text": lambda table, index: with_values(table, index, ["many"] * len(table)),
    "of lists": lambda table, index: with_values(table, index, [[1]] * len(table)),
    "of bytes": lambda table, index: with_values(table, index, [b"\xff"] * len(table)),
}
# what is right all the same
FITS = {
    *((name, "of text") for name in ("model", "kv_dtype", "state_dtype", "engine_reason")),
    ("arrival_ms", "negative"),
    ("arrival_ms", "of one and a half"),
    ("ssm_fraction", "not a number"),
    ("gpu_memory_bytes", "not a number"),  # unlimited
}
# columns of cells that are there or not, by their names' beginning
OPTIONAL = ("peak_bytes_", "snapshots_", "moved_", "usable_hit_tokens_", "usable_token_hit_rate_")


def damaged(table: pa.Table, name: str) -> Iterator[tuple[str, pa.Table]]:
    """Each column damaged in three ways, so that all columns together are in all of them."""
    for index, column in enumerate(table.schema.names):
        is_number = pa.types.is_integer(table.schema.types[index]) or pa.types.is_floating(table.schema.types[index])
        ways = list((ANY | NUMBERS if is_number else ANY).items())
        for how, damage in (ways[(3 * index + step) % len(ways)] for step in range(3)):
            is_optional = name == "cells.parquet" and column.startswith(OPTIONAL)
            if (column, how) not in FITS and not (
                is_optional and how in ("missing", "under another name", "not a number")
            ):
                yield f"{column} {how}", damage(table, index)


@pytest.mark.parametrize("name", [f"run/{name}" for name in RUN_FILES] + [f"sweep/{name}" for name in SWEEP_FILES])
def test_a_column_that_is_not_what_it_must_be_is_one_line_that_names_the_file(
    results: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    shutil.copytree(results / path.parent.name, path.parent)
    table = pq.read_table(path)
    for what, broken in damaged(table, path.name):
        pq.write_table(broken, path)
        assert refusal(path.parent).startswith(f"{path}: "), what


@pytest.mark.parametrize("name", [f"run/{name}" for name in RUN_FILES] + [f"sweep/{name}" for name in SWEEP_FILES])
def test_no_rows_fewer_rows_and_part_of_a_file_are_one_line(results: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    shutil.copytree(results / path.parent.name, path.parent)
    table, content = pq.read_table(path), path.read_bytes()
    broken = [content[: len(content) * part // 8] for part in range(8)]
    broken += [content.replace(b"PAR1", b"RAP1"), b"{}", content[:4] + content[9:]]
    for rows in ([], [0] * (len(table) + 1)):
        pq.write_table(table.take(pa.array(rows, pa.int64())), path)
        broken.append(path.read_bytes())
    for each in broken[:-1] if path.name in ("planes.parquet", "splits.parquet") else broken:
        path.write_bytes(each)
        if path.name in ("hit_depths.parquet", "explorer.parquet") and each is broken[-1]:
            continue  # more quantiles, or cells, than there are is no lie
        refusal(path.parent)
    path.unlink()
    if path.name in ("cells.parquet", "phase_ceilings.parquet", "per_request.parquet"):
        refusal(path.parent)


def entries(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each entry of a JSON value is."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from entries(each, (*at, key))


def changed(value: Any, at: tuple[Any, ...], change: Callable[[Any, Any], None]) -> bytes:
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    change(inner, at[-1])
    return json.dumps(copy).encode()


def put(value: Any) -> Callable[[Any, Any], None]:
    return lambda inner, key: inner.__setitem__(key, value)


@pytest.mark.parametrize("name", ["run/manifest.json", "run/summary.json", "sweep/manifest.json"])
def test_an_entry_that_is_not_what_it_must_be_is_one_line(results: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    shutil.copytree(results / path.parent.name, path.parent)
    value = json.loads(path.read_bytes())
    where = [at for at in entries(value) if at[0] != "manifest" or len(at) < 3]
    for number, at in enumerate(where):
        values = (-1, float("nan"), float("inf"), 2**70, True, [[]], {"a": {}}, "\ud800")
        for wrong in (values[number % 4], values[4 + number % 4]):
            if wrong == 2**70 and str(at[-1]).endswith("seconds"):
                continue  # an odd one, but possible
            path.write_bytes(changed(value, at, put(wrong)))
            refusal(path.parent)
        if isinstance(at[-1], str) and at[:-1] != ("versions",):
            path.write_bytes(changed(value, at, lambda inner, key: inner.pop(key)))
            refusal(path.parent)
    for content in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"9" * 5000, path.read_bytes()[:100]):
        path.write_bytes(content)
        refusal(path.parent)
    path.unlink()
    refusal(path.parent)


@pytest.mark.parametrize(
    ("column", "by"),
    [
        ("usable_hit_tokens", 2),
        ("never_seen_tokens", 2),
        ("lost_snapshot_tokens", 2),
        ("prompt_tokens", 1),
        ("usable_hit_tokens_host", 2),
    ],
)
def test_requests_that_do_not_sum_up_are_refused(run_path: Path, column: str, by: int) -> None:
    path = run_path / "per_request.parquet"
    table = pq.read_table(path)
    values = table.column(column).to_pylist()
    pq.write_table(with_values(table, table.schema.names.index(column), [values[0] + by, *values[1:]]), path)
    assert f"{path}: " in refusal(run_path)


@pytest.mark.parametrize("rate", ["usable_token_hit_rate", "ceiling_token_hit_rate", "kv_ceiling_token_hit_rate"])
def test_a_rate_of_a_cell_that_is_not_its_tokens_is_refused(sweep_path: Path, rate: str) -> None:
    path = sweep_path / "cells.parquet"
    table = pq.read_table(path)
    pq.write_table(with_values(table, table.schema.names.index(rate), [0.123] * len(table)), path)
    assert refusal(sweep_path).startswith(f"{path}: column {rate}: expected ")


def test_cells_that_the_manifest_does_not_name_are_refused(sweep_path: Path) -> None:
    path = sweep_path / "cells.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    assert "rows, as the manifest says, got" in refusal(sweep_path)
    sizes = table.schema.names.index("gpu_memory_bytes")
    pq.write_table(with_values(table, sizes, pa.nulls(len(table), pa.int64())), path)  # all of them unlimited
    assert "expected each combination of the manifest" in refusal(sweep_path)
    for column, value in (("gpu_memory_bytes", 7), ("tokens_per_block", 64), ("model", "other")):
        pq.write_table(with_values(table, table.schema.names.index(column), [value] * len(table)), path)
        assert f"column {column}: expected what the manifest names, got " in refusal(sweep_path)


def test_a_file_with_more_rows_than_the_manifest_says_is_not_read(run_path: Path) -> None:
    """Half a gigabyte of zeros is a file of some kilobytes."""
    path = run_path / "per_request.parquet"
    names = pq.read_schema(path).names
    types = pq.read_schema(path).types
    batch = pa.table([pa.array([0] * 1_000_000).cast(kind) for kind in types], names=names)
    with pq.ParquetWriter(path, batch.schema, compression="zstd") as writer:
        for _ in range(3):
            writer.write_table(batch)
    assert refusal(run_path) == f"{path}: expected 5 rows, got 3000000"


def files_of(folder: Path) -> dict[Path, bytes | None]:
    return {each: each.read_bytes() if each.is_file() else None for each in folder.rglob("*")}


@pytest.mark.parametrize("command", ["plot", "report"])
@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_commands_end_in_one_line_and_write_nothing(
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    kind: str,
) -> None:
    from ssmcache_cli.main import run

    folder = Path(shutil.copytree(results / kind, tmp_path / kind))
    path = folder / ("per_request.parquet" if kind == "run" else "cells.parquet")
    table = pq.read_table(path)
    usable = table.schema.names.index("usable_hit_tokens")
    for damage in (ANY["missing"], ANY["of text"], lambda table, index: table.slice(0, 0)):
        pq.write_table(damage(table, usable), path)
        before = files_of(folder)
        monkeypatch.setattr("sys.argv", ["ssmcache", command, str(folder)])
        with pytest.raises(SystemExit) as caught:
            run()
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (1, "")
        assert err.startswith(f"error: {path}: ")
        assert err.count("\n") == 1
        assert files_of(folder) == before


def test_a_picture_that_cannot_be_drawn_leaves_no_others(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []

    def draw_one(figure: object, suffix: str) -> bytes:
        drawn.append(figure)
        if len(drawn) > 3:
            raise RuntimeError("no ink")
        return b"picture"

    monkeypatch.setattr("ssmcache_sim.plots.rendered", draw_one)
    with pytest.raises(RuntimeError, match="no ink"):
        plot_directory(run_path)
    assert not (run_path / "plots").exists()


def test_results_that_nobody_damaged_are_drawn_and_reported(run_path: Path, sweep_path: Path) -> None:
    for path in (run_path, sweep_path):
        assert plot_directory(path)
        assert write_report(path).read_bytes()


def test_results_that_pandas_wrote_again_are_what_they_were(run_path: Path, sweep_path: Path) -> None:
    """Floats in place of whole numbers that may be missing, and other types of text."""
    before = load_run(run_path).per_request, load_sweep(sweep_path).cells
    for path in (*run_path.glob("*.parquet"), *sweep_path.glob("*.parquet")):
        pd.read_parquet(path).to_parquet(path)
    assert str(pq.read_schema(sweep_path / "cells.parquet").field("gpu_memory_bytes").type) == "double"
    for frame, again in zip(before, (load_run(run_path).per_request, load_sweep(sweep_path).cells), strict=True):
        pd.testing.assert_frame_equal(frame, again, check_exact=True)
