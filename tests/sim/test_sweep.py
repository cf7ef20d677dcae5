import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssmcache.models import load_model
from ssmcache_sim import sweep as sweep_module
from ssmcache_sim.engines import parse_engine, parse_pools
from ssmcache_sim.errors import OutputError, UserError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.plots import plot_directory
from ssmcache_sim.replay import replay
from ssmcache_sim.results import RunTimes
from ssmcache_sim.settings import build_config, make_settings
from ssmcache_sim.sweep import SweepPlan, SweepSpec, SweptCell, plan_sweep, run_sweep
from ssmcache_sim.sweep_results import begin_sweep, finish_sweep, load_sweep
from ssmcache_sim.totals import ReplayTotals
from ssmcache_sim.trace import Trace

GIB = 1 << 30
TIMES = RunTimes("now", 1.0)
HYBRID = load_model("marconi-7b")


@pytest.fixture(scope="module")
def trace(sample_path: Path) -> Trace:
    return read_trace(sample_path)


@pytest.fixture
def spec(sample_path: Path) -> SweepSpec:
    return SweepSpec((1024, 512), (2048, 512), (None, 40 * GIB, 10 * GIB), engine="replay")


def run(spec: SweepSpec, trace: Trace, path: Path, jobs: int = 1) -> tuple[SweepPlan, tuple[SweptCell, ...], list[int]]:
    told: list[int] = []
    plan = plan_sweep(spec, trace, HYBRID, path)
    manifest = begin_sweep(path, spec, trace, HYBRID)
    cells = run_sweep(trace, plan, jobs, told.append)
    finish_sweep(path, manifest, cells, plan.skipped, TIMES)
    return plan, cells, told


def test_each_cell_is_the_replay_of_its_settings(spec: SweepSpec, trace: Trace, tmp_path: Path) -> None:
    _, cells, told = run(spec, trace, tmp_path / "s")
    assert told == list(range(10))
    for cell in cells:
        assert cell.totals == replay(trace, build_config(HYBRID, cell.settings)).totals


def test_cells_come_by_block_interval_and_memory_with_unlimited_last(
    spec: SweepSpec, trace: Trace, tmp_path: Path
) -> None:
    run(spec, trace, tmp_path / "s")
    frame = load_sweep(tmp_path / "s").cells
    columns = ["tokens_per_block", "ssm_reuse_interval", "gpu_memory_bytes"]
    assert frame[columns].fillna(0).to_numpy().tolist() == [
        [block, interval, memory]
        for block, interval in ((512, 512), (512, 2048), (1024, 2048))
        for memory in (10 * GIB, 40 * GIB, 0)
    ]
    assert frame["usable_hit_tokens"].iloc[2] == frame["ceiling_hit_tokens"].iloc[2]


def test_combinations_that_no_cache_can_have_are_skipped_with_the_reason(
    spec: SweepSpec, trace: Trace, tmp_path: Path
) -> None:
    spec = replace(spec, tokens_per_block=(256, 512, 1024), gpu_memory_bytes=(1, 10 * GIB))
    plan, cells, _ = run(spec, trace, tmp_path / "s")
    assert (len(cells), len(plan.skipped)) == (3, 9)
    reasons = {cell.reason.partition(":")[0] for cell in plan.skipped}
    assert reasons == {"tokens_per_block", "ssm_reuse_interval", "memory too small for every request"}
    skipped = load_sweep(tmp_path / "s").manifest["skipped"]
    assert skipped[0].keys() == {
        "tokens_per_block",
        "ssm_reuse_interval",
        "admission",
        "gpu_memory_bytes",
        "host_memory_bytes",
        "reason",
    }


