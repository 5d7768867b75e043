"""The figure of a reward model's trust report: six panels, drawn from the plain lists of trust.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.report.style import COLOURS, OFF_SET, REWARD_MODEL, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (10.0, 6.9)  # inches
BLUE, ORANGE, GREEN, GREY = COLOURS["pm"], COLOURS["kl_ppo"], COLOURS["rpo"], REWARD_MODEL
PALE, FAINT, SMALL = "#D0D0D0", "#555555", 7.5
DOTS: dict[str, Any] = {"fmt": "o", "color": BLUE, "markersize": 4.5, "elinewidth": 1.2}
BARS, BAR_HEIGHT = 0.3, 0.19  # the strip of count bars below a reliability curve, and its highest bar
READINGS = {"raw": (BLUE, "o", "as trained"), "calibrated": (ORANGE, "s", "length-calibrated")}
WORDINGS = {True: (BLUE, "o", "trained wordings"), False: (ORANGE, "^", "held-out wordings")}
GROUPS = {
    "length difference": "preferred minus other, tokens",
    "length ratio": "ratio of the lengths",
    "embedding similarity": "similarity of the embeddings",
}
HALF, MINUS = r"$\delta^*\!/2$", "\u2212"

Panel = dict[str, Any]


def trust_figure(panels: Panel, path: Path, *, title: str) -> None:
    """Write the six panels of a trust report as one PNG.

    Args:
        panels: as `trust_report` returns them and trust.json keeps them.
        path: the PNG to write.
        title: of the figure: which reward model on which data.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        figure.set_layout_engine("constrained", w_pad=0.09, h_pad=0.09)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
        (first, second, third), (fourth, fifth, sixth) = figure.subplots(2, 3)
        _reliability(first, panels["reliability"])
        _margins(second, panels["margins"])
        _length(third, panels["length"])
        _accuracy(fourth, panels["accuracy"])
        _scores(fifth, panels["scores"])
        if panels["gold"] is not None:
            _gold(sixth, panels["gold"])
        else:
            _percentiles(sixth, panels["percentiles"])
        _legends(figure)
        figure.savefig(path, dpi=180)


def _reliability(axes: Axes, panel: Panel) -> None:
    """How often the more confident side won, by its confidence; below, how many pairs."""
    bins = panel["bins"]
    _head(axes, "Is its confidence earned?", "confidence in the side it prefers", "share of wins of that side")
    _detail(axes, f"ECE {panel['ece']:.3f}; on the diagonal: earned; bars: pairs")
    most = max(row["count"] for row in bins)
    for row in bins:
        middle, height = (row["left"] + row["right"]) / 2, BAR_HEIGHT * row["count"] / most
        axes.bar(middle, height, 0.9 * (row["right"] - row["left"]), bottom=-BARS, color=PALE)
        axes.text(middle, height - BARS + 0.01, _brief(row["count"]), ha="center", va="bottom", fontsize=7, color=FAINT)
    axes.plot([0.5, 1], [0.5, 1], color="black", linestyle="--", linewidth=1)
    observed = [row["observed"] for row in bins]
    axes.errorbar([row["predicted"] for row in bins], observed, _whiskers(bins, observed), clip_on=False, **DOTS)
    axes.set(xlim=(0.49, 1.01), ylim=(-BARS, 1.03))
    axes.set(xticks=[0.5, 0.6, 0.7, 0.8, 0.9, 1], yticks=[0, 0.25, 0.5, 0.75, 1])


