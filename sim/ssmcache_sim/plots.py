"""Pictures of a result directory, each as PNG and SVG: the same input gives the same bytes.

Only matplotlib's objects are used, none of its global state, so that this is safe inside notebooks and threads. Each
picture is also a function of its own, of a data frame or a run, for notebooks.
"""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from ssmcache_sim.directories import PLOTS, read_manifest, write_file
from ssmcache_sim.errors import OutputError
from ssmcache_sim.picture_parts import rendered
from ssmcache_sim.replay_pictures import (
    hit_depth,
    lost_tokens_over_time,
    memory_over_time,
    phase_of_ceiling,
    replay_figures,
)
from ssmcache_sim.results import load_run
from ssmcache_sim.sweep_pictures import (
    best_splits,
    hit_depths,
    hit_rate_against_memory,
    interval_heat_map,
    lost_tokens_by_memory,
    phase_spread,
    split_planes,
    sweep_figures,
)
from ssmcache_sim.sweep_results import SWEEP_COMMAND, load_sweep
from ssmcache_sim.tier_pictures import hit_rate_by_tier
from ssmcache_sim.trace_plot import trace_figure

__all__ = [
    "best_splits",
    "directory_figures",
    "hit_depth",
    "hit_depths",
    "hit_rate_against_memory",
    "hit_rate_by_tier",
    "interval_heat_map",
    "lost_tokens_by_memory",
    "lost_tokens_over_time",
    "memory_over_time",
    "phase_of_ceiling",
    "phase_spread",
    "plot_directory",
    "rendered",
    "replay_figures",
    "split_planes",
    "sweep_figures",
    "trace_figure",
]


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
