"""Three studies, one command each: preference collapse, over-optimisation, the paper's grid on real dialogues.

    python benchmarks/studies.py collapse [quick=true] [dry=true] [folder=DIR]
    python benchmarks/studies.py overoptimisation [...]
    python benchmarks/studies.py grid dataset.path=FILE [...]        # dialogues in the form of HH-RLHF

Three training seeds (0, 1, 2) in one world or on one split of the data; quick=true is one seed and fewer settings,
dry=true lists what would run. Runs are sweeps of `rlhf align -m`, two at a time with one thread each, into DIR
(runs/studies): the same command goes on after an interruption and re-uses what is there. Writes
benchmarks/results/studies_<name>.md and .csv and docs/images/study_<name>.png; with quick=true into DIR. `rlhf compare`
adds its report there. Exit code 1 if a run failed: the table then has the others.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import study_figures
import study_pages
import yaml
from study_figures import Runs

from rlhf_cli.config import compose
from rlhf_cli.errors import ConfigError, UserError
from rlhf_cli.store import check_folder, read_json, write_json

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
SEEDS = (0, 1, 2)
AT_A_TIME = 2
PLACES = ("run_dir", "store_dir", "tracker", "device")  # of a config: what cannot change a result
Values = dict[str, float]


@dataclass(frozen=True, eq=False)
class Grid:
    """Settings of one algorithm: all combinations of the values of its swept keys.

    Args:
        name: of its folder.
        label: of a setting, filled with the last words of the swept keys: "pm α={alpha}".
        overrides: what all of them have.
        swept: key to values; quick: the same for quick=true.
    """

    name: str
    label: str
    overrides: tuple[str, ...]
    swept: dict[str, tuple[float, ...]] = field(default_factory=dict)
    quick: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """One study.

    Args:
        overrides: what all its runs have.
        minutes: of one run, one of two at a time on 2 cores; for the estimate of dry=true.
        needs_path: whether it reads a file of the user's.
    """

    grids: tuple[Grid, ...]
    overrides: tuple[str, ...] = ()
    minutes: float = 1.0
    needs_path: bool = False


BETAS, ALPHAS, ETAS = (2, 1, 0.5, 0.2, 0.1, 0.05), (0.005, 0.01, 0.02, 0.05, 0.1), (0.005, 0.1, 1)
PAPER_BETAS, PAPER_ALPHAS = (0.1, 0.5, 1), (0.1, 0.3, 0.5)


def rpo(reduction: str, scaled: bool) -> Grid:
    """Return RPO over eta in one reduction of its SFT term; only the main text's is multiplied by beta."""
    how = ("algo=rpo", f"algo.sft_reduction={reduction}", f"algo.sft_scale_by_beta={str(scaled).lower()}")
    return Grid(f"rpo_{reduction}", f"rpo {reduction} η={{eta}}", how, {"algo.eta": ETAS}, {"algo.eta": (0.005, 1)})


