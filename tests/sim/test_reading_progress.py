import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmcache_sim.formats import read_trace


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_progress_is_the_share_of_the_file_that_has_been_read(
    write_trace: Callable[..., Path], rows_of: Callable[..., list[dict[str, Any]]], tmp_path: Path, suffix: str
) -> None:
    rows = rows_of([range(1 + index, 400 + index) for index in range(8000)], 16)
    content = write_trace(rows).read_bytes()
    assert len(content) > 2 << 20
    path = tmp_path / f"trace.jsonl{suffix}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](content))
    told: list[float] = []
    read_trace(path, 16, progress=told.append)
    assert told == sorted(told)
    assert len(told) > 2
    assert 0 < told[0] <= told[-1] == 1
