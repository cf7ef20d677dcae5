"""What the core imports by itself."""

import subprocess
import sys

SCRIPT = """
import sys
import ssmcache
import ssmcache.memory.disk_queue
import ssmcache.memory.cuda_vmm
print(sorted({"torch", "triton", "cuda", "pandas", "matplotlib"} & set(sys.modules)))
"""


def test_the_core_needs_no_gpu_packages() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