STUDIES = {
    "collapse": Study(
        (
            Grid("kl_ppo", "kl_ppo β={beta}", ("algo=kl_ppo",), {"algo.beta": BETAS}, {"algo.beta": (1, 0.2, 0.05)}),
            Grid("pm", "pm α={alpha}", ("algo=pm", "algo.beta=1"), {"algo.alpha": ALPHAS}, {"algo.alpha": (0.02, 0.1)}),
        ),
    ),
    # A proxy that can be over-optimised: few pairs, and no damaged responses among the reward model's losers.
    "overoptimisation": Study(
        (Grid("dpo", "dpo", ("algo=dpo",)), rpo("sum", True), rpo("token_mean", False), rpo("seq_mean", False)),
        ("dataset.pairs=2000", "reward.negative_share=0", "trainer.rm.max_steps=150", "algo.beta=0.1")
        + ("trainer.pairwise.max_steps=300", "trainer.pairwise.eval_every_steps=20"),
        minutes=0.7,
    ),
    "grid": Study(
        (
            Grid("kl_ppo", "kl_ppo β={beta}", ("algo=kl_ppo",), {"algo.beta": PAPER_BETAS}, {"algo.beta": (0.1,)}),
            Grid(
                "pm",
                "pm α={alpha} β={beta}",
                ("algo=pm",),
                {"algo.alpha": PAPER_ALPHAS, "algo.beta": PAPER_BETAS},
                {"algo.alpha": (0.1, 0.5), "algo.beta": (0.1, 1)},
            ),
        ),
        ("dataset=hh_rlhf",),
        needs_path=True,
    ),
}


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    name: str
    quick: bool = False
    dry: bool = False
    folder: Path = Path("runs/studies")
    path: Path | None = None

    @property
    def study(self) -> Study:
        return STUDIES[self.name]

    @property
    def seeds(self) -> tuple[int, ...]:
        return SEEDS[:1] if self.quick else SEEDS

    @property
    def place(self) -> Path:
        """Folder of the study's runs."""
        return self.folder / ("quick" if self.quick else "full") / self.name

    @property
    def table(self) -> Path:
        """File of the table: a quick one does not touch the repository's."""
        return (self.folder if self.quick else RESULTS) / f"studies_{self.name}.md"

    @property
    def image(self) -> Path:
        return (self.folder if self.quick else IMAGES) / f"study_{self.name}.png"

    @property
    def command(self) -> str:
        """The command that makes the table."""
        words = ["dataset.path=FILE"] * (self.path is not None) + ["quick=true"] * self.quick
        return " ".join(["python benchmarks/studies.py", self.name, *words])


@dataclass(frozen=True)
class Job:
    """One run: a setting of a grid with one seed."""

    asked: Asked
    grid: Grid
    values: tuple[tuple[str, float], ...]
    seed: int

    @property
    def label(self) -> str:
        return self.grid.label.format(**{key.rpartition(".")[2]: f"{value:g}" for key, value in self.values})

    @property
    def config(self) -> dict[str, Any]:
        """What the run is asked to be, without its places."""
        values = [f"{key}={value:g}" for key, value in self.values]
        return composed((*self.grid.overrides, *values, *fixed(self.asked, self.seed)))


@dataclass(frozen=True)
class Sweep:
    """All settings of a grid with one seed: one `rlhf align -m`."""

    asked: Asked
    grid: Grid
    seed: int

    @property
    def name(self) -> str:
        return f"{self.grid.name}-seed{self.seed}"

    @property
    def swept(self) -> dict[str, tuple[float, ...]]:
        return self.grid.quick if self.asked.quick else self.grid.swept

    def beside(self, suffix: str) -> Path:
        """Return a file beside the sweep's folder, which belongs to rlhf."""
        return self.asked.place / f"{self.name}{suffix}"

    def jobs(self) -> list[Job]:
        """Return its runs."""
        combinations = itertools.product(*self.swept.values())
        return [
            Job(self.asked, self.grid, tuple(zip(self.swept, each, strict=True)), self.seed) for each in combinations
        ]

    def command(self) -> list[str]:
        """Return the command line."""
        lists = [f"{key}={','.join(f'{value:g}' for value in values)}" for key, values in self.swept.items()]
        places = [f"store_dir={self.asked.folder / 'store'}", f"run_dir={self.asked.place / self.name}"]
        what = [*self.grid.overrides, *lists, *fixed(self.asked, self.seed), *places]
        return [sys.executable, "-m", "rlhf_cli.cli", "align", "-m", *what]


def fixed(asked: Asked, seed: int) -> list[str]:
    """Return the overrides that all runs of a seed share."""
    file = [f"dataset.path={asked.path}"] if asked.path is not None else []
    return [*asked.study.overrides, *file, f"seed={seed}", "tracker=none"]


@cache
def composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return the config that overrides of `rlhf align` mean, without its places."""
    return without_places(compose.as_dict(compose.load("align", list(overrides))))


def without_places(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without what cannot change a result."""
    return {key: value for key, value in config.items() if key not in PLACES}


