from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.measure.trust import Gold, HeldOut, Spread, trust_report
from rlhf_cli.report.trust import _brief, _end, _number, _span, trust_figure


def report(count: int, *, bound: np.ndarray | None = None, everything: bool = True, equal: bool = False) -> Any:
    """Return the panels of `count` pairs as they are read back from trust.json."""
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(1, 1, count), rng.normal(0, 1, count)
    lengths = np.full((2, count), 7) if equal else rng.integers(1, 200, (2, count))
    calibrated = [scores - 0.01 * length for scores, length in zip((chosen, rejected), lengths, strict=True)]
    heldout = HeldOut(
        prompts=np.arange(count),
        chosen=chosen,
        rejected=rejected,
        raw_chosen=chosen,
        raw_rejected=rejected,
        calibrated_chosen=calibrated[0] if everything else None,
        calibrated_rejected=calibrated[1] if everything else None,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        label=np.ones(count),
        length_ratio=lengths.min(0) / lengths.max(0),
        cosine=rng.uniform(0.5, 1, count) if everything else None,
        bound=bound,
    )
    gold = Gold([rng.normal(0, 1, 4)] * 5, [rng.normal(0, 1, 4)] * 5, [True] * 4 + [False]) if everything else None
    spread = Spread(np.concatenate([chosen, rejected]), rng.normal(2, 1, (8, 3)), "sft") if everything else None
    return json.loads(json.dumps(trust_report(heldout, gold, spread)[1]))


def written(panels: Any, folder: Path) -> Any:
    """Draw the panels and return the picture, (height, width, 4)."""
    from matplotlib.image import imread

    path = folder / "trust.png"
    trust_figure(panels, path, title="bt on the survey world")
    return imread(path)


def inked(picture: Any) -> list[float]:
    """Return the share of each of the 2 x 3 panels that is not white."""
    height, width = picture.shape[:2]
    dark = picture[..., :3].min(-1) < 0.9
    boxes = [(row, column) for row in range(2) for column in range(3)]
    return [
        float(dark[row * height // 2 : (row + 1) * height // 2, column * width // 3 : (column + 1) * width // 3].mean())
        for row, column in boxes
    ]


@pytest.mark.parametrize(
    "panels",
    [
        report(400, bound=np.random.default_rng(1).uniform(1, 9000, 400)),
        report(10, bound=np.full(10, 4.5)),
        report(1),
    ],
    ids=["many, own bounds", "few, one bound", "one pair"],
)
def test_every_panel_is_drawn(panels: Any, tmp_path: Path) -> None:
    picture = written(panels, tmp_path)
    assert picture.shape[1] == 1800
    assert min(inked(picture)) > 0.01


def test_what_is_not_known_leaves_a_note_in_its_panel(tmp_path: Path) -> None:
    panels = report(50, everything=False)
    assert panels["gold"] is panels["scores"] is None
    bare = inked(written(panels, tmp_path))
    whole = inked(written(report(50), tmp_path))
    assert min(bare) > 0.003  # a note, or the table of percentiles
    assert bare[4] < whole[4]
    panels["percentiles"]["rows"] = {}
    assert inked(written(panels, tmp_path))[5] < bare[5]


def test_pairs_of_equal_length_are_drawn(tmp_path: Path) -> None:
    panels = report(20, equal=True)
    assert panels["length"]["curves"][0]["bins"] == []
    assert min(inked(written(panels, tmp_path))) > 0.003


@pytest.mark.parametrize(("panel", "key"), [("margins", "count"), ("scores", "policy"), ("scores", "dataset")])
def test_a_panel_shows_its_numbers(tmp_path: Path, panel: str, key: str) -> None:
    """Other numbers are another picture of that panel (both are in the middle column), and of no other one."""
    panels = report(60)
    before = written(panels, tmp_path)
    panels[panel][key] = panels[panel][key][::-1]
    changed = np.abs(before - written(panels, tmp_path)).max(-1) > 0
    width = changed.shape[1]
    assert changed.any()
    assert not changed[:, : int(0.33 * width)].any()
    assert not changed[:, int(0.7 * width) :].any()


def test_numbers_are_short() -> None:
    assert [_brief(count) for count in (7, 999, 1000, 9949, 9950, 12345)] == ["7", "999", "1.0k", "9.9k", "10k", "12k"]
    assert [_number(value) for value in (-1.234, 0.0, 1234.5)] == ["−1.23", "0.00", "1234"]  # noqa: RUF001
    assert _end("the SFT policy") == "the SFT policy"
    assert _end("runs/2026/" + 40 * "x" + "/model") == "…" + 15 * "x" + "/model"
    assert _span(-3, 2, whole=True) == "−3 to +2"
    assert _span(0, 0, whole=True) == "0"
    assert _span(0.25, 0.5, whole=False) == "0.25 to 0.50"
