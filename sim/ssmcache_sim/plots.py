"""Pictures of a result directory, each as PNG and SVG: the same input gives the same bytes.

Only matplotlib's objects are used, none of its global state, so that this is safe inside notebooks and threads. Each
picture is also a function of its own, of a data frame or a run, for notebooks.
"""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from ssmcache_sim.directories import PLOTS, make_directory, read_manifest, write_file
from ssmcache_sim.picture_parts import rendered
from ssmcache_sim.replay_pictures import (
    hit_depth,
    lost_tokens_over_time,
    memory_over_time,
    phase_of_ceiling,
    replay_figures,
)
from ssmcache_sim.results import ReplayRun, load_run
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
from ssmcache_sim.sweep_results import SWEEP_COMMAND, SweepRun, load_sweep
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
    "load_result",
    "lost_tokens_by_memory",
    "lost_tokens_over_time",
    "memory_over_time",
    "phase_of_ceiling",
    "phase_spread",
    "plot_directory",
    "rendered",
    "replay_figures",
    "run_figures",
    "split_planes",
    "sweep_figures",
    "trace_figure",
]


def plot_directory(directory: str | Path) -> tuple[Path, ...]:
    """Draws what a replay's or a sweep's directory holds into its folder `plots`; the files written.

    Errors: OutputError if it is no such directory or cannot be written.
    """
    directory = Path(directory)
    figures = run_figures(load_result(directory))
    folder = directory / PLOTS
    pictures = {
        folder / f"{name}.{suffix}": rendered(figure, suffix) for name, figure in figures for suffix in ("png", "svg")
    }
    make_directory(folder)
    for path, content in pictures.items():
        write_file(path, content)
    return tuple(pictures)


def load_result(directory: Path) -> ReplayRun | SweepRun:
    """What a command has written with `--out`. Errors: OutputError if it is neither of a replay nor of a sweep."""
    return (load_sweep if read_manifest(directory).get("command") == SWEEP_COMMAND else load_run)(directory)


def directory_figures(directory: Path) -> Iterator[tuple[str, Figure]]:
    """(name, figure) pairs of a result directory. Errors: as `load_result`."""
    return run_figures(load_result(directory))


def run_figures(run: ReplayRun | SweepRun) -> Iterator[tuple[str, Figure]]:
    """(name, figure) pairs of a replay or a sweep, each drawn when it is asked for."""
    return sweep_figures(run) if isinstance(run, SweepRun) else replay_figures(run)
