"""The comparison table: one row per algorithm and setting, rendered for the terminal, markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from rlhf_cli.metrics.glossary import describe

MISSING = "–"
REFERENCE = "sft"
# Row order: from the policy everything starts at to the methods built on the baselines; others follow by name.
ORDER = (REFERENCE, "kl_ppo", "pm", "dpm", "dpo", "rpo", "bt")
# What cannot change a result: places, hardware, tracking, cadence of logs. Any other key separates runs into rows.
IGNORED = {"seed", "run_dir", "store_dir", "device", "tracker", "policy", "stage"}
IGNORED_LEAVES = {"log_every_steps", "save_every_steps", "eval_every_steps", "sampler"}
# The part of a config that makes the reference policy and the target it is measured against.
REFERENCE_KEYS = ("model.", "dataset.", "reward.", "generation.", "trainer.sft.", "trainer.rm.")

# (metric key, column header); a header is one short word so that all columns fit in 100 characters.
SURVEY_COLUMNS = (
    ("pm/tv", "TV"),
    ("pm/tv_max", "worst"),
    ("pm/kl_rm_policy", "KL"),
    ("pm/minority_mass", "minority"),
    ("pm/minority_mass_target", "target"),
    ("pm/offset_mass", "off-set"),
    ("optimum/tv", "optimum"),
    ("gold/tv", "people"),
    ("reward/mean", "reward"),
    ("kl/sequence", "drift"),
)
TEXT_COLUMNS = (
    ("pm/pair_tv", "pairs"),
    ("pm/divergence", "diverg."),
    ("reward/mean", "reward"),
    ("kl/sequence", "drift"),
    ("entropy/per_token", "entropy"),
    ("length/mean", "length"),
    ("eos_rate", "ends"),
)
REWARD_COLUMNS = (
    ("rm/accuracy", "right"),
    ("rm/log_loss", "loss"),
    ("rm/ece", "ECE"),
    ("rm/margin/std", "scale"),
    ("rm/bound/half", "δ*/2"),
    ("rm/length_correlation", "length"),
    ("rm/negative_accuracy", "damage"),
    ("rm/gold_tv", "people"),
    ("rm/score_policy_beyond", "beyond"),
)


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder: whose it is, resolved config, flat metrics, distributions, log lines.

    `algorithm` is the policy's name, or a reward model's.
    """

    path: Path
    algorithm: str
    config: dict[str, Any]
    metrics: dict[str, float]
    distributions: list[dict[str, Any]]
    log: list[dict[str, Any]]

    @property
    def seed(self) -> int:
        return int(self.config["seed"])


@dataclass(frozen=True)
class Cell:
    """A metric of a row: mean over `seeds` runs; sample standard deviation of two or more, or one run's interval."""

    seeds: int
    mean: float
    spread: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """One algorithm and setting: its display name, how many runs it stands for, and a cell per metric key."""

    name: str
    runs: int
    cells: dict[str, Cell]


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return runs by display name: the algorithm, plus the settings by which several groups of it differ.

    Runs that differ only in their seed (or in places and logging) share a name. Names come in a fixed order.
    """
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.algorithm, tuple(sorted(_settings(run).items()))), []).append(run)
    named: dict[str, list[Run]] = {}
    for algorithm in sorted({name for name, _ in groups}, key=lambda name: (_rank(name), name)):
        variants = [dict(settings) for name, settings in groups if name == algorithm]
        members = [group for (name, _), group in groups.items() if name == algorithm]
        labelled = zip((_label(variant, variants) for variant in variants), members, strict=True)
        for label, group in sorted(labelled, key=lambda pair: pair[0]):
            named[f"{algorithm} {label}".strip()] = sorted(group, key=lambda run: run.seed)
    return named


def comparison_table(runs: Sequence[Run]) -> list[Row]:
    """Return one row per algorithm and setting, the reference (SFT) policy first.

    Raises:
        ValueError: no runs.
    """
    if not runs:
        raise ValueError("A comparison needs at least one run.")
    everyone = [*_reference_runs(runs), *(run for run in runs if run.algorithm != REFERENCE)]
    return [Row(name, len(group), _cells(group)) for name, group in group_runs(everyone).items()]


def columns(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    """Return (metric key, header) of each column: exact distances where answers are enumerable, else sampled ones.

    Reward models have columns of their own, those that any of them has.
    """
    if not any("pm/tv" in row.cells or "pm/pair_tv" in row.cells for row in rows):
        found = tuple(pair for pair in REWARD_COLUMNS if any(pair[0] in row.cells for row in rows))
        if found:
            return found
    return SURVEY_COLUMNS if any("pm/tv" in row.cells for row in rows) else TEXT_COLUMNS


def legend(rows: Sequence[Row]) -> list[str]:
    """Return one line per column, header and meaning in words, and one on how numbers are averaged."""
    lines = []
    for key, header in columns(rows):
        metric = describe(key)
        notes = [part for part in (metric.unit, _better(metric.better)) if part]
        lines.append(f"{header}: {metric.meaning} [{', '.join(notes)}]." if notes else f"{header}: {metric.meaning}.")
    lines.append("±: sample standard deviation over training seeds; a single run shows its bootstrap 95 % interval.")
    return lines


def to_rich(rows: Sequence[Row]) -> Table:
    """Return the table for a terminal: fits 100 columns, spread under the mean."""
    from rich.markup import escape

    table = Table(box=None, pad_edge=False, padding=(0, 1, 1, 0), header_style="bold")
    table.add_column(_first(rows), max_width=18, overflow="fold")
    for _, header in columns(rows):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        name = f"{escape(row.name)}\n[dim]{_seeds(row.runs)}[/dim]"
        parts = [_parts(row.cells.get(key)) for key, _ in columns(rows)]
        # An interval takes two lines, so that a column stays as narrow as one number.
        cells = [f"{mean}\n[dim]{escape(spread.replace(' ', chr(10)))}[/dim]" for mean, spread in parts]
        table.add_row(name, *cells)
    return table


def to_markdown(rows: Sequence[Row]) -> str:
    """Return the table and its legend as markdown."""
    shown = columns(rows)
    lines = [f"| {_first(rows)} | seeds | " + " | ".join(header for _, header in shown) + " |"]
    lines.append("|---|---:|" + "---:|" * len(shown))
    for row in rows:
        values = (" ".join(filter(None, _parts(row.cells.get(key)))).replace("±", "± ") for key, _ in shown)
        lines.append(f"| {row.name} | {row.runs} | " + " | ".join(values) + " |")
    return "\n".join([*lines, "", *(f"- {line}" for line in legend(rows))]) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Return every metric of every row in long form: policy, seeds, metric, mean, std, lo, hi."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["policy", "seeds", "metric", "mean", "std", "lo", "hi"])
    for row in rows:
        for key, cell in sorted(row.cells.items()):
            low, high = cell.interval or ("", "")
            spread = "" if cell.spread is None else cell.spread
            writer.writerow([row.name, cell.seeds, key, cell.mean, spread, low, high])
    return text.getvalue()


def _rank(algorithm: str) -> int:
    return ORDER.index(algorithm) if algorithm in ORDER else len(ORDER)


def flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf of a nested config."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _settings(run: Run) -> dict[str, str]:
    """Return what makes a run's row, as text: its config without seed, places and logging."""
    found = {}
    for key, value in flatten({key: value for key, value in run.config.items() if key not in IGNORED}):
        of_reference = run.algorithm != REFERENCE or key.startswith(REFERENCE_KEYS)
        if key.rsplit(".", 1)[-1] not in IGNORED_LEAVES and of_reference:
            found[key] = "null" if value is None else str(value)
    return found


