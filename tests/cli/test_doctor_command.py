import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ssmcache_cli.doctor as doctor_module
from ssmcache_sim.diagnosis import LARGE_SLOT_BYTES, WAYS, Diagnosis, Finding, Measurement
from ssmcache_sim.machine_profile import read_profile

Run = Callable[..., subprocess.CompletedProcess[str]]
RunHere = Callable[..., tuple[int, str, str]]
MODEL = ("--model", "nemotron-h-8b", "--gpu-memory", "40GiB")


def made_up(*arguments: object) -> Diagnosis:
    """A machine on which slots move at 2 TB/s, 1.5 GB/s each other way; one thing failed."""
    rates = [Measurement(way, LARGE_SLOT_BYTES, 2e12 if way == "gpu" else 1.5e9) for way in WAYS]
    return Diagnosis(
        device="Some [GPU]",
        findings=[
            Finding("torch", True, "2.11", ""),
            Finding("Triton", False, "[red]broken", "what [is] done instead, " * 5),
            Finding("disk", None, "not asked", ""),
        ],
        measurements=rates,
        failures=[("host to GPU, slots of 64 KiB", "CUDA error: [no] memory")],
        notes=["Disk: written and gone."],
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "examine", made_up)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("columns", [60, 80, 200])
def test_findings_rates_and_failures_are_legible(
    run_here: RunHere, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = run_here("doctor")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out
    text = " ".join(out.split())
    for words in (
        "torch yes 2.11 Triton no [red]broken: what [is] done",
        "disk - not asked",
        "within the GPU - - 2,000",
        "to the disk - - 1.5",
        "not measured: host to GPU, slots of 64 KiB: CUDA error: [no] memory",
        "Disk: written and gone.",
    ):
        assert words in text


@pytest.mark.usefixtures("machine")
def test_json_is_the_profile_that_out_writes(run_here: RunHere, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    code, out, err = run_here("doctor", "--out", path, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(path.read_bytes())
    assert read_profile(path).bandwidths.gpu_bytes_per_second == 2e12
    assert run_here("doctor", "--out", path)[1].endswith(f"profile: {path}\n")  # a profile is replaced


@pytest.mark.usefixtures("machine")
def test_another_file_is_not_replaced_and_nothing_is_measured_first(
    run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*arguments: object) -> Any:
        raise AssertionError("measured before it was known where to write")

    monkeypatch.setattr(doctor_module, "examine", measure)
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    code, out, err = run_here("doctor", "--out", path)
    assert (code, out) == (1, "")
    assert err == f"error: {path}: expected a new file or a profile to replace, got something else\n"
    code, _, err = run_here("doctor", "--out", tmp_path / "none" / "m.json")
    assert (code, err.count("\n")) == (1, 1)
    assert path.read_text() == "mine"


def test_ctrl_c_is_one_line_and_leaves_nothing(
    run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_module, "examine", interrupted)
    code, out, err = run_here("doctor", "--out", tmp_path / "machine.json")
    assert (code, out) == (130, "")
    assert err == "interrupted: nothing was written or left behind\n"
    assert os.listdir(tmp_path) == []


def test_on_this_machine_it_works_whatever_the_machine_has(ssmcache: Run, tmp_path: Path) -> None:
    result = ssmcache("doctor", "--disk-path", tmp_path, "--out", tmp_path / "machine.json")
    assert (result.returncode, result.stderr) == (0, "")
    assert os.listdir(tmp_path) == ["machine.json"]
    measured = json.loads((tmp_path / "machine.json").read_bytes())["bandwidths"]
    # any disk, and any cache in front of it
    assert 1e5 < measured["to_disk_bytes_per_second"] < 1e12
    assert 1e5 < measured["from_disk_bytes_per_second"] < 1e12
    assert "fsync" in result.stdout


@pytest.mark.usefixtures("machine")
def test_replay_takes_its_copies_from_a_profile(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    run_here("doctor", "--out", path)
    tiers = ("--host-memory", "40GiB", "--ssm-reuse-interval", 2048)
    code, out, err = run_here("replay", sample, *MODEL, *tiers, "--bandwidth-profile", path, "--json")
    assert (code, err) == (0, "")
    published = json.loads(out)
    rates = {("gpu", "gpu"): 2e12, ("gpu", "host"): 1.5e9, ("host", "gpu"): 1.5e9}
    for each in published["moved"]:
        assert each["seconds"] == each["num_bytes"] / rates[each["source_tier"], each["tier"]]
    assert published["manifest"]["bandwidths"]["gpu_to_host_bytes_per_second"] == 1.5e9
    plain = json.loads(run_here("replay", sample, *MODEL, *tiers, "--json")[1])
    moves = [(each["num_slots"], each["num_bytes"] / 54.6e9) for each in plain["moved"] if each["tier"] == "host"]
    assert [(each["num_slots"], each["seconds"]) for each in plain["moved"] if each["tier"] == "host"] == moves
    assert plain["usable_hit_tokens"] == published["usable_hit_tokens"]


@pytest.mark.usefixtures("machine")
def test_a_replay_without_lower_tiers_has_no_use_for_a_profile(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    run_here("doctor", "--out", path)
    code, out, err = run_here("replay", sample, *MODEL, "--bandwidth-profile", path)
    assert (code, out) == (1, "")
    assert err.startswith("error: --bandwidth-profile: expected --host-memory or --disk-memory beside it")


@pytest.mark.usefixtures("machine")
def test_recommend_takes_its_copies_from_a_profile(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    run_here("doctor", "--out", path)
    options = ("--model", "nemotron-h-8b", "--gpu-memory", "320GiB", "--bandwidth-profile", path, "--json")
    code, out, err = run_here("recommend", sample, *options)
    assert (code, err) == (0, "")
    device = json.loads(out)["cost_model"]["device"]
    assert device["name"] == "H100 SXM with the copies of Some [GPU]"
    assert device["bandwidths"]["gpu_bytes_per_second"] == 2e12


@pytest.mark.parametrize("command", ["replay", "recommend"])
def test_what_a_profile_lacks_is_said_and_a_broken_one_is_an_error(
    run_here: RunHere, sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    path = tmp_path / "machine.json"
    monkeypatch.setattr(doctor_module, "examine", lambda *arguments: Diagnosis())
    run_here("doctor", "--out", path)
    options = (*MODEL[:2], "--gpu-memory", "320GiB", *(["--host-memory", "40GiB"] if command == "replay" else []))
    code, _, err = run_here(command, sample, *options, "--bandwidth-profile", path)
    assert code == 0
    assert err.startswith(f"{path}: not measured, and taken as on one H100: gpu_bytes_per_second, gpu_to_host_")
    path.write_text("{}")
    code, out, err = run_here(command, sample, *options, "--bandwidth-profile", path)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: {path}: expected a profile that `ssmcache doctor --out` has written")


SHAPE = {
    "model_type": "qwen3_5_text", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
}  # fmt: skip


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """A config.json that transformers and the cost model read."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


def test_a_calibration_is_printed_kept_and_used_by_recommend(
    run_here: RunHere, sample: str, shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.17")
    monkeypatch.setattr(doctor_module, "examine", lambda *arguments: Diagnosis())
    monkeypatch.setenv("COLUMNS", "70")
    path = tmp_path / "machine.json"
    code, out, _ = run_here("doctor", "--calibrate", shape, "--calibrate-tokens", "512", "--out", path)
    assert code == 0
    assert max(map(len, out.splitlines()[:-1])) <= 70  # the last one is the path
    words = " ".join(out.split())
    assert "cached tokens new tokens first token spread" in words
    found = read_profile(path).calibration
    if found is None:  # on a busy machine such short times may not grow with the tokens: then it says so
        assert "not measured: time to the first token of tiny: calibration: expected times that grow" in words
        pytest.skip("the times did not grow with the tokens")
    assert (found.model, found.dtype, len(found.times)) == ("tiny", "float32", 16)
    assert all(each.spread > 0 for each in found.times)
    assert {(each.cached_tokens, each.new_tokens) for each in found.times} >= {(0, 2), (128, 128), (256, 256), (0, 512)}
    options = ("--gpu-memory", "1GiB", "--bandwidth-profile", path, "--json")
    code, out, err = run_here("recommend", sample, "--model", shape, *options)
    assert (code, err.count("\n")) == (0, 1)  # of the copies, which were not measured
    cost = json.loads(out)["cost_model"]
    assert cost["device"]["name"] == "H100 SXM, calibrated with tiny"
    assert cost["device"]["pass_floor_seconds"] == found.pass_floor_seconds
    assert cost["linear_flops_per_token"] == 2 * found.num_parameters
    code, _, err = run_here("recommend", sample, *MODEL[:2], "--gpu-memory", "320GiB", *options[2:])
    assert code == 0
    assert f"{path}: calibrated with tiny, which is not used for nemotron-h-8b\n" in err


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calibrate", "nothing/here"), "error: "),
        (("--calibrate", "SHAPE", "--calibrate-tokens", "500"), "expected a positive multiple of 512, got 500"),
        (("--calibrate", "nemotron-h-8b"), "--calibrate: expected a config.json, or its directory, that transformers"),
    ],
)
def test_what_cannot_be_calibrated_is_an_error_of_one_line_before_anything_is_measured(
    run_here: RunHere, shape: Path, arguments: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.17")
    code, out, err = run_here("doctor", *(str(shape) if each == "SHAPE" else each for each in arguments))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
