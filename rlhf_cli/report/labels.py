"""Labels beside the points of a plot, each where it covers the least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 7.5  # points
# Directions tried, the best liked first, and distances from the point, in points.
DIRECTIONS = tuple(math.radians(angle) for angle in (45, 0, 90, -45, 135, 180, -90, -135, 20, 70, 110, 160))
DISTANCES = (5.0, 10.0, 17.0, 26.0)
FAR = 8.0  # beyond this distance a thin line leads from the point to its label
PAD = 1.0  # kept free around a label, in points
MARK = 4.5  # half the side of the square that a point takes, in points
OUTSIDE = 4.0  # how much worse it is to leave the axes than to cover something

Box = tuple[float, float, float, float]  # left, bottom, right, top


@dataclass(frozen=True)
class Label:
    """Words for the point (x, y), in data coordinates; without words only a place to keep free."""

    words: str
    x: float
    y: float
    colour: str


def place_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each label beside its point, clear of the points, the lines drawn so far and the other labels.

    The limits of the axes must be final. A place that covers nothing may not exist; then it is the one that covers
    least, and the label still stands at its point.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.font_manager import FontProperties

    renderer = FigureCanvasAgg(axes.figure.figure).get_renderer()
    font = FontProperties(family="DejaVu Sans", size=SIZE)
    scale = axes.figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    edges = (frame.x0, frame.y0, frame.x1, frame.y1)
    places = axes.transData.transform(np.array([(label.x, label.y) for label in labels]).reshape(-1, 2))
    taken = [_square(x, y, MARK * scale) for x, y in places]
    taken += [_square(x, y, scale) for x, y in _drawn(axes, 4 * scale)]
    for label, (x, y) in zip(labels, places, strict=True):
        if not label.words:
            continue
        width, height, _ = renderer.get_text_width_height_descent(label.words, font, False)
        size = width + 2 * PAD * scale, height + 2 * PAD * scale
        boxes = [
            (_beside(x, y, *size, angle, distance * scale), distance) for distance in DISTANCES for angle in DIRECTIONS
        ]
        box, distance = min(boxes, key=lambda choice: _cost(choice[0], taken, edges))
        taken.append(box)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        at = axes.transData.inverted().transform([middle, (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))])
        if distance > FAR:
            lead: dict[str, Any] = {"color": label.colour, "linewidth": 0.5, "alpha": 0.8, "zorder": 2}
            axes.plot([label.x, at[1][0]], [label.y, at[1][1]], **lead)
        look: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontproperties": font, "zorder": 4}
        axes.text(at[0][0], at[0][1], label.words, color=label.colour, **look)


def _drawn(axes: Axes, step: float) -> list[tuple[float, float]]:
    """Return points every `step` pixels along the lines of the axes."""
    found: list[tuple[float, float]] = []
    for line in axes.get_lines():
        corners = axes.transData.transform(line.get_xydata())
        found += [(float(x), float(y)) for x, y in corners]
        for start, end in zip(corners, corners[1:], strict=False):
            count = max(2, int(np.hypot(*(end - start)) / step))
            found += [(float(x), float(y)) for x, y in np.linspace(start, end, count)]
    return found


def _square(x: float, y: float, half: float) -> Box:
    return x - half, y - half, x + half, y + half


def _beside(x: float, y: float, width: float, height: float, angle: float, distance: float) -> Box:
    """Return the box of words whose nearest edge is about `distance` from the point, in the direction of `angle`."""
    across, up = math.cos(angle), math.sin(angle)
    middle_x, middle_y = x + across * (distance + width / 2), y + up * (distance + height / 2)
    return middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2


def _cost(box: Box, taken: Sequence[Box], edges: Box) -> float:
    """Return the area that a box covers of what is taken, and more for what lies outside the axes."""
    others = np.asarray(taken)
    across = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    up = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    covered = float((across.clip(0) * up.clip(0)).sum())
    inside = max(0.0, min(box[2], edges[2]) - max(box[0], edges[0])) * max(
        0.0, min(box[3], edges[3]) - max(box[1], edges[1])
    )
    return covered + OUTSIDE * ((box[2] - box[0]) * (box[3] - box[1]) - inside)
