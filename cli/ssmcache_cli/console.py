"""What the commands share on the terminal: progress on stderr, interruption, times, options."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated

import typer

from ssmcache_sim.results import RunTimes

ModelOption = Annotated[
    str, typer.Option(help="A preset (see `ssmcache models`), or the path of a config.json.", metavar="NAME|PATH")
]
TraceBlockOption = Annotated[
    int | None, typer.Option(help="Tokens that one id of the trace stands for; told by the trace if not given.")
]
SsmFractionOption = Annotated[
    float | None,
    typer.Option(help="Share of the memory for SSM states, 0 to 1; by default what a sequence of 2,048 tokens needs."),
]
KvDtypeOption = Annotated[str | None, typer.Option(help="Of the KV pages; by default what the model's config says.")]
StateDtypeOption = Annotated[
    str | None, typer.Option(help="Of the SSM states; by default what the model's config says, else float32.")
]
PrefillOption = Annotated[
    str,
    typer.Option(
        help="How snapshots inside a prompt are made: `reserved` (slots ahead, one commit) or `chunked` (one commit "
        "an interval). Both hit the same."
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No table and no progress.")]


class Stopwatch:
    """Wall time of a command, for its manifest."""

    def __init__(self) -> None:
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._start_seconds = time.perf_counter()

    def times(self) -> RunTimes:
        """The times so far."""
        return RunTimes(self._started_at, round(time.perf_counter() - self._start_seconds, 3))


@contextmanager
def interruptible(hint: str) -> Iterator[None]:
    """Ctrl-C inside ends the command with exit code 130 and one line."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: {hint}", file=sys.stderr)
        raise typer.Exit(130) from None


@contextmanager
def progress_bar(what: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that takes how much is done; draws on stderr, and only where a person looks at it."""
    if not shown or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
