import subprocess
import sys
from collections.abc import Callable

import pytest

import ssmcache as package

Run = Callable[..., subprocess.CompletedProcess[str]]
HEAVY = ("torch", "pandas", "matplotlib", "pyarrow")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([name, "--help"] for name in ("replay", "sweep", "recommend", "plot", "report", "doctor", "trace")),
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['ssmcache', *{arguments!r}]\n"
        "from ssmcache_cli.main import run\n"
        "try:\n    run()\nexcept SystemExit as exit:\n    assert not exit.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in result.stdout


def test_the_version_is_the_package_version(ssmcache: Run) -> None:
    result = ssmcache("--version")
    assert (result.returncode, result.stdout) == (0, f"ssmcache {package.__version__}\n")


def test_all_commands_are_listed(ssmcache: Run) -> None:
    help_text = ssmcache("--help").stdout
    for command in ("replay", "sweep", "recommend", "plot", "report", "models", "doctor", "trace"):
        assert f" {command} " in help_text


def test_a_wrong_flag_is_a_usage_error(ssmcache: Run, sample: str) -> None:
    result = ssmcache("replay", sample, "--modle", "nemotron-h-8b")
    assert result.returncode == 2
    assert "--modle" in result.stderr
