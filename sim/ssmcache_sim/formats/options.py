"""What a reader of traces may be told, and what a kind of trace file is."""

from collections.abc import Callable
from dataclasses import dataclass

from ssmcache_sim.formats.source import SourceFile
from ssmcache_sim.sessions import SessionStart
from ssmcache_sim.trace import LengthTrace, Trace


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How a trace is read; None: not said.

    Attributes:
        format_name: the format, instead of telling it by the content.
        session_start: when sessions start, for formats that do not record it; by default all at time 0.
        seed: of what is drawn by `session_start`; by default 0.
        tokenizer: what turns text into tokens (see `tokenizers.py`); a trace of text is refused without one.
        outputs: take what requests generated into the trace, too, where it is known (see `outputs.py`).
        skip_broken: leave broken rows out and count them, instead of an error.
    """

    format_name: str | None = None
    session_start: SessionStart | None = None
    seed: int | None = None
    tokenizer: str | None = None
    skip_broken: bool = False
    outputs: bool = False

    def given(self) -> tuple[str, ...]:
        """Names of the options that only some formats understand and that were given."""
        values = (
            ("session_start", self.session_start),
            ("seed", self.seed),
            ("tokenizer", self.tokenizer),
            ("outputs", self.outputs or None),
        )
        return tuple(name for name, value in values if value is not None)


@dataclass(frozen=True, slots=True)
class FirstRow:
    """What a format is told by: the first line of a file that is not blank, and its object if it is JSON."""

    line: bytes
    fields: dict[str, object]


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """A kind of trace file.

    Attributes:
        recognises: whether a file opens like one of this kind.
        read: reads all rows; the block is what one recorded id stands for, None: told by the content.
        options: those of `ReadOptions.given` that it understands.
    """

    name: str
    recognises: Callable[[FirstRow], bool]
    read: Callable[[SourceFile, int | None, ReadOptions], Trace | LengthTrace]
    options: frozenset[str] = frozenset()
