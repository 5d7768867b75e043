"""The figures: who is heard (bars of every answer's share) and how alignment gets there (curves of the metrics)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUESTIONS = 4
MINORITY = 0.3  # share of people outside the largest answer that makes a question worth showing
ANSWER_CHARACTERS = 27
# Okabe-Ito, safe for colour blindness; any further algorithm takes the next of SPARE.
COLOURS = {
    "policy": "#0072B2",
    "kl_ppo": "#D55E00",
    "pm": "#0072B2",
    "dpo": "#CC79A7",
    "rpo": "#009E73",
    "dpm": "#56B4E9",
}
SPARE = ("#E69F00", "#999933", "#882255", "#44AA99", "#AA4499")
PEOPLE, REWARD_MODEL, REFERENCE, OFF_SET = "#333333", "#8C8C8C", "#B0935A", "#B22222"
HEADINGS = {
    "pm/tv": "pm/tv: distance from the\nreward model's preferences",
    "pm/minority_mass": "pm/minority_mass: share of all\nanswers but the favourite",
    "pm/offset_mass": "pm/offset_mass: share of text\nthat is not a valid answer",
}
# Inches; 9 wide reads well at a README's 900 pixels.
WIDTH, LABELS, COLUMN, BAR = 9.0, 1.95, 0.95, 0.165
TITLE, NAME_LINE, BLOCK_TITLE, FOOTER = 0.46, 0.17, 0.5, 0.78
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.family": "DejaVu Sans",
}

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
        figure.savefig(path, dpi=200)


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
        figure.savefig(path, dpi=200)


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
    from matplotlib.figure import Figure

    blocks = [_columns(entry, policies) for entry in chosen]
    colours = [PEOPLE, REWARD_MODEL, REFERENCE, *_colours(policies).values()]
    heights = [BLOCK_TITLE + BAR * (len(entry["answers"]) + 1) for entry in chosen]
    width = max(WIDTH, LABELS + COLUMN * len(colours))
    column = (width - LABELS) / len(colours)
    names = [textwrap.fill(name, int(11 * column)) for name in ("people", "reward model", "reference", *policies)]
    header = TITLE + NAME_LINE * max(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(width, header + sum(heights) + FOOTER))
    limit = 1.06 * max(max(*shares, offset) for block in blocks for shares, offset in block)
    top = figure.get_figheight() - header
    for entry, block, height in zip(chosen, blocks, heights, strict=True):
        order = sorted(range(len(entry["answers"])), key=lambda answer: -entry["people"][answer])
        for number, ((shares, offset), colour) in enumerate(zip(block, colours, strict=True)):
            box = (LABELS + number * column, top - height, column - 0.12, height - BLOCK_TITLE)
            axes = _place(figure, box)
            people = [entry["people"][answer] for answer in order]
            _panel(axes, people, [shares[answer] for answer in order], offset, colour, limit, is_people=number == 0)
            if number == 0:
                answers = [_short(entry["answers"][answer]) for answer in order]
                axes.set_yticks(range(len(answers) + 1), [*answers, "off the set"], fontsize=8.5)
                axes.get_yticklabels()[-1].set(color=OFF_SET, fontstyle="italic")
            if entry is chosen[-1]:
                axes.set_xticks([0, 0.5], ["0", "50 %"], fontsize=7.5, color="#555555")
        _write(figure, 0.08, top - 0.27, textwrap.shorten(entry["prompt"], 110), weight="bold")
        top -= height
    _frame(figure, title)
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        left, bottom = LABELS + number * column, figure.get_figheight() - header + 0.06
        _write(figure, left, bottom, name, weight="bold", color=colour, size=10)
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


def _panel(
    axes: Axes,
    people: Sequence[float],
    shares: Sequence[float],
    offset: float,
    colour: str,
    limit: float,
    *,
    is_people: bool,
) -> None:
    """Draw one column of one question: a bar an answer, a tick at the people's share, the distance from them."""
    answers = len(people)
    axes.barh(range(answers), shares, height=0.74, color=colour)
    axes.barh([answers], [offset], height=0.34, color=OFF_SET)
    axes.set(xlim=(0, limit), ylim=(answers + 0.5, -0.6), yticks=[], xticks=[])
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_color("#AAAAAA")
    axes.tick_params(length=0)
    if not is_people:
        for line_width, line_colour in ((2.8, "white"), (1.4, "black")):
            rows = range(answers)
            axes.vlines(people, [y - 0.42 for y in rows], [y + 0.42 for y in rows], line_colour, linewidth=line_width)
        tv = f"TV {distance(people, shares, offset):.2f}"
        axes.text(0, -0.75, tv, ha="left", va="bottom", fontsize=8, color="#333333")


