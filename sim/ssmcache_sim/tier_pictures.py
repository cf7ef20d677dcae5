"""Pictures of what the tiers below the GPU add."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssmcache_sim.picture_parts import GIB, FloatArray, gib_name, panels, percent_axis
from ssmcache_sim.sizes import format_size

# tier, name, colour (told apart by colour-blind people too)
_TIERS = (
    ("gpu", "hit: pages on the GPU", "#009e73"),
    ("host", "hit: pages in host memory", "#56b4e9"),
    ("disk", "hit: pages on disk", "#0072b2"),
)


def has_tiers(cells: pd.DataFrame) -> bool:
    """Whether a sweep has cells with another tier than the GPU."""
    return bool((cells["host_memory_bytes"] + cells["disk_memory_bytes"]).any())


def at_largest_host(cells: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The cells with the most host memory, for pictures against something else, and in words what they are."""
    most = int(cells["host_memory_bytes"].max())
    shown = cells[cells["host_memory_bytes"] == most]
    sizes = {"host": most, "disk": int(shown["disk_memory_bytes"].max())}
    return shown, ", ".join(f"{name} {format_size(size)}" for name, size in sizes.items() if size)


def hit_parts(per_request: pd.DataFrame) -> tuple[tuple[str, str, str], ...]:
    """Column, name and colour of each part of the usable hits of a replay: one a tier where there are several."""
    tiers = [(f"usable_hit_tokens_{tier}", name, colour) for tier, name, colour in _TIERS]
    there = tuple(part for part in tiers if part[0] in per_request)
    return there or (("usable_hit_tokens", "usable hit", _TIERS[0][2]),)


def hit_rate_by_tier(cells: pd.DataFrame, title: str) -> Figure:
    """A panel for each GPU memory and interval, a bar for each size of host memory: usable hits by the tier where they
    lay, and what unlimited memory would give.
    """
    cases = list(cells.groupby(["gpu_memory_bytes", "ssm_reuse_interval"], dropna=False))
    width = max(2.8, 0.45 * max(len(group) for _, group in cases))
    figure, places = panels(title, len(cases), width, 2.9)
    for axes, (_, group) in zip(places, cases, strict=True):
        _stack_tiers(axes, group)
        gpu_bytes, interval = (_one_of(group, column) for column in ("gpu_memory_bytes", "ssm_reuse_interval"))
        shape = "no SSM layers" if interval is None else f"interval {interval}"
        axes.set_title(f"GPU {format_size(gpu_bytes)}, {shape}", fontsize=10)
    places[0].set_ylim(0, 1.1 * max(_floats(cells, "kv_ceiling_token_hit_rate").max(), 1e-3))  # shared by all
    figure.supylabel("usable token hit rate (% of prompt tokens)", fontsize=10)
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(cases) == 1 else 3)  # one panel is narrow
    return figure


def _stack_tiers(axes: Axes, cells: pd.DataFrame) -> None:
    cells = cells.sort_values("host_memory_bytes")
    bars = np.arange(len(cells))
    whole = _floats(cells, "usable_token_hit_rate")
    lower = {tier: _floats(cells, f"usable_token_hit_rate_{tier}") for tier in ("host", "disk")}
    rates = {"gpu": whole - lower["host"] - lower["disk"], **lower}
    base = np.zeros(len(cells))
    for tier, name, colour in _TIERS:
        if tier == "disk" and not cells["disk_memory_bytes"].any():
            continue
        axes.bar(bars, rates[tier], 0.8, bottom=base, color=colour, label=name)
        base += rates[tier]
    for bar, rate in zip(bars, whole, strict=True):
        label = axes.annotate(f"{100 * rate:.3g}", (bar, rate), (0, 3), textcoords="offset points", fontsize=7)
        label.set(ha="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # above the ceiling's line
    ceiling, kv_ceiling = (_floats(cells, f"{name}_token_hit_rate")[0] for name in ("ceiling", "kv_ceiling"))
    axes.axhline(ceiling, color="black", linestyle="--", linewidth=1, label="ceiling: unlimited memory")
    if kv_ceiling > ceiling:
        axes.axhline(kv_ceiling, color="#808080", linestyle=":", linewidth=1, label="ceiling of attention alone")
    sizes = [gib_name(size / GIB) if size else "none" for size in _floats(cells, "host_memory_bytes")]
    axes.set_xticks(bars, sizes, rotation=90 if len(sizes) > 6 else 0)
    axes.set_xlabel("host memory (GiB)")
    percent_axis(axes)


def _one_of(cells: pd.DataFrame, column: str) -> int | None:
    """What all cells have in a column; None where it is missing."""
    value = cells[column].iloc[0]
    return None if pd.isna(value) else int(value)


def _floats(cells: pd.DataFrame, column: str) -> FloatArray:
    """0 where a value, or the whole column, is missing: there is no such tier."""
    if column not in cells:
        return np.zeros(len(cells))
    return np.array(cells[column].to_numpy(dtype=np.float64, na_value=0.0), dtype=np.float64)
