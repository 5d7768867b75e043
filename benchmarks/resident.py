"""Runs an `rlhf` command in this process and says what its parts took: seconds, and largest resident memory.

    python benchmarks/resident.py REPORT.json COMMAND [OVERRIDES]

Parts are the training of each stage, and measuring, also that within training. Linux only: it resets the kernel's
high-water mark of resident memory at the beginning of each part.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESET_PEAK = "5"  # man 5 proc, /proc/pid/clear_refs


class Parts:
    """Seconds and largest resident memory (bytes) of parts of a run, which may lie in one another."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.open: list[str] = []
        self.since, self.since_processor = 0.0, 0.0

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` as a part; what it takes does not count for the part that calls it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._close()
            self.open.append(name)
            self._begin()
            try:
                return function(*args, **kwargs)
            finally:
                self._close()
                self.open.pop()
                self._begin()

        return run

    def _begin(self) -> None:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
        self.since, self.since_processor = time.perf_counter(), time.process_time()

    def _close(self) -> None:
        if not self.open:
            return
        part = self.found.setdefault(self.open[-1], {"seconds": 0.0, "processor": 0.0, "peak": 0.0})
        part["seconds"] += time.perf_counter() - self.since
        part["processor"] += time.process_time() - self.since_processor
        part["peak"] = max(part["peak"], resident("VmHWM"))


def resident(line: str = "VmRSS") -> float:
    """Return this process's resident memory, or another line of its status, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(found.split()[1]) * 1024 for found in lines if found.startswith(f"{line}:"))


def main() -> None:
    """Run the command in the arguments, and write the report."""
    report, command, *overrides = sys.argv[1:]
    from rlhf_cli import cli
    from rlhf_cli.stages import align, footprint, train_rm, train_sft
    from rlhf_cli.stages.workspace import Workspace

    parts = Parts()
    before: list[float] = []
    estimated: dict[str, float] = {}
    announce, estimate = footprint.announce, footprint.estimate

    def announced(cfg: Any) -> None:
        announce(cfg)
        before.append(resident())

    def noted(plan: Any, *shapes: Any) -> Any:
        found = estimate(plan, *shapes)
        estimated.setdefault(found.stage, found.total)  # later ones are remedies
        return found

    footprint.announce, footprint.estimate = announced, noted
    for module, name in ((train_sft, "sft"), (train_rm, "rm"), (align, "align")):
        module.fit = parts.watched(name, module.fit)
    align.measure = parts.watched("measures", align.measure)
    Workspace.metrics_while_training = parts.watched("measures", Workspace.metrics_while_training)  # type: ignore[method-assign]
    try:
        cli.app([command, *overrides], standalone_mode=False)
    finally:
        found = {"parts": parts.found, "before": before, "estimated": estimated, "processor": time.process_time()}
        Path(report).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
