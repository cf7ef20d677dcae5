"""Bytes of KV per token and bytes per SSM snapshot of named models, and of any config.json of a known family."""

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from ssmcache.models.families import family_names, read_config
from ssmcache.models.presets import CONFIDENCES, PRESETS, marconi_7b, read_preset
from ssmcache.models.spec import DTYPE_NAMES, AttentionSpec, LayerSpec, ModelError, ModelSpec, SsmSpec, dtype_name

_PRESETS = {preset.name: preset for preset in PRESETS}
_MARCONI = "marconi-7b"
_MAX_FILE_BYTES = 1 << 24  # a few kilobytes are usual; what is named by mistake may be huge


def preset_names() -> tuple[str, ...]:
    """The names that `load_model` knows, in the order of the documentation."""
    return (*_PRESETS, _MARCONI)


def load_model(name_or_path: str) -> ModelSpec:
    """A preset by name (in any case), or a model by the path of its config.json or of a folder that has one.

    A preset wins over a file of the same name; write `./name` for the file.

    Errors: ModelError, one line, for an unknown name (with close matches), a file that cannot be read or is not JSON
    (with the line), an unknown family, and a field that is missing, wrong, absurd, or at odds with another.
    """
    name = name_or_path.lower()
    if name == _MARCONI:
        return marconi_7b()
    if name in _PRESETS:
        return read_preset(_PRESETS[name])
    path = Path(name_or_path)
    if os.path.exists(path) or path.suffix == ".json" or len(path.parts) > 1:
        return _load_file(path / "config.json" if path.is_dir() else path)
    close = difflib.get_close_matches(name, preset_names(), n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    expected = f"the path of a config.json or one of {', '.join(preset_names())}"
    raise ModelError(f"unknown model {name_or_path!r}: {hint}Expected {expected}")


def _load_file(path: Path) -> ModelSpec:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path}: expected a config.json to read, got {error.strerror or error}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ModelError(f"{path}: expected a config.json of at most {_MAX_FILE_BYTES:,} bytes, got more")
    try:
        config = json.loads(content.decode())
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}:{error.lineno}: expected JSON, got {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError:
        raise ModelError(f"{path}: expected JSON in UTF-8, got other bytes") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or deep nesting
        raise ModelError(f"{path}: expected JSON of a model, got: {error}") from None
    if not isinstance(config, Mapping):
        raise ModelError(f"{path}: expected a JSON object, got {type(config).__name__}")
    # a file in a folder of its own is known by the folder, as in a downloaded checkpoint
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return read_config(config, name=name, where=str(path), source=str(path), confidence="config file")


__all__ = [
    "CONFIDENCES",
    "DTYPE_NAMES",
    "AttentionSpec",
    "LayerSpec",
    "ModelError",
    "ModelSpec",
    "SsmSpec",
    "dtype_name",
    "family_names",
    "load_model",
    "preset_names",
]
