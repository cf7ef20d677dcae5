"""Result directories: ours or refused, whole or absent."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ssmcache_sim.errors import OutputError

MANIFEST = "manifest.json"
PLOTS = "plots"
TOOL = "ssmcache"
_MAX_JSON_BYTES = 1 << 28  # of large sweeps there are some megabytes; what lies there by mistake may be huge


@contextmanager
def new_directory(path: Path, command: str, known_files: frozenset[str]) -> Iterator[Path]:
    """A folder to write into, that becomes `path` when the block ends, or vanishes when it raises.

    An earlier result of the same command at `path` is replaced, anything else there is left alone.

    Args:
        command: what the manifest of an earlier result names.
        known_files: what an earlier result may hold; nothing else is ever deleted.

    Errors: OutputError, before the block begins, if `path` cannot be written or holds something else.
    """
    path = path.resolve()
    _check_replaceable(path, command, known_files)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield folder
        _put_in_place(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def open_directory(path: Path, command: str) -> None:
    """Makes `path` ready to be written file by file, and keeps what an earlier run of the command left there.

    Errors: OutputError if it cannot be written or holds something else.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()) and read_manifest(path).get("command") != command:
            raise OutputError(f"{path}: expected a new directory or one of `{TOOL} {command}`, got another result")
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error


def make_directory(path: Path) -> None:
    """Makes a directory of ours inside a result; it may be there already. Errors: OutputError."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside is an OutputError that names the path."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_file(path: Path, content: bytes) -> None:
    """A file with this content, whole or absent. Errors: OutputError."""
    with whole_file(path) as file:
        file.write(content)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, that gets its name when the block ends, or vanishes when it raises.

    Errors: OutputError, also for an OSError of the block.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                yield file
            os.chmod(temporary, 0o644)  # mkstemp makes it private
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def json_bytes(value: dict[str, Any]) -> bytes:
    """The one way results are written as JSON: in the order given, readable, ending in a line feed."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """What a JSON file of ours holds, unchecked. Errors: OSError, ValueError."""
    with path.open("rb") as file:
        content = file.read(_MAX_JSON_BYTES + 1)
    if len(content) > _MAX_JSON_BYTES:
        raise ValueError(f"more than {_MAX_JSON_BYTES} bytes")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("too many brackets in each other") from error


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a result directory, of which only `tool` is checked. Errors: OutputError if it is none."""
    try:
        manifest = read_json(directory / MANIFEST)
    except (OSError, ValueError) as error:
        raise OutputError(f"{directory}: expected a result directory of {TOOL}, got no readable {MANIFEST}") from error
    if not isinstance(manifest, dict) or manifest.get("tool") != TOOL:
        raise OutputError(f"{directory}: expected a result directory of {TOOL}, got a {MANIFEST} of something else")
    return manifest


def _check_replaceable(path: Path, command: str, known_files: frozenset[str]) -> None:
    try:
        names = {entry.name for entry in path.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot_write(path, error) from error
    if not names:
        return
    if read_manifest(path).get("command") != command:
        raise OutputError(f"{path}: expected a new directory or one of `{TOOL} {command}`, got another result")
    unknown = sorted(names - known_files - {MANIFEST, PLOTS})
    if unknown:
        raise OutputError(f"{path}: expected only results of {TOOL}, which may be replaced, got {unknown[0]!r}")


def _put_in_place(folder: Path, path: Path) -> None:
    try:
        os.chmod(folder, 0o755)  # mkdtemp makes it private
        if not path.exists():
            os.rename(folder, path)
            return
        replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        os.rename(path, replaced)  # onto an empty folder: allowed, and leaves no moment with two of them
        try:
            os.rename(folder, path)
        except OSError:
            os.rename(replaced, path)
            raise
        shutil.rmtree(replaced)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: cannot write here: {error.strerror or error}")
