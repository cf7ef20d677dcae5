"""What the pictures of all kinds share: axes, colours, columns as arrays."""

from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ssmcache_sim.phase import PhaseCeilings
from ssmcache_sim.sizes import UNLIMITED, format_size

GIB = 1 << 30
_PANELS_PER_ROW = 3
_MAX_MARKS = 32  # on a curve
_DOTS_PER_INCH, _DOTS_PER_INCH_IN_NOTEBOOKS = 150, 90
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Part = tuple[FloatArray, str, str]  # tokens, name, colour
_ALWAYS = "lost: snapshot evicted", "lost: alignment to the interval", "lost: KV evicted"


class Picture(Figure):
    """A figure that a notebook shows as it is, whatever plotting backend is set there."""

    def _repr_png_(self) -> bytes:
        return rendered(self, "png", _DOTS_PER_INCH_IN_NOTEBOOKS)


def rendered(figure: Figure, suffix: str, dots_per_inch: int = _DOTS_PER_INCH) -> bytes:
    """A figure as `png` or `svg`: the same figure gives the same bytes."""
    buffer = BytesIO()
    # a salt of our own makes the ids of an SVG the same each time; a date would differ too
    metadata = {"Date": None} if suffix == "svg" else {"Software": None}
    with mpl.rc_context({"svg.hashsalt": "ssmcache"}):
        figure.savefig(buffer, format=suffix, dpi=dots_per_inch, metadata=metadata)
    return buffer.getvalue()


def lost_parts(frame: pd.DataFrame, picture: pd.DataFrame) -> list[Part]:
    """What became of the tokens between the usable hits and the KV ceiling: [rows of `frame`] tokens by cause. Rare
    causes are left out where no row of the whole `picture` has any. The colours are told apart by colour-blind people
    too.
    """
    found, there = _lost_parts(frame), _lost_parts(picture)
    return [part for part, of_all in zip(found, there, strict=True) if part[1] in _ALWAYS or of_all[0].any()]


def _lost_parts(frame: pd.DataFrame) -> list[Part]:
    evicted, window = (floats(frame, f"lost_snapshot_{cause}_tokens") for cause in ("evicted", "window"))
    too_large = floats(frame, "lost_evicted_too_large_tokens")
    snapshot, alignment, kv = _ALWAYS
    return [
        (evicted, snapshot, "#cc79a7"),
        (floats(frame, "lost_snapshot_tokens") - evicted - window, "lost: snapshot not taken", "#882255"),
        (window, "lost: window KV evicted", "#f0e442"),
        (floats(frame, "lost_alignment_tokens"), alignment, "#e69f00"),
        (floats(frame, "lost_evicted_tokens") - too_large, kv, "#d55e00"),
        (too_large, "lost: request too large", "#6b2f00"),
    ]


def stack_bars(axes: Axes, places: npt.NDArray[Any], width: float, parts: Sequence[Part], whole: FloatArray) -> None:
    base = np.zeros(len(whole))
    for tokens, name, colour in parts:
        axes.bar(places, tokens / whole, width, bottom=base, color=colour, label=name)
        base += tokens / whole


def figure_with_axes(title: str, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Picture(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots()


def memory_axis(axes: Axes, gib: FloatArray) -> None:
    """Logarithmic, with ticks at the sizes that were replayed, as many as can be read."""
    sizes = sorted(set(gib[np.isfinite(gib)].tolist()))
    axes.set_xscale("log")
    kept = [sizes[0]] + [size for before, size in pairwise(sizes) if size / before > 1.05]
    axes.set_xticks(kept, list(map(gib_name, kept)))
    axes.set_xticks([], minor=True)
    axes.set_xlabel("cache memory (GiB)")
    axes.grid(alpha=0.3)


def percent_axis(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))


def trace_and_model(manifest: dict[str, Any]) -> str:
    """For titles: a dollar of a name is a dollar, and begins no formula."""
    settings = manifest["settings"]
    arena = ", one arena for KV and snapshots" if settings.get("pools") == "arena" else ""
    return f"{manifest['trace']['name']}, {settings['model']}{arena}".replace("$", r"\$")


def groups(cells: pd.DataFrame, column: str) -> list[tuple[int | None, pd.DataFrame]]:
    """Rows by the integer in a column, rising; None where it is missing."""
    numbers = np.asarray(cells[column].to_numpy(dtype=np.float64, na_value=np.nan))
    groups: list[tuple[int | None, pd.DataFrame]] = []
    for number in np.unique(numbers):  # counts all NaN as one, the last
        is_missing = bool(np.isnan(number))
        rows = np.isnan(numbers) if is_missing else numbers == number
        groups.append((None if is_missing else int(number), cells[rows]))
    return groups


def interval_name(interval: int | None) -> str:
    return "none (no SSM layers)" if interval is None else f"{interval} tokens"


def floats(frame: pd.DataFrame, column: str) -> FloatArray:
    return np.array(frame[column].to_numpy(dtype=np.float64), dtype=np.float64)


def memory_bytes(cells: pd.DataFrame) -> FloatArray:
    """Infinity where unlimited."""
    return np.array(cells["gpu_memory_bytes"].to_numpy(dtype=np.float64, na_value=np.inf), dtype=np.float64)


def largest_memory(cells: pd.DataFrame) -> float:
    """The largest size given; infinity only where there is no other: unlimited memory hides all differences."""
    sizes = memory_bytes(cells)
    finite = sizes[np.isfinite(sizes)]
    return float(finite.max()) if finite.size else np.inf


def panels(title: str, count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of that size in inches each, in rows; all with the same vertical axis."""
    num_rows, num_columns = -(-count // _PANELS_PER_ROW), min(count, _PANELS_PER_ROW)
    figure = Picture(figsize=(max(7.0, 1.6 + num_columns * width), 1.6 + num_rows * height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    places = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flatten().tolist()
    for spare in places[count:]:
        spare.remove()
    return figure, places[:count]


def gib_name(gib: float) -> str:
    """A size in GiB for an axis, to three digits; infinity: unlimited."""
    if np.isinf(gib):
        return UNLIMITED
    return f"{gib:.0f}" if gib >= 100 else f"{gib:.3g}"


def memory_name(num_bytes: float) -> str:
    """For legends and titles; infinity: unlimited."""
    return format_size(None if np.isinf(num_bytes) else int(num_bytes))


def phase_band(axes: Axes, ceilings: PhaseCeilings) -> None:
    """Draws the ceilings of one period against the shift, from 0 to the period: bounds, and dots where they meet."""
    period, step = ceilings.period_tokens, ceilings.step_tokens
    low, high = ceilings.low / ceilings.prompt_tokens, ceilings.high / ceilings.prompt_tokens
    shifts = np.arange(period + 1)
    low, high = np.append(low, low[0]), np.append(high, high[0])  # a whole period is no shift
    bounds = axes.fill_between(shifts, low, high, step="post", color="#bbbbbb", linewidth=0)
    bounds.set(label="ceiling: within these bounds", rasterized=True)  # of thousands of points
    axes.plot(shifts[::step], low[::step], color="black", linewidth=0.8, linestyle=":" if step > 1 else "-")
    known = shifts[:: step * max(1, period // step // _MAX_MARKS)]
    axes.plot(known, low[known], "o", color="black", markersize=3.5, label="ceiling: exact")
    axes.set_xlim(0, period)
    axes.set_xlabel("tokens in front of every prompt")
    axes.grid(alpha=0.3)
    percent_axis(axes)
    axes.margins(y=0.08)
