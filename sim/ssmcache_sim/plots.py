"""Pictures of a result directory, each as PNG and SVG: the same input gives the same bytes.

Only matplotlib's objects are used, none of its global state, so that this is safe inside notebooks and threads.
"""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from ssmcache_sim.directories import PLOTS, read_manifest, write_file
from ssmcache_sim.errors import OutputError
from ssmcache_sim.replay_pictures import replay_figures
from ssmcache_sim.results import load_run
from ssmcache_sim.sweep_pictures import sweep_figures
from ssmcache_sim.sweep_results import SWEEP_COMMAND, load_sweep

_DOTS_PER_INCH = 150


def plot_directory(directory: str | Path) -> tuple[Path, ...]:
    """Draws what a replay's or a sweep's directory holds into its folder `plots`; the files written.

    Errors: OutputError if it is no such directory or cannot be written.
    """
    directory = Path(directory)
    figures = directory_figures(directory)
    folder = directory / PLOTS
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot write here: {error.strerror or error}") from error
    written: list[Path] = []
    for name, figure in figures:
        for suffix in ("png", "svg"):
            path = folder / f"{name}.{suffix}"
            write_file(path, rendered(figure, suffix))
            written.append(path)
    return tuple(written)


def directory_figures(directory: Path) -> Iterator[tuple[str, Figure]]:
    """(name, figure) pairs of a result directory, each drawn when it is asked for.

    Errors: OutputError if it is no such directory.
    """
    if read_manifest(directory).get("command") == SWEEP_COMMAND:
        return sweep_figures(load_sweep(directory))
    return replay_figures(load_run(directory))


def rendered(figure: Figure, suffix: str) -> bytes:
    """A figure as `png` or `svg`."""
    buffer = BytesIO()
    # a salt of our own makes the ids of an SVG the same each time; a date would differ too
    metadata = {"Date": None} if suffix == "svg" else {"Software": None}
    with mpl.rc_context({"svg.hashsalt": "ssmcache"}):
        figure.savefig(buffer, format=suffix, dpi=_DOTS_PER_INCH, metadata=metadata)
    return buffer.getvalue()


__all__ = ["directory_figures", "plot_directory", "rendered", "replay_figures", "sweep_figures"]
