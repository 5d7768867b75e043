"""`rlhf compare`: finished runs side by side, as a table and two figures."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlhf_cli.errors import DataError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from rlhf_cli.report.tables import Row, Run

CURVES = ("pm/tv", "pm/minority_mass", "pm/offset_mass")
REWARD_CURVES = ("rm/loss", "train/rm/accuracy", "margin")
TEXT_CURVES = ("reward/mean", "kl/per_token", "entropy/per_token")
# Runs that differ here are measured against different targets.
WORLD_KEYS = ("dataset.source", "dataset.path", "dataset.seed", "dataset.questions")
JUDGE_KEYS = ("dataset.length_bias", "dataset.ranking_size")
TARGET_KEYS = (*WORLD_KEYS, *JUDGE_KEYS, "dataset.pairs", "reward.name", "reward.calibration", "reward.combine")
# Output goes to a file or a pipe as wide as the table needs, and no narrower.
PIPE_WIDTH = 100


def run(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Print the table of finished runs and write compare.md, compare.csv, compare.png and curves.png.

    Args:
        run_dirs: run folders, or folders of run folders; unfinished ones are named and skipped.
        out: where the files go; None: `compare` beside the runs.

    Returns:
        The folder of the files.

    Raises:
        DataError: a path is no run folder, a file in it cannot be read, or no finished run is left.
        RunError: the folder cannot be written.
    """
    from rlhf_cli.report.tables import comparison_table, legend, to_rich

    console, notes = _consoles()
    folders = find_runs(run_dirs)
    runs = [loaded for folder in folders if (loaded := load_run(folder, notes)) is not None]
    if not runs:
        raise DataError(
            f"None of the {len(folders)} run folders can be compared",
            "only finished runs of rlhf align, evaluate and train-rm hold a measured policy or reward model",
            "Finish a run first: the same command goes on where it stopped",
        )
    runs = _of_one_kind(runs, notes)
    _check_comparable(runs, notes)
    rows = comparison_table(runs)
    out = (
        Path(os.path.commonpath([loaded.path.resolve().parent for loaded in runs])) / "compare" if out is None else out
    )
    written = _write(rows, runs, out, notes)
    console.print(to_rich(rows))
    for line in legend(rows):
        console.print(line, style="dim", highlight=False, markup=False)
    for path in written:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    return out


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders among the paths and, for a folder of them, inside; each once, 2 before 10.

    Raises:
        DataError: a path is neither.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(f"{path} is not a run folder", "there is no such folder", "Name folders of finished runs")
        inside = [path] if _is_run(path) else sorted(filter(_is_run, path.iterdir()), key=_natural)
        if not inside:
            raise DataError(
                f"{path} is not a run folder",
                "it holds no config.yaml beside a status.json, and no folder that does",
                "Name folders that rlhf align or rlhf evaluate wrote, or a folder of them",
            )
        found += inside
    return list({folder.resolve(): folder for folder in found}.values())


def load_run(folder: Path, notes: Console) -> Run | None:
    """Return a finished run of a policy or reward model, or None (and say so) where it is unfinished or neither.

    Raises:
        DataError: one of its files cannot be read.
    """
    from rlhf_cli.report.tables import Run

    state = _read(folder / "status.json").get("state")
    if state != "finished":
        _say(notes, f"skipped {folder}: its state is {state!r}, not finished.")
        return None
    config = _read(folder / "config.yaml")
    found = _read(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}
    metrics = {key: value for key, value in found.items() if value is not None}
    if not metrics or "reward" not in config:
        _say(notes, f"skipped {folder}: no policy or reward model was measured there.")
        return None
    distributions = _read(folder / "distributions.json") if (folder / "distributions.json").is_file() else []
    log = _read(folder / "training_log.jsonl") if (folder / "training_log.jsonl").is_file() else []
    return Run(folder, _algorithm(config), config, metrics, distributions, log)


def _algorithm(config: dict[str, Any]) -> str:
    """Return whose policy a run measured: an algorithm, the SFT policy, or a model folder by its name.

    Of a reward model's run it is the reward.
    """
    from rlhf_cli.report.tables import REFERENCE

    if "algo" not in config or config.get("stage") == "rm":
        return str(config["reward"]["name"])
    policy = config.get("policy", "")
    if policy is None:
        return REFERENCE
    if policy and not _is_run(Path(policy)):
        return Path(policy).name
    return str(config["algo"]["name"])


def _of_one_kind(runs: list[Run], notes: Console) -> list[Run]:
    """Return the policies' runs, or the reward models' where there is no policy."""
    policies = [loaded for loaded in runs if "algo" in loaded.config and loaded.config.get("stage") != "rm"]
    if policies and len(policies) < len(runs):
        _say(notes, f"left out {len(runs) - len(policies)} runs of reward models: compare them on their own.")
    return policies or runs