def parse(arguments: Sequence[str]) -> Asked:
    """Return what is asked for.

    Raises:
        ConfigError: no study, an unknown one, an unknown argument, or no file where one is needed.
        RunError: the folder cannot be written.
    """
    todo = f"Give one of {', '.join(STUDIES)}, then quick=true, dry=true, folder=DIR or dataset.path=FILE where wanted"
    if not arguments or arguments[0] not in STUDIES:
        raise ConfigError(f"{arguments[0]!r} is no study" if arguments else "No study is named", todo=todo)
    given = dict(argument.partition("=")[::2] for argument in arguments[1:])
    for key, value in given.items():
        if key not in ("quick", "dry", "folder", "dataset.path") or not value:
            raise ConfigError(f"{key!r} is no argument" if value else f"{key} has no value", todo=todo)
    for key in ("quick", "dry"):
        if given.get(key, "false") not in ("true", "false"):
            raise ConfigError(f"{key}={given[key]} is neither true nor false")
    if STUDIES[arguments[0]].needs_path != ("dataset.path" in given):
        only = [name for name, study in STUDIES.items() if study.needs_path]
        raise ConfigError(
            f"The study {arguments[0]} {'reads no file' if 'dataset.path' in given else 'needs a file of dialogues'}",
            todo=f"dataset.path=FILE.jsonl[.gz] belongs to: {', '.join(only)}",
        )
    path = Path(given["dataset.path"]).resolve() if "dataset.path" in given else None
    folder = Path(given.get("folder", Asked.folder))
    asked = Asked(arguments[0], given.get("quick") == "true", given.get("dry") == "true", folder, path)
    check_folder(asked.folder, "folder")
    return asked


def plan(asked: Asked) -> list[Sweep]:
    """Return the sweeps; neighbours differ in seed, so that they do not wait for each other's SFT and reward model."""
    return [Sweep(asked, grid, seed) for grid in asked.study.grids for seed in asked.seeds]


def finished(asked: Asked) -> list[tuple[dict[str, Any], Path]]:
    """Return config and folder of every finished run of the study."""
    found = []
    for status in sorted(asked.place.rglob("status.json")):
        folder = status.parent
        if (read_json(status) or {}).get("state") == "finished" and (folder / "metrics.json").is_file():
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            found.append((without_places(config), folder))
    return found


def folders(sweeps: Sequence[Sweep]) -> dict[Job, Path | None]:
    """Return every job's finished run, known by its config; None where it is still to do."""
    done = finished(sweeps[0].asked)
    jobs = [job for sweep in sweeps for job in sweep.jobs()]
    return {job: next((folder for config, folder in done if config == job.config), None) for job in jobs}


