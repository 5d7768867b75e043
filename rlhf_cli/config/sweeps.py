"""Sweeps: the jobs of one `-m` command, as typed or as a yaml of the group sweep lists them (`sweep=NAME`)."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Glob, IntervalSweep
from hydra.errors import HydraException

from rlhf_cli.config import compose
from rlhf_cli.config.catalog import Catalog, advice, nearest
from rlhf_cli.config.naming import group_name, job_name
from rlhf_cli.errors import ConfigError, UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

FILE_KEYS = ("jobs", "overrides", "rank", "objective", "direction")
DIRECTIONS = ("minimize", "maximize")
SWEEPER = "hydra/sweeper"
OPTUNA_PLUGIN = "hydra-optuna-sweeper"
LAUNCHER = "hydra/launcher"
# Hydra's launchers: the package that brings each, and our extra.
LAUNCHERS = {
    "joblib": ("hydra-joblib-launcher", "joblib"),
    "submitit_local": ("hydra-submitit-launcher", "submitit"),
    "submitit_slurm": ("hydra-submitit-launcher", "submitit"),
    "ray": ("hydra-ray-launcher", "ray"),
}


@dataclass(frozen=True)
class Sweep:
    """What one `-m` command runs.

    Args:
        grids: the overrides of each grid; the jobs are the union of theirs.
        group: the tracker's group of every job; None: each job's own.
        named: keys that always stand in a job's name: those by which the jobs of a sweep's file differ.
        rank: the metric that ranks the table, or None for the table's own.
        objective: the final metric that a sweeper optimises, or None.
        direction: minimize or maximize it.
    """

    grids: tuple[tuple[str, ...], ...]
    group: str | None = None
    named: frozenset[str] = frozenset()
    rank: str | None = None
    objective: str | None = None
    direction: str = "minimize"

    @property
    def sweeper(self) -> str | None:
        """Return the Hydra sweeper that is asked for, or None for Hydra's own, which lists every job beforehand."""
        found = [item.value() for item in compose.parse(list(self.grids[0])) if item.key_or_group == SWEEPER]
        return str(found[-1]) if found and found[-1] != "basic" else None

    @property
    def launcher(self) -> str | None:
        """Return the Hydra launcher that is asked for, or None for Hydra's own: one job after the other."""
        found = [item.value() for item in compose.parse(list(self.grids[0])) if item.key_or_group == LAUNCHER]
        return str(found[-1]) if found and found[-1] != "basic" else None


def resolve(overrides: list[str], catalog: Catalog) -> Sweep:
    """Return the sweep of an `-m` command; overrides as typed replace the same keys of a sweep's file.

    Raises:
        ConfigError: there is no such sweep, or its file is not valid.
    """
    parsed = compose.parse(without_globs(overrides, catalog))
    asked = [item for item in parsed if item.key_or_group == compose.SWEEP]
    typed = [item for item in parsed if item.key_or_group != compose.SWEEP]
    for item in typed:
        compose.check_override(item, catalog)
    own = {item.key_or_group: str(item.input_line) for item in typed}
    if not asked:
        return Sweep((tuple(str(item.input_line) for item in typed),), group=group_name(catalog.command, parsed))
    names, name = catalog.choices(compose.SWEEP), asked[-1].value()
    if asked[-1].is_sweep_override() or len(asked) > 1:
        raise ConfigError("sweep= names several sweeps", "One command runs one", "Run the command once for each")
    if name not in names:
        raise ConfigError(f"sweep={name} does not exist", todo=advice(str(name), names))
    file = catalog.read(f"{compose.SWEEP}/{name}")
    grids = _grids(file, catalog, f"in {catalog.path(f'{compose.SWEEP}/{name}')}")
    merged = [{**{item.key_or_group: str(item.input_line) for item in grid}, **own} for grid in grids]
    return Sweep(
        tuple(tuple(grid.values()) for grid in merged),
        group=str(name),
        named=_telling(grids),
        rank=file.get("rank"),
        objective=file.get("objective"),
        direction=file.get("direction", "minimize"),
    )


def _grids(file: dict[str, Any], catalog: Catalog, where: str) -> list[list[Override]]:
    """Return the parsed overrides of each grid of a sweep's file, everything in the file checked.

    Raises:
        ConfigError: an unknown key, a missing one, a wrong type.
    """
    for key in file:
        if key not in FILE_KEYS:
            near = nearest(str(key), list(FILE_KEYS))
            listing = f"A sweep has the keys {', '.join(FILE_KEYS)}"
            raise ConfigError(f"unknown key {key} ({where})", todo=f"The nearest is {near}" if near else listing)
    if ("jobs" in file) == ("overrides" in file):
        both = "both jobs and overrides" if "jobs" in file else "neither jobs nor overrides"
        raise ConfigError(f"a sweep has {both} ({where})", "jobs lists grids, overrides is for a sweeper", "Give one")
    for key in ("rank", "objective"):
        if not isinstance(file.get(key, ""), str):
            raise ConfigError(f"{key}={file[key]} is not a metric ({where})", todo="Name one, such as pm/tv")
    if "jobs" in file:
        if extra := [key for key in ("objective", "direction") if key in file]:
            raise ConfigError(f"{extra[0]} is for a sweeper ({where})", todo="Use rank, or overrides in place of jobs")
        return [_parsed(_words(entry), catalog, where) for entry in _texts(file, "jobs", where)]
    if file.get("direction", "minimize") not in DIRECTIONS:
        valid = advice(str(file["direction"]), list(DIRECTIONS))
        raise ConfigError(f"direction={file['direction']} is not a direction ({where})", todo=valid)
    grid = _parsed(_texts(file, "overrides", where), catalog, where)
    if SWEEPER not in {item.key_or_group for item in grid} or "objective" not in file:
        missing = SWEEPER if "objective" in file else "objective"
        raise ConfigError(f"overrides without {missing} ({where})", "A sweeper optimises a final metric", "Name both")
    return [grid]


