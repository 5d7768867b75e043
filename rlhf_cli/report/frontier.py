"""The frontier figure: what reward costs, in drift from the reference and in distance from the preferences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.metrics.guard import crossed
from rlhf_cli.report.cells import finite
from rlhf_cli.report.labels import Label, place_labels
from rlhf_cli.report.run_groups import Run
from rlhf_cli.report.style import (
    DPI,
    GREEK,
    GRID,
    REFERENCE,
    REWARD_MODEL,
    STYLE,
    WIDTH,
    algorithm,
    hues,
    legend_columns,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REWARD = "reward/mean"
# Metric key, title and axis of each panel; the reference's drift from itself is 0 and is not measured.
PANELS = {
    "kl/sequence": ("What does reward cost in drift?", "kl/sequence: KL to the reference, nats"),
    "pm/tv": ("What does it cost in preference matching?", "pm/tv: distance from the reward model's preferences"),
}
HEIGHT = 3.8  # inches

Span = tuple[float, float, float]  # mean over seeds, lowest, highest


@dataclass(frozen=True)
class Point:
    """A group of runs: its display name, coefficients, what else tells it apart, both numbers, whether it collapsed."""

    name: str
    coefficients: dict[str, float | None]
    setting: str
    x: Span
    y: Span
    seeds: int
    flagged: bool


def frontier_figure(groups: dict[str, list[Run]], path: Path) -> bool:
    """Write reward against KL to the reference, and against pm/tv: a point a group, settings of an algorithm joined.

    Args:
        groups: display name to the finished runs of a group, one a seed; the reference may be among them.
        path: the PNG to write.

    Returns:
        Whether there was anything to draw: a group, not the reference, with both numbers of a panel.
    """
    from matplotlib import rc_context

    policies = {name: runs for name, runs in groups.items() if not any(run.is_reference for run in runs)}
    panels = {key: points for key in PANELS if (points := _points(policies, key))}
    if not panels:
        return False
    with rc_context(STYLE):
        _figure(groups, panels).savefig(path, dpi=DPI)
    return True


def _points(groups: dict[str, list[Run]], key: str) -> list[Point]:
    """Return a point for each group with a reward and the metric `key`."""
    points = []
    for name, runs in groups.items():
        x, y = _span(runs, key), _span(runs, REWARD)
        if x is None or y is None:
            continue
        algo = runs[0].config.get("algo", {})
        coefficients = {symbol: algo[symbol] for symbol in GREEK if symbol in algo}
        words = [word for word in name.split()[1:] if word.partition("=")[0] not in coefficients]
        flagged = any(crossed(finite(run.metrics)) for run in runs)
        points.append(Point(name, coefficients, " ".join(words), x, y, len(runs), flagged))
    return points


def _span(runs: Iterable[Run], key: str) -> Span | None:
    """Return (mean, lowest, highest) of a metric over runs, None where none has it or one is not finite."""
    values = [run.metrics[key] for run in runs if key in run.metrics]
    if not values or not all(map(math.isfinite, values)):
        return None
    return sum(values) / len(values), min(values), max(values)


def _reference(groups: dict[str, list[Run]], key: str) -> tuple[float, float] | None:
    """Return the reference's (metric, reward), means over seeds, None where either is unknown."""
    x, y = (_mean_of_reference(groups, wanted) for wanted in (key, REWARD))
    return None if x is None or y is None else (x, y)


def _mean_of_reference(groups: dict[str, list[Run]], key: str) -> float | None:
    """Return a metric of the reference, mean over the seeds: every run was measured beside it."""
    if key == "kl/sequence":
        return 0.0
    seeds: dict[int, float] = {}
    for run in (run for runs in groups.values() for run in runs):
        span = _span([run], key if run.is_reference else f"reference/{key}")
        if span is not None:
            seeds.setdefault(run.seed, span[0])
    return sum(seeds.values()) / len(seeds) if seeds else None


def chains(points: Sequence[Point]) -> list[tuple[list[Point], str | None]]:
    """Return the points to join, in order, and the coefficient along which: settings of one algorithm.

    Where several coefficients differ, one chain runs along the coefficient with the most values for each value of the
    others; None where a point stands alone.
    """
    found: list[tuple[list[Point], str | None]] = []
    for kind in dict.fromkeys((algorithm(point.name), point.setting) for point in points):
        members = [point for point in points if (algorithm(point.name), point.setting) == kind]
        values = {symbol: {point.coefficients.get(symbol) for point in members} for symbol in GREEK}
        along = max(("beta", "alpha", "eta"), key=lambda symbol: len(values[symbol]))
        if len(values[along]) == 1:
            found += [([point], None) for point in members]
            continue
        others = dict.fromkeys(_others(point, along) for point in members)
        for other in others:
            chain = [point for point in members if _others(point, along) == other]
            found.append((sorted(chain, key=lambda point: point.coefficients.get(along) or 0.0), along))
    return found


def _others(point: Point, along: str) -> tuple[tuple[str, float | None], ...]:
    return tuple((symbol, value) for symbol, value in point.coefficients.items() if symbol != along)


