import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from ssmcache.models import load_model
from ssmcache_sim.errors import OutputError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.plots import plot_directory, replay_figures, sweep_figures
from ssmcache_sim.replay import replay
from ssmcache_sim.results import RunTimes, load_run, replay_directory, replay_manifest, write_replay
from ssmcache_sim.settings import build_config, make_settings
from ssmcache_sim.sweep import SweepSpec, plan_sweep, run_sweep
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


def make_sweep(sample_path: Path, path: Path, model: str, sizes: tuple[int | None, ...]) -> Path:
    trace, spec = read_trace(sample_path), load_model(model)
    sweep = SweepSpec(sample_path, None, (512, 1024), (512, 2048), sizes)
    plan = plan_sweep(sweep, trace, spec, path)
    manifest = begin_sweep(path, sweep, trace, spec)
    finish_sweep(path, manifest, run_sweep(sweep, trace, plan, 1, lambda done: None), plan.skipped, TIMES)
    return path


@pytest.fixture(scope="module")
def sweep_path(sample_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plots")
    return make_sweep(sample_path, folder / "sweep", "nemotron-h-8b", (50 * GIB, 200 * GIB, None))


def check_pictures(written: tuple[Path, ...], names: list[str]) -> None:
    assert [path.name for path in written] == [f"{name}.{suffix}" for name in names for suffix in ("png", "svg")]
    for path in written:
        content = path.read_bytes()
        assert len(content) > 10_000
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")


def test_a_replay_is_drawn_as_memory_and_lost_tokens_over_time(replay_path: Path) -> None:
    check_pictures(plot_directory(replay_path), ["memory_over_time", "lost_tokens_over_time"])


def test_a_sweep_is_drawn_against_memory_and_as_a_heat_map(sweep_path: Path) -> None:
    names = ["hit_rate_block_512", "lost_tokens_block_512", "hit_rate_block_1024", "lost_tokens_block_1024", "heat_map"]
    check_pictures(plot_directory(sweep_path), names)


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
    dense = make_sweep(sample_path, tmp_path / "dense", "llama-3.1-8b", (50 * GIB,))
    assert "heat_map.png" not in [path.name for path in plot_directory(dense)]
    unlimited = make_sweep(sample_path, tmp_path / "unlimited", "nemotron-h-8b", (None,))
    names = {path.name for path in plot_directory(unlimited)}
    assert "heat_map.png" in names
    assert "hit_rate_block_512.png" not in names


def test_what_is_no_result_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected a result directory of ssmcache"):
        plot_directory(tmp_path)
