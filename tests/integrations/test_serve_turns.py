"""The example of a chat says what it reused and why."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

ROOT = Path(__file__).parents[2]


def chat(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "serve_turns.py"), *arguments]
    return subprocess.run(command, input=typed, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)


def test_each_turn_reuses_the_ones_before_it():
    done = chat()
    assert done.returncode == 0, done.stderr
    turns = re.findall(r"turn (\d): (\d+) tokens, (\d+) reused, (\d+) computed\n  why: (.+)", done.stdout)
    assert [turn[:4] for turn in turns] == [
        ("1", "180", "0", "180"),
        ("2", "244", "192", "52"),
        ("3", "308", "256", "52"),
    ]
    assert [turn[4] for turn in turns] == ["nothing of it was seen before", *["all that is known of it"] * 2]


def test_it_says_where_states_are_missing_and_where_there_was_no_room():
    typed = "a" * 100 + "\n" + "b" * 100 + "\n"
    done = chat("--chat", "--answer", "4", "--interval", "128", typed=typed)
    assert "turn 2: 204 tokens, 0 reused, 204 computed" in done.stdout
    assert "why: the KV of 96 tokens is there, states only every 128" in done.stdout
    done = chat("--memory", "1", "--max-tokens", "100000", "--chat", "--answer", "2", typed="c" * 4000 + "\n")
    assert "ran without the cache" in done.stdout


def test_errors_are_one_line():
    done = chat("--interval", "40")
    assert done.returncode == 1
    assert done.stderr == "serve_turns: ssm_reuse_interval: expected a multiple of tokens_per_block (16), got 40\n"
