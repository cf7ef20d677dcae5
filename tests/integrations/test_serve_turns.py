"""The example of a chat says what it reused and why."""

import importlib.util
import io
import re
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_turns.py"


@pytest.fixture
def chat(monkeypatch, capsys):
    """Runs the example in this process: exit code, standard output, standard error."""
    spec = importlib.util.spec_from_file_location("serve_turns", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def run(*arguments, typed=""):
        monkeypatch.setattr("sys.argv", [str(EXAMPLE), *arguments])
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        code = example.main()
        return code, *capsys.readouterr()

    return run


def test_each_turn_reuses_the_ones_before_it(chat):
    code, output, _ = chat()
    assert code == 0
    turns = re.findall(r"turn (\d): (\d+) tokens, (\d+) reused, (\d+) computed\n  why: (.+)", output)
    assert [turn[:4] for turn in turns] == [
        ("1", "180", "0", "180"),
        ("2", "244", "192", "52"),
        ("3", "308", "256", "52"),
    ]
    assert [turn[4] for turn in turns] == ["nothing of it was seen before", *["all that is known of it"] * 2]


def test_it_says_where_states_are_missing_and_where_there_was_no_room(chat):
    typed = "a" * 100 + "\n" + "b" * 100 + "\n"
    _, output, _ = chat("--chat", "--answer", "4", "--interval", "128", typed=typed)
    assert "turn 2: 204 tokens, 0 reused, 204 computed" in output
    assert "why: the KV of 96 tokens is there, states only every 128" in output
    _, output, _ = chat("--memory", "1", "--max-tokens", "100000", "--chat", "--answer", "2", typed="c" * 4000 + "\n")
    assert "ran without the cache" in output


def test_errors_are_one_line(chat):
    code, output, errors = chat("--interval", "40")
    assert (code, output) == (1, "")
    assert errors == "serve_turns: ssm_reuse_interval: expected a multiple of tokens_per_block (16), got 40\n"
