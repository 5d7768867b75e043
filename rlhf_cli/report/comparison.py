"""The comparison of one set of runs: a row per algorithm and setting with its numbers, baseline, rank and warnings."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rlhf_cli.errors import DataError
from rlhf_cli.metrics.glossary import GLOSSARY, describe, known
from rlhf_cli.metrics.seeds import paired
from rlhf_cli.report.cells import Cell, cells, flags, metric_keys
from rlhf_cli.report.run_groups import Kind, Run, group_runs, reference_runs

BASELINE = "kl_ppo"
# The relative improvement over the baseline is shown for these.
IMPROVED = ("pm/tv", "pm/divergence")
DEFAULT_RANKS = ("pm/tv", "reward/mean", "rm/log_loss", "rm/accuracy")


@dataclass
class Row:
    """One algorithm and setting.

    Args:
        name: its display name.
        runs: its finished runs, one a seed.
        cells: metric key to its numbers.
        flags: bounds of collapse that it crosses, one sentence each.
        baseline: the name of the row it is compared with, None for that row itself or where there is none.
        improvement: relative improvement over the baseline in %, positive is better, by metric key.
        rank: its place by the ranking metric, 1 is best; None where it is not ranked.
        is_baseline: whether others are compared with it.
    """

    name: str
    runs: list[Run]
    cells: dict[str, Cell]
    flags: list[str] = field(default_factory=list)
    baseline: str | None = None
    improvement: dict[str, float] = field(default_factory=dict)
    rank: int | None = None
    is_baseline: bool = False

    @property
    def algorithm(self) -> str:
        return self.runs[0].algorithm

    @property
    def is_reference(self) -> bool:
        return self.runs[0].is_reference


@dataclass(frozen=True)
class Stopped:
    """A run without numbers: which it was to be, its state (failed, interrupted, running) and why."""

    name: str
    seed: int | None
    state: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """The rows of one set, in the order in which they are shown.

    Args:
        title: what the runs have in common.
        kind: what they measured.
        rows: one an algorithm and setting.
        stopped: runs without numbers.
        baselines: names of the rows that others are compared with.
        rank_by: the ranking metric, if there is one.
        notes: what to know about the ranks.
        groups: display name to runs, as they were given, unfinished ones included.
    """

    title: str
    kind: Kind
    rows: list[Row]
    stopped: list[Stopped]
    baselines: list[str]
    rank_by: str | None
    notes: list[str]
    groups: dict[str, list[Run]]


def compare(
    title: str,
    kind: Kind,
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    rank_by: str | None = None,
    failed: Sequence[tuple[str, str]] = (),
) -> Comparison:
    """Return the comparison of runs of one set.

    Args:
        title: what the runs have in common.
        kind: what they measured.
        runs: at most one finished run of each setting and seed (`latest_of_each_seed`), and unfinished ones.
        baseline: display name of the row that others are compared with; None or not here: the default.
        rank_by: the metric that orders the rows; None or not here: the default ranks them, and does not order them.
        failed: (name, reason) of runs that left no folder.

    Raises:
        ValueError: no runs.
    """
    if not runs:
        raise ValueError("A comparison needs at least one run.")
    rows, stopped = _rows(runs, kind)
    stopped += [Stopped(name, None, "failed", reason) for name, reason in failed]
    baselines = _baselines(rows, kind, baseline)
    for row in rows:
        _set_against_baseline(row, _baseline_of(row, baselines))
    key = rank_by if any(rank_by in row.cells for row in rows) else _default_rank(rows)
    notes = _rank(rows, key) if key is not None else []
    if rank_by is not None and key == rank_by:
        rows = sorted(rows, key=lambda row: (row.rank is None, row.rank or 0))
    names = [row.name for row in baselines]
    return Comparison(title, kind, rows, stopped, names, key, notes, group_runs(runs))


def check_rank(key: str, runs: Sequence[Run]) -> None:
    """Refuse a metric that cannot rank the runs.

    Raises:
        DataError: no run has it, or neither direction of it is better.
    """
    there = {name for run in [*runs, *reference_runs(runs)] for name in metric_keys(run.metrics)}
    if key not in there:
        near = difflib.get_close_matches(key, sorted(there), n=1) or difflib.get_close_matches(key, GLOSSARY, n=1)
        why = f"Did you mean {near[0]}?" if near else "compare.csv lists the metrics there are"
        raise DataError(f"--rank {key}: no run has this metric", "", why)
    if not known(key) or describe(key).better == "none":
        ranking = [name for name in DEFAULT_RANKS if name in there]
        raise DataError(
            f"--rank {key}: it cannot rank",
            "neither a lower nor a higher value is better in itself",
            f"Rank by another metric{', for example ' + ranking[0] if ranking else ''}",
        )


def check_baseline(name: str, comparisons: Sequence[Comparison]) -> None:
    """Refuse a baseline that is no row of any comparison.

    Raises:
        DataError: it is none; the message names the nearest and all there are.
    """
    names = list(dict.fromkeys(row.name for one in comparisons for row in one.rows))
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        why = f"The rows are: {', '.join(names)}"
        raise DataError(f"--baseline {name!r} is no row", why, f"Did you mean {near[0]!r}?" if near else "Name one")


def _rows(runs: Sequence[Run], kind: Kind) -> tuple[list[Row], list[Stopped]]:
    """Return the rows of the finished runs, the reference's first, and the unfinished runs under the same names."""
    everyone = list(runs)
    if kind != "rm":
        references = reference_runs(runs)
        there = {(run.algorithm, run.seed) for run in references}
        # A policy that is the reference itself, by another name.
        doubled = {id(run) for run in runs if run.finished and (run.algorithm, run.seed) in there}
        others = (run for run in runs if not run.is_reference and id(run) not in doubled)
        everyone = [*references, *others, *(run for run in runs if run.is_reference and not run.finished)]
    rows, stopped = [], []
    for name, group in group_runs(everyone).items():
        finished = [run for run in group if run.finished]
        if finished:
            rows.append(Row(name, finished, cells(finished), flags(finished)))
        stopped += [Stopped(name, run.seed, run.state, run.reason) for run in group if not run.finished]
    return rows, stopped


