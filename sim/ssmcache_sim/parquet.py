"""Parquet files of results: written from columns, read back as data frames that fit a schema.

A schema gives each column a type hint (see `schemas.py`). A name that ends in `*` stands for any number of columns that
begin so. Other columns are refused, as are more than one of a name.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
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

_ARROW_TYPES = {int: "int64", float: "double", str: "string", bool: "bool"}
_MAX_ROWS = 1 << 26  # where nothing says how many there are
_HITS, _RATE = "hit_tokens", "token_hit_rate"  # in names of columns


def write_parquet(path: Path, columns: dict[str, Any]) -> None:
    """Writes columns (arrays or lists, None: missing) as one Parquet file. Errors: OutputError."""
    write_file(path, _parquet_bytes(columns))


def _parquet_bytes(columns: dict[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def frame_of(columns: dict[str, Any]) -> "pd.DataFrame":
    """Columns as `read_parquet` would give them after `write_parquet`, without a file."""
    import pandas as pd

    return pd.read_parquet(BytesIO(_parquet_bytes(columns)), dtype_backend="numpy_nullable")


def read_parquet(path: Path, schema: Schema | None = None, num_rows: int | None = None) -> "pd.DataFrame":
    """A Parquet file of ours as a data frame with nullable types.

    Args:
        schema: None: any columns.
        num_rows: that it must have; None: any, but not none.

    Names, types and rows are checked before any value is read. Errors: OutputError, one line.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            head = pq.ParquetFile(file)
            if schema is not None:
                types = [str(kind) for kind in head.schema_arrow.types]
                hints = _checked_head(head.schema_arrow.names, types, schema)
                _check_rows(head.metadata.num_rows, num_rows)
            file.seek(0)
            frame = pd.read_parquet(file, dtype_backend="numpy_nullable")
        if schema is not None:
            for name, hint in hints.items():
                _check_values(frame[name], scalar(hint), name)
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


def _checked_head(names: Sequence[str], types: Sequence[str], schema: Schema) -> dict[str, Any]:
    """The hint of each column that is there."""
    for name in schema:
        if name not in names and not name.endswith("*"):
            raise _MisfitError(f"expected a column {name}, got none")
    hints: dict[str, Any] = {}
    for name, found in zip(names, types, strict=True):
        hint = schema.get(name) or next(
            (hint for prefix, hint in schema.items() if prefix.endswith("*") and name.startswith(prefix[:-1])), None
        )
        if hint is None:
            raise _MisfitError(f"expected no column but those of {TOOL}, got {shown(name)}")
        if name in hints:
            raise _MisfitError(f"column {name}: expected one, got several")
        kind = scalar(hint)
        if found != _ARROW_TYPES[kind.kind] and not (found == "null" and kind.may_miss):
            raise _MisfitError(f"column {name}: expected values of type {_ARROW_TYPES[kind.kind]}, got {shown(found)}")
        hints[name] = hint
    return hints


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
        bad = there[~((values >= low) & (values <= high))]  # NaN, too
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
