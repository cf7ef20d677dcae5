"""Checked access to the fields of a config.json, so that every reader fails in the same words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from ssmcache.models.spec import ModelError, dtype_name

MAX_LAYERS = 10_000
_MAX_INT = 1 << 24  # widths, heads, periods: published ones stay below 2**18
_MAX_SHOWN = 200


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class Fields:
    """One object of a config.json. `where` opens every error: the file or the preset, and the object in it.

    A field that is `null` counts as missing, as it does for the libraries that write these files. Where a field has
    several names, the first is today's and the others are older spellings.
    """

    values: Mapping[str, object]
    where: str

    def error(self, what: str, expected: str, got: object) -> ModelError:
        """A ModelError about this object, to be raised by the caller."""
        shown = repr(got)
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[: _MAX_SHOWN - 3]}..."
        return ModelError(f"{self.where}: {what}: expected {expected}, got {shown}")

    def _find(self, names: Sequence[str]) -> tuple[str, object]:
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        return names[0], None

    def _require(self, names: Sequence[str]) -> tuple[str, object]:
        name, value = self._find(names)
        if value is None:
            older = f" (or {', '.join(map(repr, names[1:]))})" if len(names) > 1 else ""
            raise ModelError(f"{self.where}: field {name!r}{older} is missing")
        return name, value

    def has(self, *names: str) -> bool:
        """Whether one of the names has a value."""
        return self._find(names)[1] is not None

    def positive_int(self, *names: str, default: int | None = None, maximum: int = _MAX_INT) -> int:
        """The field as a positive integer, not above `maximum`; `default` where it is missing, if there is one.

        Errors: ModelError for anything else.
        """
        if default is not None and not self.has(*names):
            return default
        name, value = self._require(names)
        if not (_is_int(value) and value > 0):
            raise self.error(f"field {name!r}", "a positive integer", value)
        if value > maximum:
            raise self.error(f"field {name!r}", f"at most {maximum:,}", value)
        return value

    def num_layers(self, name: str = "num_hidden_layers") -> int:
        """The field as a number of layers. Errors: as those of `positive_int`."""
        return self.positive_int(name, maximum=MAX_LAYERS)

    def count(self, name: str, default: int = 0) -> int:
        """An optional number that may be 0, such as a number of experts. Errors: ModelError for anything else."""
        value = self.values.get(name)
        if value is None:
            return default
        return 0 if _is_int(value) and value == 0 else self.positive_int(name)

    def text(self, *names: str) -> str:
        """The field as text. Errors: ModelError if missing or anything else."""
        name, value = self._require(names)
        if not isinstance(value, str):
            raise self.error(f"field {name!r}", "text", value)
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """The field as a list of integers, one for some layers. Errors: ModelError if missing or anything else."""
        _, value = self._require((name,))
        if not isinstance(value, list | tuple) or not all(map(_is_int, value)):
            raise self.error(f"field {name!r}", "a list of integers", value)
        if len(value) > MAX_LAYERS:
            raise self.error(f"length of {name}", f"at most {MAX_LAYERS:,}", len(value))
        return tuple(value)

    def section(self, name: str) -> "Fields":
        """The field as an object of its own. Errors: ModelError if missing or anything else."""
        _, value = self._require((name,))
        if not isinstance(value, Mapping):
            raise self.error(f"field {name!r}", "an object", value)
        return Fields(value, f"{self.where}, {name}")

    def dtype(self, *names: str, default: str) -> str:
        """The canonical name of a dtype field, or the default. Errors: ModelError for an unknown dtype."""
        if not self.has(*names):
            return default
        try:
            return dtype_name(self.text(*names)[:32])  # longer than any name, and short in the message
        except ModelError as error:
            raise ModelError(f"{self.where}: field {self._find(names)[0]!r}: {error}") from None

    def layer_kinds(self, *names: str, known: Mapping[str, str]) -> tuple[str, ...]:
        """A list (or a pattern of letters) with one entry a layer, each translated by `known`.

        Errors: ModelError for an unknown entry, or if the length is not `num_hidden_layers` where that is stated.
        """
        name, value = self._require(names)
        if not isinstance(value, list | tuple | str) or not value:
            raise self.error(f"field {name!r}", "one entry a layer", value)
        if len(value) > MAX_LAYERS:
            raise self.error(f"length of {name}", f"at most {MAX_LAYERS:,} layers", len(value))
        for index, entry in enumerate(value):
            if not isinstance(entry, str) or entry not in known:
                raise self.error(f"{name}[{index}]", f"one of {', '.join(map(repr, known))}", entry)
        if self.has("num_hidden_layers") and len(value) != self.num_layers():
            expected = f"num_hidden_layers = {self.num_layers()} entries"
            raise self.error(f"length of {name}", expected, len(value))
        return tuple(known[entry] for entry in value)
