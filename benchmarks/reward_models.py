"""What prior constraints, length calibration and weight averaging do to reward models, and to policies aligned to them.

    python benchmarks/reward_models.py pcrm|calibration|warm [quick=true] [folder=DIR]

The world has a planted flaw: few judgements (3000 pairs), by judges who over-prefer long answers by 0.3 nats a word.
Three worlds, each with its own training seed; quick=true is one of them with fewer steps. Runs go through the command
line as a user's would, into DIR (runs/reward_models), which the experiments share: the same command goes on after an
interruption and re-uses what is there. Writes benchmarks/results/reward_models_<experiment>.md and .csv; with
quick=true into DIR. Exit code 1 and no table if a run failed.
"""

from __future__ import annotations

import csv
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml
from scipy.special import stdtrit

from rlhf_cli.config import compose
from rlhf_cli.errors import ConfigError, UserError
from rlhf_cli.metrics.glossary import describe
from rlhf_cli.store import check_folder, read_json, write_json

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
AT_A_TIME = 2
QUICK = ("trainer.sft.max_steps=300", "trainer.rm.max_steps=150", "trainer.online.max_steps=150")
OFFSET_REWARD = -5.0  # dataset.gold_offset_reward
ALGOS = ("kl_ppo", "pm")
BASELINE = "bt"
SETTINGS = {
    "few": ("dataset.pairs=3000", "dataset.length_bias=0.3"),
    "ample": ("dataset.pairs=40000", "dataset.length_bias=0.0"),
}
HEADINGS = {
    "few": "Reward model: few judgements (3000 pairs), judges over-prefer long answers by 0.3 nats a word",
    "ample": "Reward model, default world: 40000 pairs, unbiased judges. What the method costs with nothing to fix",
}
METHODS: dict[str, tuple[str, ...]] = {
    name: (f"reward={name}",) for name in ("bt", "pcrm_length", "pcrm_cosine", "pcrm_fixed", "pcrm_random")
}
METHODS["bt_calibrated"] = ("reward=bt", "reward.calibration=length")
METHODS["warm_weights"] = ("reward=warm", "reward.members=3", "reward.combine=weights")
METHODS["warm_predictions"] = ("reward=warm", "reward.members=3", "reward.combine=predictions")

# Columns: {header: metric key}.
JUDGED = {"accuracy": "rm/accuracy", "log-loss": "rm/log_loss", "ECE": "rm/ece"}
GOLD = {"gold TV": "rm/gold_tv", "gold Spearman": "rm/gold_spearman"}
SCALE = {"Brier": "rm/brier", "margin std": "rm/margin/std", "margin q95": "rm/margin/q95"}
SCALE |= {"δ*/2": "rm/bound/half", "beyond δ*/2": "rm/beyond_half", "length correlation": "rm/length_correlation"}
LENGTH = {"length correlation as read": "rm/length_correlation", "before": "rm/length_correlation_raw"}
LENGTH |= {"after": "rm/length_correlation_calibrated", "of the labels": "rm/length_correlation_labels"}
LENGTH |= {"nats a token as read": "rm/length_slope"}
MEMBERS = {f"members' accuracy, {name}": f"rm/member_accuracy/{name}" for name in ("mean", "min", "max")}
MEMBERS |= {"ensemble accuracy": "rm/ensemble_accuracy", "ensemble ECE": "rm/ensemble_ece"}
MEMBERS |= {"disagreement": "rm/disagreement"}
POLICY = {"gold/tv": "gold/tv", "gold reward": "gold_reward", "pm/tv": "pm/tv", "reward/mean": "reward/mean"}
POLICY |= {"length/mean": "length/mean", "off-set mass": "pm/offset_mass"}
# reward/mean is in each reward model's own scale; the others are the same in every row.
NOT_COMPARED = {"reward/mean", *list(LENGTH.values())[1:4]}


