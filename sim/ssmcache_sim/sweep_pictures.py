"""Pictures of a sweep: hit rates against memory, heat map, lost tokens, how to split memory, hit depth, phases."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from ssmcache_sim.phase import PhaseCeilings
from ssmcache_sim.picture_parts import (
    GIB,
    figure_with_axes,
    floats,
    gib_name,
    groups,
    interval_name,
    largest_memory,
    lost_parts,
    memory_axis,
    memory_bytes,
    memory_name,
    panels,
    percent_axis,
    phase_band,
    stack_bars,
    trace_and_model,
)
from ssmcache_sim.sweep_details import SweepDetails
from ssmcache_sim.sweep_results import SweepRun
from ssmcache_sim.tier_pictures import at_largest_host, has_tiers, hit_rate_by_tier


def sweep_figures(run: SweepRun) -> Iterator[tuple[str, Figure]]:
    """(name, figure) pairs: some for each block size, and those of all block sizes together; for each admission anew.

    With other tiers than the GPU there are hits by tier against host memory; all others show the most host memory.
    """
    what = trace_and_model(run.manifest)
    is_last = run.cells["admission"] == "last"
    for last, suffix, words in ((False, "", ""), (True, "_last", "\nlast boundary of each request only")):
        cells = run.cells[is_last.fillna(False) == last]
        if len(cells):
            part = replace(run, cells=cells, details=_at_admission(last, run.details))
            for name, figure in _figures_of_one_admission(part, f"{what}{words}"):
                yield f"{name}{suffix}", figure


def _at_admission(last: bool, details: SweepDetails) -> SweepDetails:
    """The details of one admission; how to divide a memory is told for every boundary alone."""
    depths, phases = (
        None if frame is None else frame[(frame["admission"] == "last").fillna(False) == last]
        for frame in (details.hit_depths, details.phases)
    )
    if last:
        details = replace(details, planes=None, splits=None)
    return replace(details, hit_depths=depths, phases=phases)


def _figures_of_one_admission(run: SweepRun, what: str) -> Iterator[tuple[str, Figure]]:
    if has_tiers(run.cells):
        for block, cells in groups(run.cells, "tokens_per_block"):
            title = f"Usable token hit rate by tier against host memory\n{what}, blocks of {block} tokens"
            yield f"hit_rate_by_tier_block_{block}", hit_rate_by_tier(cells, title)
        shown, lower = at_largest_host(run.cells)
        run, what = replace(run, cells=shown, details=_at_host_of(shown, run.details)), f"{what}, {lower}"
    for block, cells in groups(run.cells, "tokens_per_block"):
        shape = f"{what}, blocks of {block} tokens"
        if cells["gpu_memory_bytes"].notna().any():
            title = f"Usable token hit rate against memory\n{shape}"
            yield f"hit_rate_block_{block}", hit_rate_against_memory(cells, title)
        yield f"lost_tokens_block_{block}", lost_tokens_by_memory(cells, f"Where shared tokens were lost\n{shape}")
        yield from _detail_figures(run, block, shape)
    if run.cells["ssm_reuse_interval"].notna().any():
        memory = largest_memory(run.cells)
        yield (
            "heat_map",
            interval_heat_map(run.cells, memory, f"Usable token hit rate at {memory_name(memory)}\n{what}"),
        )


def _at_host_of(cells: pd.DataFrame, details: SweepDetails) -> SweepDetails:
    """The details of these cells; how to divide a memory is told for the GPU alone."""
    most = cells["host_memory_bytes"].max()
    depths, phases = (
        None if frame is None else frame[frame["host_memory_bytes"] == most]
        for frame in (details.hit_depths, details.phases)
    )
    return replace(details, planes=None, splits=None, hit_depths=depths, phases=phases)


def _detail_figures(run: SweepRun, block: int | None, shape: str) -> Iterator[tuple[str, Figure]]:
    """Those of the files that a sweep has or has not."""
    details = run.details
    if details.planes is not None and details.splits is not None:
        planes, splits = (frame[frame["tokens_per_block"] == block] for frame in (details.planes, details.splits))
        if len(planes):
            title = f"How to divide the memory between KV and snapshots\n{shape}"
            yield f"split_plane_block_{block}", split_planes(planes, splits, title)
    if details.hit_depths is not None:
        depths = details.hit_depths[details.hit_depths["tokens_per_block"] == block]
        if len(depths):
            memory = largest_memory(depths)
            title = f"Hit depth of the requests at {memory_name(memory)}\n{shape}"
            yield f"hit_depth_block_{block}", hit_depths(depths[memory_bytes(depths) == memory], title)
    if details.phases is not None:
        phases = details.phases[details.phases["tokens_per_block"] == block]
        title = f"Hit rate if all prompts began later\n{shape}"
        yield f"phase_block_{block}", phase_spread(phases, details.phase_ceilings, title)


def hit_rate_against_memory(cells: pd.DataFrame, title: str) -> Figure:
    """One line an interval; dashed, in the same colour, what unlimited memory would give."""
    figure, axes = figure_with_axes(title, 8.0, 5.6)
    by_interval = groups(cells, "ssm_reuse_interval")
    for (interval, group), colour in zip(by_interval, _colours(len(by_interval)), strict=True):
        gib = memory_bytes(group) / GIB
        finite = np.isfinite(gib)
        name = interval_name(interval)
        rates = floats(group, "usable_token_hit_rate")[finite]
        axes.plot(gib[finite], rates, marker="o", markersize=4, color=colour, label=name)
        ceiling = floats(group, "ceiling_token_hit_rate")[0]
        axes.axhline(ceiling, color=colour, linestyle="--", linewidth=1)
    every = ", every boundary" if (cells["admission"] == "last").any() else ""
    axes.plot([], [], color="black", linestyle="--", linewidth=1, label=f"ceiling: unlimited memory{every}")
    memory_axis(axes, memory_bytes(cells) / GIB)
    axes.set_ylabel("usable token hit rate (% of prompt tokens)")
    percent_axis(axes)
    figure.legend(title="snapshot interval", loc="outside lower center", ncols=4)
    return figure


def interval_heat_map(cells: pd.DataFrame, num_bytes: float, title: str) -> Figure:
    """Usable hit rate of each interval and block size at one memory size (infinity: unlimited)."""
    shown = cells[memory_bytes(cells) == num_bytes]
    intervals = sorted({int(value) for value in shown["ssm_reuse_interval"].dropna()})
    blocks = sorted({int(value) for value in shown["tokens_per_block"]})
    rates = np.full((len(blocks), len(intervals)), np.nan)
    columns = ("tokens_per_block", "ssm_reuse_interval", "usable_token_hit_rate")
    for block, interval, rate in shown[list(columns)].dropna().itertuples(index=False):
        rates[blocks.index(block), intervals.index(interval)] = rate
    figure, axes = figure_with_axes(title, max(6.5, 2.4 + 0.95 * len(intervals)), max(3.4, 2.0 + 0.6 * len(blocks)))
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
    by_interval = groups(cells, "ssm_reuse_interval")
    width = max(2.6, 0.42 * max(len(group) for _, group in by_interval))
    figure, places = panels(title, len(by_interval), width, 2.7)
    for axes, (interval, group) in zip(places, by_interval, strict=True):
        bars = np.arange(len(group))
        parts = [(floats(group, "usable_hit_tokens"), "usable hit", "#009e73"), *lost_parts(group, cells)]
        stack_bars(axes, bars, 0.8, parts, floats(group, "prompt_tokens"))
        gib = memory_bytes(group) / GIB
        sizes = list(map(gib_name, gib))
        axes.set_xticks(bars, sizes, rotation=90 if len(sizes) > 6 or np.isinf(gib).any() else 0)
        axes.set_xlabel("cache memory (GiB)")
        axes.set_title(f"interval: {interval_name(interval)}", fontsize=10)
        percent_axis(axes)
    places[0].set_ylim(0, 1.05 * max(floats(cells, "kv_ceiling_token_hit_rate").max(), 1e-3))  # shared by all
    figure.supylabel("% of prompt tokens", fontsize=10)
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2)
    return figure


def split_planes(planes: pd.DataFrame, splits: pd.DataFrame, title: str) -> Figure:
    """A panel an interval: hit rate by the bytes of both pools, the best split of each memory as a line, and the
    sweep's own splits as dots.
    """
    by_interval = groups(planes, "ssm_reuse_interval")
    figure, places = panels(title, len(by_interval), 3.6, 3.3)
    top = float(floats(planes, "usable_token_hit_rate").max()) or 1.0
    image: Any = None
    for axes, (interval, plane) in zip(places, by_interval, strict=True):
        table = plane.pivot_table("usable_token_hit_rate", "ssm_bytes", "kv_bytes")
        kv_gib, ssm_gib = (np.asarray(index, dtype=np.float64) / GIB for index in (table.columns, table.index))
        image = axes.pcolormesh(
            kv_gib, ssm_gib, table.to_numpy(dtype=np.float64), cmap="viridis", vmin=0.0, vmax=top, rasterized=True
        )
        axes.set_facecolor("#dddddd")
        _best_line(axes, splits[splits["ssm_reuse_interval"] == interval])
        axes.set(xscale="log", yscale="log", xlabel="KV pages (GiB)")
        axes.set_title(f"interval: {interval_name(interval)}", fontsize=10)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda gib, _: f"{gib:g}"))
            axis.set_minor_formatter(NullFormatter())
    figure.supylabel("SSM states: snapshots and live (GiB)", fontsize=10)
    bar = figure.colorbar(image, ax=places, format=FuncFormatter(lambda share, _: f"{100 * share:g}"))
    bar.set_label("usable token hit rate (% of prompt tokens)")
    handles, _ = places[0].get_legend_handles_labels()
    handles.append(Patch(color="#dddddd", label="the largest request does not fit"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def best_splits(splits: pd.DataFrame) -> pd.DataFrame:
    """The split with the most hits of each memory; of equal ones the one with the most KV."""
    tried = splits[splits["ssm_fraction"].notna()]
    order = tried.sort_values(
        ["gpu_memory_bytes", "usable_token_hit_rate", "ssm_fraction"], ascending=[True, False, True]
    )
    return order.drop_duplicates("gpu_memory_bytes")


def _best_line(axes: Axes, splits: pd.DataFrame) -> None:
    best, own = best_splits(splits), splits[splits["ssm_fraction"].isna()]
    for frame, style, colour, name in (
        (best, "o-", "#ff5a36", "best split of each memory"),
        (own, "D", "white", "the sweep's own split"),
    ):
        kv_gib, ssm_gib = floats(frame, "kv_bytes") / GIB, floats(frame, "ssm_bytes") / GIB
        axes.plot(kv_gib, ssm_gib, style, color=colour, markersize=4, markeredgecolor="black", label=name)


def hit_depths(depths: pd.DataFrame, title: str) -> Figure:
    """One line an interval: the share of the prompt that the requests hit, worst first."""
    figure, axes = figure_with_axes(title, 8.0, 5.4)
    by_interval = groups(depths, "ssm_reuse_interval")
    for (interval, group), colour in zip(by_interval, _colours(len(by_interval)), strict=True):
        requests = floats(group, "percent_of_requests") / 100
        axes.step(requests, floats(group, "share_of_prompt"), where="pre", color=colour, label=interval_name(interval))
    axes.set(
        xlabel="requests, worst first (%)", ylabel="share of the prompt that hits (%)", xlim=(0, 1), ylim=(0, 1.02)
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, symbol=None))
    axes.grid(alpha=0.3)
    figure.legend(title="snapshot interval", loc="outside lower center", ncols=4)
    return figure


def phase_spread(phases: pd.DataFrame, ceilings: Sequence[PhaseCeilings], title: str) -> Figure:
    """A panel an interval: the hit rate of each memory at the shifts that were tried, and the bounds of the ceiling."""
    by_interval = groups(phases, "ssm_reuse_interval")
    by_period = {one.period_tokens: one for one in ceilings}
    figure, places = panels(title, len(by_interval), 3.4, 2.9)
    for axes, (interval, group) in zip(places, by_interval, strict=True):
        period = interval or int(group["tokens_per_block"].iloc[0])
        phase_band(axes, by_period[period])
        sizes = sorted(set(memory_bytes(group).tolist()))
        for size, colour in zip(sizes, _colours(len(sizes)), strict=True):
            shown = group[memory_bytes(group) == size]
            shifts, rates = floats(shown, "shift_tokens"), floats(shown, "own_hit_rate")
            shifts, rates = np.append(shifts, period), np.append(rates, rates[0])  # a whole period is no shift
            axes.plot(shifts, rates, "o:", color=colour, markersize=3, linewidth=1, label=memory_name(size))
        axes.set_title(f"interval: {interval_name(interval)}", fontsize=10)
    highest = max(float(one.high.max()) / one.prompt_tokens for one in ceilings)
    places[0].set_ylim(bottom=0, top=1.05 * max(highest, 1e-3))  # shared by all
    figure.supylabel("% of own prompt tokens", fontsize=10)
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _colours(count: int) -> Any:
    """As many colours in order, dark to light, told apart by colour-blind people too."""
    return mpl.colormaps["viridis"](np.linspace(0.0, 0.9, count))