def _margins(axes: Axes, panel: Panel) -> None:
    """Margins, and where the prior-constrained loss has its optimum."""
    _head(axes, "How far apart are two responses?", "margin: preferred minus other, nats", "pairs")
    edges, half, mean = panel["edges"], panel["half"], panel["mean"]
    shown = panel["count"] + (half["count"] if half is not None and not half["constant"] else [])
    axes.stairs(panel["count"], edges, fill=True, color=BLUE, alpha=0.5, label="margin")
    _mark(axes, mean, max(shown), color=BLUE, label=f"mean {_number(mean)}")
    if edges[0] < 0 < edges[-1]:
        _mark(axes, 0, max(shown), color="black", linewidth=0.8)
    _detail(axes, "below 0: ordered wrongly")
    if half is None:
        return
    if not half["constant"]:
        outside = f" ({_brief(half['outside'])} off the axis)" if half["outside"] else ""
        axes.stairs(half["count"], edges, color=ORANGE, linewidth=1.3, label=HALF + outside)
    kind = HALF if half["constant"] else f"median {HALF}"
    where: dict[str, Any] = {"linestyle": "--", "label": f"{kind} {_number(half['median'])}"}
    if half["median"] <= edges[-1]:
        _mark(axes, half["median"], max(shown), color=ORANGE, **where)
    else:
        axes.plot([], [], color=ORANGE, linewidth=1.5, **where)


def _length(axes: Axes, panel: Panel) -> None:
    """What the longer response is given more, by how much longer it is."""
    curves = panel["curves"]
    _head(axes, "Is length rewarded?", "length: longer minus shorter, tokens", "reward: longer minus shorter, nats")
    if not curves[0]["bins"]:
        _note(axes, "All pairs are of equal length.")
        return
    _detail(axes, "mean, and the middle half of the pairs")
    axes.axhline(0, color="black", linewidth=0.8)
    for curve in curves:
        colour, marker, name = READINGS[curve["name"]]
        tokens, means = [row["tokens"] for row in curve["bins"]], [row["mean"] for row in curve["bins"]]
        correlation = "" if curve["correlation"] is None else f", correlation {_number(curve['correlation'])}"
        axes.plot(tokens, means, color=colour, marker=marker, markersize=4, linewidth=1.5, label=name + correlation)
        low, high = [row["low"] for row in curve["bins"]], [row["high"] for row in curve["bins"]]
        axes.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlim(left=0)


def _accuracy(axes: Axes, panel: Panel) -> None:
    """Accuracy by length difference and by similarity: one row a bin, with its interval and its pairs."""
    _head(axes, "Where is it right?", "accuracy, with 95 % interval", "")
    _detail(axes, f"{panel['accuracy']:.3f} overall (line); pairs on the right")
    axes.axvline(panel["accuracy"], color=BLUE, linewidth=1, alpha=0.6)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    across = axes.get_yaxis_transform()
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    place, labels = 0.0, {}
    for group in panel["groups"]:
        name = GROUPS[group["by"]]
        axes.text(0.01, place, name, transform=across, va="center", fontsize=SMALL, weight="bold", bbox=white)
        for row in group["bins"]:
            place += 1
            labels[place] = _span(row["from"], row["to"], whole=group["by"] == "length difference")
            axes.errorbar([row["accuracy"]], [place], xerr=_whiskers([row], [row["accuracy"]]), clip_on=False, **DOTS)
            count = _brief(row["count"])
            axes.text(1.03, place, count, transform=across, va="center", fontsize=SMALL, color=FAINT)
        place += 1.3
    axes.set_yticks(list(labels), labels.values(), fontsize=SMALL)
    axes.tick_params(axis="y", length=0)
    rows = [row for group in panel["groups"] for row in group["bins"]]
    ends = min(0.5, *(row["low"] for row in rows)), max(0.5, *(row["high"] for row in rows))
    axes.set(xlim=(max(ends[0] - 0.02, 0), min(ends[1] + 0.02, 1)), ylim=(place - 0.5, -0.7))
    axes.grid(axis="y", visible=False)


def _scores(axes: Axes, panel: Panel | None) -> None:
    """Rewards of dataset responses and of a policy's samples."""
    _head(axes, "Where will a policy push it?", "reward, nats", "density")
    if panel is None:
        _note(axes, "No policy was sampled.")
        return
    edges, top = panel["edges"], max(panel["dataset"] + panel["policy"])
    _detail(axes, f"{100 * panel['policy_beyond']:.1f} % of samples beyond 99 % of the data")
    axes.stairs(panel["dataset"], edges, fill=True, color=GREY, alpha=0.55, label="dataset responses")
    axes.stairs(panel["policy"], edges, color=GREEN, linewidth=1.7, label=f"samples of {_end(panel['name'])}")
    _mark(axes, panel["dataset_percentile_99"], top, color=OFF_SET, linestyle="--", label="99th percentile of the data")
    best = f"best sample of a prompt, mean {_number(panel['policy_best_mean'])}"
    _mark(axes, panel["policy_best_mean"], top, color=GREEN, linestyle=":", label=best)


