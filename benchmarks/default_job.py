"""Time and peak memory of the default job, `rlhf align algo=pm`, from an empty store: whole processes in turn.

    python benchmarks/default_job.py [--runs 3]

The bound is 120 s and 1 GB on 2 cores. Writes benchmarks/results/default_job.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "default_job.md"


def measure() -> tuple[float, float]:
    """Return (wall seconds, peak resident megabytes) of one run from an empty store."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlhf_cli.cli", "align", "algo=pm"]
        command += [f"run_dir={folder}/run", f"store_dir={folder}/store"]
        start = time.perf_counter()
        subprocess.run(command, check=True, env=os.environ | {"WANDB_MODE": "offline"}, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = [measure() for _ in range(parser.parse_args().runs)]
    seconds, peak = [run[0] for run in runs], max(run[1] for run in runs)
    text = (
        "# Default job, empty store\n\n"
        f"`rlhf align algo=pm` with all its stages, {len(runs)} runs on {os.cpu_count()} cores ({platform.machine()}), "
        f"Python {platform.python_version()}; load average before the last run {os.getloadavg()[2]:.1f}.\n\n"
        "| | median | fastest | slowest |\n|---|---|---|---|\n"
        f"| wall seconds | {statistics.median(seconds):.0f} | {min(seconds):.0f} | {max(seconds):.0f} |\n\n"
        f"Peak resident memory: {peak:.0f} MB.\n"
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
