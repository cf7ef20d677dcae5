"""`ssmcache models`: legible tables, clean JSON, errors of one line."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ssmcache.models import ModelError, preset_names
from ssmcache_cli.models import models_command

app = typer.Typer()
app.command("models")(models_command)


@pytest.fixture(autouse=True)
def _narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def run(*arguments: str) -> str:
    """What the command prints."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_table_is_legible_at_80_columns() -> None:
    lines = run().splitlines()
    assert max(map(len, lines)) <= 80
    # no name is cut or broken: each opens a line, and each line has all nine columns
    rows = {line.split()[0]: line.split() for line in lines if line.split() and line.split()[0] in preset_names()}
    assert set(rows) == set(preset_names())
    assert all(len(row) == 9 for row in rows.values())
    assert rows["nemotron-h-8b"] == ["nemotron-h-8b", "8", "4/24", "16,384", "100.7", "1.5", "102.1", "6,234", "config"]
    assert rows["llama-3.1-8b"] == ["llama-3.1-8b", "8", "32/0", "131,072", "-", "-", "-", "-", "config"]


def test_a_narrow_terminal_gets_fewer_columns_and_no_cut_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "58")
    output = run()
    assert max(map(len, output.splitlines())) <= 58
    assert "…" not in output
    rows = [line.split() for line in output.splitlines()]
    assert ["nemotron-h-8b", "4/24", "16,384", "102.1", "6,234"] in rows


def test_the_table_follows_the_dtypes() -> None:
    row = next(
        line.split() for line in run("--state-dtype", "bf16", "--kv-dtype", "fp8").splitlines() if "h-8b" in line
    )
    assert row[3:8] == ["8,192", "50.3", "1.5", "51.8", "6,324"]


def test_one_model_shows_layers_dtypes_source_and_confidence() -> None:
    output = run("Kimi-Linear-48B-A3B")
    assert max(map(len, output.splitlines())) <= 80
    assert "7 x   attention (latent 576) + moe" in output
    assert "19 x  kda (state 32 x 128 x 128, conv 12288 x 3) + moe" in output
    assert "41,943,040 bytes, in float32" in output
    assert "config.json of moonshotai/Kimi-Linear-48B-A3B-Instruct" in output
    assert "published config" in output


def test_json_is_one_document_of_all_presets() -> None:
    document = json.loads(run("--json"))
    assert [model["name"] for model in document["models"]] == list(preset_names())
    marconi = document["models"][-1]
    assert (marconi["snapshot_bytes"], marconi["kv_bytes_per_token"]) == (26_787_840, 65_536)


def test_json_of_one_model_has_runs_of_equal_layers() -> None:
    document = json.loads(run("jamba-1.5-mini", "--json"))
    assert document["conv_dtype"] == "bfloat16"
    runs = document["layers"]
    assert [run["first"] for run in runs] == [0, *[run["last"] + 1 for run in runs[:-1]]]
    assert runs[-1]["last"] == document["num_layers"] - 1
    assert runs[4]["kv_elements_per_token"] == {"key": 1024, "value": 1024}


def test_a_config_file_is_read_like_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    fields = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 8}
    path.write_text(json.dumps(fields), encoding="utf-8")
    assert "2,048 bytes a token, in bfloat16" in run(str(path))
    assert "not stated" in run(str(path))


@pytest.mark.parametrize("arguments", [["nemotron-9"], ["--kv-dtype", "int4"], ["llama-3.1-8b", "--state-dtype", "x"]])
def test_errors_are_left_to_the_caller(arguments: list[str]) -> None:
    with pytest.raises(ModelError):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