def _gold(axes: Axes, panel: Panel) -> None:
    """Reward against gold of every answer, each question's mean taken out."""
    _head(axes, "Is it what people want?", "gold reward of an answer, nats", "its reward, nats")
    known = {"TV": panel["tv"], "Spearman": panel["spearman"]}
    numbers = [f"{name} {_number(value)}" for name, value in known.items() if value is not None]
    _detail(axes, "; ".join([*([", ".join(numbers)] if numbers else []), "centred by question"]))
    axes.axline((0, 0), slope=1, color="black", linestyle="--", linewidth=1)
    for trained, (colour, marker, name) in WORDINGS.items():
        shown = [point for point in panel["points"] if point["trained"] is trained]
        if shown:
            gold, reward = [point["gold"] for point in shown], [point["reward"] for point in shown]
            axes.scatter(gold, reward, s=13, color=colour, marker=marker, alpha=0.55, linewidths=0, label=name)


def _percentiles(axes: Axes, panel: Panel) -> None:
    """Where gold is not known: the percentiles in numbers, each row below its name."""
    _head(axes, "Percentiles, nats", "", "")
    _detail(axes, "gold rewards are not known for these data")
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    columns = [(number + 0.9) / len(panel["levels"]) for number in range(len(panel["levels"]))]
    for x, level in zip(columns, panel["levels"], strict=True):
        axes.text(x, 0.92, f"{level} %", ha="right", fontsize=SMALL, color=FAINT)
    for number, (name, values) in enumerate(panel["rows"].items()):
        y = 0.82 - 0.19 * number
        axes.text(0.02, y, name.replace("delta*/2", HALF), fontsize=SMALL, weight="bold")
        for x, value in zip(columns, values, strict=True):
            axes.text(x, y - 0.08, _number(value), ha="right", fontsize=8)


def _head(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set_title(title, fontsize=9.5, loc="left", weight="bold", pad=17)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(color="#ECECEC", linewidth=0.7)
    axes.set_axisbelow(True)


def _detail(axes: Axes, words: str) -> None:
    """Write the numbers of a panel between its title and its axes."""
    text = axes.annotate(words, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=SMALL, color=FAINT)
    text.set_in_layout(False)  # long words may not narrow the panel


def _mark(axes: Axes, x: float, top: float, **style: Any) -> None:
    """Draw a vertical line as high as the data, which leaves the legend free."""
    axes.vlines([x], 0, 1.04 * top, **{"linewidth": 1.5, **style})


def _note(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=FAINT)
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="")


def _legends(figure: Figure) -> None:
    """Put a legend above the marks of each panel that has any, in room made for it."""
    for axes in figure.axes:
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + (high - low) * (0.05 + 0.085 * len(handles)))
            axes.legend(loc="upper left", fontsize=SMALL, frameon=False, borderaxespad=0.1, labelspacing=0.3)


def _whiskers(rows: list[Panel], values: list[float]) -> list[list[float]]:
    """Return the distances from each value to both ends of its interval; a value may lie a rounding outside."""
    below = [max(value - row["low"], 0.0) for row, value in zip(rows, values, strict=True)]
    return [below, [max(row["high"] - value, 0.0) for row, value in zip(rows, values, strict=True)]]


def _span(low: float, high: float, *, whole: bool) -> str:
    ends = [f"{end:+.0f}" if whole and end else f"{end:.0f}" if whole else f"{end:.2f}" for end in (low, high)]
    return (ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}").replace("-", MINUS)


def _brief(count: int) -> str:
    """Return a count in four characters: 999, 1.2k, 12k."""
    if count < 1000:
        return str(count)
    return f"{count / 1000:.1f}k" if count < 9950 else f"{count / 1000:.0f}k"


def _end(name: str, longest: int = 22) -> str:
    """Return a name, of a long one (a folder) its end."""
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def _number(value: float) -> str:
    return (f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}").replace("-", MINUS)
