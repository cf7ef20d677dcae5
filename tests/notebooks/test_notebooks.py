"""The notebooks run, in time, and print what is stored in them: so the stored figures and text stay true."""

import asyncio
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from ssmcache_cli.main import app

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
TRACE = str(REPOSITORY / "examples" / "traces" / "mooncake_conversation_1000.jsonl.gz")
TIME_LIMIT_SECONDS = 60
MAX_BYTES = 400_000


class ThisPython(KernelSpecManager):
    """The one kernel is the Python that runs the test, whatever is installed for all."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name=kernel_name, language="python")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def executed(notebook: Any, folder: Path, scratch: Path, limit_seconds: float = TIME_LIMIT_SECONDS) -> Any:
    """A copy with the outputs of a run in `folder`, in a kernel that ends with it.

    Errors: CellExecutionError for a cell that fails; TimeoutError where all cells together take too long.
    """
    deadline = time.monotonic() + limit_seconds
    copy = nbformat.from_dict(notebook)
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    manager = AsyncKernelManager(kernel_name="python3", transport="ipc", connection_file=str(scratch / "kernel.json"))
    manager.kernel_spec_manager = ThisPython()
    client = NotebookClient(
        copy,
        km=manager,
        timeout_func=lambda cell: max(0.1, deadline - time.monotonic()),
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )

    async def run() -> None:
        try:
            await client.async_execute()
        finally:
            await manager.shutdown_kernel(now=True)

    asyncio.run(run())
    return copy


def printed(notebook: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of each code cell its source, and its outputs as text; of a picture only that there is one."""
    return [(cell.source, [_as_text(output) for output in cell.outputs]) for cell in code_cells(notebook)]


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _as_text(output: Any) -> tuple[str, str]:
    if output.output_type == "stream":
        return output.name, output.text
    return ("picture", "") if "image/png" in output.data else ("result", output.data["text/plain"])


def test_the_five_notebooks_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart",
        "02_interval_and_block_size",
        "03_memory_split_and_tiers",
        "04_real_memory",
        "05_real_model",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_is_stored_in_it(path: Path, tmp_path: Path) -> None:
    stored = read(path)
    assert printed(executed(stored, path.parent, tmp_path)) == printed(stored)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_an_article_with_nothing_of_a_machine_in_it(path: Path) -> None:
    text, notebook = path.read_text(encoding="utf-8"), read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size <= MAX_BYTES
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert notebook.metadata == {"language_info": {"name": "python"}}
    assert all(not cell.metadata for cell in notebook.cells)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    assert not re.search(r"0x[0-9a-f]{6,}|/(home|root|work|tmp)/|[A-Z]:\\\\", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_commands_in_a_notebook_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(path):
        _, *arguments = [TRACE if word == "TRACE" else word for word in shlex.split(command)]
        app(arguments, standalone_mode=False)


def commands(path: Path) -> list[str]:
    """What the blocks of shell in the text say, a command an entry."""
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def test_a_changed_output_is_noticed(tmp_path: Path) -> None:
    stored = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1)\n2")])
    first = executed(stored, tmp_path, tmp_path)
    assert printed(first) == [("print(1)\n2", [("stdout", "1\n"), ("result", "2")])]
    first.cells[0].outputs[0].text = "3\n"
    assert printed(executed(first, tmp_path, tmp_path)) != printed(first)


def test_a_notebook_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    forever = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("while True:\n    pass")])
    with pytest.raises(TimeoutError):
        executed(forever, tmp_path, tmp_path, limit_seconds=3)


def test_a_cell_that_fails_fails_the_test(tmp_path: Path) -> None:
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        executed(broken, tmp_path, tmp_path)
