"""Running jobs: one, or the many of a multirun through Hydra, so that its launchers and sweepers plug in."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
import typer
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rlhf_cli import data, launch, objective, ranks
from rlhf_cli.config import compose, sweeps
from rlhf_cli.config.catalog import Catalog
from rlhf_cli.config.naming import job_name, run_name, swept
from rlhf_cli.config.schema import CommandConfig
from rlhf_cli.config.sweeps import Sweep
from rlhf_cli.errors import RUN_FOLDER, ConfigError, RankError, RunError, UserError
from rlhf_cli.launch import gpus
from rlhf_cli.models import quantisation
from rlhf_cli.models.check import check_model
from rlhf_cli.stages import imported

if TYPE_CHECKING:
    from collections.abc import Sequence

QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.job.chdir=false")


def run_one(command: str, overrides: list[str], config_dir: Path | None) -> Path | None:
    """Run one stage from its overrides and return its run folder, or None where a cluster runs it later."""
    overrides, config_dir = compose.with_base(command, overrides, config_dir)
    cfg = compose.load(command, overrides, config_dir)
    if launch.is_elsewhere(cfg) and launch.is_submitted(cfg):
        _check_inputs(cfg)
        typer.echo(launch.submit(command, cfg, overrides, config_dir))
        return None
    cfg.tracker.run_name = cfg.tracker.run_name or run_name(command, cfg, compose.parse(overrides))
    return run_stage(command, cfg, overrides, config_dir)


def run_stage(command: str, cfg: CommandConfig, overrides: list[str], config_dir: Path | None) -> Path:
    """Run one stage, here or as several ranks, and return its run folder; first print in one line what is in force."""
    if not ranks.launched():
        _announce(command, cfg)
        _check_inputs(cfg)
        if launch.is_elsewhere(cfg):
            return launch.start(command, cfg, overrides, config_dir)
    stage = imported(command.replace("-", "_"))
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
        first = sweeps.jobs(command, sweep, config_dir)[0]
        launch.refuse_in_sweep(compose.load(command, first, config_dir))
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
    objective.check(sweep)
    sweeps.check_launcher(sweep)
    if sweep.sweeper is not None:
        sweeps.check_sweeper(command, sweep, config_dir)
    return sweep


@dataclass(frozen=True)
class Job:
    """One job of a multirun, as Hydra calls it, perhaps in another process; it leaves its outcome in a file.

    Args:
        command: the stage.
        overrides: those of its whole grid.
        config_dir: a user's own directory, or None.
        outcomes: folder for one small json per job.
        sweep: what it is a part of.
        gpus: those of this machine, of which each job gets its own; empty where something else deals them out.
    """

    command: str
    overrides: tuple[str, ...]
    config_dir: Path | None
    outcomes: Path
    sweep: Sweep
    gpus: tuple[str, ...] = ()

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
        launch.refuse_in_sweep(cfg)
        self._pin(cfg)
        cfg.tracker.group = cfg.tracker.group or self.sweep.group
        cfg.tracker.run_name = cfg.tracker.run_name or run_name(self.command, cfg, own)
        return run_stage(self.command, cfg, task, config_dir)

    def _pin(self, cfg: CommandConfig) -> None:
        """Take GPUs for this process; joblib's serve many jobs, submitit's one, so that there the next can wait."""
        if self.gpus and cfg.device != "cpu":
            wanted, wait = getattr(cfg.launch, "processes", None) or 1, self.sweep.launcher != "joblib"
            number = HydraConfig.get().job.num
            gpus.pin(list(self.gpus), wanted, self.outcomes.parent, wait=wait, number=number)

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
    elsewhere = sweep.launcher not in {None, "joblib"}
    mine = tuple(gpus.visible()) if sweep.launcher in {"joblib", "submitit_local"} else ()
    outcomes: dict[str, dict[str, Any]] = {}  # by name: a job that two grids share is one
    with tempfile.TemporaryDirectory(prefix=".rlhf-", dir=Path.cwd() if elsewhere else None) as scratch:
        for number, grid in enumerate(sweep.grids):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            job = Job(command, grid, config_dir, folder, sweep, mine)
            lost = _run_grid(job, [] if elsewhere else [f"hydra.sweep.dir='{folder}'"])
            found = [*_read(folder), *lost]
            if elsewhere:  # what a job prints is in a file of its launcher
                for outcome in (outcome for outcome in found if outcome["failure"]):
                    typer.echo(f"error: {outcome['job']}: {outcome['reason']}", err=True)
            outcomes |= {outcome["job"]: outcome for outcome in found}
    return list(outcomes.values())


def _run_grid(job: Job, places: list[str]) -> list[dict[str, Any]]:
    """Hand one grid to Hydra, and return the outcomes of jobs that left none: their process was ended."""
    sweep, folder = job.sweep, job.outcomes
    try:
        _through_hydra(job, places)
    except UserError:
        raise
    except Exception as error:
        left = _read(folder)
        failures = [outcome["failure"] for outcome in left]
        if isinstance(error, ValueError) and sweep.sweeper is not None and failures and None not in failures:
            return []  # Optuna has no best trial to write down where all have failed
        if sweep.launcher is None or sweep.sweeper is not None:
            raise
        names = [job_name(task, job.overrides, sweep.named) for task in sweeps.split(job.overrides)]
        reason = f"its process was ended: {type(error).__name__}"
        gone: dict[str, Any] = {"run_dir": None, "failure": "bug", "reason": reason, "objective": None}
        done = {outcome["job"] for outcome in left}
        lost = [{"job": name, **gone} for name in names if name not in done]
        if not lost:
            raise
        typer.echo(str(error).strip(), err=True)
        return lost
    return []


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
