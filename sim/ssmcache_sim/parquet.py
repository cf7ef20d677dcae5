"""Parquet files of results: written from columns, read back as data frames that fit a schema.

A schema gives each column a type hint (see `schemas.py`). A name that ends in `*` stands for any number of columns that
begin so. Other columns are refused, as are more than one of a name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmcache_sim.causes import broken_promise
from ssmcache_sim.directories import TOOL, write_file
from ssmcache_sim.errors import OutputError
from ssmcache_sim.schemas import Scalar, is_plain, scalar, shown

if TYPE_CHECKING:
    import pandas as pd

Schema = Mapping[str, Any]

_ARROW_TYPES = {int: ("int64",), float: ("double",), str: ("string", "large_string"), bool: ("bool",)}
_MAX_ROWS = 1 << 26  # where nothing says how many there are
_HITS, _RATE = "hit_tokens", "token_hit_rate"  # in names of columns


def write_parquet(path: Path, columns: dict[str, Any]) -> None:
    """Writes columns (arrays or lists, None: missing) as one Parquet file. Errors: OutputError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    write_file(path, sink.getvalue().to_pybytes())


def frame_of(columns: dict[str, Any]) -> "pd.DataFrame":
    """Columns as `read_parquet` would give them after `write_parquet`, without a file."""
    import pyarrow as pa

    return _frame(pa.table(columns))


def _frame(table: Any) -> "pd.DataFrame":
    """With nullable types, whatever the file says of an index."""
    import pandas as pd
    import pyarrow as pa

    types = {
        pa.int64(): pd.Int64Dtype(),
        pa.float64(): pd.Float64Dtype(),
        pa.bool_(): pd.BooleanDtype(),
        pa.string(): pd.StringDtype(),
        pa.large_string(): pd.StringDtype(),
    }
    frame: pd.DataFrame = table.replace_schema_metadata().to_pandas(types_mapper=types.get)
    return frame


def read_parquet(path: Path, schema: Schema | None = None, num_rows: int | None = None) -> "pd.DataFrame":
    """A Parquet file of ours as a data frame with nullable types.

    Args:
        schema: None: any columns.
        num_rows: that it must have; None: any, but not none.

    Names, types and rows are checked before any value is read. Whole numbers that may be missing may also be of a
    floating-point type: so pandas writes them. Errors: OutputError, one line.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            kinds: dict[str, Scalar] = {}
            if schema is not None:
                _check_rows(file.metadata.num_rows, num_rows)
                kinds = _checked_columns(file.schema_arrow.names, list(map(str, file.schema_arrow.types)), schema)
            frame = _frame(file.read())
        for name, kind in kinds.items():
            _check_values(frame[name], kind, name)
            if kind.kind is int and str(frame[name].dtype) == "Float64":
                frame[name] = frame[name].astype("Int64")
        if kinds:
            _check_tokens(frame)
    except _MisfitError as error:
        raise OutputError(f"{path}: {error}") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise OutputError(f"{path}: expected a Parquet file of {TOOL}: {' '.join(str(error).split())}") from error
    return frame


def plain_rows(frame: "pd.DataFrame", names: Sequence[str]) -> set[tuple[Any, ...]]:
    """The different rows of some columns, None where a value is missing."""
    import pandas as pd

    rows = frame[list(names)].drop_duplicates().itertuples(index=False, name=None)
    return {tuple(None if pd.isna(value) else value for value in row) for row in rows}


class _MisfitError(Exception):
    """A table that does not fit its schema, in one line."""


def _checked_columns(names: Sequence[str], types: Sequence[str], schema: Schema) -> dict[str, Scalar]:
    """What each column that is there must hold."""
    for name in schema:
        if name not in names and not name.endswith("*"):
            raise _MisfitError(f"expected a column {name}, got none")
    kinds: dict[str, Scalar] = {}
    for name, found in zip(names, types, strict=True):
        hint = schema.get(name) or next(
            (hint for prefix, hint in schema.items() if prefix.endswith("*") and name.startswith(prefix[:-1])), None
        )
        if hint is None:
            raise _MisfitError(f"expected no column but those of {TOOL}, got {shown(name)}")
        if name in kinds:
            raise _MisfitError(f"column {name}: expected one, got several")
        kind = scalar(hint)
        other = ("null", *(("double",) if kind.kind is int else ())) if kind.may_miss else ()
        if found not in (*_ARROW_TYPES[kind.kind], *other):
            expected = _ARROW_TYPES[kind.kind][0]
            raise _MisfitError(f"column {name}: expected values of type {expected}, got {shown(found)}")
        kinds[name] = kind
    return kinds


def _check_rows(found: int, expected: int | None) -> None:
    if expected is None and not 0 < found <= _MAX_ROWS:
        raise _MisfitError(f"expected 1 to {_MAX_ROWS} rows, got {found}")
    if expected is not None and found != expected:
        raise _MisfitError(f"expected {expected} rows, got {found}")


def _check_values(column: "pd.Series[Any]", kind: Scalar, name: str) -> None:
    there = column.dropna()
    if len(there) < len(column) and not kind.may_miss:
        raise _MisfitError(f"column {name}: expected {kind.expected()}, got a row without")
    if kind.kind in (int, float):
        values = there.to_numpy(dtype=np.float64)
        low, high = kind.range
        fits = (values >= low) & (values <= high)  # NaN does not
        bad = there[~(fits & (values == np.floor(values)) if kind.kind is int else fits)]
    elif kind.kind is str:
        bad = there[[value not in kind.texts if kind.texts else not is_plain(value) for value in there]]
    else:
        return
    if len(bad):
        raise _MisfitError(f"column {name}: expected {kind.expected()}, got {shown(bad.iloc[0])} in row {bad.index[0]}")


def _check_tokens(frame: "pd.DataFrame") -> None:
    """What follows from each other: causes of tokens, and rates from tokens."""
    numbers = {str(name): frame[name].to_numpy() for name in frame if str(frame[name].dtype) == "Int64"}
    wrong = broken_promise(numbers)
    if wrong is not None:
        raise _MisfitError(f"column {wrong}")
    for name in numbers:
        rate, whole = name.replace(_HITS, _RATE), numbers.get("prompt_tokens")
        if _HITS in name and rate in frame and whole is not None:
            followed = frame[name].to_numpy(np.float64, na_value=0) / whole.astype(np.float64)
            if not np.allclose(frame[rate].to_numpy(np.float64, na_value=0), followed, rtol=1e-9, atol=0):
                raise _MisfitError(f"column {rate}: expected {name} / prompt_tokens, got another number")
