import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import ssmcache_sim.payload_host as payload_host

RunHere = Callable[..., tuple[int, str, str]]
REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = ("--model", str(REPOSITORY / "examples" / "models" / "small-hybrid"))
SIZES = ("--gpu-memory", "100MiB", "--host-memory", "64MiB", "--requests", 30)


def test_verify_says_what_was_compared_and_is_legible_at_60_columns(run_here: RunHere, sample: str) -> None:
    code, out, err = run_here("verify", sample, *MODEL, *SIZES)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines[1:])) <= 60
    assert lines[0] == "mooncake_conversation_1000.jsonl.gz, 30 requests, small-hybrid, on host memory"
    assert lines[1].endswith(" equal, none different")
    assert lines[2].startswith("payload: ")
    assert lines[3:] == ["  0 wrong bytes, 0 missing pages", "passed"]


def test_json_has_the_same_and_the_log_has_a_line_for_each_decision(
    run_here: RunHere, sample: str, tmp_path: Path
) -> None:
    log = tmp_path / "log.gz"
    disk = ("--disk-memory", "64MiB", "--disk-path", tmp_path)
    code, out, err = run_here("verify", sample, *MODEL, *SIZES, *disk, "--log", log, "--json")
    answer = json.loads(out)
    assert (code, err, answer["passed"], answer["difference"]) == (0, "", True, None)
    with gzip.open(log, "rt") as lines:
        assert answer["decisions"] == len(lines.readlines())
    assert answer["payload"]["wrong_bytes"] == 0
    assert answer["payload"]["checked_bytes"] > answer["totals"]["usable_hit_tokens"] > 0
    assert list(tmp_path.iterdir()) == [log]  # the disk tier leaves nothing


def test_wrong_bytes_fail_with_exit_code_1(run_here: RunHere, sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload_host.HostKernels, "write_states", lambda *arguments: None)
    code, out, _ = run_here("verify", sample, *MODEL, *SIZES)
    assert code == 1
    assert "\n  first in request " in out
    assert out.endswith("FAILED\n")
    code, out, _ = run_here("replay", sample, *MODEL, *SIZES, "--memory", "host", "--verify", "--quiet")
    assert (code, out) == (1, "")


def digest_of(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }


def test_a_replay_on_real_memory_hits_what_a_simulated_one_does_and_leaves_its_decisions(
    run_here: RunHere, sample: str, tmp_path: Path
) -> None:
    real, again, simulated = tmp_path / "real", tmp_path / "again", tmp_path / "simulated"
    on_host = ("--memory", "host", "--verify")
    for folder, options in ((real, on_host), (again, on_host), (simulated, ())):
        code, out, err = run_here("replay", sample, *MODEL, *SIZES, *options, "--out", folder)
        assert (code, err) == (0, "")
        assert ("0 wrong bytes" in out) == bool(options)
    assert digest_of(real) == digest_of(again)
    same = ("per_request.parquet", "phase_ceilings.parquet")
    assert [digest_of(real)[name] for name in same] == [digest_of(simulated)[name] for name in same]
    assert "decisions.log.gz" in digest_of(real)
    assert "decisions.log.gz" not in digest_of(simulated)
    assert json.loads((real / "summary.json").read_text())["payload"]["wrong_bytes"] == 0
    assert json.loads((real / "manifest.json").read_text())["memory"] == "host"


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("replay", ["--verify"], "--verify: expected --memory host or cuda beside it, got simulated memory, without"),
        ("replay", ["--memory", "gpu"], "memory: expected host, cuda or cuda:INDEX, got 'gpu'"),
        ("verify", ["--memory", "gpu"], "memory: expected host, cuda or cuda:INDEX, got 'gpu'"),
        ("verify", ["--gpu-memory", "unlimited"], "--gpu-memory: expected a size for --memory host, got unlimited"),
        ("verify", ["--disk-memory", "1GiB"], "--disk-path: expected a directory for the disk tier of --memory host"),
        ("verify", ["--disk-memory", "1GiB", "--disk-path", "/no/such"], "--disk-path: expected a directory, got"),
        ("verify", ["--requests", "0"], "requests: expected at least 1 of mooncake_conversation_1000.jsonl.gz, got 0"),
        ("verify", ["--gpu-memory", "1MiB"], "memory too small for every request: expected at least"),
        ("verify", ["--log", "/no/such/log.gz"], "/no/such/log.gz: expected to write a decision log, got No such file"),
    ],
)
def test_what_cannot_be_is_one_line(
    run_here: RunHere, sample: str, command: str, options: list[str], message: str
) -> None:
    code, out, err = run_here(command, sample, *MODEL, *options)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_the_first_requests_are_a_trace_of_their_own(run_here: RunHere, sample: str) -> None:
    code, out, _ = run_here("replay", sample, *MODEL, "--requests", 10, "--json")
    manifest = json.loads(out)["manifest"]
    assert (code, manifest["trace"]["requests"], manifest["trace"]["reading"]) == (0, 10, "first 10 requests")
