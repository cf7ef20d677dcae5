import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from ssmcache.models import load_model
from ssmcache_sim.engines import parse_engine
from ssmcache_sim.errors import OutputError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.phase import phase_ceilings
from ssmcache_sim.phase_cells import phase_cells
from ssmcache_sim.plots import plot_directory, rendered, replay_figures, sweep_figures
from ssmcache_sim.replay import replay
from ssmcache_sim.results import RunTimes, load_run, replay_directory, replay_manifest, write_replay
from ssmcache_sim.settings import build_config, make_settings
from ssmcache_sim.sweep import SweepSpec, plan_sweep, run_sweep
from ssmcache_sim.sweep_details import DETAIL_FILES, SweepPhases, write_details
from ssmcache_sim.sweep_results import begin_sweep, finish_sweep, load_sweep

GIB = 1 << 30
TIMES = RunTimes("now", 1.0)
SAMPLE = "mooncake_conversation_1000.jsonl.gz"


@pytest.fixture(scope="module")
def replay_path(sample_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    trace, spec = read_trace(sample_path), load_model("nemotron-h-8b")
    setting = make_settings(spec, 512, ssm_reuse_interval=2048, gpu_memory_bytes=200 * GIB)
    path = tmp_path_factory.mktemp("plots") / "replay"
    with replay_directory(path) as folder:
        write_replay(folder, replay(trace, build_config(spec, setting)), replay_manifest(trace, setting), TIMES)
    return path


def make_sweep(
    sample_path: Path, path: Path, model: str, sizes: tuple[int | None, ...], phase: bool = False, engine: str = "auto"
) -> Path:
    trace, spec = read_trace(sample_path), load_model(model)
    sweep = SweepSpec((512, 1024), (512, 2048), sizes, engine=parse_engine(engine))
    plan = plan_sweep(sweep, trace, spec, path)
    manifest = begin_sweep(path, sweep, trace, spec)
    cells = run_sweep(trace, plan, 1, lambda done: None)
    periods = (512, 2048) if spec.num_ssm_layers else (512, 1024)
    ceilings = tuple(phase_ceilings(trace, period) for period in periods)
    phases = SweepPhases(phase_cells(trace, plan.cells, lambda done: None), ceilings) if phase else None
    write_details(path, sweep, trace, spec, list(zip(plan.cells, cells, strict=True)), phases)
    finish_sweep(path, manifest, cells, plan.skipped, TIMES)
    return path


@pytest.fixture(scope="module")
def sweep_path(sample_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plots")
    return make_sweep(sample_path, folder / "sweep", "nemotron-h-8b", (50 * GIB, 200 * GIB, None), phase=True)


def check_pictures(written: tuple[Path, ...], names: list[str]) -> None:
    assert [path.name for path in written] == [f"{name}.{suffix}" for name in names for suffix in ("png", "svg")]
    for path in written:
        content = path.read_bytes()
        assert len(content) > 10_000
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")


def test_a_replay_is_drawn_over_time_by_hit_depth_and_by_phase(replay_path: Path) -> None:
    check_pictures(plot_directory(replay_path), ["memory_over_time", "lost_tokens_over_time", "hit_depth", "phase"])


def test_a_sweep_by_the_grid_is_drawn_in_all_pictures(sweep_path: Path) -> None:
    of_block = ("hit_rate", "lost_tokens", "split_plane", "hit_depth", "phase")
    names = [f"{name}_block_{block}" for block in (512, 1024) for name in of_block]
    check_pictures(plot_directory(sweep_path), [*names, "heat_map"])


def test_a_sweep_by_replays_has_no_pictures_that_only_the_grid_can_make(sample_path: Path, tmp_path: Path) -> None:
    replayed = make_sweep(sample_path, tmp_path / "replayed", "nemotron-h-8b", (50 * GIB,), engine="replay")
    names = [f"{name}_block_{block}" for block in (512, 1024) for name in ("hit_rate", "lost_tokens")]
    check_pictures(plot_directory(replayed), [*names, "heat_map"])


def test_a_sweep_made_again_leaves_no_details_of_the_one_before(sample_path: Path, tmp_path: Path) -> None:
    sizes = (200 * GIB,)
    first = make_sweep(sample_path, tmp_path / "sweep", "nemotron-h-8b", sizes, phase=True)
    assert {path.name for path in first.iterdir()} == {"manifest.json", "cells.parquet", *DETAIL_FILES}
    make_sweep(sample_path, tmp_path / "sweep", "nemotron-h-8b", sizes)
    assert {path.name for path in first.iterdir()} == {"manifest.json", "cells.parquet", *DETAIL_FILES[:4]}
    make_sweep(sample_path, tmp_path / "sweep", "nemotron-h-8b", sizes, engine="replay")
    assert {path.name for path in first.iterdir()} == {"manifest.json", "cells.parquet", "cells"}


def test_the_same_sweep_leaves_the_same_bytes(sample_path: Path, tmp_path: Path) -> None:
    first, second = (
        make_sweep(sample_path, tmp_path / name, "nemotron-h-8b", (200 * GIB,), phase=True) for name in "ab"
    )
    for name in DETAIL_FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_best_line_of_the_plane_is_the_best_split_and_the_dots_are_the_cells(sweep_path: Path) -> None:
    run = load_sweep(sweep_path)
    axes = dict(sweep_figures(run))["split_plane_block_512"].axes[0]
    best, own = axes.lines
    splits = run.details.splits
    assert splits is not None
    splits = splits[(splits["tokens_per_block"] == 512) & (splits["ssm_reuse_interval"] == 512)]
    assert len(best.get_xdata()) == splits["gpu_memory_bytes"].nunique() == 16
    for kv_gib, ssm_gib in zip(best.get_xdata(), best.get_ydata(), strict=True):
        point = splits[(splits["kv_bytes"] == kv_gib * GIB) & (splits["ssm_bytes"] == ssm_gib * GIB)].iloc[0]
        rivals = splits[splits["gpu_memory_bytes"] == point["gpu_memory_bytes"]]
        assert point["usable_token_hit_rate"] == rivals["usable_token_hit_rate"].max()
    cells = run.cells[(run.cells["tokens_per_block"] == 512) & (run.cells["ssm_reuse_interval"] == 512)]
    dots = splits[splits["ssm_fraction"].isna()]
    assert dots["usable_token_hit_rate"].tolist() == cells["usable_token_hit_rate"].tolist()[: len(dots)]
    assert [kv + ssm for kv, ssm in zip(own.get_xdata(), own.get_ydata(), strict=True)] == pytest.approx(
        [50, 200], 0.01
    )


def test_the_phase_lines_begin_and_end_at_the_rates_of_the_cells(sweep_path: Path) -> None:
    run = load_sweep(sweep_path)
    axes = dict(sweep_figures(run))["phase_block_512"].axes[1]
    lines = {line.get_label(): line for line in axes.lines}
    cells = run.cells[(run.cells["tokens_per_block"] == 512) & (run.cells["ssm_reuse_interval"] == 2048)]
    for name, rate in zip(("50 GiB", "200 GiB", "unlimited"), cells["usable_token_hit_rate"], strict=True):
        assert list(lines[name].get_xdata()) == [0, 512, 1024, 1536, 2048]
        assert lines[name].get_ydata()[0] == lines[name].get_ydata()[-1] == rate
    assert list(lines["ceiling: exact"].get_ydata()) == list(lines["unlimited"].get_ydata())
    assert (axes.get_xlabel(), axes.get_title()) == ("tokens in front of every prompt", "interval: 2048 tokens")


def test_the_depth_of_a_replay_shows_every_request_and_its_share(replay_path: Path) -> None:
    run = load_run(replay_path)
    left, right = dict(replay_figures(run))["hit_depth"].axes
    dots = left.collections[0].get_offsets()
    assert (dots[:, 0] * 1000).round().tolist() == run.per_request["prompt_tokens"].tolist()
    assert (dots[:, 1] * 1000).round().tolist() == run.per_request["usable_hit_tokens"].tolist()
    usable = right.lines[-1].get_ydata()
    assert usable[1:].tolist() == sorted(run.per_request["usable_hit_tokens"] / run.per_request["prompt_tokens"])


def test_a_name_with_dollars_is_no_formula(replay_path: Path, sweep_path: Path) -> None:
    run, swept = load_run(replay_path), load_sweep(sweep_path)
    for manifest in (run.manifest, swept.manifest):
        manifest["trace"]["name"] = r"a$\frac{$b"
    for _, figure in [*list(replay_figures(run))[-1:], *list(sweep_figures(swept))[-1:]]:
        assert r"<!-- a$\frac{$b, nemotron-h-8b" in rendered(figure, "svg").decode()


def test_the_same_results_give_the_same_bytes(replay_path: Path, sweep_path: Path) -> None:
    for path in (replay_path, sweep_path):
        first = [picture.read_bytes() for picture in plot_directory(path)]
        assert [picture.read_bytes() for picture in plot_directory(path)] == first


def test_titles_say_trace_and_model_and_axes_their_units(replay_path: Path, sweep_path: Path) -> None:
    figures = dict([*replay_figures(load_run(replay_path)), *sweep_figures(load_sweep(sweep_path))])
    for figure in figures.values():
        assert f"{SAMPLE}, nemotron-h-8b" in figure.get_suptitle()
    labels = {name: (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) for name, figure in figures.items()}
    assert labels["memory_over_time"] == ("time since the first request (minutes)", "cache memory in use (GiB)")
    assert labels["hit_rate_block_512"] == ("cache memory (GiB)", "usable token hit rate (% of prompt tokens)")
    assert labels["heat_map"] == ("snapshot interval (tokens)", "block (tokens)")
    assert "at 200 GiB" in figures["heat_map"].get_suptitle()


def test_the_lines_are_the_rates_of_the_cells_and_the_dashes_the_ceilings(sweep_path: Path) -> None:
    run = load_sweep(sweep_path)
    figure = dict(sweep_figures(run))["hit_rate_block_512"]
    cells = run.cells[run.cells["tokens_per_block"] == 512]
    for interval, line, dashes in zip(
        (512, 2048), figure.axes[0].lines[0::2], figure.axes[0].lines[1::2], strict=False
    ):
        rows = cells[(cells["ssm_reuse_interval"] == interval) & cells["gpu_memory_bytes"].notna()]
        assert list(line.get_xdata()) == [50.0, 200.0]
        assert list(line.get_ydata()) == rows["usable_token_hit_rate"].tolist()
        assert set(dashes.get_ydata()) == {rows["ceiling_token_hit_rate"].iloc[0]}


def test_the_heat_map_says_where_a_combination_is_not_possible(sweep_path: Path) -> None:
    run = load_sweep(sweep_path)
    texts = [text.get_text() for text in dict(sweep_figures(run))["heat_map"].axes[0].texts]
    assert texts[2] == "not\npossible"
    largest = run.cells[run.cells["gpu_memory_bytes"] == 200 * GIB]
    assert [text for text in texts if "%" in text] == [f"{rate:.2%}" for rate in largest["usable_token_hit_rate"]]


def test_sweeps_without_ssm_layers_or_with_unlimited_memory_alone_are_drawn_too(
    sample_path: Path, tmp_path: Path
) -> None:
    dense = make_sweep(sample_path, tmp_path / "dense", "llama-3.1-8b", (50 * GIB,), phase=True)
    drawn = [path.name for path in plot_directory(dense)]
    assert {"hit_depth_block_512.png", "phase_block_1024.png"} <= set(drawn)
    assert not {"heat_map.png", "split_plane_block_512.png"} & set(drawn)
    unlimited = make_sweep(sample_path, tmp_path / "unlimited", "nemotron-h-8b", (None,))
    names = {path.name for path in plot_directory(unlimited)}
    assert "heat_map.png" in names
    assert "hit_rate_block_512.png" not in names


def test_what_is_no_result_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected a result directory of ssmcache"):
        plot_directory(tmp_path)