def _texts(file: dict[str, Any], key: str, where: str) -> list[str]:
    entries = file[key]
    if not (isinstance(entries, list) and entries and all(isinstance(entry, str) and entry for entry in entries)):
        todo = "Write lines such as `- algo=pm algo.beta=0.5,1`"
        raise ConfigError(f"{key} is no list of texts ({where})", todo=todo)
    return entries


def _words(text: str) -> list[str]:
    """Return the parts of a text between spaces; spaces within quotes stay."""
    return re.findall(r"(?:'[^']*'|\"[^\"]*\"|\S)+", text)


def _parsed(overrides: list[str], catalog: Catalog, where: str) -> list[Override]:
    try:
        parsed = compose.parse(without_globs(overrides, catalog))
        for item in parsed:
            compose.check_override(item, catalog)
        return parsed
    except ConfigError as error:
        what = error.what.replace(" (set on the command line)", "")
        raise ConfigError(f"{what} ({where})", error.why, error.todo) from None


def _telling(grids: Sequence[Sequence[Override]]) -> frozenset[str]:
    """Return the keys by which the jobs of several grids differ."""
    values = [{item.key_or_group: compose.plain(item) for item in grid} for grid in grids]
    swept = {item.key_or_group for grid in grids for item in grid if item.is_sweep_override()}
    keys = {key for grid in values for key in grid if not compose.is_hydra(key)}
    return frozenset(swept | {key for key in keys if len({grid.get(key) for grid in values}) > 1})


def without_globs(overrides: list[str], catalog: Catalog) -> list[str]:
    """Return the overrides with `algo=glob(*)` written out as the choices it matches."""
    written = []
    for item in compose.parse(overrides):
        glob = item.value()
        names: list[str] = glob.filter(catalog.choices(item.key_or_group)) if isinstance(glob, Glob) else []
        written.append(f"{item.key_or_group}={','.join(names)}" if names else str(item.input_line))
    return written


def check_sweeper(command: str, sweep: Sweep, config_dir: Path | None) -> None:
    """Refuse a sweeper without its plugin or objective, and values of which the first or last is not valid.

    Raises:
        ConfigError: naming what is missing, or the key.
    """
    asked = f"{SWEEPER}={sweep.sweeper}"
    if sweep.objective is None:
        todo = "Put it in a sweep of your own, like conf/sweep/optuna.yaml: DIR/sweep/NAME.yaml with --config-dir DIR"
        raise ConfigError(f"{asked} has no objective", "A sweeper needs a final metric to optimise", todo)
    if sweep.sweeper == "optuna" and not _is_installed(OPTUNA_PLUGIN):
        why = f"The package {OPTUNA_PLUGIN} is not installed"
        raise ConfigError(f"{asked} cannot start", why, "pip install rlhf-cli[optuna]")
    parsed = [item for item in compose.parse(list(sweep.grids[0])) if not compose.is_hydra(item.key_or_group)]
    for position in (0, -1):
        compose.load(command, [extreme(item, position) for item in parsed], config_dir)


def check_launcher(sweep: Sweep) -> None:
    """Refuse a launcher whose plugin is not installed.

    Raises:
        ConfigError: naming what to install.
    """
    package, extra = LAUNCHERS.get(sweep.launcher or "", ("", ""))
    if package and not _is_installed(package):
        why = f"The package {package} is not installed"
        raise ConfigError(f"{LAUNCHER}={sweep.launcher} cannot start", why, f"pip install rlhf-cli[{extra}]")


def extreme(item: Override, position: int) -> str:
    """Return an override with the first (0) or last (-1) of the values it lists."""
    value = item.value()
    if isinstance(value, IntervalSweep):
        return f"{item.key_or_group}={(value.start, value.end)[position]}"
    if not item.is_sweep_override():
        return compose.plain(item)
    return f"{item.key_or_group}={list(item.sweep_string_iterator())[position]}"


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def jobs(command: str, sweep: Sweep, config_dir: Path | None) -> list[list[str]]:
    """Return the overrides of each job, each composed and checked.

    Raises:
        ConfigError: a job is not valid; the message names it.
    """
    named = [(job, grid) for grid in sweep.grids for job in split(grid)]
    for number, (job, grid) in enumerate(named, 1):
        try:
            compose.load(command, job, config_dir)
        except UserError as error:
            name = job_name(job, grid, sweep.named) or command
            raise ConfigError(f"job {number} of {len(named)} ({name}): {error.what}", error.why, error.todo) from None
    return [job for job, _ in named]


def split(grid: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each job of a grid.

    Raises:
        ConfigError: it has values that only a sweeper can choose.
    """
    try:
        return BasicSweeper.split_arguments(compose.parse(list(grid)), max_batch_size=None)[0]
    except HydraException as error:
        todo = "Choose one in a sweep of your own (see conf/sweep/optuna.yaml), or list values: KEY=a,b"
        raise ConfigError("this sweep needs a sweeper plugin", str(error), todo) from None
