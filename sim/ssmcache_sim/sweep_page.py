"""What a report says of a sweep: the best settings, an explorer of all of them, phases."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from ssmcache_sim.page_parts import Markup, folded, number, percent, script_json, section, table, term, text, warning
from ssmcache_sim.sizes import format_size
from ssmcache_sim.sweep_results import SweepRun

Row = dict[str, Any]

_MAX_ROWS = 2_000  # of the table of all cells: more make a page that no browser likes
# of the explorer's cells: name in the page, column of the files
_EXPLORED = (
    ("model", "model"),
    ("block", "tokens_per_block"),
    ("interval", "ssm_reuse_interval"),
    ("memory", "gpu_memory_bytes"),
    ("usable", "usable_hit_tokens"),
    ("ceiling", "ceiling_hit_tokens"),
    ("kv_ceiling", "kv_ceiling_hit_tokens"),
    ("evicted", "lost_evicted_tokens"),
    ("alignment", "lost_alignment_tokens"),
    ("snapshot", "lost_snapshot_tokens"),
)


def sweep_body(run: SweepRun) -> Markup:
    """Headline numbers, explorer, tables."""
    cells = _records(run.cells)
    best = max(cells, key=_usable)
    size = _memory(best)
    interval = f"interval {_interval(best)}" if best["ssm_reuse_interval"] else "no SSM layers"
    usable = number(
        term("usable", "best usable token hit rate"),
        percent(best["usable_token_hit_rate"]),
        f"block {best['tokens_per_block']}, {interval}, memory {size}",
    )
    ceiling = number(term("ceiling", "its ceiling"), percent(best["ceiling_token_hit_rate"]), "unlimited memory")
    kv_ceiling = number(term("kv-ceiling", "KV ceiling"), percent(best["kv_ceiling_token_hit_rate"]), "attention alone")
    skipped = len(run.manifest.get("skipped", ()))
    note = f"{skipped:,} combinations are not possible" if skipped else "all combinations"
    counted = number("cells", f"{len(cells):,}", note)
    return (
        f'<div class="numbers">{usable}{ceiling}{kv_ceiling}{counted}</div>'
        + section("Explorer", _explorer(run))
        + section("Best of each memory size", _best_of_each_memory(cells) + _all_cells(cells))
        + _phases(run)
    )


def _explorer(run: SweepRun) -> Markup:
    """Controls, an empty chart, and the cells that the script draws from: those of the GPU alone, every boundary."""
    wider = run.details.explorer
    swept = _records(run.cells)
    every = [cell for cell in swept if cell["admission"] != "last"]
    alone = [cell for cell in every if not (cell["host_memory_bytes"] or cell["disk_memory_bytes"])]
    replayed = [cell for cell in alone if cell["engine"] == "replay"]
    explored = alone if wider is None else _records(wider) + replayed
    if not explored:
        return '<p class="soft">No cells of the GPU alone, every boundary: see the tables and pictures.</p>'
    best = max(every, key=_usable)
    start = {
        "model": str(best["model"]),
        "block": str(best["tokens_per_block"]),
        "interval": str(best["ssm_reuse_interval"] or "none"),
        "memory": str(best["gpu_memory_bytes"] or "unlimited"),
    }
    published = {
        "start": start,
        "prompt_tokens": explored[0]["prompt_tokens"],
        "columns": [name for name, _ in _EXPLORED],
        "rows": [[cell[column] for _, column in _EXPLORED] for cell in explored],
    }
    data = script_json(json.dumps(published, separators=(",", ":"), allow_nan=False))
    scope = (
        "Cells that were swept."
        if wider is None
        else "All presets, at the memory sizes of the sweep and sizes in between, where the one-pass grid is exact; "
        "and the cells of the sweep that were replayed."
    )
    if len(every) < len(swept):
        scope = f"With a snapshot at every boundary. {scope}"
    if len(alone) < len(every):
        scope = f"With the GPU alone, without host memory and disk. {scope}"
    rows = "".join(
        f'<tr><th scope="row">{swatch}{name}</th><td data-tokens="{part}"></td><td data-rate="{part}"></td></tr>'
        for part, swatch, name in (
            ("usable", _swatch("hit"), term("usable", "usable hit")),
            ("snapshot", _swatch("snapshot"), term("snapshot", "lost: no snapshot")),
            ("alignment", _swatch("alignment"), term("alignment", "lost: alignment to the interval")),
            ("evicted", _swatch("evicted"), term("evicted", "lost: KV evicted")),
            ("kv_ceiling", "", term("kv-ceiling", "KV ceiling: the sum of these")),
            ("ceiling", "", term("ceiling", "ceiling at this interval")),
        )
    )
    return _EXPLORER.format(scope=text(scope), rows=rows, data=data)


def _swatch(name: str) -> Markup:
    return f'<span class="swatch" style="background:var(--{name})"></span>'


def _best_of_each_memory(cells: Sequence[Row]) -> Markup:
    by_memory: dict[tuple[float, int], list[Row]] = {}
    for cell in cells:
        by_memory.setdefault((cell["gpu_memory_bytes"] or math.inf, cell["host_memory_bytes"]), []).append(cell)
    best = (max(of_size, key=_usable) for _, of_size in sorted(by_memory.items()))
    rows = [
        (
            _memory(cell),
            *_shape(cell),
            percent(cell["usable_token_hit_rate"]),
            percent(cell["ceiling_token_hit_rate"]),
        )
        for cell in best
    ]
    headings = ("memory", term("block", "block"), term("interval", "interval"), term("usable", "usable"))
    caption = "Block and interval with the most usable hits, of those that were swept"
    return table(caption, (*headings, term("ceiling", "ceiling")), rows)


def _not_taken(cell: Row) -> int:
    there = cell["lost_snapshot_evicted_tokens"] + cell["lost_snapshot_window_tokens"]
    return int(cell["lost_snapshot_tokens"] - there)


def _all_cells(cells: Sequence[Row]) -> Markup:
    if len(cells) > _MAX_ROWS:
        return f'<p class="soft">{len(cells):,} cells: too many for a page; they are in cells.parquet.</p>'
    rates = ("usable_token_hit_rate", "attention_token_hit_rate", "ceiling_token_hit_rate")
    lost = ("lost_evicted_tokens", "lost_alignment_tokens", "lost_snapshot_evicted_tokens")
    rows = [
        (
            *_shape(cell),
            _memory(cell),
            *(percent(cell[name]) for name in rates),
            *(percent(cell[name] / cell["prompt_tokens"]) for name in lost),
            percent(_not_taken(cell) / cell["prompt_tokens"]),
            percent(cell["never_seen_tokens"] / cell["prompt_tokens"]),
            text(cell["engine"]),
        )
        for cell in cells
    ]
    words = (("block", "block"), ("interval", "interval"), ("usable", "usable"), ("attention", "KV present"))
    more = (
        ("ceiling", "ceiling"),
        ("evicted", "evicted"),
        ("alignment", "alignment"),
        ("snapshot", "snapshot evicted"),
    )
    rest = (("snapshot", "snapshot not taken"), ("never-seen", "never seen"))
    named = [term(*word) for word in (*words, *more, *rest)]
    headings = (*named[:2], "memory", *named[2:], term("engine", "engine"))
    shown = table("Every cell; shares of all prompt tokens, losses of the KV ceiling", headings, rows)
    return folded(f"All {len(cells):,} cells", shown)


def _phases(run: SweepRun) -> Markup:
    """The spread of the ceilings, and of each cell, over the shifts; nothing where the sweep was made without."""
    phases = run.details.phases
    if phases is None:
        return ""
    summaries = [one.summary() for one in run.details.phase_ceilings]
    hanging = [f"{one.period_tokens:,}" for one in summaries if one.hangs_on_phase]
    said = f"<p>{term('phase', 'What is a phase?')}</p>"
    if hanging:
        where = f"at intervals of {', '.join(hanging)} tokens" if _has_intervals(phases) else "on the block"
        said = warning(f"The hit rate hangs on the {term('phase', 'phase')} of the prompt lengths {where}.")
    ceilings = [
        (
            f"{one.period_tokens:,}",
            percent(one.now_rate),
            f"{percent(one.worst_rate)} ({one.worst_shift_tokens:,})",
            f"{percent(one.best_rate)} ({one.best_shift_tokens:,})",
            percent(one.best_rate - one.worst_rate),
        )
        for one in summaries
    ]
    columns = ("now", "worst", "best", "spread")
    caption = "if the same tokens stood in front of every prompt (in brackets: how many), of own prompt tokens"
    period = term("interval", "interval") if _has_intervals(phases) else term("block", "block")
    overview = table(f"Ceiling {caption}", (period, *columns), ceilings)
    headings = (term("block", "block"), term("interval", "interval"), "memory", *columns)
    cells = table(f"Hit rate of every cell {caption}", headings, _phase_rows(_records(phases)))
    return section("Phase", said + overview + folded("The spread of every cell", cells))


def _phase_rows(phases: Sequence[Row]) -> list[tuple[Markup, ...]]:
    of_cell: dict[tuple[Markup, ...], list[Row]] = {}
    for row in phases:  # of each cell in the order of its shifts, that of 0 first
        of_cell.setdefault((*_shape(row), _memory(row)), []).append(row)
    rows = []
    for names, shifts in of_cell.items():
        worst, best = (pick(shifts, key=lambda row: row["own_hit_rate"]) for pick in (min, max))
        shown = (f"{percent(row['own_hit_rate'])} ({row['shift_tokens']:,})" for row in (worst, best))
        spread = percent(best["own_hit_rate"] - worst["own_hit_rate"])
        rows.append((*names, percent(shifts[0]["own_hit_rate"]), *shown, spread))
    return rows


def _has_intervals(frame: pd.DataFrame) -> bool:
    return bool(frame["ssm_reuse_interval"].notna().any())


def _records(frame: pd.DataFrame) -> list[Row]:
    """Rows with plain values, None where one is missing."""
    columns = {str(name): [None if pd.isna(value) else value for value in frame[name].tolist()] for name in frame}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _usable(cell: Row) -> float:
    rate: float = cell["usable_token_hit_rate"]
    return rate


def _memory(cell: Row) -> Markup:
    """The GPU's, and that of the tiers below it."""
    lower = {"host": cell["host_memory_bytes"], "disk": cell["disk_memory_bytes"]}
    shown = [f"{name} {format_size(size)}" for name, size in lower.items() if size]
    return text(", ".join([format_size(cell["gpu_memory_bytes"]), *shown]))


