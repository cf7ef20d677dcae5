import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import ssmcache_cli.recommend as recommend_module

Run = Callable[..., subprocess.CompletedProcess[str]]
RunHere = Callable[..., tuple[int, str, str]]
MODEL = ("--model", "nemotron-h-8b", "--gpu-memory", "320GiB")


def words_of(out: str) -> str:
    return " ".join(out.split())


def test_the_answer_comes_first_and_in_words(ssmcache: Run, sample: str) -> None:
    result = ssmcache("recommend", sample, *MODEL, "--admission", "every")
    assert (result.returncode, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stdout.startswith(
        "mooncake_conversation_1000.jsonl.gz, nemotron-h-8b\n\nUse interval 6,144, block 512, and"
    )
    text = words_of(result.stdout)
    assert re.search(r"(\d+\.\d\d)% of the prompt tokens are skipped, and (\d+\.\d\d)% of the prefill time is", text)
    for words in (
        "Runner-up: interval 4,096, block 512, saves ",
        "Ceiling: with unlimited memory",
        "attention alone would skip 21.55% of the tokens",
        "How sure: on 10 parts of the trace",
        "other costs another choice is better",
        "prefill reserved: 3,072 saves ",
    ):
        assert words in text


def test_the_printed_command_replays_what_was_promised(ssmcache: Run, run_here: RunHere, sample: str) -> None:
    out = ssmcache("recommend", sample, *MODEL, "--state-dtype", "bf16", "--skip-broken", "--format", "mooncake").stdout
    (skipped,) = re.findall(r"(\S+) of the prompt tokens are skipped", words_of(out))
    command = shlex.split(out.partition("To replay it:\n")[2].replace("\\\n", " "))
    assert command[:3] == ["ssmcache", "replay", sample]
    for option in ("--skip-broken", "--state-dtype", "--format", "--ssm-fraction"):
        assert option in command
    code, replayed, _ = run_here(*command[1:], "--json")
    assert code == 0
    assert f"{json.loads(replayed)['usable_token_hit_rate']:.2%}" == skipped


@pytest.mark.parametrize("columns", [40, 59, 60])
def test_narrow_terminals_cut_no_number(
    run_here: RunHere, sample: str, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run_here("recommend", sample, *MODEL)
    assert code == 0
    text = out.partition("To replay it:")[0]  # a path of the command may be longer than any line
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    headings = next(line.split() for line in text.splitlines() if line.split()[:2] == ["interval", "block"])
    assert ("ceiling" in headings) == (columns == 60)


def test_last_boundaries_and_tiers_are_named_and_in_the_command(run_here: RunHere, sample: str) -> None:
    tiers = ("--gpu-memory", "40GiB", "--host-memory", "100GiB")
    _, out, _ = run_here("recommend", sample, "--model", "nemotron-h-8b", *tiers, "--ssm-reuse-interval", "512,4096")
    text = words_of(out)
    assert "nemotron-h-8b GPU 40 GiB, host 100 GiB" in text
    assert "Use interval 512, block 512, the last boundary of each request alone, and" in text
    assert re.search(r"They lay \d+\.\d\d% on the GPU, \d+\.\d\d% in host memory;", text)
    assert re.search(r"\d+ settings were replayed, best promise first", text)
    assert "Phase: with " in text
    (skipped,) = re.findall(r"(\S+) of the prompt tokens are skipped", text)
    command = shlex.split(out.partition("To replay it:\n")[2].replace("\\\n", " "))
    for words in (["--admission", "last"], ["--host-memory", "100GiB"]):
        assert words == command[command.index(words[0]) :][:2]
    code, replayed, _ = run_here(*command[1:], "--json")
    assert code == 0
    assert f"{json.loads(replayed)['usable_token_hit_rate']:.2%}" == skipped


def test_without_ssm_layers_the_block_size_is_what_is_chosen(run_here: RunHere, sample: str) -> None:
    code, out, _ = run_here("recommend", sample, "--model", "llama-3.1-8b")
    assert code == 0
    assert "\nUse block 512 (640 pages of 64 MiB): " in out
    assert "interval" not in out.partition("To replay it:")[2]
    assert "--ssm-fraction" not in out


def test_what_is_not_judged_is_said(run_here: RunHere, sample: str) -> None:
    _, out, _ = run_here("recommend", sample, "--model", "nemotron-h-8b", "--gpu-memory", "20GiB")
    # 121,924 tokens are 238 full blocks of 512 and a page more; 239 states of 102,137,856 bytes; KV of 16 KiB a token
    least = 239 * 102_137_856 + 239 * 512 * 16_384
    assert (
        f"Not judged: 512, every boundary kept, where the largest request alone needs {least / 2**30:.4g} GiB or more."
        in words_of(out)
    )


def test_a_choice_that_saves_nothing_is_not_praised(run_here: RunHere, tmp_path: Path) -> None:
    rows = [{"timestamp": n, "input_length": 600, "output_length": 1, "hash_ids": [n, 100 + n]} for n in range(8)]
    trace = tmp_path / "fresh.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    one = ("--ssm-reuse-interval", "512", "--admission", "every")
    code, out, _ = run_here("recommend", trace, *MODEL, *one)
    assert code == 0
    text = words_of(out)
    assert "No setting saves time. The least bad one: Use interval 512, block 512" in text
    assert "No runner-up: there was nothing else to choose from." in text


def test_json_is_one_object_with_the_answer_and_what_it_depends_on(ssmcache: Run, sample: str) -> None:
    result = ssmcache("recommend", sample, *MODEL, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    published = json.loads(result.stdout)
    best = published["best"]
    assert best == published["settings"][0]
    assert best["kv_bytes"] + best["ssm_bytes"] <= best["gpu_memory_bytes"] == 320 << 30
    assert (best["admission"], best["known_by"]) == ("last", "grid")
    assert {row["admission"] for row in published["settings"]} == {"every", "last"}
    assert published["search"] == {"replays": 0, "more_promising": 0}
    assert published["cost_model"]["device"]["name"] == "H100 SXM"
    assert published["cost_model"]["snapshot_bytes"] == 102_137_856
    assert published["manifest"]["settings"]["prefill"] == "chunked"
    kinds = [case["kind"] for case in published["certainty"]["cases"]]
    assert kinds == ["half"] * 2 + ["piece"] * 8 + ["phase"] * kinds.count("phase") + ["cost"] * 5
    assert 1 <= kinds.count("phase") <= 3


def test_out_writes_a_directory_and_quiet_prints_nothing(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    command = ("recommend", sample, *MODEL, "--out", tmp_path / "r", "--quiet")
    assert run_here(*command) == (0, "", "")
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        "manifest.json",
        "recommendation.json",
        "settings.parquet",
    ]
    rows = pd.read_parquet(tmp_path / "r" / "settings.parquet")
    assert (rows.ssm_reuse_interval[0], rows.admission[0]) == (512, "last")
    assert run_here(*command) == (0, "", "")  # an earlier result is replaced


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory", "unlimited"], "--gpu-memory: expected a size to split, such as 40GiB, got 'unlimited'"),
        (["--gpu-memory", "much"], "memory size: expected a size such as 40GiB"),
        (["--gpu-memory", "1GiB"], "memory too small for the largest request (121924 tokens): expected at least "),
        (["--tokens-per-block", "x"], "--tokens-per-block: expected a positive integer, got 'x'"),
        (["--tokens-per-block", "256"], "tokens_per_block: expected a multiple of the 512 tokens a block of "),
        (["--ssm-reuse-interval", "700"], "ssm_reuse_interval: expected a multiple of a block size (512 or 1024), got"),
        (["--admission", "first"], "admission: expected every or last, got 'first'"),
        (["--host-memory", "much"], "--host-memory: expected a size such as 40GiB"),
        (["--host-memory", "1MiB"], "host memory too small: expected at least "),
        (["--prefill", "none"], "prefill: expected reserved or chunked, got 'none'"),
        (
            ["--model", "mamba2-2.7b"],
            "mamba2-2.7b: expected a model with attention layers, got none: ",
        ),
        (["--kv-dtype", "int4"], "dtype: expected one of "),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_1(
    run_here: RunHere, sample: str, tmp_path: Path, options: list[str], message: str
) -> None:
    code, out, err = run_here("recommend", sample, *MODEL, "--out", tmp_path / "r", *options)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_one_s_own_needs_its_parameters(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 8}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    command = ("recommend", sample, "--model", tmp_path / "mine.json")
    code, _, err = run_here(*command)
    assert (code, err.count("\n")) == (1, 1)
    assert "billion_parameters" in err
    assert run_here(*command, "--billion-parameters", "0.5", "--quiet") == (0, "", "")


def test_ctrl_c_is_one_line_and_leaves_nothing(
    run_here: RunHere, sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recommend_module, "recommend", interrupted)
    code, out, err = run_here("recommend", sample, *MODEL, "--out", tmp_path / "r")
    assert (code, out, err) == (130, "", "interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == []
