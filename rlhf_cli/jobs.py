"""Running jobs: one, or the many of a multirun through Hydra, so that its launchers and sweepers plug in."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
import typer
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rlhf_cli import data, launch, ranks
from rlhf_cli.config import compose, sweeps
from rlhf_cli.config.catalog import Catalog
from rlhf_cli.config.naming import job_name, run_name, swept
from rlhf_cli.config.schema import CommandConfig
from rlhf_cli.config.sweeps import Sweep
from rlhf_cli.errors import RUN_FOLDER, ConfigError, RankError, RunError, UserError
from rlhf_cli.metrics import glossary
from rlhf_cli.models import quantisation
from rlhf_cli.models.check import check_model

if TYPE_CHECKING:
    from collections.abc import Sequence

QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.job.chdir=false")


def run_one(command: str, overrides: list[str], config_dir: Path | None) -> Path | None:
    """Run one stage from its overrides and return its run folder, or None where a cluster runs it later."""
    overrides, config_dir = compose.with_base(command, overrides, config_dir)
    cfg = compose.load(command, overrides, config_dir)
    if launch.is_submitted(cfg):
        _check_inputs(cfg)
        typer.echo(launch.submit(command, cfg, overrides, config_dir))
        return None
    cfg.tracker.run_name = cfg.tracker.run_name or run_name(command, cfg, compose.parse(overrides))
    return run_stage(command, cfg, overrides, config_dir)


def run_stage(command: str, cfg: CommandConfig, overrides: list[str], config_dir: Path | None) -> Path:
    """Run one stage, here or as several ranks, and return its run folder; first print, in one line, what is in force."""
    if not ranks.launched():
        _announce(command, cfg)
        _check_inputs(cfg)
        if launch.is_elsewhere(cfg):
            return launch.start(command, cfg, overrides, config_dir)
    stage = import_module(f"rlhf_cli.stages.{command.replace('-', '_')}")
    own = None if config_dir is None else str(config_dir.resolve())
    return cast(Path, stage.run(cfg, overrides=overrides, config_dir=own))


def _announce(command: str, cfg: CommandConfig) -> None:
    names = {
        block: getattr(getattr(cfg, block, None), "name", None) for block in ("algo", "reward", "model", "trainer")
    }
    constraint = getattr(getattr(cfg, "algo", None), "constraint", None)
    if constraint is not None and constraint.name != "none":
        names["algo/constraint"] = constraint.name
    if cfg.peft.name != "none":
        names["peft"] = cfg.peft.name
    in_force = {**names, "dataset": cfg.dataset.name, "seed": cfg.seed}
    shown = " ".join(f"{key}={value}" for key, value in in_force.items() if value is not None)
    typer.echo(f"rlhf {command}: {shown}", err=True)


def _check_inputs(cfg: CommandConfig) -> None:
    """Refuse, before anything heavy is imported, models and data that are out of reach."""
    if getattr(cfg, "policy", None) is None:
        quantisation.check(cfg.peft)
        for key in ("path", "reward_path"):
            if given := getattr(cfg.model, key):
                check_model(f"model.{key}", given)
    data.check(cfg.dataset)


def plan(command: str, overrides: list[str], config_dir: Path | None) -> Sweep:
    """Return the sweep of an `-m` command, every job of it checked; nothing has run.

    Raises:
        ConfigError: the sweep, or a job of it, is not valid.
    """
    sweep = _resolved(command, overrides, config_dir)
    if sweep.sweeper is None:
        sweeps.jobs(command, sweep, config_dir)
    return sweep


def expand(command: str, overrides: list[str], config_dir: Path | None) -> list[list[str]]:
    """Return the overrides of each job of a sweep, each job composed and checked.

    Raises:
        ConfigError: a job is not valid; the message names it. Or a sweeper makes up the jobs as it goes.
    """
    sweep = _resolved(command, overrides, config_dir)
    if sweep.sweeper is not None:
        why = f"{sweeps.SWEEPER}={sweep.sweeper} chooses each when those before it are done"
        raise ConfigError("the jobs of this sweep cannot be listed", why, "Leave out --cfg to run it")
    return sweeps.jobs(command, sweep, config_dir)


def _resolved(command: str, overrides: list[str], config_dir: Path | None) -> Sweep:
    sweep = sweeps.resolve(overrides, Catalog(command, config_dir))
    check_metrics(sweep)
    if sweep.sweeper is not None:
        sweeps.check_sweeper(command, sweep, config_dir)
    return sweep


def check_metrics(sweep: Sweep) -> None:
    """Refuse a metric by which nothing can be ranked, and an objective that training itself lowers.

    Raises:
        ConfigError: naming the metric.
    """
    better = {name: _better(name, getattr(sweep, name)) for name in ("objective", "rank")}
    key = sweep.objective
    if key is None:
        return
    if key.startswith("train/") or re.search(r"(?<!log_)loss\b", key):
        why = "Every job lowers its training loss, and jobs with other losses cannot be compared by it"
        raise ConfigError(f"objective={key} is measured in training", why, "Name a held-out metric: heldout/pm/tv")
    if "divergence" in key:
        why = "It is zero for a collapsed policy too"
        raise ConfigError(f"objective={key} is no objective", why, "Name a distance: heldout/pm/tv")
    right = "minimize" if better["objective"] == "lower" else "maximize"
    if sweep.direction != right:
        why = f"A {better['objective']} value is the better one"
        raise ConfigError(f"direction={sweep.direction} makes {key} worse", why, f"Write direction: {right}")


def _better(name: str, key: str | None) -> str | None:
    try:
        return None if key is None else glossary.rankable(key).better
    except ValueError as error:
        raise ConfigError(f"{name}={key} cannot rank the jobs of a sweep", str(error)) from None


@dataclass(frozen=True)
class Job:
    """One job of a multirun, as Hydra calls it, perhaps in another process; it leaves its outcome in a file.

    Args:
        command: the stage.
        overrides: those of its whole grid.
        config_dir: a user's own directory, or None.
        outcomes: folder for one small json per job.
        sweep: what it is a part of.
    """

    command: str
    overrides: tuple[str, ...]
    config_dir: Path | None
    outcomes: Path
    sweep: Sweep

    def __call__(self, _: object) -> float | None:
        """Run the job Hydra is at, and return the sweep's objective; a failure ends this job, not its siblings.

        Without an objective, and for a failed job, the value is None; Optuna's plugin takes that for a failed trial.
        """
        task = [compose.plain(item) for item in compose.parse(list(HydraConfig.get().overrides.task))]
        name = job_name(task, self.overrides, self.sweep.named)
        outcome: dict[str, Any] = {"job": name, "run_dir": None, "failure": None, "reason": None, "objective": None}
        try:
            folder = self._run(task, name)
            outcome |= {"run_dir": str(folder), "objective": self._objective(folder)}
        except UserError as error:
            outcome |= {"failure": "user", "reason": str(error), "run_dir": _left_by(error)}
            typer.echo(f"error: {name}: {error}", err=True)
        except RankError as error:
            outcome |= {"failure": "bug", "reason": error.reason, "run_dir": _left_by(error)}
            typer.echo(str(error), err=True)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            outcome |= {"failure": "bug", "reason": reason, "run_dir": _left_by(error)}
            traceback.print_exc()
        file = self.outcomes / f"job-{HydraConfig.get().job.num}.json"
        file.write_text(json.dumps(outcome), encoding="utf-8")
        return cast("float | None", outcome["objective"])

    def _run(self, task: list[str], name: str) -> Path:
        own = swept(task, self.overrides, self.sweep.named)
        task, config_dir = compose.with_base(self.command, task, self.config_dir)
        cfg = compose.load(self.command, task, config_dir)
        if cfg.run_dir is not None and name and not re.search(r"(^|,)run_dir=", name):
            cfg.run_dir = (Path(cfg.run_dir) / name).as_posix()
            quoted = cfg.run_dir.replace("'", "\\'")
            task = [text for text in task if not text.startswith("run_dir=")] + [f"run_dir='{quoted}'"]
        cfg.tracker.group = cfg.tracker.group or self.sweep.group
        cfg.tracker.run_name = cfg.tracker.run_name or run_name(self.command, cfg, own)
        return run_stage(self.command, cfg, task, config_dir)

    def _objective(self, folder: Path) -> float | None:
        """Return the final metric that the sweep optimises, if it optimises one.

        Raises:
            RunError: the run does not measure it.
        """
        key = self.sweep.objective
        if key is None:
            return None
        value = json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get(key)
        if value is None:
            error = RunError(f"{key} is not among the metrics of {folder}", "The sweep optimises it", "Choose another")
            error.add_note(f"{RUN_FOLDER}{folder}")
            raise error
        return float(value)


def _left_by(error: BaseException) -> str | None:
    """Return the run folder that a failed job left, as its session noted it."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(RUN_FOLDER)]
    return notes[-1].removeprefix(RUN_FOLDER) if notes else None


def multirun(command: str, sweep: Sweep, config_dir: Path | None) -> list[dict[str, Any]]:
    """Run every job of a sweep; a failed one does not stop the others.

    Returns:
        One dict per job, in order: `job` (its name), `run_dir` (None where it left no folder), `failure` (None, "user",
        "bug"), `reason` (of the failure, one line) and `objective`.
    """
    # A launcher may run jobs on other machines: then the outcomes lie in the working directory, which they share.
    elsewhere = any(item.key_or_group == "hydra/launcher" for item in compose.parse(list(sweep.grids[0])))
    outcomes: dict[str, dict[str, Any]] = {}  # by name: a job that two grids share is one
    with tempfile.TemporaryDirectory(prefix=".rlhf-", dir=Path.cwd() if elsewhere else None) as scratch:
        for number, grid in enumerate(sweep.grids):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            job = Job(command, grid, config_dir, folder, sweep)
            try:
                _through_hydra(job, [] if elsewhere else [f"hydra.sweep.dir='{folder}'"])
            except ValueError:  # Optuna has no best trial to write down where all have failed
                failures = [outcome["failure"] for outcome in _read(folder)]
                if sweep.sweeper is None or not failures or None in failures:
                    raise
            outcomes |= {outcome["job"]: outcome for outcome in _read(folder)}
    return list(outcomes.values())


def _read(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("job-*.json"), key=lambda path: int(path.stem.removeprefix("job-")))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def best(outcomes: Sequence[dict[str, Any]], sweep: Sweep) -> str | None:
    """Return one line on the job with the best objective, or None where the sweep optimises nothing."""
    measured = [outcome for outcome in outcomes if outcome["objective"] is not None]
    if not measured:
        return None
    choose = min if sweep.direction == "minimize" else max
    found = choose(measured, key=lambda outcome: outcome["objective"])
    return f"best {sweep.objective} of {len(measured)} jobs: {found['objective']:.4f} ({found['job']})"


def _through_hydra(job: Job, places: list[str]) -> None:
    """Hand a sweep to hydra.main, which reads sys.argv; Hydra writes nothing of its own beside the runs."""
    catalog = Catalog(job.command, job.config_dir)
    parsed = compose.parse(list(job.overrides))
    asked = [compose.hydra_form(item, catalog) for item in parsed]
    if job.sweep.sweeper == "optuna":
        places = [*places, f"hydra.sweeper.direction={job.sweep.direction}"]
    argv, before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["rlhf", "--multirun", *QUIET, *places, *asked]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises what goes wrong instead of printing and exiting
    try:
        with compose.search_path(catalog) as ours:
            hydra.main(config_path=ours, config_name=catalog.primary, version_base=compose.HYDRA_VERSION_BASE)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("Hydra cannot run this sweep", compose.hydra_reason(error)) from None
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR") if before is None else os.environ.update(HYDRA_FULL_ERROR=before)
