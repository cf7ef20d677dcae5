import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]
RunHere = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def sample() -> str:
    """The bundled sample."""
    return str(REPOSITORY / "examples" / "traces" / "mooncake_conversation_1000.jsonl.gz")


@pytest.fixture(scope="session")
def ssmcache() -> Run:
    """Runs the command in a process of its own."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ssmcache_cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)

    return run


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """All files of a result by name, without what a manifest says of the time."""

    def read(directory: Path) -> dict[str, bytes]:
        files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        for name in [name for name in files if Path(name).name == "manifest.json"]:
            manifest = json.loads(files[name])
            assert manifest.pop("run").keys() == {"started_at", "wall_seconds"}
            files[name] = json.dumps(manifest).encode()
        return files

    return read


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command's entry point in this process: exit code, standard output, standard error."""
    from ssmcache_cli.main import run

    def run_command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ssmcache", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run()
        output = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0), output.out, output.err

    return run_command


@pytest.fixture
def bad_trace(tmp_path: Path) -> Path:
    """A trace whose second row has a negative length."""
    good = {"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [0, 1]}
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, {**good, "input_length": -3}])))
    return path
