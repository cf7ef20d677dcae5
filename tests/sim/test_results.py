import json
from pathlib import Path
from typing import Any

import pytest

from ssmcache.models import load_model
from ssmcache_sim.accounting import ReplayResult
from ssmcache_sim.directories import write_file
from ssmcache_sim.errors import OutputError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.replay import replay
from ssmcache_sim.results import RunTimes, load_run, replay_directory, replay_manifest, summary, write_replay
from ssmcache_sim.settings import build_config, make_settings

PROMISED = {
    "requests",
    "prompt_tokens",
    "usable_hit_tokens",
    "usable_token_hit_rate",
    "attention_hit_tokens",
    "tree_hit_tokens",
    "kv_ceiling_hit_tokens",
    "ceiling_hit_tokens",
    "lost_evicted_tokens",
    "lost_alignment_tokens",
    "lost_snapshot_tokens",
    "too_large_requests",
    "peak_bytes",
    "snapshots",
    "manifest",
}


@pytest.fixture(scope="module")
def replayed(sample_path: Path) -> tuple[ReplayResult, dict[str, Any]]:
    trace, spec = read_trace(sample_path), load_model("nemotron-h-8b")
    setting = make_settings(spec, 512, ssm_reuse_interval=2048, gpu_memory_bytes=200 << 30)
    return replay(trace, build_config(spec, setting)), replay_manifest(trace, setting)


def write(path: Path, replayed: tuple[ReplayResult, dict[str, Any]], times: RunTimes) -> None:
    with replay_directory(path) as folder:
        write_replay(folder, *replayed, times)


def test_a_run_read_back_is_what_was_written(tmp_path: Path, replayed: tuple[ReplayResult, dict[str, Any]]) -> None:
    result, manifest = replayed
    write(tmp_path / "new" / "run", replayed, RunTimes("2024-01-01T00:00:00+00:00", 1.5))
    run = load_run(tmp_path / "new" / "run")
    assert run.totals == result.totals
    assert run.manifest == {**manifest, "run": {"started_at": "2024-01-01T00:00:00+00:00", "wall_seconds": 1.5}}
    assert run.per_request["usable_hit_tokens"].tolist() == result.usable.tolist()
    assert run.per_request["used_bytes_ssm_1"].tolist() == result.used_bytes[1].tolist()
    assert int(run.per_request["prompt_tokens"].sum()) == result.totals.prompt_tokens


def test_the_summary_holds_what_is_promised(replayed: tuple[ReplayResult, dict[str, Any]]) -> None:
    result, manifest = replayed
    published = json.loads(json.dumps(summary(result, manifest)))
    assert published.keys() >= PROMISED
    assert published["usable_token_hit_rate"] == published["usable_hit_tokens"] / published["prompt_tokens"]
    assert set(published["peak_bytes"]) == {"attention", "ssm", "total"}
    assert set(published["snapshots"]) == {"taken", "reused", "evicted", "evicted_unused", "skipped"}
    assert published["manifest"]["trace"]["sha256"] == result.trace.sha256


def test_only_the_manifest_differs_between_two_runs(
    tmp_path: Path, replayed: tuple[ReplayResult, dict[str, Any]]
) -> None:
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        write(tmp_path / name, replayed, RunTimes("now", seconds))
    for name in ("summary.json", "per_request.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    manifests = [json.loads((tmp_path / name / "manifest.json").read_bytes()) for name in "ab"]
    assert [manifest.pop("run")["wall_seconds"] for manifest in manifests] == [1.0, 2.0]
    assert manifests[0] == manifests[1]


def test_an_earlier_run_is_replaced_as_a_whole(tmp_path: Path, replayed: tuple[ReplayResult, dict[str, Any]]) -> None:
    path = tmp_path / "run"
    for seconds in (1.0, 2.0):
        write(path, replayed, RunTimes("now", seconds))
        (path / "plots").mkdir()
    write(path, replayed, RunTimes("now", 3.0))
    assert load_run(path).manifest["run"]["wall_seconds"] == 3.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    assert not (path / "plots").exists()


def test_a_failure_leaves_nothing_and_the_earlier_run_whole(
    tmp_path: Path, replayed: tuple[ReplayResult, dict[str, Any]]
) -> None:
    path = tmp_path / "run"
    write(path, replayed, RunTimes("now", 1.0))

    def fail(target: Path, error: type[BaseException]) -> None:
        with replay_directory(target) as folder:
            (folder / "half").write_text("written")
            raise error

    for error in (KeyboardInterrupt, RuntimeError):
        for target in (path, tmp_path / "other"):
            with pytest.raises(error):
                fail(target, error)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    assert load_run(path).manifest["run"]["wall_seconds"] == 1.0


def test_directories_that_are_not_ours_are_left_alone(
    tmp_path: Path, replayed: tuple[ReplayResult, dict[str, Any]]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    ours = tmp_path / "ours"
    write(ours, replayed, RunTimes("now", 1.0))
    (ours / "thesis.txt").write_text("years of work")
    for path in (tmp_path / "notes", ours, tmp_path):
        with pytest.raises(OutputError, match=r"expected .* got"), replay_directory(path):
            pytest.fail("the long work must not begin")
    assert (tmp_path / "notes" / "thesis.txt").exists()
    assert (ours / "thesis.txt").exists()


def test_an_unwritable_place_is_an_error_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match="cannot write here: Not a directory"), replay_directory(path):
            pytest.fail("the long work must not begin")


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"first")
    with pytest.raises(TypeError):
        write_file(tmp_path / "a", "no bytes")  # type: ignore[arg-type]
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_what_is_no_run_is_refused(tmp_path: Path, replayed: tuple[ReplayResult, dict[str, Any]]) -> None:
    with pytest.raises(OutputError, match=r"got no readable manifest\.json"):
        load_run(tmp_path)
    (tmp_path / "manifest.json").write_text('{"tool": "another"}')
    with pytest.raises(OutputError, match=r"got a manifest\.json of something else"):
        load_run(tmp_path)
    (tmp_path / "manifest.json").write_text('{"tool": "ssmcache", "command": "sweep"}')
    with pytest.raises(OutputError, match="expected the result of a replay, got one of 'sweep'"):
        load_run(tmp_path)
    path = tmp_path / "run"
    write(path, replayed, RunTimes("now", 1.0))
    (path / "per_request.parquet").write_bytes(b"noise")
    with pytest.raises(OutputError, match="expected a Parquet file of ssmcache"):
        load_run(path)
    (path / "summary.json").write_text("{}")
    with pytest.raises(OutputError, match="expected the summary of a replay"):
        load_run(path)