def _words(chain: Sequence[Point], along: str | None, points: Sequence[Point]) -> list[str]:
    """Return the label of each point of a chain: its coefficient, and on the first what tells the chain from others."""
    alike = [point for point in points if algorithm(point.name) == algorithm(chain[0].name)]
    first = chain[0].coefficients
    apart = [
        _coefficient(symbol, first.get(symbol))
        for symbol in GREEK
        if symbol != along and len({point.coefficients.get(symbol) for point in alike}) > 1
    ]
    if len({point.setting for point in alike}) > 1:
        apart.append(chain[0].setting)
    words = ["" if along is None else _coefficient(along, point.coefficients.get(along)) for point in chain]
    return [" ".join(filter(None, [words[0], *apart])), *words[1:]]


def _coefficient(symbol: str, value: float | None) -> str:
    return f"no {GREEK[symbol]}" if value is None else f"{GREEK[symbol]}={value:g}"


def _figure(groups: dict[str, list[Run]], panels: dict[str, list[Point]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT))
    left, gap, below = 0.72 / WIDTH, 0.035, 1.06 / HEIGHT
    across = (1 - left - gap * (len(panels) - 1) - 0.02) / len(panels)
    inks = hues([point.name for points in panels.values() for point in points])
    handles: dict[str, Any] = {}
    for number, (key, points) in enumerate(panels.items()):
        axes = figure.add_axes((left + number * (across + gap), below, across, 0.92 - below))
        axes.set_title(PANELS[key][0], fontsize=9.5, loc="left", weight="bold")
        axes.set_xlabel(PANELS[key][1])
        if number == 0:
            axes.set_ylabel("reward/mean, nats")
            axes.yaxis.set_label_coords(-0.5 / WIDTH / across, 0.5)
        else:
            axes.tick_params(labelleft=False)
        handles |= _panel(axes, points, _reference(groups, key), inks)
    _align(figure.axes)
    _legend(figure, handles, several=any(point.seeds > 1 for points in panels.values() for point in points))
    for axes, points in zip(figure.axes, panels.values(), strict=True):
        place_labels(axes, _labels(points, inks))
    return figure


def _panel(
    axes: Axes, points: Sequence[Point], reference: tuple[float, float] | None, inks: dict[str, str]
) -> dict[str, Any]:
    """Draw one panel and return the legend's handles by their words."""
    handles: dict[str, Any] = {}
    for chain, _ in chains(points):
        ink = inks[chain[0].name]
        axes.plot([p.x[0] for p in chain], [p.y[0] for p in chain], color=ink, linewidth=1.3, alpha=0.55, zorder=2)
    for point in points:
        ink = inks[point.name]
        (x, *x_ends), (y, *y_ends) = point.x, point.y
        look: dict[str, Any] = {"color": ink, "linewidth": 1, "alpha": 0.7, "zorder": 2.5}
        axes.plot(x_ends, [y, y], **look)
        axes.plot([x, x], y_ends, **look)
        shape: dict[str, Any] = {"marker": "o", "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
        if point.flagged:
            shape = {"marker": "X", "markersize": 8, "markerfacecolor": "white", "markeredgewidth": 1.3}
        axes.plot([x], [y], color=ink, linestyle="none", zorder=3, **shape)
    solid: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 6}
    for point in points:
        handles.setdefault(algorithm(point.name), axes.plot([], [], color=inks[point.name], **solid)[0])
    grey: dict[str, Any] = {"linestyle": "none", "color": REWARD_MODEL}
    if reference is not None:
        shape = {"marker": "D", "markersize": 7, "zorder": 3, "linestyle": "none", "color": REFERENCE}
        handles["reference"] = axes.plot(*([value] for value in reference), **shape)[0]
    if any(point.flagged for point in points):
        shape = {"marker": "X", "markersize": 8, "markerfacecolor": "white", "markeredgewidth": 1.3, **grey}
        handles["flagged: beyond a bound of the guard"] = axes.plot([], [], **shape)[0]
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(0.09)
    return handles


def _align(panels: Sequence[Axes]) -> None:
    """Give all panels the same rewards, and let distances begin at 0."""
    ends = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        low, high = axes.get_xlim()
        axes.set_xlim(min(-0.04 * high, max(low, -0.04 * high)), high)


def _legend(figure: Figure, handles: dict[str, Any], *, several: bool) -> None:
    """Write below the panels what the colours and marks mean."""
    ordered = sorted(handles, key=lambda words: (words.startswith("flagged"), words == "reference"))
    columns = min(len(ordered), max(2, legend_columns(["flagged"])))
    title = "point: mean over seeds; bars: from the lowest to the highest seed" if several else None
    place: dict[str, Any] = {"loc": "lower center", "ncols": columns, "frameon": False, "handletextpad": 0.2}
    figure.legend([handles[words] for words in ordered], ordered, title=title, title_fontsize=8, **place)


def _labels(points: Sequence[Point], inks: dict[str, str]) -> list[Label]:
    """Return what is written beside each point, with all points as places to keep free."""
    found = []
    for chain, along in chains(points):
        words = _words(chain, along, points)
        found += [Label(w, p.x[0], p.y[0], inks[p.name]) for w, p in zip(words, chain, strict=True)]
    return found
