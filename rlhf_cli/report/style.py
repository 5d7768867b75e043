"""How every figure looks: the colours of algorithms and their settings, the font, names as a picture writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

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
FAINT, GRID = "#555555", "#E5E5E5"
# Settings of one algorithm share its hue, so markers tell the lines apart where the tints come close.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PALE_STEP, PALEST = 0.33, 0.6  # share of white that each further setting's tint gains; that of the last one
WIDTH = 9.0  # inches; reads well at a README's 900 pixels
DPI = 200
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.family": "DejaVu Sans",
}
GREEK = {"alpha": "α", "beta": "β", "eta": "η"}


def algorithm(name: str) -> str:
    """Return the algorithm of a display name: its first word."""
    return name.partition(" ")[0]


def hues(names: Iterable[str]) -> dict[str, str]:
    """Return the colour of each name's algorithm: its own, or the next spare one."""
    spare = cycle(SPARE)
    found: dict[str, str] = {}
    chosen = {}
    for name in names:
        kind = algorithm(name)
        if kind not in chosen:
            chosen[kind] = COLOURS.get(kind) or next(spare)
        found[name] = chosen[kind]
    return found


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each name: the algorithm's own for its first setting, paler tints for its others."""
    tinted = {}
    for name, hue in hues(names).items():
        alike = [other for other in names if algorithm(other) == algorithm(name)]
        step = min(PALE_STEP, PALEST / max(len(alike) - 1, 1))
        tinted[name] = _tint(hue, step * alike.index(name))
    return tinted


def markers(names: Sequence[str]) -> dict[str, str]:
    """Return a marker for each name: its place among the settings of its algorithm."""
    found: dict[str, str] = {}
    for name in names:
        before = sum(algorithm(other) == algorithm(name) for other in found)
        found[name] = MARKERS[before % len(MARKERS)]
    return found


def written(name: str) -> str:
    """Return a name as a picture writes it: coefficients by their letter, `pm alpha=0.1` as `pm α=0.1`."""
    return re.sub(r"\b(alpha|beta|eta)(?==)", lambda match: GREEK[match[1]], name)


def legend_columns(labels: Iterable[str], width: float = WIDTH) -> int:
    """Return how many columns of a legend fit in `width` inches."""
    longest = max(map(len, labels), default=1)
    return max(1, int(width / (0.64 + 0.078 * longest)))


def _tint(colour: str, white: float) -> str:
    channels = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (255 - channel) * white):02X}" for channel in channels)
