"""The studies' pictures, and the numbers that they and the tables draw from a run's curves and distributions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_cli.report.style import COLOURS, FAINT, GRID, STYLE, WIDTH, colours

TV, MINORITY = "#D55E00", "#0072B2"
REDUCTIONS = {
    "sum": "SFT term: sum over tokens",
    "token_mean": "SFT term: mean over tokens",
    "seq_mean": "SFT term: mean of sequence means",
}


@dataclass(frozen=True)
class Run:
    """What is read of a finished run: config, final metrics, log lines, distributions of every question."""

    config: dict[str, Any]
    metrics: dict[str, float | None]
    log: list[dict[str, Any]]
    distributions: list[dict[str, Any]]

    def value(self, key: str) -> float | None:
        """Return a final metric, None where there is none."""
        return self.metrics.get(key)

    def curve(self, keys: Sequence[str]) -> list[tuple[float, float]]:
        """Return (step, value) of the first of the keys that the log has."""
        for key in keys:
            found = [(line["step"], line[key]) for line in self.log if line.get(key) is not None]
            if found:
                return found
        return []

    def trained(self) -> list[dict[str, Any]]:
        """Return the distributions of the wordings that were trained on."""
        return [row for row in self.distributions if not row["heldout"]]


Runs = dict[str, dict[int, Run]]  # setting, seed

# Panels of the over-optimisation study, the first PANELS that the logs have: heading, and keys, the first that counts.
PANELS = 3
CURVES = {
    "proxy: the reward model's reward": ("reward/mean",),
    "gold: the people's reward": ("gold/reward",),
    "log-prob of chosen: change": ("chosen_logps_change", "train/chosen_logps_change"),
    "distance from the people (TV)": ("gold/tv",),
}


def gold_curve(run: Run) -> list[tuple[float, float]]:
    """Return (step, gold reward) while training."""
    return run.curve(CURVES["gold: the people's reward"])


def gold_reward(run: Run, who: str = "policy") -> float | None:
    """Return the mean gold reward, nats: log of the people's share of an answer, gold_offset_reward off the set."""
    logged = run.value("gold/reward" if who == "policy" else f"{who}/gold/reward")
    if logged is not None or not run.distributions:
        return logged
    outside = run.config["dataset"]["gold_offset_reward"]
    rewards = [float(np.dot(row[who], np.log(row["people"]))) + row[f"{who}_offset"] * outside for row in run.trained()]
    return float(np.mean(rewards))


def closed_form(row: dict[str, Any], beta: float) -> np.ndarray:
    """Return KL-PPO's optimum on the answers of a question, pi_ref q^(1/beta) normalised, (A,); q = softmax(r)."""
    with np.errstate(divide="ignore"):
        weight = np.log(row["reference"]) + np.log(row["reward_model"]) / beta
    share = np.exp(weight - weight.max())
    return share / share.sum()


def target_distance(row: dict[str, Any], shares: np.ndarray) -> tuple[float, float]:
    """Return total variation of shares on the answers from the reward model's preferences, and their minority mass."""
    target = np.array(row["reward_model"])
    return 0.5 * float(np.abs(shares - target).sum()), float(shares.sum() - shares[target.argmax()])


def optimum_distance(run: Run) -> float | None:
    """Return pm/tv of the run's own closed-form optimum on the answers; None where there is none."""
    rows = [row for row in run.trained() if row.get("optimum")]
    return float(np.mean([target_distance(row, np.array(row["optimum"]))[0] for row in rows])) if rows else None


def figure(name: str, runs: Runs) -> Figure:
    """Return the picture of a study."""
    with rc_context(STYLE):
        return {"collapse": _collapse, "overoptimisation": _overoptimisation, "grid": _grid}[name](runs)


def _collapse(runs: Runs) -> Figure:
    picture = Figure(figsize=(WIDTH, 4.1), layout="constrained")
    left, right = picture.subplots(1, 2, sharey=True)
    panels = {
        "kl_ppo": (left, "beta", "KL-PPO as β falls"),
        "pm": (right, "alpha", "preference matching, β = 1, over α"),
    }
    for algo, (axes, key, title) in panels.items():
        of_algo = [run for of in runs.values() for run in of.values() if run.config["algo"]["name"] == algo]
        points = [(run.config["algo"][key], run) for run in of_algo]
        for metric, colour, words in (("pm/tv", TV, "distance from preferences (TV)"),
                                      ("pm/minority_mass", MINORITY, "minority mass")):  # fmt: skip
            _band(axes, [(x, run.value(metric)) for x, run in points], colour, words)
        _optimum_lines(axes, points, algo)
        targets = [value for _, run in points if (value := run.value("pm/minority_mass_target")) is not None]
        if targets:
            axes.axhline(np.mean(targets), color="black", linestyle=":", linewidth=1.2, label="minority mass: target")
        axes.set(xscale="log", xlabel={"beta": "β", "alpha": "α"}[key], ylim=(0, 1))
        axes.set_title(title, loc="left", fontsize=10)
        ticks = sorted({x for x, _ in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        axes.grid(axis="y", color=GRID)
    left.invert_xaxis()  # stronger optimisation to the right
    _legend(picture, [left, right])
    return picture


def _optimum_lines(axes: Axes, points: list[tuple[float, Run]], algo: str) -> None:
    """Draw where the closed-form optimum itself lies: for KL at every beta, for PM at the runs' own alphas."""
    rows = [(x, row) for x, run in points for row in run.trained()]
    if not rows:
        return
    found: dict[float, list[tuple[float, float]]] = {}
    if algo == "kl_ppo":
        places = [x for x, _ in points]
        for beta in np.geomspace(min(places), max(places), 40):
            found[float(beta)] = [target_distance(row, closed_form(row, beta)) for _, row in rows]
    else:
        for x, row in rows:
            if row.get("optimum"):
                found.setdefault(x, []).append(target_distance(row, np.array(row["optimum"])))
    lines = np.array([[x, *np.mean(values, axis=0)] for x, values in sorted(found.items())]).reshape(-1, 3)
    for column, colour, words in ((1, TV, "TV"), (2, MINORITY, "minority mass")):
        axes.plot(lines[:, 0], lines[:, column], color=colour, linestyle="--", linewidth=1.1, alpha=0.8,
                  label=f"{words}: closed-form optimum")  # fmt: skip


def _overoptimisation(runs: Runs) -> Figure:
    there = [(heading, keys) for heading, keys in CURVES.items() if any(run.curve(keys) for run in _all(runs))]
    shown = dict(there[:PANELS])
    etas = sorted(
        {run.config["algo"]["eta"] for run in _all(runs) if run.config["algo"]["name"] == "rpo"}, reverse=True
    )
    tints = colours([f"rpo η={eta:g}" for eta in etas])
    picture = Figure(figsize=(WIDTH, 2.3 * len(REDUCTIONS) + 0.6), layout="constrained")
    panels = picture.subplots(len(REDUCTIONS), max(len(shown), 1), squeeze=False, sharex=True, sharey="col")
    for number, (row, (reduction, words)) in enumerate(zip(panels, REDUCTIONS.items(), strict=True)):
        for axes, (heading, keys) in zip(row, shown.items(), strict=False):
            _follow(
                axes, [run for run in _all(runs) if run.config["algo"]["name"] == "dpo"], keys, COLOURS["dpo"], "dpo"
            )
            for eta in etas:
                alike = [run for run in _all(runs) if _is_rpo(run, reduction, eta)]
                _follow(axes, alike, keys, tints[f"rpo η={eta:g}"], f"rpo η={eta:g}")
            axes.grid(axis="y", color=GRID)
            if number == 0:
                axes.set_title(heading, loc="left", fontsize=9, fontweight="bold")
            if number == len(REDUCTIONS) - 1:
                axes.set_xlabel("optimizer step")
        row[0].set_ylabel(words, fontsize=8, color=FAINT)
    _legend(picture, panels.ravel(), columns=4)
    return picture


def _is_rpo(run: Run, reduction: str, eta: float) -> bool:
    algo = run.config["algo"]
    return algo["name"] == "rpo" and algo["sft_reduction"] == reduction and algo["eta"] == eta


def _follow(axes: Axes, runs: list[Run], keys: Sequence[str], colour: str, label: str) -> None:
    _band(axes, [point for run in runs for point in run.curve(keys)], colour, label, marker=None)


def _grid(runs: Runs) -> Figure:
    picture = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    panels = {"pm/tv": "distance from preferences (TV)", "reward/mean": "mean reward, nats"}
    panels |= {"kl/sequence": "KL to the reference, nats"}
    betas = sorted({run.config["algo"]["beta"] for run in _all(runs)})
    tints = {algo: colours([f"{algo} β={beta:g}" for beta in betas]) for algo in ("pm", "kl_ppo")}
    for axes, (key, title) in zip(picture.subplots(1, len(panels)), panels.items(), strict=True):
        for algo, beta in ((algo, beta) for algo in tints for beta in betas):
            alike = [
                run for run in _all(runs) if (run.config["algo"]["name"], run.config["algo"]["beta"]) == (algo, beta)
            ]
            label = f"{algo} β={beta:g}"
            if algo == "pm":
                points = [(run.config["algo"]["alpha"], run.value(key)) for run in alike]
                _band(axes, points, tints[algo][label], label)
                continue
            values = [value for run in alike if (value := run.value(key)) is not None]
            if values:
                axes.axhline(np.mean(values), color=tints[algo][label], linestyle="--", linewidth=1.4, label=label)
                axes.axhspan(min(values), max(values), color=tints[algo][label], alpha=0.12, linewidth=0)
        axes.set_title(title, loc="left", fontsize=10)
        alphas = sorted({run.config["algo"]["alpha"] for run in _all(runs) if run.config["algo"]["name"] == "pm"})
        axes.set_xlabel("α")
        if key != "reward/mean":
            axes.set_ylim(bottom=0)
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axes.grid(axis="y", color=GRID)
    _legend(picture, picture.axes)
    return picture


def _all(runs: Runs) -> list[Run]:
    return [run for of in runs.values() for run in of.values()]


def _band(
    axes: Axes, points: Iterable[tuple[float, float | None]], colour: str, label: str, marker: str | None = "o"
) -> None:
    """Draw the mean over seeds at each place, and their range as a band."""
    found: dict[float, list[float]] = {}
    for x, value in points:
        if value is not None:
            found.setdefault(x, []).append(value)
    if found:
        places = sorted(found)
        axes.plot(places, [np.mean(found[x]) for x in places], color=colour, linewidth=1.8, marker=marker, markersize=4,
                  label=label)  # fmt: skip
        low, high = [min(found[x]) for x in places], [max(found[x]) for x in places]
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)


def _legend(picture: Figure, panels: Iterable[Axes], columns: int = 3) -> None:
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        picture.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
        )
