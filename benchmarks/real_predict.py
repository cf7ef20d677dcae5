"""How well the simulator's cost model predicts measured times to the first token. Needs no GPU.

    PYTHONPATH=.:sim python benchmarks/real_predict.py benchmarks/measured/h100-qwen3.5-9b-grid.json \
        [--calibration benchmarks/measured/h100-qwen3.5-9b-scenarios.json]

Both files are reports of `benchmarks/real_model.py`. Errors are predicted / measured - 1 of medians, of

- *other half*: each half of the grid, its cells taken as the colours of a chess-board, by a fit to the other one. All
  of it was measured in turns, so that these are the errors of the model.
- *calibration*: cases that it was not fitted to, by what `ssmcache doctor --calibrate` measured before or after. These
  have in them what the machine did otherwise then.

A speed-up is a miss over a hit, of cases that reuse something.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from ssmcache.models import load_model
from ssmcache_sim.calibration import Calibration, FirstTokenTime
from ssmcache_sim.cost import PrefillCost, prefill_cost
from ssmcache_sim.device_profile import H100, calibrated
from ssmcache_sim.prefill_fit import fit_calibration
from ssmcache_sim.schemas import MOST_INT, Positive, Range, decode

Row = dict[str, Any]


def predictions(report: Row, calibration: Calibration | None) -> Iterator[Row]:
    """The errors of each way, of the grid of a report."""
    rows, interval = report["grid"], int(report["settings"]["interval"])
    cost = cost_of(report)
    halves = [[row for row in rows if colour(row, rows) == half] for half in (0, 1)]
    if min(map(len, halves)) >= 5:
        by_other = [
            judge(half, calibrated_cost(cost, fit(report, cost, other)), interval)
            for half, other in (halves, halves[::-1])
        ]
        yield {"by": "other half"} | summary([row for half in by_other for row in half])
    if calibration is not None:
        fitted = {(each.cached_tokens, each.new_tokens) for each in calibration.times}
        others = [row for row in rows if point(row) not in fitted]
        yield {"by": "calibration"} | summary(judge(others, calibrated_cost(cost, calibration), interval))


def cost_of(report: Row) -> PrefillCost:
    """With the FLOPs of the model that a report is of."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(report["config"]), encoding="utf-8")
        return prefill_cost(load_model(folder), billion_parameters=report["counted_parameters"] / 1e9)


def calibrated_cost(cost: PrefillCost, calibration: Calibration) -> PrefillCost:
    """For a runner that passes over a prompt at once."""
    return replace(cost, device=replace(calibrated(H100, calibration), pass_tokens=1 << 30))


def fit(report: Row, cost: PrefillCost, rows: Iterable[Row]) -> Calibration:
    times = [FirstTokenTime(*point(row), row["p50_ms"] / 1e3) for row in rows]
    return fit_calibration(cost, report["shape"], report["dtype"], report["counted_parameters"], times)


def point(row: Row) -> tuple[int, int]:
    """Cached and new tokens of the pass that a row is of."""
    cached = row["reused"] if row["kind"] == "hit" else 0
    return cached, row["reused"] + row["new"] - cached


def colour(row: Row, rows: Sequence[Row]) -> int:
    """0 or 1, of a cell of the grid; a hit and its miss have the same."""
    places = [sorted({each[name] for each in rows}).index(row[name]) for name in ("reused", "new")]
    return sum(places) % 2


def judge(rows: Sequence[Row], cost: PrefillCost, interval: int) -> list[Row]:
    """Each row with what the cost model says of it."""
    return [row | {"predicted_ms": predicted(row, cost, interval)} for row in rows]


def predicted(row: Row, cost: PrefillCost, interval: int) -> float:
    start, new = point(row)
    prompt, starts = np.array([start + new]), np.array([start])
    if row["kind"] == "miss":
        return int(cost.plain_ns(prompt)[0]) / 1e6
    taken = int((start + new) // interval > start // interval)
    nanoseconds = int(cost.prefill_ns(prompt, starts, interval, "last")[0])
    return (nanoseconds + cost.snapshots_ns(taken, int(start > 0))) / 1e6


def summary(rows: Sequence[Row]) -> Row:
    errors = [row["predicted_ms"] / row["p50_ms"] - 1 for row in rows]
    by_cell = {(row["reused"], row["new"], row["kind"]): row for row in rows}
    ratios = []
    for (reused, new, kind), hit in by_cell.items():
        miss = by_cell.get((reused, new, "miss"))
        if reused and kind == "hit" and miss is not None:
            predicted_ratio = miss["predicted_ms"] / hit["predicted_ms"]
            ratios.append(predicted_ratio / (miss["p50_ms"] / hit["p50_ms"]) - 1)
    return {
        "points": len(errors),
        "median_error": median(errors),
        "worst_error": worst(errors),
        "median_speed_up_error": median(ratios),
        "worst_speed_up_error": worst(ratios),
        "rows": [
            [row["reused"], row["new"], row["kind"], round(row["p50_ms"], 1), round(row["predicted_ms"], 1)]
            for row in rows
        ],
    }


def median(errors: Sequence[float]) -> float | None:
    return float(np.median(np.abs(errors))) if errors else None


def worst(errors: Sequence[float]) -> float | None:
    return max(map(abs, errors), default=None)


def read(path: str) -> Row:
    """A report. For argparse, which makes one line of what is wrong with it."""
    try:
        report: Row = json.loads(Path(path).read_text(encoding="utf-8"))
        if not report["grid"]:
            raise ValueError("its grid is empty")
        _check(_Report, report)
        for row in report["grid"]:
            _check(_Measured, row)
        if not 0 < int(report["settings"]["interval"]) <= MOST_INT:
            raise ValueError("its interval is not positive")
        if report["calibration"] is not None:
            for time in report["calibration"]["times"]:
                decode(FirstTokenTime, {"spread": 0.0, **time}, "calibration.times")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{path}: expected a report of real_model.py: {error!r}") from error
    return report


@dataclass(frozen=True, slots=True)
class _Report:
    """What is used of a report, beside its rows."""

    shape: str
    dtype: str
    counted_parameters: Positive


@dataclass(frozen=True, slots=True)
class _Measured:
    """What is used of a row of its grid."""

    reused: int
    new: Positive
    kind: Literal["hit", "miss"]
    p50_ms: Annotated[float, Range(1e-6, 1e9)]


def _check(record: type, value: Row) -> None:
    """Of the fields of the record alone. Errors: ValueError, KeyError."""
    decode(record, {field.name: value[field.name] for field in fields(record)}, "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=read, help="report with the grid")
    parser.add_argument("--calibration", type=read, help="report with a calibration of the same model and machine")
    options = parser.parse_args()
    report, kept, found = options.grid, options.calibration, None
    if kept is not None:
        if kept["shape"] != report["shape"] or not kept["calibration"]:
            parser.error(
                f"--calibration: expected a report with a calibration of {report['shape']}, got {kept['shape']}"
            )
        # fitted anew: the numbers in a report are those of the cost model of its time
        times = [FirstTokenTime(**each) for each in kept["calibration"]["times"]]
        found = fit_calibration(cost_of(report), kept["shape"], kept["dtype"], report["counted_parameters"], times)
    for prediction in predictions(report, found):
        for row in prediction.pop("rows"):
            print("{:>7,} {:>6,} {:4} {:9,.1f} ms, predicted {:9,.1f} ms".format(*row))
        print(json.dumps(prediction))


if __name__ == "__main__":
    main()
