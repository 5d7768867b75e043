"""What the studies write of their runs: a page with a table, every number as csv, a picture.

Of a run folder only config.yaml, metrics.json, training_log.jsonl and, on the survey world, distributions.json are
read. A number that a run does not have is a dash.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import os
import platform
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from study_figures import Run, Runs, gold_curve, gold_reward, optimum_distance

from rlhf_cli.metrics.seeds import mean_interval, paired

GRID_BASELINE = "kl_ppo β=0.1"  # the paper's
Number = Callable[[Run], float | None]


@dataclass(frozen=True)
class About:
    """How the runs came about.

    Args:
        command: that makes the page; overrides: of all its runs.
        seeds: asked for; planned: runs; missing: those that failed, in words.
        attempts: [start, end] of every sweep, seconds; at_a_time: how many of them ran side by side.
    """

    command: str
    overrides: list[str]
    seeds: tuple[int, ...]
    planned: int
    missing: list[str]
    attempts: list[list[float]]
    at_a_time: int


def metric(key: str) -> Number:
    """Return what reads a final metric of a run."""
    return lambda run: run.value(key)


def best_gold(run: Run) -> float | None:
    """Return the highest gold reward on the way, nats."""
    curve = gold_curve(run)
    return max(value for _, value in curve) if curve else None


def best_gold_step(run: Run) -> float | None:
    """Return the optimizer step of `best_gold`."""
    curve = gold_curve(run)
    return max(curve, key=lambda point: point[1])[0] if curve else None


DISTANCES: dict[str, Number] = {"TV": metric("pm/tv"), "forward KL": metric("pm/kl_rm_policy")}
COLUMNS: dict[str, dict[str, Number]] = {
    "collapse": {
        **DISTANCES,
        "TV to own optimum": metric("optimum/tv"),
        "TV of that optimum": optimum_distance,
        "minority mass": metric("pm/minority_mass"),
        "its target": metric("pm/minority_mass_target"),
        "coverage": metric("pm/minority_coverage"),
        "entropy": metric("entropy/per_token"),
        "off-set": metric("pm/offset_mass"),
        "official divergence": metric("pm/divergence"),
    },
    "overoptimisation": {
        "proxy reward": metric("reward/mean"),
        "gold reward": gold_reward,
        "best on the way": best_gold,
        "at step": best_gold_step,
        "gold TV": metric("gold/tv"),
        "off-set": metric("pm/offset_mass"),
        "KL": metric("kl/sequence"),
        "chosen log-prob": metric("chosen_logps_change"),
        "wins by proxy": metric("win_rate/rm"),
        "wins by gold": metric("win_rate/gold"),
    },
    "grid": {
        **DISTANCES,
        "reverse KL": metric("pm/kl_policy_rm"),
        "rank correlation": metric("pm/rank_correlation"),
        "official divergence": metric("pm/divergence"),
        "reward": metric("reward/mean"),
        "KL": metric("kl/sequence"),
        "entropy": metric("entropy/per_token"),
        "distinct-2": metric("distinct_2"),
        "ends": metric("eos_rate"),
        "wins": metric("win_rate/rm"),
    },
}
# The same numbers of the reference policy.
OF_REFERENCE: dict[str, Number] = {
    "gold reward": lambda run: gold_reward(run, "reference"),
    **{
        header: metric(f"reference/{key}")
        for header, key in {
            "TV": "pm/tv", "forward KL": "pm/kl_rm_policy", "reverse KL": "pm/kl_policy_rm", "gold TV": "gold/tv",
            "minority mass": "pm/minority_mass", "its target": "pm/minority_mass_target", "ends": "eos_rate",
            "coverage": "pm/minority_coverage", "rank correlation": "pm/rank_correlation", "off-set": "pm/offset_mass",
            "entropy": "entropy/per_token", "distinct-2": "distinct_2", "official divergence": "pm/divergence",
            "proxy reward": "reward/mean", "reward": "reward/mean",
        }.items()
    },
}  # fmt: skip
TITLES = {
    "collapse": "Preference collapse: KL-PPO as beta falls, preference matching over alpha",
    "overoptimisation": "Over-optimisation of a proxy: DPO and RPO on few preference pairs",
    "grid": "The grid of the preference matching paper, in small, on real dialogues",
}
NOTES = {
    "collapse": """TV and forward KL are distances from the reward model's preferences; "TV to own optimum" is from the
        algorithm's closed form, "TV of that optimum" how far the closed form itself is from the preferences (mass off
        the answers is not in it). Coverage is the share of the minority's preferences that the policy covers. The
        official divergence (arXiv 2405.16455) is shown because it is the paper's; it is zero for a policy that always
        says the same. Places are by the mean over seeds, 1 is best; a setting that the collapse guard flags in a seed
        has none by the divergence.""",
    "overoptimisation": """The proxy is a reward model trained on the same 2000 pairs as the policies, without damaged
        responses among the losers, so that text that is no answer is new to it. Gold is the log of the people's share
        of an answer, and dataset.gold_offset_reward for anything else; its mean is exact. "Best on the way" is the
        highest gold reward at an evaluation while training, "at step" where that was. Chosen log-prob is its change
        against the reference, on held-out pairs. Wins are against the reference's sample of the same prompt.""",
    "grid": """TV, KL and rank correlation are on a pool of candidates, the same for every run of a seed: the responses
        of the data and samples of the reference; both sides are normalised over it (benchmarks/results/estimators.md
        says how far such numbers are from exact ones). **Read it with care**: half a million parameters, trained from
        nothing on a few hundred dialogues, do not hold a conversation. The table shows that the paper's grid runs on
        real text and how to read it; it neither confirms nor contradicts the paper's result.""",
}