def _baselines(rows: Sequence[Row], kind: Kind, named: str | None) -> list[Row]:
    """Return the row that is named, else all of KL-PPO, else the reference; empty where there is none of them."""
    chosen = [row for row in rows if row.name == named]
    if kind != "rm":
        chosen = chosen or [row for row in rows if row.algorithm == BASELINE]
        chosen = chosen or [row for row in rows if row.is_reference][:1]
    return chosen if len(rows) > 1 else []


def _baseline_of(row: Row, baselines: Sequence[Row]) -> Row | None:
    """Return the baseline with the nearest beta, the first by name among equals; None for a baseline itself."""
    if not baselines or row.name in [other.name for other in baselines]:
        return None
    beta = _beta(row)
    gaps = [0.0 if beta is None else abs(math.log(beta / (_beta(other) or beta))) for other in baselines]
    return baselines[gaps.index(min(gaps))]


def _beta(row: Row) -> float | None:
    """Return the beta of an aligned policy."""
    algo = row.runs[0].config.get("algo", {})
    return algo.get("beta") if row.algorithm == algo.get("name") else None


def _set_against_baseline(row: Row, baseline: Row | None) -> None:
    """Give each cell its paired difference from the baseline, and the row its relative improvement."""
    if baseline is None:
        return
    row.baseline, baseline.is_baseline = baseline.name, True
    for key, cell in row.cells.items():
        ours, theirs = _by_seed(row, key), _by_seed(baseline, key)
        common = sorted(ours.keys() & theirs.keys())
        if not common or not all(math.isfinite(of[seed]) for of in (ours, theirs) for seed in common):
            continue
        row.cells[key] = replace(
            cell, difference=paired({seed: ours[seed] for seed in common}, {seed: theirs[seed] for seed in common})
        )
        before = sum(theirs[seed] for seed in common)
        # A policy that collapsed has next to no divergence: a share of it, or from it, says nothing.
        collapsed = "divergence" in key and (row.flags or baseline.flags)
        if key in IMPROVED and before > 0 and cell.finite and not collapsed:
            row.improvement[key] = 100 * (before - sum(ours[seed] for seed in common)) / before


def _by_seed(row: Row, key: str) -> dict[int, float]:
    return {run.seed: run.metrics[key] for run in row.runs if key in run.metrics}


def _default_rank(rows: Sequence[Row]) -> str | None:
    return next((key for key in DEFAULT_RANKS if any(key in row.cells for row in rows)), None)


def _rank(rows: Sequence[Row], key: str) -> list[str]:
    """Give each row its rank by a metric, equal means the same one; return what to say about the ranks."""
    sign = -1 if describe(key).better == "higher" else 1
    having = [row for row in rows if key in row.cells]
    # A policy that collapsed has no variance under itself, and so next to no divergence.
    unfit = [row for row in having if row.flags] if "divergence" in key else []
    ranked = [row for row in having if row not in unfit and row.cells[key].finite]
    values = [sign * row.cells[key].mean for row in ranked]
    for row, value in zip(ranked, values, strict=True):
        row.rank = 1 + sum(other < value for other in values)
    notes = []
    if unfit:
        names = ", ".join(row.name for row in unfit)
        notes.append(f"Not ranked by {key}, which is near zero after a collapse too: {names}.")
    if len({tuple(sorted(_by_seed(row, key))) for row in ranked}) > 1:
        notes.append("Not every row has the same seeds: ranks compare means over different seeds.")
    return notes
