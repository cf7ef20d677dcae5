"""`CudaMemory` keeps the contract of memories also where there is no GPU: on a device that torch's CPU plays.

In a process of its own, since that patches torch. What it cannot find is found by `tests/gpu`: streams, kernels, the
driver.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real CUDA device, which tests/gpu is for")
@pytest.mark.parametrize(
    ("file", "chosen", "least"),
    [("core/test_memory_contract.py", "cuda", 190), ("gpu/test_cuda_memory.py", "disk or file", 3)],
)
def test_cuda_memory_passes_its_tests_on_a_device_that_is_played(file: str, chosen: str, least: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "played_device", "-p", "no:cacheprovider", "-k", chosen]
    environment = os.environ | {"PYTHONPATH": str(TESTS / "core"), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [*command, str(TESTS / file)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout
    found = re.search(r"^(\d+) passed", done.stdout, flags=re.MULTILINE)
    assert found is not None, done.stdout
    assert int(found[1]) >= least
    assert "skipped" not in done.stdout.splitlines()[-1]
