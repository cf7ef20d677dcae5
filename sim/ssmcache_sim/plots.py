"""Pictures of a result directory, each as PNG and SVG: the same input gives the same bytes.

Only matplotlib's objects are used, none of its global state, so that this is safe inside notebooks and threads.
"""

from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from ssmcache_sim.directories import PLOTS, read_manifest, write_file
from ssmcache_sim.errors import OutputError
from ssmcache_sim.results import ReplayRun, load_run
from ssmcache_sim.sizes import UNLIMITED, format_size
from ssmcache_sim.sweep_results import SWEEP_COMMAND, SweepRun, load_sweep
from ssmcache_sim.tier_pictures import at_largest_host, has_tiers, hit_parts, hit_rate_by_tier

_GIB = 1 << 30
_MS_PER_MINUTE = 60_000
_TIME_BINS = 40
_MAX_POINTS = 2_000  # of a curve over time: more than a screen can show
_DOTS_PER_INCH = 150
_PANELS_PER_ROW = 3
# what became of the tokens below the KV ceiling: column, name, colour (told apart by colour-blind people too)
_FATES = (
    ("usable_hit_tokens", "usable hit", "#009e73"),
    ("lost_snapshot_tokens", "lost: no snapshot", "#cc79a7"),
    ("lost_alignment_tokens", "lost: alignment to the interval", "#e69f00"),
    ("lost_evicted_tokens", "lost: evicted KV", "#d55e00"),
)
_NEW_COLOUR = "#d9d9d9"
_GROUP_COLOURS = {"attention": "#56b4e9", "ssm": "#0072b2"}

FloatArray = npt.NDArray[np.float64]


def plot_directory(directory: str | Path) -> tuple[Path, ...]:
    """Draws what a replay's or a sweep's directory holds into its folder `plots`; the files written.

    Errors: OutputError if it is no such directory or cannot be written.
    """
    directory = Path(directory)
    is_sweep = read_manifest(directory).get("command") == SWEEP_COMMAND
    figures = sweep_figures(load_sweep(directory)) if is_sweep else replay_figures(load_run(directory))
    folder = directory / PLOTS
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot write here: {error.strerror or error}") from error
    written: list[Path] = []
    for name, figure in figures:
        for suffix in ("png", "svg"):
            path = folder / f"{name}.{suffix}"
            write_file(path, _rendered(figure, suffix))
            written.append(path)
    return tuple(written)


def replay_figures(run: ReplayRun) -> Iterator[tuple[str, Figure]]:
    """Memory over time, and where tokens were lost over time: (name, figure) pairs."""
    settings = run.manifest["settings"]
    interval = settings["ssm_reuse_interval"]
    shape = f"block {settings['tokens_per_block']}" + ("" if interval is None else f", interval {interval}")
    lower = {"host": settings["host_memory_bytes"], "disk": settings["disk_memory_bytes"]}
    tiers = "".join(f", {name} {format_size(size)}" for name, size in lower.items() if size)
    memory = f"{'GPU' if tiers else 'memory'} {format_size(settings['gpu_memory_bytes'])}{tiers}"
    what = f"{_trace_and_model(run.manifest)}\n{shape}, {memory}"
    whose = "GPU memory of the cache" if tiers else "Cache memory"
    yield "memory_over_time", memory_over_time(run, f"{whose} over time\n{what}")
    yield "lost_tokens_over_time", lost_tokens_over_time(run, f"Prompt tokens: hit, lost and new\n{what}")


