"""The figures: who is heard (bars of every answer's share) and how alignment gets there (curves of the metrics)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.report.style import (
    DPI,
    FAINT,
    GRID,
    OFF_SET,
    PEOPLE,
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

QUESTIONS = 4
MINORITY = 0.3  # share of people outside the largest answer that makes a question worth showing
ANSWER_CHARACTERS = 32
HEADINGS = {
    "pm/tv": "pm/tv: distance from the\nreward model's preferences",
    "pm/minority_mass": "pm/minority_mass: share of all\nanswers but the favourite",
    "pm/offset_mass": "pm/offset_mass: share of text\nthat is not a valid answer",
}
# Inches.
LABELS, COLUMN, BAR = 2.3, 0.93, 0.165
TITLE, NAME_LINE, BLOCK_TITLE, FOOTER = 0.46, 0.17, 0.5, 0.78

Distribution = dict[str, Any]


def preference_bars(
    distributions: list[Distribution],
    path: Path,
    *,
    title: str,
    policies: dict[str, list[Distribution]] | None = None,
) -> None:
    """Write bars of every answer's share: one row a question, one column each for people, rewards and policies.

    A tick in every panel marks the people's share, so that an answer that is drowned out or inflated shows at once.
    The questions are those whose reference is furthest from the people (`choose_questions`).

    Args:
        distributions: as in distributions.json: shares of people, reward model, reference, policy.
        path: the PNG to write.
        title: of the figure.
        policies: name to distributions of the same questions, one column each; None: the policy of `distributions`.

    Raises:
        ValueError: nothing to draw, or a policy without one of the questions.
    """
    from matplotlib import rc_context

    policies = {"policy": distributions} if policies is None else policies
    chosen = choose_questions(distributions)
    if not chosen or not policies:
        raise ValueError("No distributions to draw.")
    with rc_context(STYLE):
        figure = _bars(chosen, policies, title)
        figure.savefig(path, dpi=DPI)


def curves(logs: dict[str, list[dict[str, float]]], path: Path, keys: Sequence[str]) -> None:
    """Write one panel per metric against the optimizer step, one line per algorithm: mean and range over seeds.

    Args:
        logs: algorithm to the log lines of all its seeds; lines without a key do not count for it.
        path: the PNG to write.
        keys: metric keys; one that has a `_target` beside it is drawn against it.

    Raises:
        ValueError: no line holds any of the keys.
    """
    from matplotlib import rc_context

    shown = [key for key in keys if any(_points(lines, key) for lines in logs.values())]
    if not shown:
        raise ValueError("No log line holds any of the metrics " + ", ".join(keys) + ".")
    with rc_context(STYLE):
        figure = _curves(logs, shown)
        figure.savefig(path, dpi=DPI)


def choose_questions(distributions: Iterable[Distribution], count: int = QUESTIONS) -> list[Distribution]:
    """Return the questions whose reference is furthest from the people, real minorities first, one wording each.

    Half of them, where there are as many, have a reference that shares the people's favourite: there a biased policy
    collapses on the majority; on the others it is led astray.
    """
    wordings: dict[int, Distribution] = {}
    for entry in distributions:
        best = wordings.get(entry["question"])
        if best is None or (best["heldout"] and not entry["heldout"]):
            wordings[entry["question"]] = entry

    def rank(entry: Distribution) -> tuple[bool, float, int]:
        gap = distance(entry["people"], entry["reference"], entry["reference_offset"])
        return (1 - max(entry["people"]) < MINORITY, -gap, entry["question"])

    ranked = sorted(wordings.values(), key=rank)
    shared = [entry for entry in ranked if _favourite(entry["people"]) == _favourite(entry["reference"])]
    others = [entry for entry in ranked if entry not in shared]
    kept = max(count - count // 2, count - len(others))
    return sorted(shared[:kept] + others[: count - min(kept, len(shared))], key=rank)


def _favourite(shares: Sequence[float]) -> int:
    return max(range(len(shares)), key=lambda answer: shares[answer])


def distance(people: Sequence[float], shares: Sequence[float], offset: float) -> float:
    """Return the total variation distance between two distributions on the answers, mass off the set included."""
    return 0.5 * (sum(abs(p - q) for p, q in zip(people, shares, strict=True)) + offset)


def _bars(chosen: list[Distribution], policies: dict[str, list[Distribution]], title: str) -> Figure:
    """Draw everything on one pair of axes that measures inches: many small axes take matplotlib seconds."""
    from matplotlib.figure import Figure

    blocks = [_columns(entry, policies) for entry in chosen]
    tints = [PEOPLE, REWARD_MODEL, REFERENCE, *colours([*policies]).values()]
    heights = [BLOCK_TITLE + BAR * (len(entry["answers"]) + 1) for entry in chosen]
    width = max(WIDTH, LABELS + COLUMN * len(tints))
    column = (width - LABELS) / len(tints)
    heads = ["people", "reward\nmodel", "reference", *(_narrow(name, int(11 * column)) for name in policies)]
    ink = [PEOPLE, REWARD_MODEL, REFERENCE, *hues(policies).values()]
    header = TITLE + NAME_LINE * max(head.count("\n") + 1 for head in heads)
    height = header + sum(heights) + FOOTER
    figure = Figure(figsize=(width, height))
    sheet = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    sheet.set_axis_off()
    scale = (column - 0.12) / (1.06 * max(max(*shares, offset) for block in blocks for shares, offset in block))
    top = height - header
    for entry, block, block_height in zip(chosen, blocks, heights, strict=True):
        _question(sheet, entry, block, tints, (top, column, scale))
        top -= block_height
    for number, (head, colour) in enumerate(zip(heads, ink, strict=True)):
        left = LABELS + number * column
        sheet.text(left, height - header + 0.06, head, va="baseline", weight="bold", color=colour, size=10)
        for share, words in ((0, "0"), (0.5, "50 %")):
            sheet.text(left + scale * share, top - 0.03, words, ha="center", va="top", size=7.5, color=FAINT)
    sheet.text(0.08, height - 0.3, title, weight="bold", size=12)
    _marks(figure, sheet)
    return figure


def _columns(entry: Distribution, policies: dict[str, list[Distribution]]) -> list[tuple[list[float], float]]:
    """Return (shares, mass off the set) of one question: people, reward model, reference, then each policy."""
    columns = [(entry["people"], 0.0), (entry["reward_model"], 0.0), (entry["reference"], entry["reference_offset"])]
    for name, entries in policies.items():
        found = next((other for other in entries if other["prompt"] == entry["prompt"]), None)
        if found is None or found["answers"] != entry["answers"]:
            raise ValueError(f"The policy {name} has no distribution over the answers to {entry['prompt']!r}.")
        columns.append((found["policy"], found["policy_offset"]))
    return columns


def _question(
    sheet: Axes,
    entry: Distribution,
    block: list[tuple[list[float], float]],
    tints: Sequence[str],
    place: tuple[float, float, float],
) -> None:
    """Draw one question: a bar an answer in every column, a tick at the people's share, the distance from them."""
    from matplotlib.collections import LineCollection, PolyCollection

    top, column, scale = place
    people = entry["people"]
    order = sorted(range(len(people)), key=lambda answer: -people[answer])
    rows = [top - BLOCK_TITLE - BAR * (row + 0.55) for row in range(len(people) + 1)]
    bars, fills, ticks, stems = [], [], [], []
    for number, ((shares, offset), tint) in enumerate(zip(block, tints, strict=True)):
        left = LABELS + number * column
        stems.append([(left, rows[0] + 0.6 * BAR), (left, rows[-1] - 0.5 * BAR)])
        for y, answer in zip(rows, order, strict=False):
            bars.append(_box(left, y, scale * shares[answer], 0.37 * BAR))
            ticks.append([(left + scale * people[answer], y + side * 0.42 * BAR) for side in (-1, 1)])
        bars.append(_box(left, rows[-1], scale * offset, 0.17 * BAR))
        fills += [tint] * len(people) + [OFF_SET]
        if number:
            words = f"TV {distance(people, shares, offset):.2f}"
            sheet.text(left, rows[0] + 0.8 * BAR, words, va="bottom", size=8, color="#333333")
    sheet.add_collection(PolyCollection(bars, facecolors=fills, linewidths=0))
    sheet.add_collection(LineCollection(stems, colors="#AAAAAA", linewidths=0.8))
    for line_width, line_colour in ((2.8, "white"), (1.4, "black")):
        # The first column is the people's own.
        sheet.add_collection(LineCollection(ticks[len(people) :], colors=line_colour, linewidths=line_width))
    for y, answer in zip(rows, order, strict=False):
        words = textwrap.shorten(entry["answers"][answer], ANSWER_CHARACTERS, placeholder=" …")
        sheet.text(LABELS - 0.05, y, words, ha="right", va="center_baseline", size=8.5)
    off: dict[str, Any] = {"style": "italic", "color": OFF_SET, "size": 8.5}
    sheet.text(LABELS - 0.05, rows[-1], "off the set", ha="right", va="center_baseline", **off)
    sheet.text(0.08, top - 0.27, textwrap.shorten(entry["prompt"], 110), weight="bold")