@dataclass(frozen=True)
class Experiment:
    """Methods in one table; the first is the baseline."""

    title: str
    methods: tuple[str, ...]
    columns: dict[str, str]
    settings: tuple[str, ...] = ("few", "ample")


EXPERIMENTS = {
    "pcrm": Experiment(
        "Prior-constrained reward models (PCRM, arXiv 2404.00978)",
        ("bt", "pcrm_length", "pcrm_cosine", "pcrm_fixed", "pcrm_random"),
        JUDGED | SCALE | GOLD,
    ),
    "calibration": Experiment(
        "Length calibration of a finished reward model (LOWESS, arXiv 2409.17407)",
        ("bt", "bt_calibrated"),
        LENGTH | JUDGED | GOLD,
    ),
    "warm": Experiment(
        "Averaging three reward models (WARM, arXiv 2401.12187)",
        ("bt", "warm_weights", "warm_predictions"),
        JUDGED | GOLD | MEMBERS,
        ("few",),
    ),
}
KINDS = ("better", "worse", "changed", "no clear difference", "one seed, no verdict")
ENSEMBLE = {"rm/accuracy": "accuracy", "rm/log_loss": "log_loss", "rm/ece": "ece"}  # rm/member_…/mean, rm/ensemble_…
Row = dict[str, float]
Rows = dict[tuple[str, str, str], list[Row]]  # (setting, method, rm or algorithm): one row a seed


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    experiment: str
    quick: bool = False
    folder: Path = Path("runs/reward_models")

    @property
    def seeds(self) -> tuple[int, ...]:
        return SEEDS[:1] if self.quick else SEEDS

    @property
    def results(self) -> Path:
        """Folder of the tables: quick ones do not touch the repository's."""
        return self.folder if self.quick else RESULTS

    @property
    def command(self) -> str:
        """The command that makes the tables."""
        return f"python benchmarks/reward_models.py {self.experiment}" + (" quick=true" if self.quick else "")


@dataclass(frozen=True)
class Job:
    """One run: a reward model (stage "rm") or a policy aligned to it (stage is the algorithm)."""

    asked: Asked
    setting: str
    method: str
    stage: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting}/{self.method}-{self.stage}/seed{self.seed}"

    @property
    def run_dir(self) -> Path:
        return self.asked.folder / ("quick" if self.asked.quick else "full") / self.name

    def beside(self, suffix: str) -> Path:
        """Return a file beside the run folder, which belongs to rlhf."""
        return self.run_dir.with_name(self.run_dir.name + suffix)

    def command(self) -> list[str]:
        """Return the command line."""
        what = ["train-rm"] if self.stage == "rm" else ["align", f"algo={self.stage}"]
        what += [*METHODS[self.method], *SETTINGS[self.setting], *(QUICK if self.asked.quick else ())]
        what += [f"dataset.seed={self.seed}", f"seed={self.seed}", "tracker=none"]
        places = [f"store_dir={self.asked.folder / 'store'}", f"run_dir={self.run_dir}"]
        return [sys.executable, "-m", "rlhf_cli.cli", *what, *places]


def parse(arguments: Sequence[str]) -> Asked:
    """Return what is asked for.

    Raises:
        ConfigError: no experiment, an unknown one, or an unknown argument.
        RunError: the folder cannot be written.
    """
    todo = f"Give one of {', '.join(EXPERIMENTS)}, then quick=true or folder=DIR where wanted"
    if not arguments or arguments[0] not in EXPERIMENTS:
        raise ConfigError(f"{arguments[0]!r} is no experiment" if arguments else "No experiment is named", todo=todo)
    given = dict(argument.partition("=")[::2] for argument in arguments[1:])
    for key, value in given.items():
        if key not in ("quick", "folder") or not value:
            raise ConfigError(f"{key!r} is no argument" if value else f"{key} has no value", todo=todo)
    if given.get("quick", "false") not in ("true", "false"):
        raise ConfigError(f"quick={given['quick']} is neither true nor false")
    asked = Asked(arguments[0], given.get("quick") == "true", Path(given.get("folder", Asked.folder)))
    check_folder(asked.folder, "folder")
    return asked


