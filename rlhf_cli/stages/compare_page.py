"""The page of a comparison: a section for each set of runs, with its figures and completions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.report.columns import notes
from rlhf_cli.report.comparison import Comparison
from rlhf_cli.report.figures import curves, preference_bars
from rlhf_cli.report.frontier import frontier_figure
from rlhf_cli.report.page import Page, Section
from rlhf_cli.report.pair_figures import pair_figure
from rlhf_cli.report.run_groups import Run
from rlhf_cli.report.tables import metric_table, page_table
from rlhf_cli.stages.found_runs import Say, completions

CURVES = ("pm/tv", "pm/minority_mass", "pm/offset_mass")
TEXT_CURVES = ("reward/mean", "kl/per_token", "entropy/per_token")
REWARD_CURVES = ("rm/loss", "train/rm/accuracy", "margin")
FIGURES = {
    "compare": "Share of every answer on the questions where the reference is furthest from the people",
    "frontier": "Reward against drift from the reference and against distance from the preferences",
    "curves": "Metrics while training",
    "pairs": "How often each one prefers the chosen response of a held-out pair",
}
FIGURE = re.compile(rf"({'|'.join(FIGURES)})(-\d+)?\.png")


def compare_page(comparisons: Sequence[Comparison], runs: Sequence[Run], out: Path, say: Say) -> Page:
    """Draw the figures for which there is data into `out`, remove those of an earlier comparison, return the page.

    Raises:
        DataError: completions cannot be read.
    """
    for path in out.iterdir():
        if FIGURE.fullmatch(path.name):
            path.unlink()
    sections = []
    for number, one in enumerate(comparisons, start=1):
        groups = {row.name: row.runs for row in one.rows}
        # The reference has its place in every figure, so it is a policy only where it stands alone.
        policies = {name: group for name, group in groups.items() if not group[0].is_reference} or groups
        places = {name: out / (f"{name}.png" if number == 1 else f"{name}-{number}.png") for name in FIGURES}
        _draw(policies, groups, places, one.title, say)
        captions = {**FIGURES, "pairs": FIGURES["pairs"] + _seed_shown(policies)}
        figures = [(caption, places[name]) for name, caption in captions.items() if places[name].is_file()]
        texts = {name: completions(shown) for name, shown in _of_one_seed(policies).items()} if one.kind != "rm" else {}
        texts = {name: lines for name, lines in texts.items() if lines}
        sections.append(Section(one.title, page_table(one), notes(one), figures, texts, metric_table(one)))
    return Page(*_titles(comparisons, runs), sections)


def _titles(comparisons: Sequence[Comparison], runs: Sequence[Run]) -> tuple[str, str]:
    """Return title and subtitle of the page."""
    finished = [run for run in runs if run.finished]
    names = dict.fromkeys(run.algorithm for one in comparisons for row in one.rows for run in row.runs)
    seeds = len({run.seed for run in finished})
    words = [f"{len(finished)} finished runs", f"{seeds} seed{'s' * (seeds != 1)}"]
    words += [f"{len(comparisons)} sets that may not be compared with each other"] if len(comparisons) > 1 else []
    return f"Comparison of {', '.join(names)}", ", ".join(words)


def _draw(
    policies: dict[str, list[Run]], groups: dict[str, list[Run]], places: dict[str, Path], title: str, say: Say
) -> None:
    _bars(policies, places["compare"], title, say)
    frontier_figure(groups, places["frontier"])
    logs = {name: [line for run in group for line in run.log] for name, group in policies.items()}
    has = {key for log in logs.values() for line in log for key in line}
    keys = next((family for family in (CURVES, TEXT_CURVES, REWARD_CURVES) if has & set(family)), None)
    if keys:
        curves(logs, places["curves"], keys)
    pairs = {name: run.pairs for name, run in _of_one_seed(policies).items() if run.pairs}
    if pairs:
        pair_figure(pairs, places["pairs"])


def _bars(policies: dict[str, list[Run]], path: Path, title: str, say: Say) -> None:
    """Draw the policies that were measured on the questions of the first one."""
    chosen = _of_one_seed({name: [run for run in group if run.distributions] for name, group in policies.items()})
    if not chosen:
        return
    base = next(iter(chosen.values()))
    shown = {name: run.distributions for name, run in chosen.items() if _questions(run) == _questions(base)}
    missing = [name for name in policies if name not in shown]
    if missing:
        say(f"warning: {path.name} leaves out {', '.join(missing)}: no run on the same questions.")
    heading = f"Whose preferences are heard? {title}, seed {base.seed}"
    preference_bars(base.distributions, path, title=heading, policies=shown)


def _of_one_seed(groups: dict[str, list[Run]]) -> dict[str, Run]:
    """Return one run of each group that has any: of the seed that most groups have, or the nearest."""
    seeds = [{run.seed for run in group} for group in groups.values()]
    everyone: Iterable[int] = sorted(set().union(*seeds))
    common = max(everyone, key=lambda seed: sum(seed in found for found in seeds), default=0)
    return {name: min(group, key=lambda run: abs(run.seed - common)) for name, group in groups.items() if group}


def _seed_shown(groups: dict[str, list[Run]]) -> str:
    """Return which of several seeds a figure of one run each shows, in words; empty where there is one seed."""
    if len({run.seed for group in groups.values() for run in group}) < 2:
        return ""
    shown = {name: run.seed for name, run in _of_one_seed(groups).items() if run.pairs}
    seeds = list(shown.values())
    if not seeds:
        return ""
    usual = max(seeds, key=seeds.count)
    others = "".join(f"; {name}: seed {seed}" for name, seed in shown.items() if seed != usual)
    return f" (seed {usual}{others})"


def _questions(run: Run) -> list[tuple[Any, ...]]:
    return [(entry["prompt"], entry["answers"], entry["people"]) for entry in run.distributions]