def sweep_figures(run: SweepRun) -> Iterator[tuple[str, Figure]]:
    """For each block size hit rate and lost tokens against memory, and a heat map interval x block size; with other
    tiers than the GPU hits by tier against host memory, and the others at the most host memory there is.
    """
    what = _trace_and_model(run.manifest)
    if has_tiers(run.cells):
        for block, cells in _groups(run.cells, "tokens_per_block"):
            title = f"Usable token hit rate by tier against host memory\n{what}, blocks of {block} tokens"
            yield f"hit_rate_by_tier_block_{block}", hit_rate_by_tier(cells, title)
        shown, lower = at_largest_host(run.cells)
        run, what = replace(run, cells=shown), f"{what}, {lower}"
    for block, cells in _groups(run.cells, "tokens_per_block"):
        shape = f"{what}, blocks of {block} tokens"
        if cells["gpu_memory_bytes"].notna().any():
            title = f"Usable token hit rate against memory\n{shape}"
            yield f"hit_rate_block_{block}", hit_rate_against_memory(cells, title)
        yield f"lost_tokens_block_{block}", lost_tokens_by_memory(cells, f"Where shared tokens were lost\n{shape}")
    if run.cells["ssm_reuse_interval"].notna().any():
        memory = _largest_memory(run.cells)
        size = format_size(None if np.isinf(memory) else int(memory))
        yield "heat_map", interval_heat_map(run.cells, memory, f"Usable token hit rate at {size}\n{what}")


def hit_rate_against_memory(cells: pd.DataFrame, title: str) -> Figure:
    """One line an interval; dashed, in the same colour, what unlimited memory would give."""
    figure, axes = _figure_with_axes(title, 8.0, 5.6)
    groups = _groups(cells, "ssm_reuse_interval")
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.9, len(groups)))
    for (interval, group), colour in zip(groups, colours, strict=True):
        gib = _memory_bytes(group) / _GIB
        finite = np.isfinite(gib)
        name = _interval_name(interval)
        rates = _floats(group, "usable_token_hit_rate")[finite]
        axes.plot(gib[finite], rates, marker="o", markersize=4, color=colour, label=name)
        ceiling = _floats(group, "ceiling_token_hit_rate")[0]
        axes.axhline(ceiling, color=colour, linestyle="--", linewidth=1)
    axes.plot([], [], color="black", linestyle="--", linewidth=1, label="ceiling: unlimited memory")
    _memory_axis(axes, _memory_bytes(cells) / _GIB)
    axes.set_ylabel("usable token hit rate (% of prompt tokens)")
    _percent_axis(axes)
    figure.legend(title="snapshot interval", loc="outside lower center", ncols=4)
    return figure


def interval_heat_map(cells: pd.DataFrame, memory_bytes: float, title: str) -> Figure:
    """Usable hit rate of each interval and block size at one memory size (infinity: unlimited)."""
    shown = cells[_memory_bytes(cells) == memory_bytes]
    intervals = sorted({int(value) for value in shown["ssm_reuse_interval"].dropna()})
    blocks = sorted({int(value) for value in shown["tokens_per_block"]})
    rates = np.full((len(blocks), len(intervals)), np.nan)
    columns = ("tokens_per_block", "ssm_reuse_interval", "usable_token_hit_rate")
    for block, interval, rate in shown[list(columns)].dropna().itertuples(index=False):
        rates[blocks.index(block), intervals.index(interval)] = rate
    figure, axes = _figure_with_axes(title, max(6.5, 2.4 + 0.95 * len(intervals)), max(3.4, 2.0 + 0.6 * len(blocks)))
    colour_map = mpl.colormaps["viridis"].with_extremes(bad="#f0f0f0")
    top = float(np.nanmax(rates)) or 1.0
    image = axes.imshow(rates, cmap=colour_map, vmin=0.0, vmax=top, aspect="auto")
    for (row, column), rate in np.ndenumerate(rates):
        text, colour = ("not\npossible", "#808080") if np.isnan(rate) else (f"{rate:.2%}", "white")
        if rate > 0.6 * top:
            colour = "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(intervals)), [str(interval) for interval in intervals])
    axes.set_yticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_xlabel("snapshot interval (tokens)")
    axes.set_ylabel("block (tokens)")
    bar = figure.colorbar(image, format=PercentFormatter(1.0))
    bar.set_label("% of prompt tokens")
    return figure


