"""The README's commands do what it says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SET_UP = [body.strip() for language, body in BLOCKS if language == "sh" and "venv" in body]


def run_here(command: str, folder: Path, repository: Path) -> str:
    """Run one `ssmcache ...` of the README in `folder`, with the interpreter of the tests."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    assert words[0].endswith("ssmcache"), words
    arguments = [str(repository / word) if word.startswith("examples/") else word for word in words[1:]]
    command_line = [sys.executable, "-m", "ssmcache_cli", *arguments]
    done = subprocess.run(command_line, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_two_set_up_commands_and_each_makes_its_environment():
    assert len(SET_UP) == 2
    for command in SET_UP:
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q -e ")
        assert "\n" not in command


def test_the_first_command_replays_the_bundled_sample(tmp_path):
    output = run_here(SET_UP[0].split(" && ")[-1], tmp_path, ROOT)
    assert re.search(r"usable token hit rate +1,679,360 +12\.23%", output)


def test_the_second_command_is_what_ci_runs():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"s/\^\\\((.*)\\\)\$/", script)
    assert pattern is not None
    assert [command for command in SET_UP if re.fullmatch(pattern[1], command)] == SET_UP[1:]


def test_the_command_line_examples_run(tmp_path):
    examples = [body.strip() for language, body in BLOCKS if language == "sh" and "venv" not in body]
    assert len(examples) == 2
    for command in re.split(r"(?<!\\)\n", "\n".join(examples)):
        run_here(command, tmp_path, ROOT)
    assert (tmp_path / "out" / "sweep" / "cells.parquet").is_file()
    assert list((tmp_path / "out" / "sweep" / "plots").glob("*.png"))


def test_the_notebook_example_gives_a_picture(monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = [body.rstrip() for language, body in BLOCKS if language == "python" and "plots." in body]
    *statements, last = example.split("\n")
    names = {}
    exec(compile("\n".join(statements), "README.md", "exec"), names)
    assert eval(last, names)._repr_png_().startswith(b"\x89PNG")
    assert len(names["sweep"].cells) == 15


def run_library_example(document, capsys):
    """What a document's whole example of a manager prints, line by line."""
    blocks = re.findall(r"^```python\n(.*?)^```$", document, flags=re.MULTILINE | re.DOTALL)
    (example,) = [body for body in blocks if "KVCacheManager(" in body and "import" in body]
    exec(compile(example, "example", "exec"), {})
    return capsys.readouterr().out.splitlines()


def test_the_library_example_reuses_the_prompt_on_the_second_turn(capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.17")
    first, second = (re.fullmatch(r"turn (.+), answer (.+)", line) for line in run_library_example(README, capsys))
    assert (first[1], second[1]) == ("0: 0 of 500 tokens reused", "1: 384 of 500 tokens reused")
    assert first[2] == second[2]


def test_the_example_of_a_runner_of_ones_own_does_so_too(capsys):
    document = (ROOT / "docs" / "real_models.md").read_text(encoding="utf-8")
    assert run_library_example(document, capsys) == [
        "turn 0: 0 of 2000 tokens reused",
        "turn 1: 1536 of 2000 tokens reused",
    ]


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_what_the_readme_points_to_exists(link):
    assert (ROOT / link).exists()