def test_a_sweep_without_any_possible_cell_is_an_error_and_writes_nothing(
    spec: SweepSpec, trace: Trace, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no combination of the sweep is possible; the first: ssm_reuse_interval: "):
        plan_sweep(replace(spec, ssm_reuse_intervals=(700,)), trace, HYBRID, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_without_ssm_layers_all_intervals_are_one_cell(spec: SweepSpec, trace: Trace, tmp_path: Path) -> None:
    plan = plan_sweep(spec, trace, load_model("llama-3.1-8b"), tmp_path)
    assert [cell.settings.ssm_reuse_interval for cell in plan.cells] == [None] * 6


def test_finished_cells_are_not_run_again(
    spec: SweepSpec, trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(spec, trace, tmp_path / "s")
    ran: list[object] = []
    monkeypatch.setattr(sweep_module, "replay", lambda *a, **k: (ran.append(a), replay(*a, **k))[1])
    first = (tmp_path / "s" / "cells.parquet").read_bytes()
    plan, _, told = run(spec, trace, tmp_path / "s")
    assert (len(plan.finished), ran, told) == (9, [], [9])
    assert (tmp_path / "s" / "cells.parquet").read_bytes() == first
    run(replace(spec, gpu_memory_bytes=(10 * GIB, 20 * GIB)), trace, tmp_path / "s")
    assert len(ran) == 3
    run(replace(spec, kv_dtype="fp8"), trace, tmp_path / "s")
    assert len(ran) == 12
    run(replace(spec, prefill="chunked", gpu_memory_bytes=(None,)), trace, tmp_path / "s")
    assert len(ran) == 15


def test_a_damaged_cell_is_run_again(spec: SweepSpec, trace: Trace, tmp_path: Path) -> None:
    spec = replace(spec, gpu_memory_bytes=(10 * GIB,))
    _, cells, _ = run(spec, trace, tmp_path / "s")
    damaged, *_ = (tmp_path / "s" / "cells").iterdir()
    (whole,) = json.loads(damaged.read_bytes())["cells"]
    tampered = [
        {"usable_hit_tokens": -512},
        {"usable_hit_tokens": whole["usable_hit_tokens"] + 512},
        {"usable_token_hit_rate": 1.5},
        {"prompt_tokens": float(whole["prompt_tokens"])},
        {"requests": whole["requests"] + 1},  # of another trace
        {"snapshots": None, "more": 1, "tiers": {}},
        {"layer_groups": [{"kind": "ssm"}]},
    ]
    contents = [json.dumps({"cells": [{**whole, **changes}]}) for changes in tampered]
    contents += [
        json.dumps({"cells": [whole] * 2}),
        json.dumps({"cells": []}),
        "[" * 100_000,
        "{",
        "[]",
        '{"cells": 1}',
    ]
    for content in contents:
        damaged.write_text(content)
        plan, again, _ = run(spec, trace, tmp_path / "s")
        assert (len(plan.finished), again) == (2, cells)


def test_a_damaged_pass_is_made_again_and_one_of_other_cells_is_not_taken(
    spec: SweepSpec, trace: Trace, tmp_path: Path
) -> None:
    spec = replace(spec, tokens_per_block=(512,), gpu_memory_bytes=(200 * GIB, None), engine="auto")
    begin_sweep(tmp_path / "s", spec, trace, HYBRID)
    cells = run_sweep(trace, plan_sweep(spec, trace, HYBRID, tmp_path / "s"), 1, lambda done: None)
    assert len(plan_sweep(spec, trace, HYBRID, tmp_path / "s").finished) == 4
    other = replace(spec, gpu_memory_bytes=(100 * GIB, None))
    assert not plan_sweep(other, trace, HYBRID, tmp_path / "s").finished
    (kept,) = (tmp_path / "s" / "cells").iterdir()
    content = kept.read_text()
    for damaged in (content[:-9], content.replace('"cells"', '"cell"'), content.replace('": 0', '": -1')):
        kept.write_text(damaged)
        plan = plan_sweep(spec, trace, HYBRID, tmp_path / "s")
        assert not plan.finished
        assert run_sweep(trace, plan, 1, lambda done: None) == cells
        assert kept.read_text() == content


def test_a_size_that_is_given_twice_is_a_cell_twice(spec: SweepSpec, trace: Trace, tmp_path: Path) -> None:
    spec = replace(spec, tokens_per_block=(512,), ssm_reuse_intervals=(512,), gpu_memory_bytes=(None, None))
    for engine in ("replay", "auto"):
        _, cells, _ = run(replace(spec, engine=engine), trace, tmp_path / engine)
        assert len(cells) == len(load_sweep(tmp_path / engine).cells) == 2
        assert cells[0] == cells[1]


def test_an_interrupted_sweep_keeps_its_cells_and_goes_on(spec: SweepSpec, trace: Trace, tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    plan = plan_sweep(spec, trace, HYBRID, tmp_path / "s")
    begin_sweep(tmp_path / "s", spec, trace, HYBRID)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(trace, plan, 1, interrupt)
    with pytest.raises(OutputError, match="got an interrupted one: run it again to go on"):
        load_sweep(tmp_path / "s")
    plan, cells, told = run(spec, trace, tmp_path / "s")
    assert (len(plan.finished), len(cells), told) == (4, 9, [4, 5, 6, 7, 8, 9])


def test_worker_processes_give_the_same_bytes_and_can_be_interrupted(
    spec: SweepSpec, trace: Trace, tmp_path: Path
) -> None:
    run(spec, trace, tmp_path / "one")

    def interrupt(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    plan = plan_sweep(spec, trace, HYBRID, tmp_path / "two")
    begin_sweep(tmp_path / "two", spec, trace, HYBRID)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(trace, plan, 2, interrupt)
    kept = len(plan_sweep(spec, trace, HYBRID, tmp_path / "two").finished)
    assert 2 <= kept <= 9
    run(spec, trace, tmp_path / "two", jobs=2)
    assert (tmp_path / "one" / "cells.parquet").read_bytes() == (tmp_path / "two" / "cells.parquet").read_bytes()


def test_a_sweep_refuses_a_directory_of_something_else(
    spec: SweepSpec, trace: Trace, tmp_path: Path, trace_of: Callable[..., Trace]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"got no readable manifest\.json"):
        begin_sweep(tmp_path / "notes", spec, trace, HYBRID)
    (tmp_path / "notes" / "manifest.json").write_text(json.dumps({"tool": "ssmcache", "command": "replay"}))
    with pytest.raises(OutputError, match="got another result"):
        begin_sweep(tmp_path / "notes", spec, trace, HYBRID)
    with pytest.raises(OutputError, match="cannot write here: Not a directory"):
        begin_sweep(tmp_path / "notes" / "thesis.txt" / "s", spec, trace, HYBRID)


def test_settings_are_those_of_the_cell_that_they_name(spec: SweepSpec, trace: Trace, tmp_path: Path) -> None:
    spec = replace(spec, ssm_fraction=0.3, kv_dtype="fp8", state_dtype="bf16", prefill="chunked")
    plan = plan_sweep(spec, trace, HYBRID, tmp_path)
    assert plan.cells[0].settings == make_settings(
        HYBRID,
        512,
        ssm_reuse_interval=512,
        gpu_memory_bytes=10 * GIB,
        ssm_fraction=0.3,
        kv_dtype="fp8",
        state_dtype="bf16",
        prefill="chunked",
    )


def token_sums(totals: ReplayTotals) -> dict[str, object]:
    return {name: value for name, value in totals.to_json().items() if name.endswith(("tokens", "requests", "rate"))}


@pytest.mark.parametrize("model", ["marconi-7b", "llama-3.1-8b", "mamba2-2.7b"])
def test_the_grid_counts_the_tokens_of_the_replay_wherever_it_is_chosen(
    spec: SweepSpec, trace: Trace, tmp_path: Path, model: str
) -> None:
    hybrid = load_model(model)
    spec = replace(
        spec, engine="auto", gpu_memory_bytes=(1 * GIB, 5 * GIB, 40 * GIB, 200 * GIB, None), ssm_fraction=None
    )
    plan = plan_sweep(spec, trace, hybrid, tmp_path)
    (tmp_path / "cells").mkdir()
    cells = run_sweep(trace, plan, 1, lambda done: None)
    by_engine = {engine: [cell for cell in cells if cell.engine == engine] for engine in ("grid", "replay")}
    assert (len(by_engine["grid"]) > 0) == (model != "mamba2-2.7b")
    assert by_engine["replay"], "the smallest memory, or a model without attention, is replayed"
    for cell in by_engine["grid"]:
        replayed = replay(trace, build_config(hybrid, cell.settings)).totals
        assert token_sums(cell.totals) == token_sums(replayed), cell.settings
    for cell in by_engine["replay"]:
        assert cell.reason.startswith(("the largest request", "the snapshots of the largest", "no attention layers"))


def test_the_results_say_which_engine_made_a_cell_and_why(spec: SweepSpec, trace: Trace, tmp_path: Path) -> None:
    run(replace(spec, engine="auto", gpu_memory_bytes=(5 * GIB, None)), trace, tmp_path / "s")
    frame = load_sweep(tmp_path / "s").cells
    assert set(frame["engine"]) == {"grid", "replay"}
    assert frame.loc[frame["engine"] == "grid", "snapshots_taken"].isna().all()
    assert frame.loc[frame["engine"] == "replay", "snapshots_taken"].notna().all()
    assert frame["engine_reason"].str.len().gt(10).all()
    assert plot_directory(tmp_path / "s")


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UserError, match="engine: expected auto or replay, got 'magic'"):
        parse_engine("magic")


def test_an_arena_is_labelled_and_loses_every_token_for_a_reason(spec: SweepSpec, trace: Trace, tmp_path: Path) -> None:
    spec = replace(spec, engine="auto", pools="arena", gpu_memory_bytes=(5 * GIB, 40 * GIB, 200 * GIB, None))
    plan, cells, _ = run(spec, trace, tmp_path / "s")
    unlimited = [replay(trace, build_config(HYBRID, cell.settings)).totals for cell in cells if not is_finite(cell)]
    assert [token_sums(cell.totals) for cell in cells if not is_finite(cell)] == list(map(token_sums, unlimited))
    for cell in cells:
        lost = cell.totals.lost_evicted_tokens + cell.totals.lost_alignment_tokens + cell.totals.lost_snapshot_tokens
        assert cell.totals.usable_hit_tokens + lost == cell.totals.kv_ceiling_hit_tokens
    loaded = load_sweep(tmp_path / "s")
    assert loaded.manifest["settings"]["pools"] == "arena"
    assert set(loaded.cells["pools"]) == {"arena"}
    assert set(loaded.cells["engine"]) == {"grid"}
    assert loaded.cells["engine_reason"].str.startswith("an arena: ").all()
    # what no arena can tell exactly is left out, and says why
    assert {cell.settings.gpu_memory_bytes for cell in plan.skipped if "largest request" in cell.reason} == {5 * GIB}
    assert plot_directory(tmp_path / "s")


def is_finite(cell: SweptCell) -> bool:
    return cell.settings.gpu_memory_bytes is not None


def test_separate_pools_are_labelled_too(spec: SweepSpec, trace: Trace, tmp_path: Path) -> None:
    run(replace(spec, engine="auto", gpu_memory_bytes=(5 * GIB, None)), trace, tmp_path / "s")
    assert set(load_sweep(tmp_path / "s").cells["pools"]) == {"separate"}


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        (
            {"engine": "replay"},
            "marconi-7b",
            "engine: expected auto for an arena, which no manager can replay, got rep",
        ),
        ({"ssm_fraction": 0.25}, "marconi-7b", "ssm_fraction: expected none for an arena, .*, got 0.25"),
        ({}, "llama-3.1-8b", "arena: expected a model with attention and SSM layers, got one whose memory is one pool"),
        ({}, "mamba2-2.7b", "arena: expected a model with attention and SSM layers, got one whose memory is one pool"),
        (
            {"gpu_memory_bytes": (GIB,)},
            "marconi-7b",
            r"arena: expected room for the largest request \(\d+ tokens\), \d+ bytes, got 1073741824 bytes",
        ),
    ],
)
def test_an_arena_that_cannot_be_is_refused(
    spec: SweepSpec, trace: Trace, tmp_path: Path, changes: dict[str, object], model: str, message: str
) -> None:
    spec = replace(spec, **{"engine": "auto", "pools": "arena", **changes})
    with pytest.raises(UserError, match=message):
        plan_sweep(spec, trace, load_model(model), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_unknown_pools_are_refused() -> None:
    with pytest.raises(UserError, match="pools: expected separate or arena, got 'magic'"):
        parse_pools("magic")


@pytest.mark.parametrize(
    "change", [{"kv_dtype": "fp8"}, {"state_dtype": "float32"}, {"ssm_fraction": 0.5}, {"prefill": "chunked"}]
)
def test_a_finished_cell_is_not_taken_for_one_of_other_bytes(
    spec: SweepSpec, trace: Trace, tmp_path: Path, change: dict[str, Any]
) -> None:
    few = replace(spec, tokens_per_block=(512,), ssm_reuse_intervals=(2048,), gpu_memory_bytes=(40 * GIB,))
    run(few, trace, tmp_path / "s")
    assert len(plan_sweep(few, trace, HYBRID, tmp_path / "s").finished) == 1
    assert not plan_sweep(replace(few, **change), trace, HYBRID, tmp_path / "s").finished