def paragraph(text: str) -> list[str]:
    """Return text as lines, and an empty one."""
    return [*textwrap.wrap(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False), ""]


def by_seed(runs: dict[int, Run], number: Number) -> dict[int, float]:
    """Return a number of every run that has it, by seed."""
    found = {seed: number(run) for seed, run in runs.items()}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def cell(values: Sequence[float]) -> str:
    """Return mean and half the width of its 95 % interval as text; the mean alone of one value, a dash of none.

    Three decimals, fewer where the mean is large; no minus before a zero.
    """
    if not values:
        return "–"
    found = mean_interval(values)
    digits = 3 if abs(found.mean) < 10 else 1 if abs(found.mean) < 1000 else 0
    mean = f"{round(found.mean, digits) + 0.0:.{digits}f}"
    return mean + (f" ± {found.half:.{digits}f}" if found.half is not None else "")


def table(name: str, runs: Runs) -> list[str]:
    """Return the study's table as markdown, the reference policy first; empty columns are left out."""
    every = [run for of_label in runs.values() for run in of_label.values()]
    columns = {
        header: number for header, number in COLUMNS[name].items() if any(number(run) is not None for run in every)
    }
    extra = {"collapse": places, "grid": against_baseline}.get(name, lambda runs: {})(runs)
    headers = [*columns, *extra, "flagged", "seeds"]
    lines = ["| | " + " | ".join(headers) + " |", "|---" + "|---:" * len(headers) + "|"]
    first = next(iter(runs.values()))
    numbers = [OF_REFERENCE.get(header) for header in columns]
    reference = ["–" if number is None else cell(list(by_seed(first, number).values())) for number in numbers]
    lines.append("| sft (reference) | " + " | ".join([*reference, *["–"] * len(extra), "–", str(len(first))]) + " |")
    for label, of_label in runs.items():
        cells = [cell(list(by_seed(of_label, number).values())) for number in columns.values()]
        cells += [column[label] for column in extra.values()]
        lines.append(f"| {label} | " + " | ".join([*cells, flagged(of_label), str(len(of_label))]) + " |")
    return [*lines, ""]


def flagged(runs: dict[int, Run]) -> str:
    """Return in how many seeds the collapse guard flags a setting."""
    crossed = by_seed(runs, metric("guard/crossed"))
    count = sum(value > 0 for value in crossed.values())
    return f"**{count} of {len(crossed)}**" if count else "no" if crossed else "–"


