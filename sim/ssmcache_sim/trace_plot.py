"""A picture of a trace: lengths, arrivals over time, and how deep into its prompt each request would hit."""

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from ssmcache_sim.ceilings import infinite_cache
from ssmcache_sim.picture_parts import Picture
from ssmcache_sim.trace import LengthTrace, Trace

_TIME_BINS = 60
_LENGTH_BINS = 48
_MAX_DOTS = 20_000  # more of them are a blot that takes seconds to draw
_PROMPT_COLOUR, _OUTPUT_COLOUR, _HIT_COLOUR = "#0072b2", "#e69f00", "#009e73"
_TIME_UNITS = ((2 * 86_400_000, "days", 86_400_000), (3 * 3_600_000, "hours", 3_600_000), (180_000, "minutes", 60_000))


def trace_figure(requests: Trace | LengthTrace) -> Figure:
    """Panels for lengths and arrivals, and for what requests share where the trace tells it."""
    shares = isinstance(requests, Trace)
    figure = Picture(figsize=(11.0, 7.6 if shares else 4.2), layout="constrained")
    name = requests.label if isinstance(requests, Trace) else requests.name
    figure.suptitle(f"{name}: {requests.num_requests:,} requests", fontsize=12)
    panels = figure.subplots(2 if shares else 1, 2, squeeze=False)
    _lengths(panels[0, 0], requests)
    _arrivals(panels[0, 1], requests)
    if isinstance(requests, Trace):
        hit_depth = infinite_cache(requests, None).kv_tokens
        _hit_depth(panels[1, 0], requests, hit_depth)
        if requests.has_outputs:
            prompts_only = infinite_cache(requests.without_outputs(), None).kv_tokens
            _hit_share(panels[1, 1], requests, prompts_only, _PROMPT_COLOUR, "prompts only")
            _hit_share(panels[1, 1], requests, hit_depth, _HIT_COLOUR, "with outputs")
        else:
            _hit_share(panels[1, 1], requests, hit_depth, _HIT_COLOUR, "of all prompt tokens")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _lengths(axes: Axes, requests: Trace | LengthTrace) -> None:
    longest = max(int(requests.prompt_tokens.max()), int(requests.output_tokens.max()), 2)
    edges = np.unique(np.geomspace(1, longest + 1, _LENGTH_BINS).astype(np.int64))
    for tokens, name, colour in (
        (requests.prompt_tokens, "prompt", _PROMPT_COLOUR),
        (requests.output_tokens, "output", _OUTPUT_COLOUR),
    ):
        # a length of 0 has no place on a logarithmic axis: it is counted with 1
        axes.hist(np.maximum(tokens, 1), bins=edges.tolist(), alpha=0.65, label=name, color=colour)
    axes.set_xscale("log")
    axes.set(title="Lengths", xlabel="tokens", ylabel="requests")
    _plain_numbers(axes, x=True)
    axes.legend()


def _arrivals(axes: Axes, requests: Trace | LengthTrace) -> None:
    since_first_ms = requests.arrival_ms - requests.arrival_ms[0]
    span_ms = max(float(since_first_ms[-1]), 1.0)
    unit, unit_ms = next(((name, size) for least, name, size in _TIME_UNITS if span_ms >= least), ("seconds", 1000))
    counts, edges = np.histogram(since_first_ms, bins=_TIME_BINS, range=(0.0, span_ms))
    tokens, _ = np.histogram(since_first_ms, edges, weights=requests.prompt_tokens)
    bin_seconds = span_ms / _TIME_BINS / 1000
    axes.stairs(counts / bin_seconds, edges / unit_ms, fill=True, color=_PROMPT_COLOUR, alpha=0.35)
    axes.set(title="Arrivals", xlabel=f"{unit} since the first request", ylabel="requests a second")
    token_axes = axes.twinx()
    token_axes.stairs(
        tokens / bin_seconds, edges / unit_ms, color="black", linewidth=1.2, label="prompt tokens a second"
    )
    token_axes.set_ylabel("prompt tokens a second (line)")
    token_axes.set_ylim(bottom=0)
    token_axes.spines["top"].set_visible(False)
    _plain_numbers(token_axes)


def _hit_depth(axes: Axes, trace: Trace, hit_depth: npt.NDArray[np.int64]) -> None:
    step = -(-trace.num_requests // _MAX_DOTS)
    prompts, depths = trace.prompt_tokens[::step], hit_depth[::step]
    axes.scatter(prompts, depths, s=5, alpha=0.25, color=_HIT_COLOUR, linewidths=0, rasterized=True)
    longest = int(trace.prompt_tokens.max())
    axes.plot([0, longest], [0, longest], color="black", linestyle="--", linewidth=1, label="the whole prompt")
    sample = f", every {step}th request" if step > 1 else ""
    axes.set(title=f"Hit depth with unlimited memory{sample}", xlabel="prompt tokens", ylabel="tokens that hit")
    _plain_numbers(axes, x=True)
    axes.legend(loc="upper left")


def _hit_share(axes: Axes, trace: Trace, hit_depth: npt.NDArray[np.int64], colour: str, name: str) -> None:
    shares = np.sort(hit_depth / np.maximum(trace.prompt_tokens, 1))
    percents = np.arange(1, shares.size + 1) / shares.size
    axes.step(np.concatenate(([0.0], percents)), np.concatenate((shares[:1], shares)), color=colour)
    total = hit_depth.sum() / max(int(trace.prompt_tokens.sum()), 1)
    axes.axhline(total, color=colour, linestyle="--", linewidth=1, label=f"{name}: {total:.1%}")
    title = f"Share of the prompt that hits, blocks of {trace.tokens_per_block}"
    axes.set(title=title, xlabel="requests, worst first", ylabel="share of the prompt", ylim=(0, 1.02), xlim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="lower right")


def _plain_numbers(axes: Axes, x: bool = False) -> None:
    formatter = FuncFormatter(_short)
    axes.yaxis.set_major_formatter(formatter)
    if x:
        axes.xaxis.set_major_formatter(formatter)


def _short(value: float, position: Any) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"