def _label(settings: dict[str, str], variants: Sequence[dict[str, str]]) -> str:
    """Return the settings of one variant that tell it from the others, e.g. "alpha=0.1 beta=0.5"."""
    keys = sorted({key for variant in variants for key in variant})
    differing = [key for key in keys if len({variant.get(key) for variant in variants}) > 1]
    # A group's name stands for the values it brings, unless other values of it were changed too.
    named = {key.rsplit(".", 1)[0] for key in differing if key.endswith((".name", ".source"))}
    short = [key for key in differing if key.rsplit(".", 1)[0] not in named or key.endswith((".name", ".source"))]
    if len({tuple(variant.get(key) for key in short) for variant in variants}) == len(variants):
        differing = short
    words = (f"{key.removeprefix('algo.').removesuffix('.name')}={settings.get(key, 'null')}" for key in differing)
    return " ".join(words)


def _reference_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the reference policies the runs were measured beside, each once per seed and setting, as runs."""
    found: dict[tuple[str, int], Run] = {}
    for run in runs:
        metrics = run.metrics
        if run.algorithm != REFERENCE:
            metrics = {key[len("reference/") :]: v for key, v in run.metrics.items() if key.startswith("reference/")}
        # The optimum is the algorithm's, so the reference has no distance to one of its own.
        metrics = {key: value for key, value in metrics.items() if not key.startswith("optimum/")}
        reference = Run(run.path, REFERENCE, run.config, metrics, run.distributions, [])
        if metrics:
            found.setdefault((str(sorted(_settings(reference).items())), run.seed), reference)
    return list(found.values())


def _cells(group: Sequence[Run]) -> dict[str, Cell]:
    cells = {}
    for key in {key for run in group for key in run.metrics if not key.endswith(("/lo", "/hi", "/n"))}:
        values = [run.metrics[key] for run in group if run.metrics.get(key) is not None]
        if not values:
            continue
        spread = interval = None
        if len(values) > 1:
            spread = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
        else:
            ends = [run.metrics.get(f"{key}/{end}") for run in group for end in ("lo", "hi")]
            known_ends = [end for end in ends if end is not None]
            interval = (known_ends[0], known_ends[1]) if len(known_ends) == 2 else None
        cells[key] = Cell(len(values), sum(values) / len(values), spread, interval)
    return cells


def _parts(cell: Cell | None) -> tuple[str, str]:
    """Return (mean, spread) as text; the spread is empty where there is none."""
    if cell is None:
        return MISSING, ""
    if cell.spread is not None:
        return _number(cell.mean), f"±{_number(cell.spread)}"
    if cell.interval is not None:
        return _number(cell.mean), "[{}, {}]".format(*map(_number, cell.interval))
    return _number(cell.mean), ""


def _number(value: float) -> str:
    """Return a number in at most six or seven characters: three decimals, fewer where it is large."""
    size = abs(value)
    if not math.isfinite(value) or size < 10:
        return f"{value:.3f}"
    return f"{value:.{2 if size < 100 else 1}f}" if size < 1000 else f"{value:.3g}"


def _first(rows: Sequence[Row]) -> str:
    """Return the header of the first column."""
    return "reward model" if columns(rows)[0] in REWARD_COLUMNS else "policy"


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def _better(direction: str) -> str:
    return "" if direction == "none" else f"{direction} is better"