def run_sweep(sweep: Sweep) -> bool:
    """Run one sweep; keep its seconds. Return whether all of it went well."""
    sweep.asked.place.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with sweep.beside(".log").open("a", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(sweep.command(), check=False, env=environment, stdout=log, stderr=subprocess.STDOUT)
    write_json(sweep.beside(".spans.json"), {"spans": [*spans(sweep), [start, time.time()]]})
    return done.returncode == 0


def spans(sweep: Sweep) -> list[list[float]]:
    """Return [start, end] of every attempt, seconds since the epoch."""
    return (read_json(sweep.beside(".spans.json")) or {}).get("spans", [])


def execute(sweeps: Sequence[Sweep], run: Callable[[Sweep], bool] = run_sweep) -> None:
    """Run the sweeps, AT_A_TIME at a time; what goes wrong in one is printed and leaves the others alone."""
    number = itertools.count(1)

    def follow(sweep: Sweep) -> None:
        start, well = time.time(), run(sweep)
        seconds = f"{time.time() - start:.0f} s"
        print(f"[{next(number)}/{len(sweeps)}] {sweep.name}: {len(sweep.jobs())} runs, {seconds}", flush=True)
        if not well:
            tail = sweep.beside(".log").read_text(encoding="utf-8").splitlines()[-15:]
            print("\n".join([f"{sweep.name} FAILED, the end of {sweep.beside('.log')}:", *tail]), flush=True)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        list(pool.map(follow, sweeps))  # after an interruption nothing new begins


def list_jobs(sweeps: Sequence[Sweep], state: dict[Job, Path | None]) -> list[str]:
    """Return what would run, one line a sweep and one a run."""
    lines = []
    for sweep in sweeps:
        lines.append(" ".join(["rlhf", *sweep.command()[3:]]))
        lines += [
            f"    {job.label}: {'to do' if state[job] is None else f'finished, {state[job]}'}" for job in sweep.jobs()
        ]
    waiting = sum(folder is None for folder in state.values())
    minutes = waiting * sweeps[0].asked.study.minutes / min(AT_A_TIME, len(sweeps))
    return [
        *lines,
        f"{len(state)} runs, {waiting} to do: about {minutes:.0f} minutes on 2 cores, SFT and rewards besides",
    ]


def compare(asked: Asked, found: Sequence[Path]) -> bool:
    """Let `rlhf compare` write its report of the runs beside them. Return whether it did."""
    out = asked.place / "compare"
    command = [sys.executable, "-m", "rlhf_cli.cli", "compare", *map(str, found), "--out", str(out)]
    with (asked.place / "compare.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT)
    print(f"rlhf compare: {out}" if done.returncode == 0 else f"rlhf compare FAILED, see {log.name}", flush=True)
    return done.returncode == 0


def gather(state: dict[Job, Path | None]) -> Runs:
    """Return the finished runs by setting, in the plan's order, and by seed."""
    runs: Runs = {}
    for job, folder in state.items():
        of_label = runs.setdefault(job.label, {})
        if folder is not None:
            of_label[job.seed] = study_pages.read_run(folder)
    return {label: dict(sorted(of_label.items())) for label, of_label in runs.items() if of_label}


def write(asked: Asked, sweeps: Sequence[Sweep], state: dict[Job, Path | None]) -> None:
    """Write table, numbers and picture."""
    runs = gather(state)
    missing = [f"{job.label}, seed {job.seed}" for job, folder in state.items() if folder is None]
    attempts = [span for sweep in sweeps for span in spans(sweep)]
    about = study_pages.About(
        asked.command, list(asked.study.overrides), asked.seeds, len(state), missing, attempts, AT_A_TIME
    )
    asked.table.parent.mkdir(parents=True, exist_ok=True)
    asked.image.parent.mkdir(parents=True, exist_ok=True)
    text = study_pages.page(asked.name, runs, about)
    asked.table.write_text(text, encoding="utf-8")
    study_pages.write_csv(asked.name, runs, asked.table.with_suffix(".csv"))
    study_figures.figure(asked.name, runs).savefig(asked.image, dpi=200)
    print(f"{text}\nwritten: {asked.table}, {asked.table.with_suffix('.csv')}, {asked.image}")


def main(arguments: Sequence[str]) -> int:
    """Run, compare, write."""
    if set(arguments) & {"-h", "--help"}:
        print(__doc__)
        return 0
    try:
        asked = parse(arguments)
        sweeps = plan(asked)
        state = folders(sweeps)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if asked.dry:
        print("\n".join(list_jobs(sweeps, state)))
        return 0
    waiting = [sweep for sweep in sweeps if any(state[job] is None for job in sweep.jobs())]
    print(
        f"{len(state)} runs, {sum(folder is not None for folder in state.values())} of them finished before", flush=True
    )
    try:
        execute(waiting)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    state = folders(sweeps)
    found = [folder for folder in state.values() if folder is not None]
    if not found:
        print("no table: no run has finished", file=sys.stderr)
        return 1
    compared = compare(asked, found)
    write(asked, sweeps, state)
    return 0 if compared and len(found) == len(state) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
