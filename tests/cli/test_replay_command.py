import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ssmcache_cli.replay as replay_module
from ssmcache_sim.results import load_run

Run = Callable[..., subprocess.CompletedProcess[str]]
RunHere = Callable[..., tuple[int, str, str]]
MODEL = ("--model", "nemotron-h-8b")


def test_the_table_shows_the_headline_with_its_definition_and_the_rest_beside_it(ssmcache: Run, sample: str) -> None:
    result = ssmcache("replay", sample, *MODEL, "--ssm-reuse-interval", 2048, "--gpu-memory", "200GiB")
    assert (result.returncode, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= 80
    for words in (
        "mooncake_conversation_1000.jsonl.gz, nemotron-h-8b",
        "block 512, interval 2048, memory 200 GiB",
        "usable token hit rate",
        "usable: prompt tokens that a request skips",
        "prefix known (tree)",
        "KV present (attention alone)",
        "ceiling at this interval",
        "KV evicted",
        "alignment to the interval",
        "no snapshot",
        "too large for the memory",
        "ssm (layer group 1)",
        "snapshots taken",
        "evicted unused",
        "no room",
    ):
        assert words in result.stdout


def test_the_table_is_legible_at_60_columns(run_here: RunHere, sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _ = run_here("replay", sample, *MODEL)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 60
    assert "…" not in out


TIERS = ("--gpu-memory", "40GiB", "--host-memory", "100GiB", "--disk-memory", "200GiB")


def test_with_tiers_the_table_splits_hits_peaks_and_moves_and_is_legible_at_60_columns(
    run_here: RunHere, sample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    code, out, err = run_here("replay", sample, *MODEL, *TIERS, "--ssm-reuse-interval", 2048)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 60
    assert "…" not in out
    rows = {" ".join(line.split()[:-2]): line.split()[-2:] for line in out.splitlines() if len(line.split()) > 2}
    tokens = [int(rows[f"from {tier} memory"][0].replace(",", "")) for tier in ("GPU", "host", "disk")]
    assert sum(tokens) == int(rows["usable token hit rate"][0].replace(",", ""))
    assert min(tokens) > 0
    for words in (
        "block 512, interval 2048, GPU 40 GiB, host 100 GiB, disk",
        "peak GPU memory",
        "peak host memory",
        "peak disk memory",
        "GPU to host, attention",
        "host to disk, ssm",
        "disk to GPU, attention",
        "within the GPU, ssm",
    ):
        assert words in out
    # without other tiers none is named
    assert "GPU" not in run_here("replay", sample, *MODEL, "--ssm-reuse-interval", 2048)[1]


def test_with_tiers_the_results_split_hits_and_count_moves(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    options = (*MODEL, *TIERS, "--ssm-reuse-interval", 2048, "--out", tmp_path / "run", "--json")
    code, out, err = run_here("replay", sample, *options)
    assert (code, err) == (0, "")
    published, run = json.loads(out), load_run(tmp_path / "run")
    assert [tier["tier"] for tier in published["tiers"]] == ["gpu", "host", "disk"]
    assert sum(tier["usable_hit_tokens"] for tier in published["tiers"]) == published["usable_hit_tokens"]
    for tier in published["tiers"]:
        assert int(run.per_request[f"usable_hit_tokens_{tier['tier']}"].sum()) == tier["usable_hit_tokens"]
    assert {(moved["source_tier"], moved["tier"]) for moved in published["moved"]} >= {("gpu", "host"), ("host", "gpu")}
    settings = published["manifest"]["settings"]
    assert (settings["host_memory_bytes"], settings["disk_memory_bytes"]) == (100 << 30, 200 << 30)


def test_a_disk_path_is_recorded_and_said_to_be_unused(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    code, out, err = run_here("replay", sample, *MODEL, "--disk-memory", "1TiB", "--disk-path", path, "--json")
    assert code == 0
    assert err == f"--disk-path: the disk is simulated, nothing is read or written at {path}\n"
    assert json.loads(out)["manifest"]["settings"]["disk_path"] == str(path)
    assert not path.exists()


def test_json_is_one_object_and_nothing_else(ssmcache: Run, sample: str) -> None:
    result = ssmcache("replay", sample, *MODEL, "--gpu-memory", "unlimited", "--json")
    published = json.loads(result.stdout)
    assert (result.returncode, result.stderr) == (0, "")
    assert published["requests"] == 1000
    assert published["usable_hit_tokens"] == published["ceiling_hit_tokens"] == 2_959_360
    assert published["manifest"]["settings"] == {
        "model": "nemotron-h-8b",
        "tokens_per_block": 512,
        "ssm_reuse_interval": 512,
        "gpu_memory_bytes": None,
        "ssm_fraction": None,
        "kv_dtype": "bfloat16",
        "state_dtype": "float32",
        "prefill": "reserved",
        "host_memory_bytes": 0,
        "disk_memory_bytes": 0,
        "disk_path": None,
        "admission": "every",
    }
    assert published["manifest"]["run"]["wall_seconds"] > 0


def test_defaults_are_40_gib_the_trace_s_block_and_an_interval_from_512_on(run_here: RunHere, sample: str) -> None:
    _, out, _ = run_here("replay", sample, *MODEL, "--json", "--tokens-per-block", 1024)
    settings = json.loads(out)["manifest"]["settings"]
    assert settings["gpu_memory_bytes"] == 40 << 30
    assert (settings["tokens_per_block"], settings["ssm_reuse_interval"]) == (1024, 1024)


def test_out_writes_a_directory_that_reads_back(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    code, out, err = run_here("replay", sample, *MODEL, "--out", tmp_path / "run", "--quiet")
    assert (code, out, err) == (0, "", "")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "manifest.json",
        "per_request.parquet",
        "phase_ceilings.parquet",
        "summary.json",
    ]
    assert load_run(tmp_path / "run").totals.requests == 1000


def test_every_option_reaches_the_replay(run_here: RunHere, sample: str) -> None:
    options = [
        "--kv-dtype",
        "fp8",
        "--state-dtype",
        "bf16",
        "--ssm-fraction",
        "0.4",
        "--prefill",
        "chunked",
        "--trace-block",
        "512",
        "--json",
    ]
    _, out, _ = run_here("replay", sample, *MODEL, *options)
    settings = json.loads(out)["manifest"]["settings"]
    assert (settings["kv_dtype"], settings["state_dtype"]) == ("float8_e4m3fn", "bfloat16")
    assert (settings["ssm_fraction"], settings["prefill"]) == (0.4, "chunked")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory", "10"], "memory too small for every request: expected at least "),
        (["--gpu-memory", "40G"], "memory size: expected a size such as 40GiB, 1.5TB, 512MB, a number of bytes, or "),
        (["--ssm-reuse-interval", "700"], "ssm_reuse_interval: expected a multiple of tokens_per_block (512), got 700"),
        (["--ssm-reuse-interval", "-512"], "ssm_reuse_interval: expected a positive integer, got -512"),
        (["--tokens-per-block", "256"], "tokens_per_block: expected a multiple of the 512 tokens a block of "),
        (["--tokens-per-block", "0"], "tokens_per_block: expected a positive integer, got 0"),
        (["--ssm-fraction", "2"], "ssm_fraction: expected a share between 0 and 1, got 2.0"),
        (["--kv-dtype", "int3"], "dtype: expected one of "),
        (["--prefill", "both"], "prefill: expected reserved or chunked, got 'both'"),
        (
            ["--trace-block", "16"],
            "mooncake_conversation_1000.jsonl.gz:1: hash_ids: expected 423 (or 422, full blocks ",
        ),
        (["--model", "nemo"], "unknown model 'nemo'"),
        (["--host-memory", "unlimited"], "--host-memory: expected a size such as 40GiB, 1.5TB, 512MB, a number of by"),
        (["--host-memory", "-1GiB"], "--host-memory: expected a size such as 40GiB, 1.5TB, 512MB, a number of bytes, "),
        (["--disk-memory", "much"], "--disk-memory: expected a size such as 40GiB, 1.5TB, 512MB, a number of bytes, "),
        (["--host-memory", "100"], "host memory too small: expected at least 110526464 bytes (105.4 MiB) "),
        (
            ["--host-memory", "1GiB", "--disk-memory", "1MB"],
            "disk memory too small: expected at least 110526464 bytes (105.4 MiB) ",
        ),
        (["--disk-path", "/data"], "--disk-path: expected --disk-memory beside it, got '/data' alone"),
        (
            ["--gpu-memory", "unlimited", "--host-memory", "1GiB"],
            "host memory: expected none below unlimited GPU memory, got 1 GiB",
        ),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_1(
    run_here: RunHere, sample: str, tmp_path: Path, options: list[str], message: str
) -> None:
    code, out, err = run_here("replay", sample, *MODEL, "--out", tmp_path / "run", *options)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_bad_row_is_named_and_nothing_is_written(ssmcache: Run, bad_trace: Path, tmp_path: Path) -> None:
    result = ssmcache("replay", bad_trace, *MODEL, "--out", tmp_path / "run")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: bad.jsonl:2: input_length: expected a positive integer, got -3\n"
    assert list(tmp_path.iterdir()) == [bad_trace]


def test_a_missing_trace_and_an_unwritable_directory_are_one_line(ssmcache: Run, sample: str, tmp_path: Path) -> None:
    missing = ssmcache("replay", tmp_path / "none.jsonl", *MODEL)
    assert missing.returncode == 1
    assert missing.stderr == f"error: {tmp_path}/none.jsonl: cannot read the trace: No such file or directory\n"
    (tmp_path / "file").write_text("")
    unwritable = ssmcache("replay", sample, *MODEL, "--out", tmp_path / "file" / "run")
    assert unwritable.returncode == 1
    assert unwritable.stderr == f"error: {tmp_path}/file/run: cannot write here: Not a directory\n"


def test_a_bug_of_ours_stays_loud(run_here: RunHere, sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(replay_module, "replay", broken)
    monkeypatch.setattr(sys, "argv", ["ssmcache", "replay", sample, *MODEL])
    from ssmcache_cli.main import run

    with pytest.raises(ValueError, match="a bug"):
        run()


def test_an_interrupted_replay_ends_with_130_and_one_line(
    run_here: RunHere, sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(replay_module, "replay", interrupted)
    code, out, err = run_here("replay", sample, *MODEL, "--out", tmp_path / "run")
    assert (code, out, err) == (130, "", "interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_a_warning_where_the_hit_rate_hangs_on_the_phase(run_here: RunHere, tmp_path: Path) -> None:
    """A shared start of 100 tokens, one too few for an interval of 101."""
    ids = [[*range(100), *range(1000 * user, 1000 * user + 20)] for user in range(1, 9)]
    rows = [{"timestamp": 0, "input_length": 120, "output_length": 1, "hash_ids": row} for row in ids]
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    command = ("replay", path, *MODEL, "--trace-block", "1", "--ssm-reuse-interval")
    code, out, err = run_here(*command, "101")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert "warning: the hit rate hangs on the phase of the prompt lengths." in text
    assert "from 0.00% (0 tokens more) to 72.92% (1 more); now 0.00%" in text  # 7 of 8 prompts, 100 of 120 tokens
    published = json.loads(run_here(*command, "101", "--json")[1])
    assert published["phase"]["hangs_on_phase"]
    assert (published["phase"]["best_shift_tokens"], published["phase"]["period_tokens"]) == (1, 101)
    steady = run_here(*command, "10")[1]
    assert "ceiling if all prompts began later" in steady
    assert "warning" not in steady


def test_last_boundaries_are_named_and_take_fewer_snapshots(run_here: RunHere, sample: str) -> None:
    taken = {}
    for admission in ("every", "last"):
        code, out, _ = run_here(
            "replay", sample, *MODEL, "--gpu-memory", "unlimited", "--admission", admission, "--json"
        )
        assert code == 0
        published = json.loads(out)
        assert published["manifest"]["settings"]["admission"] == admission
        taken[admission] = published["snapshots"]["taken"]
        passed_over = published["snapshots"]["skipped"]["not_admitted"]
        assert (passed_over > 0) == (admission == "last")
    assert 0 < taken["last"] <= 1000 < taken["every"]
    _, out, _ = run_here("replay", sample, *MODEL, "--admission", "last")
    assert "last boundary only" in out
    code, out, err = run_here("replay", sample, *MODEL, "--admission", "frist")
    assert (code, out, err) == (1, "", "error: admission: expected every or last, got 'frist'\n")