def _frame(figure: Figure, title: str) -> None:
    """Write the title, and below all what the marks mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    top = figure.get_figheight()
    _write(figure, 0.08, top - 0.3, title, weight="bold", size=12)
    marks = [
        Line2D([], [], color="black", marker="|", linestyle="none", markersize=9, markeredgewidth=1.6),
        Patch(color=OFF_SET),
    ]
    words = ["the people's share", "mass on text that is not a valid answer"]
    below = 0.6 / top
    figure.legend(marks, words, loc="upper left", bbox_to_anchor=(0, below), ncols=2, frameon=False, fontsize=8.5)
    note = (
        "TV: total variation distance from the people's shares, 0 (the same) to 1 (nothing in common). "
        "Half of the questions: the reference has the people's favourite."
    )
    _write(figure, 0.08, 0.12, note, size=7.5, color="#555555")


def _curves(logs: dict[str, list[dict[str, float]]], keys: Sequence[str]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        for name, colour in _colours(logs).items():
            points = _points(logs[name], key)
            if not points:
                continue
            means = [sum(values) / len(values) for _, values in points]
            steps = [step for step, _ in points]
            axes.plot(steps, means, color=colour, linewidth=1.8, label=name, marker="o", markersize=2.5)
            low, high = [min(values) for _, values in points], [max(values) for _, values in points]
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        targets = [
            value for lines in logs.values() for _, values in _points(lines, f"{key}_target") for value in values
        ]
        if targets:
            axes.axhline(sum(targets) / len(targets), color="black", linestyle="--", linewidth=1.2, label="target")
        axes.set_title(HEADINGS.get(key, key), fontsize=9, loc="left")
        axes.set_xlabel("optimizer step")
        if axes.dataLim.ymin >= 0:
            axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#E5E5E5")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 7), frameon=False
    )
    return figure


def _points(lines: Iterable[dict[str, float]], key: str) -> list[tuple[int, list[float]]]:
    """Return (step, that metric's value in every seed) in the order of steps."""
    found: dict[int, list[float]] = {}
    for line in lines:
        if line.get(key) is not None:
            found.setdefault(int(line["step"]), []).append(line[key])
    return sorted(found.items())


def _colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each name: an algorithm's own for its first setting, spare ones for the rest."""
    free = [*SPARE]
    taken: dict[str, str] = {}
    for name in names:
        own = COLOURS.get(name.split()[0])
        if own is None or own in taken.values():
            own = free.pop(0)
            free.append(own)
        taken[name] = own
    return taken


def _place(figure: Figure, box: tuple[float, float, float, float]) -> Axes:
    """Return axes at (left, bottom, width, height) in inches."""
    width, height = figure.get_figwidth(), figure.get_figheight()
    return figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))


def _write(figure: Figure, left: float, bottom: float, words: str, **style: Any) -> None:
    figure.text(left / figure.get_figwidth(), bottom / figure.get_figheight(), words, va="baseline", **style)


def _short(answer: str) -> str:
    return textwrap.shorten(answer, ANSWER_CHARACTERS, placeholder=" …")