def _narrow(name: str, characters: int) -> str:
    """Return a name with a line for each of its words, long words broken."""
    return "\n".join(textwrap.fill(word, characters) for word in written(name).split())


def _box(left: float, middle: float, length: float, half: float) -> list[tuple[float, float]]:
    """Return the corners of a bar."""
    bottom, top, right = middle - half, middle + half, left + length
    return [(left, bottom), (right, bottom), (right, top), (left, top)]


def _marks(figure: Figure, sheet: Axes) -> None:
    """Write below all what the marks mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    tick = Line2D([], [], color="black", marker="|", linestyle="none", markersize=9, markeredgewidth=1.6)
    words = ["the people's share", "mass on text that is not a valid answer"]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, 0.6 / figure.get_figheight())}
    figure.legend([tick, Patch(color=OFF_SET)], words, ncols=2, frameon=False, fontsize=8.5, **place)
    note = (
        "TV: total variation distance from the people's shares, 0 (the same) to 1 (nothing in common). "
        "Half of the questions: the reference has the people's favourite."
    )
    sheet.text(0.08, 0.12, note, size=7.5, color=FAINT)


def _curves(logs: dict[str, list[dict[str, float]]], keys: Sequence[str]) -> Figure:
    from matplotlib.figure import Figure

    rows = -(-(len(logs) + 1) // legend_columns(map(written, logs)))
    figure = Figure(figsize=(WIDTH, 3.3 + 0.2 * rows), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        _metric(axes, logs, key)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = min(len(handles), legend_columns(handles))
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    if any(len(values) > 1 for lines in logs.values() for key in keys for _, values in _points(lines, key)):
        place |= {"title": "line: mean over seeds; band: from the lowest to the highest seed", "title_fontsize": 8}
    figure.legend(handles.values(), handles.keys(), **place)
    return figure


def _metric(axes: Axes, logs: dict[str, list[dict[str, float]]], key: str) -> None:
    """Draw one metric of every policy: the mean over seeds and, of several, the band from the lowest to the highest."""
    tints, shapes = colours([*logs]), markers([*logs])
    for name, lines in logs.items():
        points = _points(lines, key)
        if not points:
            continue
        steps = [step for step, _ in points]
        look: dict[str, Any] = {"color": tints[name], "marker": shapes[name], "markersize": 3, "linewidth": 1.6}
        axes.plot(steps, [sum(values) / len(values) for _, values in points], label=written(name), **look)
        low, high = [min(values) for _, values in points], [max(values) for _, values in points]
        axes.fill_between(steps, low, high, color=tints[name], alpha=0.18, linewidth=0)
    targets = [value for lines in logs.values() for _, values in _points(lines, f"{key}_target") for value in values]
    if targets:
        axes.axhline(sum(targets) / len(targets), color="black", linestyle="--", linewidth=1.2, label="target")
    axes.set_title(HEADINGS.get(key, key), fontsize=9, loc="left")
    axes.set_xlabel("optimizer step")
    if axes.dataLim.ymin >= 0:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GRID)


def _points(lines: Iterable[dict[str, float]], key: str) -> list[tuple[int, list[float]]]:
    """Return (step, that metric's value in every seed) in the order of steps."""
    found: dict[int, list[float]] = {}
    for line in lines:
        if line.get(key) is not None:
            found.setdefault(int(line["step"]), []).append(line[key])
    return sorted(found.items())
