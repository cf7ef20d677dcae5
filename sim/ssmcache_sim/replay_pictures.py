"""Pictures of one replay: memory, lost tokens, hit depth, and how far the ceiling hangs on the phase."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ssmcache_sim.picture_parts import (
    GIB,
    FloatArray,
    Picture,
    figure_with_axes,
    floats,
    lost_parts,
    phase_band,
    trace_and_model,
)
from ssmcache_sim.results import ReplayRun
from ssmcache_sim.sizes import format_size
from ssmcache_sim.tier_pictures import hit_parts

_MS_PER_MINUTE = 60_000
_TIME_BINS = 40
_MAX_POINTS = 2_000  # of a curve over time: more than a screen can show
_MAX_DOTS = 20_000  # more of them are a blot that takes seconds to draw
_NEW_COLOUR, _LAST_COLOUR = "#d9d9d9", "#a0a0a0"
_GROUP_COLOURS = {"attention": "#56b4e9", "window": "#f0e442", "ssm": "#0072b2"}


def replay_figures(run: ReplayRun) -> Iterator[tuple[str, Figure]]:
    """(name, figure) pairs."""
    settings = run.manifest["settings"]
    interval = settings["ssm_reuse_interval"]
    shape = f"block {settings['tokens_per_block']}" + ("" if interval is None else f", interval {interval}")
    lower = {"host": settings["host_memory_bytes"], "disk": settings["disk_memory_bytes"]}
    tiers = "".join(f", {name} {format_size(size)}" for name, size in lower.items() if size)
    memory = f"{'GPU' if tiers else 'memory'} {format_size(settings['gpu_memory_bytes'])}{tiers}"
    what = f"{trace_and_model(run.manifest)}\n{shape}, {memory}"
    whose = "GPU memory of the cache" if tiers else "Cache memory"
    yield "memory_over_time", memory_over_time(run, f"{whose} over time\n{what}")
    yield "lost_tokens_over_time", lost_tokens_over_time(run, f"Prompt tokens: hit, lost and new\n{what}")
    yield "hit_depth", hit_depth(run, f"Hit depth of each request\n{what}")
    yield (
        "phase",
        phase_of_ceiling(run, f"Ceiling if all prompts began later\n{trace_and_model(run.manifest)}, {shape}"),
    )


def memory_over_time(run: ReplayRun, title: str) -> Figure:
    """Bytes in use after each request, stacked by layer group, and the memory there is."""
    figure, axes = figure_with_axes(title, 8.0, 5.4)
    frame = run.per_request.iloc[_thinned(len(run.per_request))]
    minutes = _minutes(frame)
    names = [f"used_bytes_{peak.kind}_{peak.layer_group}" for peak in run.totals.peaks]
    labels = [f"{peak.kind} (group {peak.layer_group})" for peak in run.totals.peaks]
    used_gib = np.array([floats(frame, name) / GIB for name in names])
    axes.stackplot(minutes, used_gib, labels=labels, colors=[_GROUP_COLOURS[peak.kind] for peak in run.totals.peaks])
    total = run.manifest["settings"]["gpu_memory_bytes"]
    if total is not None:
        axes.axhline(total / GIB, color="black", linestyle="--", linewidth=1, label="memory given")
    axes.set_xlabel("time since the first request (minutes)")
    axes.set_ylabel("cache memory in use (GiB)")
    axes.set_xlim(minutes[0], max(minutes[-1], minutes[0] + 1e-3))
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def lost_tokens_over_time(run: ReplayRun, title: str) -> Figure:
    """Prompt tokens by time of arrival: hit, lost by cause, and what even unlimited memory would not hit."""
    figure, axes = figure_with_axes(title, 8.0, 5.4)
    minutes = _minutes(run.per_request)
    edges = np.linspace(0.0, max(float(minutes[-1]), 1e-3), _TIME_BINS + 1)
    base = np.zeros(_TIME_BINS)
    prompt_tokens = run.totals.prompt_tokens
    new = [
        (floats(run.per_request, "never_seen_tokens"), "never seen before", _NEW_COLOUR),
        (floats(run.per_request, "last_block_tokens"), "last block of each prompt", _LAST_COLOUR),
    ]
    hits = [(floats(run.per_request, column), name, colour) for column, name, colour in hit_parts(run.per_request)]
    for tokens, name, colour in [*hits, *lost_parts(run.per_request, run.per_request), *new]:
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


def hit_depth(run: ReplayRun, title: str) -> Figure:
    """Left each request's hit against its prompt, right the shares of the prompt that hit, worst first."""
    figure = Picture(figsize=(10.5, 5.0), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2)
    _depth_by_prompt(left, run.per_request)
    prompts = np.maximum(floats(run.per_request, "prompt_tokens"), 1)
    for column, name, colour, style in (
        ("kv_ceiling_hit_tokens", "KV ceiling", "black", ":"),
        ("ceiling_hit_tokens", "ceiling at this interval", "black", "--"),
        ("usable_hit_tokens", "usable hit", "#009e73", "-"),
    ):
        shares = np.sort(floats(run.per_request, column) / prompts)
        percents = np.arange(shares.size + 1) / shares.size
        right.step(percents, np.concatenate((shares[:1], shares)), style, color=colour, linewidth=1.4, label=name)
    right.set(xlabel="requests, worst first (%)", ylabel="share of the prompt (%)", xlim=(0, 1), ylim=(0, 1.02))
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, symbol=None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(loc="upper left", fontsize=9)
    return figure


def _depth_by_prompt(axes: Axes, per_request: pd.DataFrame) -> None:
    step = -(-len(per_request) // _MAX_DOTS)
    shown = per_request.iloc[::step]
    prompts, hits = floats(shown, "prompt_tokens") / 1000, floats(shown, "usable_hit_tokens") / 1000
    axes.scatter(prompts, hits, s=6, alpha=0.3, color="#009e73", linewidths=0, rasterized=True)
    longest = float(prompts.max())
    axes.plot([0, longest], [0, longest], color="black", linestyle="--", linewidth=1, label="the whole prompt")
    sample = f", every {step}th request" if step > 1 else ""
    axes.set(xlabel=f"prompt (thousand tokens){sample}", ylabel="usable hit (thousand tokens)", ylim=(0, None))
    axes.set_xlim(left=0)
    axes.legend(loc="upper left", fontsize=9)


def phase_of_ceiling(run: ReplayRun, title: str) -> Figure:
    """The bounds of the ceiling over all shifts of one period; dots where it is known exactly."""
    figure, axes = figure_with_axes(title, 8.0, 5.0)
    phase_band(axes, run.phase)
    axes.set_ylabel("hit rate with unlimited memory (% of own prompt tokens)")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _minutes(frame: pd.DataFrame) -> FloatArray:
    arrival_ms = floats(frame, "arrival_ms")
    minutes: FloatArray = (arrival_ms - arrival_ms[0]) / _MS_PER_MINUTE
    return minutes


def _thinned(count: int) -> npt.NDArray[np.int64]:
    """Indices of at most `_MAX_POINTS` of `count` points, evenly spread, both ends included."""
    return np.unique(np.linspace(0, count - 1, min(count, _MAX_POINTS)).astype(np.int64))
