"""Finding run folders among paths and globs, and reading what a comparison needs of them."""

from __future__ import annotations

import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.errors import DataError
from rlhf_cli.report.run_groups import MODEL_FOLDERS, REFERENCE, Run, model_name, settings
from rlhf_cli.store import content_hash

# Folders that hold no runs and can be large; a store is known by the folders of its stages.
NOT_ENTERED = {"wandb", "checkpoints", "tensorboard"}
STORE = (".work", ".locks")
TODO = "Name folders that rlhf align, evaluate or train-rm wrote, a folder of them, or a pattern such as 'runs/**'"

Say = Callable[[str], None]


def find_runs(paths: Iterable[str | Path], say: Say) -> list[Path]:
    """Return the run folders that the paths and globs name or hold, at any depth; each once, 2 before 10.

    A path without runs beside others that have some (a store, an earlier comparison) is named and left out.

    Raises:
        DataError: a path does not exist, or no run was found at all.
    """
    found: dict[Path, Path] = {}
    empty = []
    asked = [str(path) for path in paths]
    for given in asked:
        inside = [folder for path in _expand(given) for folder in _runs_below(path)]
        if not inside:
            empty.append(given)
        found |= {folder.resolve(): folder for folder in inside if folder.resolve() not in found}
    if not found and len(asked) == 1 and not glob.has_magic(asked[0]):
        why = "it holds no config.yaml beside a status.json, and no folder that does"
        raise DataError(f"{asked[0]} is not a run folder", why, TODO)
    if not found:
        raise DataError("No runs were found", f"looked for config.yaml beside status.json in {', '.join(asked)}", TODO)
    for given in empty:
        say(f"left out {given}: no run is in it.")
    return list(found.values())


def load_run(folder: Path, say: Say) -> Run | None:
    """Return a run of a policy or reward model, or None (and say so) where it is neither or measured nothing.

    Raises:
        DataError: one of its files cannot be read.
    """
    status = _read(folder / "status.json")
    config = _read(folder / "config.yaml")
    if not isinstance(config, dict) or "reward" not in config:
        say(f"skipped {folder}: it aligns no policy and trains no reward model.")
        return None
    state = str(status.get("state"))
    reason = str(status.get("error") or "")
    config = {**config, **_named_models(config)}
    if state != "finished":
        return Run(folder, _algorithm(config), config, {}, [], [], state=state, reason=reason)
    metrics = {key: _number(value) for key, value in _optional(folder / "metrics.json", {}).items()}
    if not metrics:
        say(f"skipped {folder}: it is finished, and has no metrics.")
        return None
    return Run(
        folder,
        _algorithm(config),
        config,
        metrics,
        _optional(folder / "distributions.json", []),
        _optional(folder / "training_log.jsonl", []),
        ended=str(status.get("ended") or ""),
        measured=_optional(folder / "measured.json", {}),
        pairs=_optional(folder / "pairs.json", {}),
    )


def completions(run: Run) -> list[dict[str, Any]]:
    """Return the lines of a run's completions.jsonl, none where there is no such file.

    Raises:
        DataError: it cannot be read.
    """
    return _optional(run.path / "completions.jsonl", [])


def is_run(path: Path) -> bool:
    """Return whether a folder is a run's."""
    return (path / "config.yaml").is_file() and (path / "status.json").is_file()


def _expand(given: str) -> list[Path]:
    """Return the folders that a path or a quoted glob names.

    Raises:
        DataError: a path does not exist.
    """
    path = Path(given).expanduser()
    if path.exists():
        return [path]
    if not glob.has_magic(given):
        raise DataError(f"{given} is not a run folder", "there is no such folder", TODO)
    # Runs are looked for at any depth in any case, so `**` at the end says nothing new, and would list every file.
    pattern = re.sub(r"(/\*\*)+$", "", str(path)) if str(path) != "**" else "."
    return sorted((Path(name) for name in glob.glob(pattern, recursive=True)), key=_natural)


def _runs_below(path: Path) -> list[Path]:
    """Return the path if it is a run folder, else the run folders inside, in natural order."""
    if not path.is_dir() or _is_hidden(path):
        return []
    if is_run(path):
        return [path]
    if path.name in NOT_ENTERED or any((path / name).is_dir() for name in STORE):
        return []
    inside = (Path(entry.path) for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
    return [folder for child in sorted(inside, key=_natural) for folder in _runs_below(child)]


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") and path.name not in {".", ".."}


def _algorithm(config: dict[str, Any]) -> str:
    """Return whose policy a run measured: an algorithm, the SFT policy, or a model folder by its name.

    Of a reward model's run it is the reward.
    """
    if "algo" not in config or config.get("stage") == "rm":
        return str(config["reward"]["name"])
    policy = config.get("policy", "")
    if policy is None:
        return REFERENCE
    if policy and not is_run(Path(policy)):
        return _name_of_model(Path(policy))
    return str(config["algo"]["name"])


def _name_of_model(folder: Path) -> str:
    """Return the name of a model folder: the algorithm of the run it is of, or else the folder's name."""
    if folder.name not in MODEL_FOLDERS or not is_run(folder.absolute().parent):
        return model_name(str(folder))
    config = _read(folder.absolute().parent / "config.yaml")
    return _algorithm(config) if isinstance(config, dict) and "reward" in config else REFERENCE


def _named_models(config: dict[str, Any]) -> dict[str, Any]:
    """Return `reference` and `reward_model` with run folders named by what was run, so that seeds share a name."""
    named: dict[str, Any] = {}
    if config.get("reference"):
        named["reference"] = _model_name(str(config["reference"]))
    given = config.get("reward_model")
    if given:
        named["reward_model"] = [_model_name(str(path)) for path in ([given] if isinstance(given, str) else given)]
    return named


def _model_name(path: str) -> str:
    folder = Path(path)
    if not is_run(folder):
        return path
    config = _read(folder / "config.yaml")
    other = Run(folder, _algorithm(config) if "reward" in config else REFERENCE, config, {}, [], [])
    return f"{other.algorithm}-{content_hash(settings(other))[:8]}"


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts 2_algo=pm before 10_algo=pm."""
    parts = re.findall(r"\d+|\D+", str(path))
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _number(value: Any) -> float:
    """Return a metric; what is not finite is written as null, and is infinite here: no mean may go without it."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.inf


def _optional(path: Path, default: Any) -> Any:
    return _read(path) if path.is_file() else default


def _read(path: Path) -> Any:
    """Return the content of a json, jsonl or yaml file.

    Raises:
        DataError: it is missing or not valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".yaml":
            return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if path.suffix == ".jsonl":
            # Not splitlines: texts may hold other line separators than json lines do.
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read", str(error), "Run its command again in a fresh run_dir") from error