def lost_tokens_by_memory(cells: pd.DataFrame, title: str) -> Figure:
    """A panel an interval, a bar a memory size: how the shared tokens (the KV ceiling) divide into hit and lost."""
    groups = _groups(cells, "ssm_reuse_interval")
    num_rows = -(-len(groups) // _PANELS_PER_ROW)
    num_columns = min(len(groups), _PANELS_PER_ROW)
    width = max(7.0, 1.6 + num_columns * max(2.6, 0.42 * max(len(group) for _, group in groups)))
    figure = Figure(figsize=(width, 1.6 + 2.7 * num_rows), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    for axes, (interval, group) in zip(panels.flat, groups, strict=False):
        places = np.arange(len(group))
        _stack_bars(axes, places, 0.8, group, _floats(group, "prompt_tokens"))
        gib = _memory_bytes(group) / _GIB
        sizes = [UNLIMITED if np.isinf(size) else f"{size:.3g}" for size in gib]
        axes.set_xticks(places, sizes, rotation=90 if len(sizes) > 6 or np.isinf(gib).any() else 0)
        axes.set_xlabel("cache memory (GiB)")
        axes.set_title(f"interval: {_interval_name(interval)}", fontsize=10)
        _percent_axis(axes)
    panels[0, 0].set_ylim(0, 1.05 * max(_floats(cells, "kv_ceiling_token_hit_rate").max(), 1e-3))  # shared by all
    for axes in panels.flat[len(groups) :]:
        axes.remove()
    figure.supylabel("% of prompt tokens", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2)
    return figure


def memory_over_time(run: ReplayRun, title: str) -> Figure:
    """Bytes in use after each request, stacked by layer group, and the memory there is."""
    figure, axes = _figure_with_axes(title, 8.0, 5.4)
    frame = run.per_request.iloc[_thinned(len(run.per_request))]
    minutes = _minutes(frame)
    names = [f"used_bytes_{peak.kind}_{peak.layer_group}" for peak in run.totals.peaks]
    labels = [f"{peak.kind} (group {peak.layer_group})" for peak in run.totals.peaks]
    used_gib = np.array([_floats(frame, name) / _GIB for name in names])
    axes.stackplot(minutes, used_gib, labels=labels, colors=[_GROUP_COLOURS[peak.kind] for peak in run.totals.peaks])
    total = run.manifest["settings"]["gpu_memory_bytes"]
    if total is not None:
        axes.axhline(total / _GIB, color="black", linestyle="--", linewidth=1, label="memory given")
    axes.set_xlabel("time since the first request (minutes)")
    axes.set_ylabel("cache memory in use (GiB)")
    axes.set_xlim(minutes[0], max(minutes[-1], minutes[0] + 1e-3))
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def lost_tokens_over_time(run: ReplayRun, title: str) -> Figure:
    """Prompt tokens by time of arrival: hit, lost by reason, and new (what even unlimited memory would not hit)."""
    figure, axes = _figure_with_axes(title, 8.0, 5.4)
    minutes = _minutes(run.per_request)
    edges = np.linspace(0.0, max(float(minutes[-1]), 1e-3), _TIME_BINS + 1)
    base = np.zeros(_TIME_BINS)
    prompt_tokens = run.totals.prompt_tokens
    new_tokens = _floats(run.per_request, "prompt_tokens") - _floats(run.per_request, "kv_ceiling_hit_tokens")
    fates = [*hit_parts(run.per_request), *_FATES[1:]]
    parts = [(_floats(run.per_request, column), name, colour) for column, name, colour in fates]
    for tokens, name, colour in [*parts, (new_tokens, "new: above the KV ceiling", _NEW_COLOUR)]:
        millions = np.histogram(minutes, edges, weights=tokens)[0] / 1e6
        label = f"{name} ({tokens.sum() / prompt_tokens:.2%})"
        axes.bar(edges[:-1], millions, width=np.diff(edges), align="edge", bottom=base, color=colour, label=label)
        base += millions
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("time since the first request (minutes)")
    axes.set_ylabel(f"prompt tokens (millions in {edges[1]:.2g} minutes)")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], title="share of all prompt tokens", loc="outside lower center", ncols=2)
    return figure


