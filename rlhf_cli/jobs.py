"""Running jobs: one, or the many of a multirun through Hydra, so that its launchers and sweepers plug in."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import traceback
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import hydra
import typer
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rlhf_cli import data
from rlhf_cli.config import compose
from rlhf_cli.config.catalog import Catalog
from rlhf_cli.config.schema import CommandConfig
from rlhf_cli.errors import ConfigError, UserError

LONGEST_NAME = 120
QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.job.chdir=false")


def run_one(command: str, overrides: list[str], config_dir: Path | None) -> Path:
    """Run one stage from its overrides and return its run folder."""
    overrides, config_dir = compose.with_base(command, overrides, config_dir)
    return run_stage(command, compose.load(command, overrides, config_dir), overrides, config_dir)


def run_stage(command: str, cfg: CommandConfig, overrides: list[str], config_dir: Path | None) -> Path:
    """Run one stage and return its run folder; first print, in one line, what is in force."""
    names = {
        block: getattr(getattr(cfg, block, None), "name", None) for block in ("algo", "reward", "model", "trainer")
    }
    constraint = getattr(getattr(cfg, "algo", None), "constraint", None)
    if constraint is not None and constraint.name != "none":
        names["algo/constraint"] = constraint.name
    in_force = {**names, "dataset": cfg.dataset.source, "seed": cfg.seed}
    shown = " ".join(f"{key}={value}" for key, value in in_force.items() if value is not None)
    typer.echo(f"rlhf {command}: {shown}", err=True)
    data.check(cfg.dataset)
    stage = import_module(f"rlhf_cli.stages.{command.replace('-', '_')}")
    own = None if config_dir is None else str(config_dir.resolve())
    return cast(Path, stage.run(cfg, overrides=overrides, config_dir=own))


def expand(command: str, overrides: list[str], config_dir: Path | None) -> list[list[str]]:
    """Return the overrides of each job of a choice sweep, each job composed and checked.

    Raises:
        ConfigError: a job is not valid; the message names it.
    """
    catalog = Catalog(command, config_dir)
    parsed = compose.parse(without_globs(overrides, catalog))
    for override in parsed:
        compose.check_override(override, catalog)
    try:
        jobs = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    except HydraException as error:
        raise ConfigError(
            "this sweep needs a sweeper plugin", str(error), "Choose one: hydra/sweeper=NAME, or list values: KEY=a,b"
        ) from None
    for number, job in enumerate(jobs, 1):
        try:
            compose.load(command, job, config_dir)
        except UserError as error:
            name = job_name(job, overrides) or command
            raise ConfigError(f"job {number} of {len(jobs)} ({name}): {error.what}", error.why, error.todo) from None
    return jobs


def job_name(job: list[str], overrides: list[str]) -> str:
    """Return what tells a job from its siblings, as a folder name: its swept overrides, e.g. `algo=pm,seed=0`.

    Args:
        job: the overrides of this job.
        overrides: those of the whole sweep; what stands there with one value is common to all jobs.
    """
    given = compose.parse(overrides)
    common = {item.key_or_group for item in given} - {item.key_or_group for item in given if item.is_sweep_override()}
    swept = {item.key_or_group: item for item in compose.parse(job) if item.key_or_group not in common}  # the last wins
    text = ",".join(compose.plain(item) for item in swept.values()).replace("algo/constraint=", "algo.constraint=")
    safe = re.sub(r"[^\w.=,+-]", "_", text)
    if safe == text and len(text) <= LONGEST_NAME:
        return text
    return f"{safe[:LONGEST_NAME]}-{sha256(text.encode()).hexdigest()[:8]}"


def without_globs(overrides: list[str], catalog: Catalog) -> list[str]:
    """Return the overrides with `algo=glob(*)` written out as the choices it matches."""
    written = []
    for item in compose.parse(overrides):
        glob = item.value()
        names: list[str] = glob.filter(catalog.choices(item.key_or_group)) if isinstance(glob, Glob) else []
        written.append(f"{item.key_or_group}={','.join(names)}" if names else str(item.input_line))
    return written


@dataclass(frozen=True)
class Job:
    """One job of a multirun, as Hydra calls it, perhaps in another process; it leaves its outcome in a file.

    Args:
        command: the stage.
        overrides: those of the whole sweep.
        config_dir: a user's own directory, or None.
        outcomes: folder for one small json per job.
    """

    command: str
    overrides: tuple[str, ...]
    config_dir: Path | None
    outcomes: Path

    def __call__(self, _: object) -> None:
        """Run the job Hydra is at; a user's mistake or a bug ends this job, not its siblings."""
        task = [compose.plain(item) for item in compose.parse(list(HydraConfig.get().overrides.task))]
        name = job_name(task, list(self.overrides))
        outcome: dict[str, Any] = {"job": name, "run_dir": None, "failure": None}
        try:
            outcome["run_dir"] = str(self._run(task, name))
        except UserError as error:
            outcome["failure"] = "user"
            typer.echo(f"error: {name}: {error}", err=True)
        except Exception:
            outcome["failure"] = "bug"
            traceback.print_exc()
        file = self.outcomes / f"job-{HydraConfig.get().job.num}.json"
        file.write_text(json.dumps(outcome), encoding="utf-8")

    def _run(self, task: list[str], name: str) -> Path:
        task, config_dir = compose.with_base(self.command, task, self.config_dir)
        cfg = compose.load(self.command, task, config_dir)
        if cfg.run_dir is not None and name and not re.search(r"(^|,)run_dir=", name):
            cfg.run_dir = (Path(cfg.run_dir) / name).as_posix()
            quoted = cfg.run_dir.replace("'", "\\'")
            task = [text for text in task if not text.startswith("run_dir=")] + [f"run_dir='{quoted}'"]
        return run_stage(self.command, cfg, task, config_dir)


def multirun(command: str, overrides: list[str], config_dir: Path | None) -> list[dict[str, Any]]:
    """Run every job of a sweep; a failed one does not stop the others.

    Returns:
        One dict per job, in order: `job` (its name), `run_dir` (None if it failed) and `failure` (None, "user", "bug").

    Raises:
        ConfigError: a job is not valid; nothing has run.
    """
    overrides = without_globs(overrides, Catalog(command, config_dir))
    keys = {item.key_or_group for item in compose.parse(overrides)}
    if "hydra/sweeper" not in keys:
        expand(command, overrides, config_dir)
    # A launcher may run jobs on other machines: then the outcomes lie in the working directory, which they share.
    elsewhere = bool({"hydra/launcher", "hydra/sweeper"} & keys)
    with tempfile.TemporaryDirectory(prefix=".rlhf-", dir=Path.cwd() if elsewhere else None) as scratch:
        job = Job(command, tuple(overrides), config_dir, Path(scratch))
        _through_hydra(job, [] if elsewhere else [f"hydra.sweep.dir='{scratch}'"])
        files = sorted(Path(scratch).glob("job-*.json"), key=lambda path: int(path.stem.removeprefix("job-")))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _through_hydra(job: Job, places: list[str]) -> None:
    """Hand a sweep to hydra.main, which reads sys.argv; Hydra writes nothing of its own beside the runs."""
    catalog = Catalog(job.command, job.config_dir)
    parsed = compose.parse(list(job.overrides))
    asked = [compose.hydra_form(item, catalog) for item in parsed]
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
