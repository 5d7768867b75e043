"""Does every algorithm reach its own closed-form optimum? Worlds x training seeds, gates, and a table.

    python benchmarks/conformance.py            # three worlds x three seeds; over an hour on 2 cores
    python benchmarks/conformance.py --paired   # three worlds, one seed each; about half an hour

Runs go through the command line as a user's would; finished runs are not repeated. The table goes to
benchmarks/results/conformance.md, every number to conformance.csv. Exit code 1 if a gate is missed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SHOWN = ["pm/tv", "pm/tv_max", "pm/kl_rm_policy", "pm/kl_rm_policy_max", "pm/offset_mass", "pm/offset_mass_max"]
SHOWN += ["optimum/tv", "optimum/tv_max", "optimum/kl", "gold/tv", "heldout/pm/tv", "chosen_logps_change"]
SHOWN += ["reference/optimum/tv", "reference/optimum/kl", "reference/pm/offset_mass", "reference/pm/tv"]


@dataclass(frozen=True)
class Case:
    """One algorithm in one setting, with the bounds that the median over worlds and seeds must keep."""

    name: str
    overrides: tuple[str, ...]
    gates: tuple[tuple[str, float], ...] = ()


CLOSED = ("algo=pm", "algo.alpha=null", "dataset.closed_vocabulary=true", "reward=gold")
CASES = [
    Case("pm-unconditional-gae", (*CLOSED, "algo.advantage=gae"), (("pm/tv", 0.02),)),
    Case("pm-unconditional-rloo", (*CLOSED, "algo.advantage=rloo"), (("pm/tv", 0.02),)),
    Case("kl_ppo", ("algo=kl_ppo",), (("optimum/tv", 0.06),)),
    Case("pm-gold", ("algo=pm", "reward=gold"), (("optimum/tv", 0.08), ("pm/offset_mass", 0.03))),
    Case(
        "pm",
        ("algo=pm",),
        (("pm/tv", 0.10), ("pm/offset_mass", 0.05), ("pm/tv_max", 0.25), ("pm/kl_rm_policy_max", 0.5)),
    ),
    Case("dpm", ("algo=dpm",)),
    Case("dpo", ("algo=dpo",)),
    Case("rpo", ("algo=rpo",)),
]


def run_case(case: Case, pairs: Sequence[tuple[int, int]], folder: Path) -> None:
    """Run one case on every (world, seed); output goes to a log beside the runs."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    (folder / case.name).mkdir(parents=True, exist_ok=True)
    with (folder / f"{case.name}.log").open("w", encoding="utf-8") as log:
        for world, seed in pairs:
            command = [sys.executable, "-m", "rlhf_cli.cli", "align", *case.overrides, "tracker=none"]
            command += [f"dataset.seed={world}", f"seed={seed}", f"store_dir={folder / 'store'}"]
            command += [f"run_dir={folder / case.name / f'world{world}-seed{seed}'}"]
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
            print(f"{case.name}: world {world}, seed {seed} done", flush=True)


def read_metrics(folder: Path) -> dict[str, float]:
    """Return a run's final metrics."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def gate_rows(cases: dict[str, list[dict[str, float]]]) -> list[tuple[str, str, str, float, float, bool]]:
    """Return (case, metric, bound, median, worst, kept) of every gate; the median must keep the bound."""
    gates = [(case.name, key, bound) for case in CASES for key, bound in case.gates]
    measured = [(name, key, bound, [run[key] for run in cases[name]]) for name, key, bound in gates]
    for name, others, key in (("pm", "kl_ppo", "pm/tv"), ("rpo", "dpo", "pm/offset_mass")):
        ratios = [ours[key] / other[key] for ours, other in zip(cases[name], cases[others], strict=True)]
        measured.append((name, f"{key} as a share of {others}'s", 0.59, ratios))
    for name in ("dpm", "dpo"):
        for key in ("optimum/kl", "optimum/tv"):
            moved = [run[key] / run[f"reference/{key}"] for run in cases[name]]
            measured.append((name, f"{key} as a share of the reference's", 1.0, moved))
    rows = [
        (name, key, f"<= {bound:g}", statistics.median(values), max(values), statistics.median(values) <= bound)
        for name, key, bound, values in measured
    ]
    for name, key, bound in (("kl_ppo", "pm/tv", 0.15), ("rpo", "chosen_logps_change", -0.5)):  # from below
        values = [run[key] for run in cases[name]]
        rows.append((name, key, f">= {bound:g}", statistics.median(values), min(values), min(values) >= bound))
    return rows


def to_markdown(cases: dict[str, list[dict[str, float]]], title: str) -> str:
    """Return the gates and the medians (worst) of every case as markdown."""
    lines = ["# Conformance", "", title, "", "Gates hold for the median over worlds and seeds.", ""]
    lines += ["| case | metric | bound | median | worst | kept |", "|---|---|---|---|---|---|"]
    for case, key, bound, median, worst, kept in gate_rows(cases):
        lines.append(f"| {case} | `{key}` | {bound} | {median:.4f} | {worst:.4f} | {'yes' if kept else '**no**'} |")
    lines += ["", "Median over worlds and seeds (worst in brackets); `_max` is the worst question of a run.", ""]
    lines += ["| case | " + " | ".join(f"`{key}`" for key in SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for name, runs in cases.items():
        cells = []
        for key in SHOWN:
            values = [run[key] for run in runs if run.get(key) is not None]
            worst = min if key == "chosen_logps_change" else max
            cells.append(f"{statistics.median(values):.3f} ({worst(values):.3f})" if values else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_csv(cases: dict[str, list[dict[str, float]]], pairs: Sequence[tuple[int, int]], path: Path) -> None:
    """Write every shown number of every run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "world", "seed", *SHOWN])
        for name, runs in cases.items():
            for (world, seed), run in zip(pairs, runs, strict=True):
                numbers = [f"{run[key]:.6f}" if run.get(key) is not None else "" for key in SHOWN]
                writer.writerow([name, world, seed, *numbers])


def main() -> int:
    """Run, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paired", action="store_true", help="world k with seed k only")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/conformance"), help="where the runs go")
    args = parser.parse_args()
    pairs = [(world, seed) for world in range(3) for seed in range(3) if world == seed or not args.paired]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda case: run_case(case, pairs, args.folder), CASES))
    cases = {
        case.name: [read_metrics(args.folder / case.name / f"world{w}-seed{s}") for w, s in pairs] for case in CASES
    }
    RESULTS.mkdir(exist_ok=True)
    text = to_markdown(cases, f"Runs: {len(pairs)} a case, (world, seed) = {', '.join(map(str, pairs))}.")
    (RESULTS / "conformance.md").write_text(text, encoding="utf-8")
    write_csv(cases, pairs, RESULTS / "conformance.csv")
    print(text)
    return 0 if all(row[-1] for row in gate_rows(cases)) else 1


if __name__ == "__main__":
    sys.exit(main())
