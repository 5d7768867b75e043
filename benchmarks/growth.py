"""From one process to many: what two processes on a CPU take, measured, and plans up to 70B parameters, computed.

    python benchmarks/growth.py ranks    # one and two processes; writes benchmarks/results/growth.md
    python benchmarks/growth.py plan     # writes the tables of benchmarks/growth_plan.py into docs/growth.md

A process has one thread, so a second one is a second core. One and two processes take turns, for the machine is not
equally fast all the time.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from growth_plan import tables

HERE = Path(__file__).parent
RESULT, PAGE = HERE / "results" / "growth.md", HERE.parent / "docs" / "growth.md"
BEGIN, END = "<!-- tables: python benchmarks/growth.py plan -->", "<!-- end of tables -->"
STEPS, WARM = 40, 10  # optimizer steps; the first ones are not timed
TURNS = 2
LOOK = 0.1  # seconds between looks
JOBS = {"pm": "online", "dpo": "pairwise"}  # algorithm, the trainer's block
MB = 1e6


@dataclass(frozen=True)
class Measured:
    """What an alignment took.

    Args:
        seconds: of an optimizer step, mean.
        peaks: largest resident memory of each process that trains, bytes.
        metrics: final ones.
    """

    seconds: float
    peaks: list[float]
    metrics: dict[str, float]


def command(algo: str, processes: int, folder: Path) -> list[str]:
    """Return the command that aligns with `algo` on so many processes, in `folder` with its store."""
    block = f"trainer.{JOBS[algo]}"
    asked = ["align", f"algo={algo}", "experiment=quick", f"{block}.max_steps={STEPS}", f"{block}.log_every_steps=1"]
    asked += [f"{block}.eval_every_steps={STEPS}", "device=cpu", "tracker=none", f"store_dir={folder / 'store'}"]
    asked += [f"run_dir={folder / f'{algo}-{processes}'}"]
    more = ["launch=accelerate", f"launch.processes={processes}"] if processes > 1 else []
    return [sys.executable, "-m", "rlhf_cli.cli", *asked, *more]


def measured(algo: str, processes: int, folder: Path) -> Measured:
    """Return what an alignment takes; SFT policy and reward model are in the store, or made first."""
    shutil.rmtree(folder / f"{algo}-{processes}", ignore_errors=True)  # of the turn before
    asked = command(algo, processes, folder)
    run = folder / f"{algo}-{processes}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    begun: dict[int, float] = {}
    peaks: dict[int, float] = {}
    with subprocess.Popen(asked, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as job:
        while job.poll() is None:
            now = time.perf_counter()
            for step in logged(run / "training_log.jsonl"):
                begun.setdefault(step, now)
            for process in family(job.pid):
                peaks[process] = max(peaks.get(process, 0.0), peak(process))
            time.sleep(LOOK)
    if job.returncode:
        raise SystemExit(f"failed: {' '.join(asked)}")
    times = [begun[step] for step in sorted(begun) if WARM <= step < STEPS]  # the last step is followed by measures
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return Measured(seconds, sorted(peaks.values(), reverse=True)[:processes], metrics)


def logged(file: Path) -> list[int]:
    """Return the steps that a training log has so far; its last line may be in the middle of being written."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line)["step"] for line in lines if line]


def family(process: int) -> list[int]:
    """Return a process and all below it."""
    found = [process]
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            below = children.read_text(encoding="ascii").split()
        except OSError:  # it has ended
            continue
        found += [one for child in below for one in family(int(child))]
    return found


def peak(process: int) -> float:
    """Return the largest resident memory of a process so far, bytes; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def difference(one: dict[str, float], other: dict[str, float]) -> float:
    """Return the largest difference of two runs' exact metrics of the policy, pm/ and optimum/."""
    keys = [key for key in one if key.startswith(("pm/", "optimum/")) and isinstance(one[key], float)]
    if not keys:
        raise ValueError("no metric is there to compare.")
    return max(abs(one[key] - other[key]) for key in keys)


def row(algo: str, processes: int, turns: Sequence[Measured], single: Sequence[Measured]) -> str:
    """Return a line of the table: medians over the turns, the quotient of each turn's two in brackets."""
    seconds, first = statistics.median(turn.seconds for turn in turns), turns[0]
    memory = " + ".join(f"{size / MB:.0f}" for size in first.peaks)
    beside = "–" if turns is single else f"{difference(single[0].metrics, first.metrics):.1e}"
    quotients = [found.seconds / one.seconds for found, one in zip(turns, single, strict=True)]
    shown = (
        "1" if turns is single else f"{statistics.median(quotients):.2f} ({min(quotients):.2f}–{max(quotients):.2f})"
    )
    cells = [f"`{algo}`", str(processes), f"{1000 * seconds:.0f}", shown, memory]
    cells += [f"{first.metrics['pm/tv']:.4f}", beside]
    return f"| {' | '.join(cells)} |"


def ranks() -> None:
    """Measure, print, write."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for algo in JOBS:
            measured(algo, 1, Path(scratch))  # trains SFT policy and reward model
            turns = [[measured(algo, processes, Path(scratch)) for processes in (1, 2)] for _ in range(TURNS)]
            single, double = ([turn[place] for turn in turns] for place in (0, 1))
            rows += [row(algo, 1, single, single), row(algo, 2, double, single)]
            print(*rows[-2:], sep="\n", flush=True)
    RESULT.write_text(page(rows), encoding="utf-8")


def page(rows: Sequence[str]) -> str:
    """Return the page of the measurement."""
    return TEXT.format(
        rows="\n".join(rows), cores=os.cpu_count(), steps=STEPS - WARM, load=os.getloadavg()[1], turns=TURNS
    )


def planned(text: str) -> str:
    """Return the page `text` with the tables as they are computed now.

    Raises:
        ValueError: the page does not say where they belong.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has no place for the tables: {BEGIN} … {END}")
    return f"{before}{begin}\n\n{tables()}\n\n{end}{after}"


TEXT = """# One process and two, on one CPU

`rlhf align algo=… experiment=quick device=cpu`, alone and with `launch=accelerate launch.processes=2` (DDP over gloo),
one thread a process, {cores} cores; load average {load:.1f} at the end. Seconds are means over {steps} optimizer
steps of the same global batch, medians of {turns} turns of one process and then two; memory is the largest resident
memory of each process that trains, that of the libraries included.

| `algo=` | processes | ms a step | beside one process | MB a process | pm/tv | largest difference of the metrics |
|---|---:|---:|---:|---|---:|---:|
{rows}

Differences are those of pm/ and optimum/, from rounding: two processes add up the same gradients in another order.

A quotient below 0.50 is more than a second core can give: each of two processes has tensors of half the size. Why those
are faster by more than half on this machine was not looked into.
"""


def main() -> None:
    """Do what the argument says."""
    if sys.argv[1:] == ["ranks"]:
        ranks()
    elif sys.argv[1:] == ["plan"]:
        PAGE.write_text(planned(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