def places(runs: Runs) -> dict[str, dict[str, str]]:
    """Return each setting's place by TV and by the official divergence, which never ranks a flagged one."""
    found = {}
    for header, key, ranked in (
        ("place by TV", "pm/tv", runs),
        ("by divergence", "pm/divergence", {label: of for label, of in runs.items() if "*" not in flagged(of)}),
        ("were none flagged", "pm/divergence", runs),
    ):
        means = {label: list(by_seed(of, metric(key)).values()) for label, of in ranked.items()}
        order = sorted((sum(values) / len(values), label) for label, values in means.items() if values)
        place = {label: str(number) for number, (_, label) in enumerate(order, 1)}
        found[header] = {label: place.get(label, "–") for label in runs}
    return found


def against_baseline(runs: Runs) -> dict[str, dict[str, str]]:
    """Return each setting's change of TV and divergence against the paper's baseline, per cent, paired by seed.

    A setting that the guard flags has none of the divergence.
    """
    base = runs.get(GRID_BASELINE, {})
    tv, divergence = (
        {label: _change(by_seed(of, metric(key)), by_seed(base, metric(key))) for label, of in runs.items()}
        for key in ("pm/tv", "pm/divergence")
    )
    unflagged = {label: "flagged" if "*" in flagged(of) else divergence[label] for label, of in runs.items()}
    return {"TV against KL β=0.1": tv, "divergence against it": unflagged}


def _change(ours: dict[int, float], theirs: dict[int, float]) -> str:
    both = {seed: 100 * (ours[seed] / theirs[seed] - 1) for seed in ours.keys() & theirs.keys() if theirs[seed] > 0}
    if not both or ours == theirs:
        return "–"
    found = paired(both, dict.fromkeys(both, 0.0))
    return f"{found.mean:+.1f} %" + (f" ± {found.half:.1f}" if found.half is not None else "")


def elapsed(intervals: Sequence[Sequence[float]]) -> float:
    """Return the length of the union of [start, end] intervals."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def page(name: str, runs: Runs, about: About) -> str:
    """Return the whole markdown page."""
    versions = f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"
    done = sum(map(len, runs.values()))
    of_cells = "Cells are mean ± half the width of Student's 95 % interval" if len(about.seeds) > 1 else "One run a row"
    lines = [f"# {TITLES[name]}", ""]
    common = f": `{' '.join(about.overrides)}`" if about.overrides else ""
    seeds = f"Training seed{'s' if len(about.seeds) > 1 else ''} {', '.join(map(str, about.seeds))}"
    lines += paragraph(
        f"""`{about.command}`{common}. {seeds}; {done} of {about.planned} runs,
        {about.at_a_time} at a time with one thread each, on {os.cpu_count()} cores ({platform.machine()}), {versions}:
        {elapsed(about.attempts) / 60:.0f} minutes. {of_cells}."""
    )
    if about.missing:
        lines += paragraph(f"**Missing**, because they failed: {'; '.join(about.missing)}.")
    return "\n".join([*lines, *paragraph(NOTES[name]), *table(name, runs)]).rstrip() + "\n"


def write_csv(name: str, runs: Runs, path: Path) -> None:
    """Write every number of the table, run by run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", "seed", "column", "value"])
        columns = {**COLUMNS[name], "flagged": metric("guard/crossed")}
        for label, of_label in runs.items():
            for seed, run in of_label.items():
                values = {header: number(run) for header, number in columns.items()}
                writer.writerows([label, seed, header, f"{v:.6g}"] for header, v in values.items() if v is not None)


def read_run(folder: Path) -> Run:
    """Return what a finished run folder holds; only metrics.json and config.yaml have to be there."""

    def lines(name: str) -> list[dict[str, Any]]:
        file = folder / name
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []

    distributions = folder / "distributions.json"
    return Run(
        yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")),
        json.loads((folder / "metrics.json").read_text(encoding="utf-8")),
        lines("training_log.jsonl"),
        json.loads(distributions.read_text(encoding="utf-8")) if distributions.is_file() else [],
    )