def plan(asked: Asked) -> list[Job]:
    """Return the runs, reward models first; neighbours differ in seed or world, so that they share no open stage."""
    experiment = EXPERIMENTS[asked.experiment]
    rms = itertools.product(experiment.methods, experiment.settings, ["rm"], asked.seeds)
    aligns = itertools.product(experiment.methods, ["few"], ALGOS, asked.seeds)
    return [Job(asked, setting, method, stage, seed) for method, setting, stage, seed in [*rms, *aligns]]


def is_finished(job: Job) -> bool:
    """Return whether a run is done and its config is what the same command means today; else rlhf decides."""
    if (read_json(job.run_dir / "status.json") or {}).get("state") != "finished":
        return False
    command, *overrides = job.command()[3:]
    config = yaml.safe_load((job.run_dir / "config.yaml").read_text(encoding="utf-8"))
    return config == compose.as_dict(compose.load(command, overrides))


def run_job(job: Job) -> bool:
    """Run one job; keep its seconds. Return whether it went well."""
    job.run_dir.parent.mkdir(parents=True, exist_ok=True)
    before = (read_json(job.run_dir / "status.json") or {}).get("state") == "finished"
    start = time.time()
    with job.beside(".log").open("a", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(job.command(), check=False, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if not before:  # rlhf has nothing to train in a finished run
        write_json(job.beside(".spans.json"), {"spans": [*spans(job), [start, time.time()]]})
    return done.returncode == 0


def spans(job: Job) -> list[list[float]]:
    """Return [start, end] of every attempt that trained, seconds since the epoch."""
    return (read_json(job.beside(".spans.json")) or {}).get("spans", [])


def execute(jobs: Sequence[Job], run: Callable[[Job], bool] = run_job) -> list[Job]:
    """Run reward models, then the policies whose reward model is there. Return what failed or was left out."""
    failed: list[Job] = []
    number = itertools.count(1)

    def follow(job: Job) -> bool:
        if any(job.stage != "rm" and (job.method, job.seed) == (bad.method, bad.seed) for bad in missing):
            print(f"{job.name}: left out, its reward model failed", flush=True)
            return False
        start, well = time.time(), run(job)
        print(f"[{next(number)}/{len(jobs)}] {job.name}: {time.time() - start:.0f} s", flush=True)
        if not well:
            tail = job.beside(".log").read_text(encoding="utf-8").splitlines()[-15:]
            print("\n".join([f"{job.name} FAILED, the end of {job.beside('.log')}:", *tail]), flush=True)
        return well

    for phase in (True, False):
        missing = [job for job in failed if job.setting == "few"]
        now = [job for job in jobs if (job.stage == "rm") is phase]
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            failed += [job for job, well in zip(now, pool.map(follow, now), strict=True) if not well]
    return failed


def elapsed(intervals: Iterable[list[float]]) -> float:
    """Return the length of the union of [start, end] intervals."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def gold_reward(rows: Sequence[dict], who: str = "policy") -> float:
    """Return the mean gold reward of a distribution over answers, nats, mean over questions that are not held out.

    sum_y share(y) log people(y) + mass off the answer set * OFFSET_REWARD
    """
    rewards = []
    for row in rows:
        if not row["heldout"]:
            pairs = zip(row[who], row["people"], strict=True)
            off = row.get(f"{who}_offset", 0.0)
            rewards.append(sum(share * math.log(people) for share, people in pairs) + off * OFFSET_REWARD)
    return statistics.mean(rewards)


def read_row(job: Job) -> Row:
    """Return the numbers of a finished run; a policy's with the gold rewards."""
    found = read_json(job.run_dir / "metrics.json") or {}
    row = {key: value for key, value in found.items() if value is not None}
    if job.stage != "rm":
        answers = json.loads((job.run_dir / "distributions.json").read_text(encoding="utf-8"))
        row["gold_reward"] = gold_reward(answers)
        row |= {f"{who}/gold_reward": gold_reward(answers, who) for who in ("reference", "people")}
    return row


def read_rows(jobs: Sequence[Job]) -> Rows:
    """Return the numbers of all runs by setting, method and stage, seeds in order."""
    rows: Rows = {}
    for job in jobs:
        rows.setdefault((job.setting, job.method, job.stage), []).append(read_row(job))
    return rows


def spread(values: Sequence[float], sign: str = "") -> str:
    """Return mean and sample standard deviation as text, the mean alone of one value."""
    mean = f"{statistics.mean(values):{sign}.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def table(labels: dict[str, list[Row]], columns: dict[str, str]) -> list[str]:
    """Return a markdown table, one line a label."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for label, rows in labels.items():
        values = [[row[key] for row in rows if key in row] for key in columns.values()]
        lines.append(f"| {label} | " + " | ".join(spread(each) if each else "-" for each in values) + " |")
    return lines


def verdict(key: str, differences: Sequence[float]) -> tuple[str, str]:
    """Return what paired differences of a metric mean, and in how many seeds they have the sign of their mean.

    A difference is clear where the paired t-test's 95 % interval of its mean leaves out 0.
    """
    n = len(differences)
    if n == 1:
        return "one seed, no verdict", ""
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(n)
    way = "lower" if mean < 0 else "higher"
    count = sum(difference * mean > 0 for difference in differences)
    seeds = f" ({way} in {count} of {n})" if count else ""
    if abs(mean) <= stdtrit(n - 1, 0.975) * error:
        return "no clear difference", seeds
    better = "higher" if key == "gold_reward" else describe(key).better
    return {"none": "changed", way: "better"}.get(better, "worse"), seeds


def compare(label: str, ours: Sequence[Row], base: Sequence[Row], columns: dict[str, str]) -> str:
    """Return one sentence on what differs between two sets of runs, seed by seed."""
    parts: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for header, key in columns.items():
        if key not in NOT_COMPARED and all(key in row for row in [*ours, *base]):
            differences = [our[key] - other[key] for our, other in zip(ours, base, strict=True)]
            kind, seeds = verdict(key, differences)
            parts[kind].append(f"{header} {spread(differences, '+')}{seeds}")
    return f"- {label}. " + "; ".join(f"{kind}: {', '.join(found)}" for kind, found in parts.items() if found) + "."


def members(rows: Sequence[Row], which: str, end: str = "") -> list[Row]:
    """Return WARM's members or their prediction ensemble as rows of a reward model, both read alike."""
    return [{key: row[f"rm/{which}_{name}{end}"] for key, name in ENSEMBLE.items()} for row in rows]


def rm_section(experiment: Experiment, setting: str, rows: Rows) -> list[str]:
    """Return heading, table and sentences of the reward models in one setting."""
    found = {method: rows[setting, method, "rm"] for method in experiment.methods}
    lines = [f"## {HEADINGS[setting]}", "", *table(found, experiment.columns), ""]
    for method in experiment.methods[1:]:
        lines.append(compare(f"`{method}` against `{BASELINE}`", found[method], found[BASELINE], experiment.columns))
    if "warm_weights" in found:
        warm = found["warm_weights"]
        ours, base = members(warm, "ensemble"), members(warm, "member", "/mean")
        lines.append(compare("Prediction ensemble against the mean of its members", ours, base, JUDGED))
    return [*lines, ""]


def policy_section(experiment: Experiment, rows: Rows) -> list[str]:
    """Return heading, table and sentences of the policies."""
    labels = {f"{algo}, {method}": rows["few", method, algo] for algo in ALGOS for method in experiment.methods}
    lines = ["## Policies aligned to the reward models of the first table", "", *table(labels, POLICY), ""]
    keys = ("reference/gold/tv", "reference/gold_reward", "people/gold_reward")
    sft, sft_reward, people = (spread([row[key] for row in rows["few", BASELINE, ALGOS[0]]]) for key in keys)
    lines += [
        f"For scale: the SFT policy has gold/tv {sft} and gold reward {sft_reward}; answering as the people do has"
    ]
    lines += [f"gold/tv 0 and gold reward {people}, and always giving their favourite answer a higher one."]
    lines += ["reward/mean is in each reward model's own scale and is not compared.", ""]
    for algo, method in itertools.product(ALGOS, experiment.methods[1:]):
        ours, base = rows["few", method, algo], rows["few", BASELINE, algo]
        lines.append(compare(f"{algo} with `{method}` against `{BASELINE}`", ours, base, POLICY))
    return [*lines, ""]


NOTES = """
Accuracy, log-loss, ECE and Brier are against held-out judgements of the same judges, whose bias they share; gold is the
people's shares. Below a table: mean ± standard deviation of the difference to the baseline, paired by seed. It is
called better, worse or changed where the paired t-test's 95 % interval leaves out 0; of many numbers without any true
difference, one in twenty is called so. With three seeds the interval is wide: "no clear difference" is not "none".
"""


def report(asked: Asked, rows: Rows, intervals: Sequence[list[float]], runs: int) -> str:
    """Return the whole markdown page; `intervals` are [start, end] of every run, seconds."""
    experiment, n = EXPERIMENTS[asked.experiment], len(asked.seeds)
    minutes, summed = elapsed(intervals) / 60, sum(end - start for start, end in intervals) / 60
    versions = f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"
    lines = [f"# {experiment.title}", "", f"`{asked.command}`" + f": {' '.join(QUICK)}" * asked.quick, ""]
    lines += [f"n = {n}: world k is trained with seed k (dataset.seed = seed = {', '.join(map(str, asked.seeds))})."]
    lines += ["Cells are mean ± sample standard deviation over the n." if n > 1 else "Cells are one run's."]
    lines += [f"{runs} runs, {AT_A_TIME} at a time, on {os.cpu_count()} cores ({platform.machine()}), {versions}:"]
    lines += [f"{minutes:.1f} minutes, {summed:.1f} summed over the runs.", *NOTES.splitlines(), ""]
    for setting in experiment.settings:
        lines += rm_section(experiment, setting, rows)
    return "\n".join([*lines, *policy_section(experiment, rows)]).rstrip() + "\n"


def write_csv(asked: Asked, rows: Rows, path: Path) -> None:
    """Write every number of the tables, run by run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", "method", "stage", "seed", "metric", "value"])
        for (setting, method, stage), found in rows.items():
            columns = EXPERIMENTS[asked.experiment].columns if stage == "rm" else POLICY
            for seed, row in zip(asked.seeds, found, strict=True):
                for key in (key for key in columns.values() if key in row):
                    writer.writerow([setting, method, stage, seed, key, f"{row[key]:.6f}"])


def main(arguments: Sequence[str]) -> int:
    """Run, compare, write."""
    if set(arguments) & {"-h", "--help"}:
        print(__doc__)
        return 0
    try:
        asked = parse(arguments)
        jobs = plan(asked)
        waiting = [job for job in jobs if not is_finished(job)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them finished before", flush=True)
    try:
        failed = execute(waiting)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    if failed:
        print(f"no table: {len(failed)} of {len(jobs)} runs are missing; the same command goes on", file=sys.stderr)
        return 1
    rows = read_rows(jobs)
    text = report(asked, rows, [span for job in jobs for span in spans(job)], len(jobs))
    asked.results.mkdir(parents=True, exist_ok=True)
    path = asked.results / f"reward_models_{asked.experiment}.md"
    path.write_text(text, encoding="utf-8")
    write_csv(asked, rows, path.with_suffix(".csv"))
    print(f"{text}\nwritten: {path}, {path.with_suffix('.csv')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