def _shape(cell: Row) -> tuple[Markup, Markup]:
    """Block and interval."""
    return text(cell["tokens_per_block"]), text(_interval(cell))


def _interval(cell: Row) -> str:
    """With the admission, unless it is every boundary."""
    interval = str(cell["ssm_reuse_interval"] or "-")
    return f"{interval}, last boundary only" if cell["admission"] == "last" else interval


_EXPLORER = """
<p class="soft">{scope}</p>
<noscript><p>The explorer needs JavaScript; the tables below do not.</p></noscript>
<div id="explorer" hidden>
<div class="controls">
<label for="model">Model<select id="model"></select></label>
<label for="block">Block<select id="block"></select></label>
<label for="interval">Snapshot interval<select id="interval"></select></label>
<label for="memory"><span>Cache memory: <span id="memory-name"></span></span>
<input id="memory" type="range" min="0" step="1"></label>
</div>
<svg id="chart" role="img" aria-label=""></svg>
<ul id="legend" aria-label="Snapshot intervals"></ul>
<p id="said" role="status" aria-live="polite"></p>
<div id="bar" aria-hidden="true"><span data-part="usable" style="background:var(--hit)"></span>
<span data-part="snapshot" style="background:var(--snapshot)"></span>
<span data-part="alignment" style="background:var(--alignment)"></span>
<span data-part="evicted" style="background:var(--evicted)"></span></div>
<div class="scroll" tabindex="0" role="region" aria-label="Tokens of the chosen cell"><table>
<caption>Of all prompt tokens; grey in the bar: new, no earlier prompt has them</caption>
<thead><tr><th scope="col"></th><th scope="col">tokens</th><th scope="col">share</th></tr></thead>
<tbody>{rows}</tbody></table></div>
</div>
<script type="application/json" id="cells">{data}</script>
"""
