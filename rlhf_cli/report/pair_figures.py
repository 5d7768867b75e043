"""The figure of preference pairs: how sure reward model, reference and policies are of the preferred response.

Histograms of the pairwise preference as in arXiv:2405.16455, Figures 2 and 4, each policy's reliability curve, and by
how much the responses of a pair differ in length, because that alone drives a policy's preference to 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rlhf_cli.report.style import (
    DPI,
    FAINT,
    GRID,
    REFERENCE,
    REWARD_MODEL,
    STYLE,
    WIDTH,
    colours,
    hues,
    legend_columns,
    markers,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS = 5  # histograms in a row, at most
LENGTH_BINS = 30
NAME_CHARACTERS = 20
# Inches.
LEFT, GAP, RIGHT = 0.62, 0.16, 0.08
TITLE, HISTOGRAM, BELOW_ROW, BETWEEN_ROWS = 0.62, 1.0, 0.62, 0.5
HEAD, LOWER, FOOT, ENTRY = 0.42, 1.9, 0.55, 0.19

Pairs = dict[str, Any]


def pair_figure(pairs: dict[str, Pairs], path: Path) -> bool:
    """Write histograms of pairwise preference, reliability curves with their ECE, and length differences.

    Args:
        pairs: policy to the content of its pairs.json; reward model, reference and lengths are the first policy's.
        path: the PNG to write.

    Returns:
        Whether there was anything to draw: a policy that was measured on pairs.
    """
    from matplotlib import rc_context

    shown = {name: found for name, found in pairs.items() if sum(found.get("counts", {}).get("policy", []))}
    if not shown:
        return False
    with rc_context(STYLE):
        _figure(shown).savefig(path, dpi=DPI)
    return True


def calibration_error(reliability: dict[str, Any]) -> float:
    """Return the expected calibration error of a reliability curve, in [0, 1].

    ECE = sum_k n_k / N |observed_k - predicted_k|  over the bins k that hold pairs
    """
    bins = _filled(reliability)
    return sum(n * abs(observed - predicted) for predicted, observed, n in bins) / sum(n for *_, n in bins)


def _filled(reliability: dict[str, Any]) -> list[tuple[float, float, int]]:
    """Return (predicted, observed, count) of the bins that hold pairs."""
    columns = (reliability["predicted"], reliability["observed"], reliability["count"])
    return [row for row in zip(*columns, strict=True) if row[2]]


def _figure(pairs: dict[str, Pairs]) -> Figure:
    from matplotlib.figure import Figure

    first = next(iter(pairs.values()))
    tints, inks = colours([*pairs]), hues(pairs)
    panels = [(name, first["counts"][key], ink, ink) for name, key, ink in _SHARED if sum(first["counts"][key])]
    panels += [(written(name), found["counts"]["policy"], tints[name], inks[name]) for name, found in pairs.items()]
    rows = math.ceil(len(panels) / ACROSS)
    columns = math.ceil(len(panels) / rows)
    labels = [f"{written(name)}: ECE {calibration_error(found['reliability']):.3f}" for name, found in pairs.items()]
    foot = FOOT + ENTRY * math.ceil(len(labels) / legend_columns(labels))
    height = TITLE + rows * HISTOGRAM + (rows - 1) * BETWEEN_ROWS + BELOW_ROW + HEAD + LOWER + foot
    figure = Figure(figsize=(WIDTH, height))
    width = (WIDTH - LEFT - RIGHT - GAP * (columns - 1)) / columns
    tallest = max(max(counts) / sum(counts) for _, counts, *_ in panels)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        bottom = height - TITLE - HISTOGRAM - row * (HISTOGRAM + BETWEEN_ROWS)
        axes = _place(figure, LEFT + column * (width + GAP), bottom, width, HISTOGRAM)
        _histogram(axes, panel, first["edges"], tallest, is_left=column == 0)
    figure.text(LEFT / WIDTH, 1 - 0.25 / height, "How sure is each of the preferred response?", size=9.5, weight="bold")
    middle = height - TITLE - rows * HISTOGRAM - (rows - 1) * BETWEEN_ROWS - 0.38
    words = "probability that the preferred response of a pair is preferred"
    figure.text((LEFT + WIDTH - RIGHT) / 2 / WIDTH, middle / height, words, ha="center", va="center")
    half = (WIDTH - LEFT - RIGHT - 0.62) / 2
    handles = _reliability(_place(figure, LEFT, foot, half, LOWER), pairs, tints)
    _lengths(_place(figure, LEFT + half + 0.62, foot, half, LOWER), first["length_difference"])
    place: dict[str, Any] = {"loc": "lower center", "ncols": min(len(labels), legend_columns(labels))}
    figure.legend(handles, labels, frameon=False, borderaxespad=0.1, **place)
    return figure


_SHARED = (("reward model", "reward_model", REWARD_MODEL), ("reference", "reference", REFERENCE))


def _place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Return axes at a place in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def _histogram(
    axes: Axes, panel: tuple[str, Sequence[int], str, str], edges: Sequence[float], tallest: float, *, is_left: bool
) -> None:
    """Draw how often each probability was predicted, and say how much of it is next to 0 or 1."""
    name, counts, tint, ink = panel
    shares = [count / sum(counts) for count in counts]
    axes.stairs(shares, edges, fill=True, color=tint)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.22 * tallest), xticks=[0, 0.5, 1])
    axes.set_xticklabels(["0", "0.5", "1"])
    axes.axvline(0.5, color="black", ymax=0.85, linewidth=0.7, linestyle=":")
    title = name if len(name) <= NAME_CHARACTERS else f"…{name[1 - NAME_CHARACTERS :]}"
    axes.set_title(title, fontsize=9, loc="left", weight="bold", color=ink, pad=4)
    ends = f"{100 * (shares[0] + shares[-1]):.0f} % within {edges[1]:g} of 0 or 1"
    axes.text(0.5, 0.99, ends, transform=axes.transAxes, ha="center", va="top", fontsize=7.5, color=FAINT)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.locator_params(axis="y", nbins=4)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    if is_left:
        axes.set_ylabel("pairs")
    else:
        axes.tick_params(labelleft=False)


def _reliability(axes: Axes, pairs: dict[str, Pairs], tints: dict[str, str]) -> list[Any]:
    """Draw each policy's reliability curve, the larger a mark the more pairs, and return the legend's handles."""
    shapes = markers([*pairs])
    handles = []
    lows = [0.5]
    for name, found in pairs.items():
        bins = _filled(found["reliability"])
        look: dict[str, Any] = {"color": tints[name], "linewidth": 1.4}
        predicted, observed = [row[0] for row in bins], [row[1] for row in bins]
        total = sum(row[2] for row in bins)
        axes.plot(predicted, observed, alpha=0.8, **look)
        sizes = [10 + 60 * row[2] / total for row in bins]
        axes.scatter(predicted, observed, s=sizes, color=tints[name], marker=shapes[name], zorder=3)
        handles += axes.plot([], [], marker=shapes[name], markersize=4, **look)
        lows += observed
    ends = [found["reliability"]["edges"] for found in pairs.values()]
    low, high = min(edges[0] for edges in ends), max(edges[-1] for edges in ends)
    axes.plot([low, high], [low, high], color="black", linestyle="--", linewidth=1)
    _head(axes, "Is a policy's confidence earned?", "on the dashed line: earned; the larger a mark, the more pairs")
    axes.set(xlabel="confidence in the side it prefers", ylabel="share of wins of that side")
    axes.set(xlim=(low - 0.01, high + 0.015), ylim=(max(0, min(lows) - 0.05), 1.03))
    return handles


def _lengths(axes: Axes, differences: Sequence[int]) -> None:
    """Draw the length differences of the pairs."""
    _head(
        axes,
        "How far apart are the lengths of a pair?",
        "the further apart, the nearer a policy's preference to 0 or 1",
    )
    axes.set(xlabel="difference in length, tokens", ylabel="pairs")
    if not differences:
        return
    bins = min(LENGTH_BINS, int(max(differences)) + 1)
    axes.hist(differences, bins, range=(0, max(differences) + 1), color=REWARD_MODEL)
    middle = median(differences)
    axes.axvline(middle, color="black", linestyle="--", linewidth=1.2)
    _, top = axes.get_ylim()
    axes.set(xlim=(0, max(differences) + 1), ylim=(0, 1.1 * top))
    at: dict[str, Any] = {
        "xycoords": axes.get_xaxis_transform(),
        "textcoords": "offset points",
        "va": "top",
        "fontsize": 8,
    }
    axes.annotate(f"median {middle:g}", (middle, 1), (4, -2), **at)


def _head(axes: Axes, title: str, detail: str) -> None:
    axes.set_title(title, fontsize=9.5, loc="left", weight="bold", pad=17)
    axes.annotate(detail, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=7.5, color=FAINT)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