def _stack_bars(axes: Axes, places: npt.NDArray[Any], width: float, frame: pd.DataFrame, whole: FloatArray) -> None:
    base = np.zeros(len(frame))
    for column, name, colour in _FATES:
        share = _floats(frame, column) / whole
        axes.bar(places, share, width, bottom=base, color=colour, label=name)
        base += share


def _figure_with_axes(title: str, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots()


def _memory_axis(axes: Axes, gib: FloatArray) -> None:
    """Logarithmic, with ticks at the sizes that were replayed, as many as can be read."""
    sizes = sorted(set(gib[np.isfinite(gib)].tolist()))
    axes.set_xscale("log")
    kept = [sizes[0]] + [size for before, size in pairwise(sizes) if size / before > 1.05]
    axes.set_xticks(kept, [f"{size:.3g}" for size in kept])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("cache memory (GiB)")
    axes.grid(alpha=0.3)


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))


def _trace_and_model(manifest: dict[str, Any]) -> str:
    settings = manifest["settings"]
    arena = ", one arena for KV and snapshots" if settings.get("pools") == "arena" else ""
    return f"{manifest['trace']['name']}, {settings['model']}{arena}"


def _groups(cells: pd.DataFrame, column: str) -> list[tuple[int | None, pd.DataFrame]]:
    """Rows by the integer in a column, rising; None where it is missing."""
    numbers = np.asarray(cells[column].to_numpy(dtype=np.float64, na_value=np.nan))
    groups: list[tuple[int | None, pd.DataFrame]] = []
    for number in np.unique(numbers):  # counts all NaN as one, the last
        is_missing = bool(np.isnan(number))
        rows = np.isnan(numbers) if is_missing else numbers == number
        groups.append((None if is_missing else int(number), cells[rows]))
    return groups


def _interval_name(interval: int | None) -> str:
    return "none (no SSM layers)" if interval is None else f"{interval} tokens"


def _floats(frame: pd.DataFrame, column: str) -> FloatArray:
    return np.array(frame[column].to_numpy(dtype=np.float64), dtype=np.float64)


def _memory_bytes(cells: pd.DataFrame) -> FloatArray:
    """Infinity where unlimited."""
    return np.array(cells["gpu_memory_bytes"].to_numpy(dtype=np.float64, na_value=np.inf), dtype=np.float64)


def _largest_memory(cells: pd.DataFrame) -> float:
    """The largest size given; infinity only where there is no other: unlimited memory hides all differences."""
    sizes = _memory_bytes(cells)
    finite = sizes[np.isfinite(sizes)]
    return float(finite.max()) if finite.size else np.inf


def _minutes(frame: pd.DataFrame) -> FloatArray:
    arrival_ms = _floats(frame, "arrival_ms")
    minutes: FloatArray = (arrival_ms - arrival_ms[0]) / _MS_PER_MINUTE
    return minutes


def _thinned(count: int) -> npt.NDArray[np.int64]:
    """Indices of at most `_MAX_POINTS` of `count` points, evenly spread, both ends included."""
    return np.unique(np.linspace(0, count - 1, min(count, _MAX_POINTS)).astype(np.int64))


def _rendered(figure: Figure, suffix: str) -> bytes:
    buffer = BytesIO()
    # a salt of our own makes the ids of an SVG the same each time; a date would differ too
    metadata = {"Date": None} if suffix == "svg" else {"Software": None}
    with mpl.rc_context({"svg.hashsalt": "ssmcache"}):
        figure.savefig(buffer, format=suffix, dpi=_DOTS_PER_INCH, metadata=metadata)
    return buffer.getvalue()