def _check_comparable(runs: Sequence[Run], notes: Console) -> None:
    """Warn where runs have different targets; refuse where they share no measure.

    Raises:
        DataError: some runs have exact distances and some have not.
    """
    from rlhf_cli.report.tables import flatten

    exact = [loaded for loaded in runs if "pm/tv" in loaded.metrics]
    if exact and len(exact) < len(runs):
        other = next(loaded for loaded in runs if loaded not in exact)
        raise DataError(
            f"{exact[0].path} and {other.path} cannot be compared",
            "one has answers that can be enumerated (pm/tv), the other free text",
            "Compare runs of each kind on their own",
        )
    configs = [dict(flatten(loaded.config)) for loaded in runs]
    policies = "algo.name" in configs[0]
    keys = TARGET_KEYS if policies else (*WORLD_KEYS, *JUDGE_KEYS)
    differing = [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]
    if differing:
        what = "their pm/ metrics have different targets" if policies else "they were judged on different data"
        _say(notes, f"warning: the runs differ in {', '.join(differing)}, so {what}.")


def _write(rows: Sequence[Row], runs: Sequence[Run], out: Path, notes: Console) -> list[Path]:
    """Write tables and figures, and return their paths.

    Raises:
        RunError: the folder cannot be written.
    """
    from rlhf_cli.report.tables import to_csv, to_markdown

    tables = {out / "compare.md": to_markdown(rows), out / "compare.csv": to_csv(rows)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, text in tables.items():
            path.write_text(text, encoding="utf-8")
        return [*tables, *_figures(runs, out, notes)]
    except OSError as error:
        raise RunError(f"The comparison cannot be written to {out}", str(error), "Name another folder") from error


def _figures(runs: Sequence[Run], out: Path, notes: Console) -> list[Path]:
    """Write the figures for which there is data, remove those of an earlier comparison, and return what was written."""
    from rlhf_cli.report.figures import curves, preference_bars
    from rlhf_cli.report.tables import REFERENCE, group_runs

    bars, lines = out / "compare.png", out / "curves.png"
    bars.unlink(missing_ok=True)
    lines.unlink(missing_ok=True)
    groups = group_runs(runs)
    # The reference has a column in every figure, so it is a policy only where it stands alone.
    aligned = {name: group for name, group in groups.items() if group[0].algorithm != REFERENCE} or groups
    base, shown = _same_world(aligned)
    if base is not None:
        missing = [name for name in aligned if name not in shown]
        if missing:
            _say(notes, f"warning: {bars.name} leaves out {', '.join(missing)}: no run on the same questions.")
        title = f"Whose preferences are heard? Survey world {base.config['dataset'].get('seed', '')}, seed {base.seed}"
        preference_bars(base.distributions, bars, title=title, policies=shown)
    logs = {name: [line for loaded in group for line in loaded.log] for name, group in aligned.items()}
    families = (CURVES, TEXT_CURVES, REWARD_CURVES)
    has = {key for log in logs.values() for line in log for key in line}
    keys = next((family for family in families if has & set(family)), None)
    if keys:
        curves(logs, lines, keys)
    return [path for path in (bars, lines) if path.is_file()]


def _same_world(groups: dict[str, list[Run]]) -> tuple[Run | None, dict[str, list[dict[str, Any]]]]:
    """Return a run and, for each name, the distributions of one run on its questions: its seed where there is one."""
    base = next((loaded for group in groups.values() for loaded in group if loaded.distributions), None)
    if base is None:
        return None, {}
    questions = _questions(base)
    shown = {}
    for name, group in groups.items():
        same = [loaded for loaded in group if _questions(loaded) == questions]
        if same:
            shown[name] = min(same, key=lambda loaded: abs(loaded.seed - base.seed)).distributions
    return base, shown


def _questions(loaded: Run) -> list[tuple[str, list[str], list[float]]]:
    return [(entry["prompt"], entry["answers"], entry["people"]) for entry in loaded.distributions]


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "status.json").is_file()


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts 2_algo=pm before 10_algo=pm."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _read(path: Path) -> Any:
    """Return the content of a json, jsonl or yaml file.

    Raises:
        DataError: it is missing or not valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".yaml":
            return yaml.safe_load(text)
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read", str(error), "Run its command again in a fresh run_dir") from error


def _consoles() -> tuple[Console, Console]:
    """Return the console of results (stdout) and that of notes (stderr)."""
    from rich.console import Console

    console = Console()
    return (console if console.is_terminal else Console(width=PIPE_WIDTH)), Console(stderr=True)


def _say(notes: Console, words: str) -> None:
    notes.print(words, highlight=False, markup=False, soft_wrap=True)
