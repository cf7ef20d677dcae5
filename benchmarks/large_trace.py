"""Commands on a trace whose block references take more memory than the process may have. Prints one JSON object.

    python benchmarks/large_trace.py [--requests 60000] [--limit-mib 500]

Makes a trace of so many requests for 1,000 blocks each (documents of 900 blocks, asked 200 times, each time with 100
blocks more), then runs each command with its own memory (RLIMIT_DATA: all that is not a file) limited. Needs about 25
bytes of disk for temporary files a reference. A minute and a half.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NUM_SHARED, NUM_OWN, NUM_ASKED = 900, 100, 200
MODEL = ("--model", "nemotron-h-8b", "--quiet")


def write_trace(path: Path, num_requests: int) -> None:
    rng = random.Random(0)
    num_documents = max(1, num_requests // NUM_ASKED)
    documents = [
        ",".join(map(str, range(start * NUM_SHARED, (start + 1) * NUM_SHARED))) for start in range(num_documents)
    ]
    next_id = num_documents * NUM_SHARED
    with path.open("w") as file:
        for request in range(num_requests):
            own = ",".join(map(str, range(next_id, next_id + NUM_OWN)))
            next_id += NUM_OWN
            tokens = 512 * (NUM_SHARED + NUM_OWN)
            file.write(
                f'{{"timestamp": {request}, "input_length": {tokens}, "output_length": 1, '
                f'"hash_ids": [{rng.choice(documents)},{own}]}}\n'
            )


def within(limit_bytes: int, arguments: list[str]) -> dict[str, Any]:
    """What a command takes, whose own memory is limited."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "ssmcache_cli", *arguments],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes)),
        capture_output=True,
        text=True,
        check=False,
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "command": " ".join(arguments[:2] if arguments[0] == "trace" else arguments[:1]),
        "succeeded": done.returncode == 0,
        "error": done.stderr.splitlines()[-1] if done.returncode else None,
        "cpu_seconds": round(used.ru_utime + used.ru_stime - start.ru_utime - start.ru_stime, 1),
        "wall_seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=60_000)
    parser.add_argument("--limit-mib", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace, converted = Path(folder) / "large.jsonl", Path(folder) / "large.npz"
        write_trace(trace, options.requests)
        report: dict[str, Any] = {
            "references": options.requests * (NUM_SHARED + NUM_OWN),
            "reference_mib": round(options.requests * (NUM_SHARED + NUM_OWN) * 8 / 2**20),
            "text_mib": trace.stat().st_size >> 20,
            "limit_mib": options.limit_mib,
            "commands": [],
        }
        sweep = ("--gpu-memory", "200GiB:400GiB:3", "--jobs", "1", "--out", f"{folder}/sweep")
        for arguments in (
            ["trace", "info", str(trace)],
            ["trace", "convert", str(trace), str(converted)],
            ["trace", "info", str(converted)],
            ["replay", str(converted), *MODEL, "--gpu-memory", "400GiB"],
            ["sweep", str(converted), *MODEL, *sweep],
        ):
            report["commands"].append(within(options.limit_mib << 20, arguments))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
