from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.report.figures import _bars, _curves
from rlhf_cli.report.frontier import PANELS, _figure, _points, chains, frontier_figure
from rlhf_cli.report.labels import Label, place_labels
from rlhf_cli.report.pair_figures import _figure as pairs_figure
from rlhf_cli.report.pair_figures import calibration_error, pair_figure
from rlhf_cli.report.run_groups import Run
from rlhf_cli.report.style import REFERENCE, colours, hues, legend_columns, markers, written


def run(algorithm: str, seed: int = 0, *, beta: float = 1.0, metrics: dict[str, Any] | None = None, **algo: Any) -> Run:
    config = {"seed": seed, "algo": {"name": algorithm, "beta": beta, **algo}}
    found = {"reward/mean": 1.0, "kl/sequence": 2.0, "pm/tv": 0.3, "reference/reward/mean": 0.0, "reference/pm/tv": 0.5}
    return Run(Path("x"), algorithm, config, found if metrics is None else metrics, [], [])


def width_of(path: Path) -> int:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big")


def frontier(groups: dict[str, list[Run]]) -> Any:
    panels = {key: points for key in PANELS if (points := _points(groups, key))}
    return _figure(groups, panels)


def drawn(axes: Any, marker: str) -> list[tuple[float, float]]:
    """Return where a marker stands, handles of the legend left out."""
    lines = [line for line in axes.get_lines() if line.get_marker() == marker and len(line.get_xdata())]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines]


# --- frontier


def test_one_group_is_enough_and_none_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "frontier.png"
    assert frontier_figure({"pm": [run("pm")]}, path) is True
    assert width_of(path) == 1800
    for groups in (
        {},
        {"pm": []},
        {"pm": [run("pm", metrics={"reward/mean": 1.0})]},
        {"pm": [run("pm", metrics={"reward/mean": float("nan"), "pm/tv": 0.2})]},
        {"sft": [run("sft")]},
    ):
        assert frontier_figure(groups, tmp_path / "none.png") is False
    assert not (tmp_path / "none.png").exists()


def test_a_point_is_the_mean_over_seeds_with_the_range() -> None:
    seeds = [{"reward/mean": reward, "kl/sequence": kl} for reward, kl in ((1.0, 2.0), (2.0, 4.0), (6.0, 3.0))]
    (axes,) = frontier({"pm": [run("pm", number, metrics=found) for number, found in enumerate(seeds)]}).axes
    assert drawn(axes, "o") == [(3.0, 3.0)]  # (2 + 4 + 3) / 3, (1 + 2 + 6) / 3
    bars = [line.get_xydata().tolist() for line in axes.get_lines() if len(line.get_xdata()) == 2]
    assert [[2.0, 3.0], [4.0, 3.0]] in bars
    assert [[3.0, 1.0], [3.0, 6.0]] in bars


def test_the_reference_is_a_diamond_of_its_own_seeds() -> None:
    seeds = [{**run("pm").metrics, "reference/reward/mean": value, "reference/pm/tv": 0.4} for value in (0.1, 0.3)]
    groups = {name: [run(name, n, metrics=found) for n, found in enumerate(seeds)] for name in ("pm", "dpo")}
    drift, matching = frontier(groups).axes
    assert drawn(drift, "D") == [(0.0, pytest.approx(0.2))]
    assert {line.get_color() for line in drift.get_lines() if line.get_marker() == "D"} == {REFERENCE}
    assert drawn(matching, "D") == [(pytest.approx(0.4), pytest.approx(0.2))]
    alone = frontier({"pm": [run("pm", metrics={"reward/mean": 1.0, "pm/tv": 0.2})]})
    assert drawn(alone.axes[0], "D") == []


def test_the_reference_measured_by_itself_is_no_policy() -> None:
    of_itself = run("sft", metrics={"reward/mean": -0.5, "pm/tv": 0.6})
    groups = {"sft": [of_itself], "pm": [run("pm", metrics={"reward/mean": 1.0, "pm/tv": 0.2})]}
    figure = _figure(groups, {"pm/tv": _points({"pm": groups["pm"]}, "pm/tv")})
    assert drawn(figure.axes[0], "D") == [(0.6, -0.5)]
    assert len(drawn(figure.axes[0], "o")) == 1


def test_a_collapsed_policy_is_a_hollow_cross() -> None:
    collapsed = {**run("pm").metrics, "entropy/per_token": 0.01, "reference/entropy/per_token": 1.0}
    figure = frontier({"pm": [run("pm")], "dpo": [run("dpo"), run("dpo", 1, metrics=collapsed)]})
    for axes in figure.axes:
        assert len(drawn(axes, "o")) == 1
        assert len(drawn(axes, "X")) == 1
    crosses = [line for line in figure.axes[0].get_lines() if line.get_marker() == "X"]
    assert {line.get_markerfacecolor() for line in crosses} == {"white"}
    assert "flagged: beyond a bound of the guard" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_settings_of_one_coefficient_are_joined_in_its_order_and_labelled() -> None:
    groups = {f"kl_ppo beta={beta:g}": [run("kl_ppo", beta=beta)] for beta in (2.0, 0.1, 1.0)}
    groups["pm"] = [run("pm")]
    points = _points(groups, "pm/tv")
    (chain, along), (alone, nothing) = chains(points)
    assert [point.coefficients["beta"] for point in chain] == [0.1, 1.0, 2.0]
    assert (along, nothing, len(alone)) == ("beta", None, 1)
    words = [text.get_text() for text in frontier(groups).axes[0].texts]
    assert sorted(words) == ["β=0.1", "β=1", "β=2"]


def test_a_grid_has_a_chain_for_each_value_of_the_other_coefficient() -> None:
    grid = {
        f"pm alpha={alpha} beta={beta:g}": [run("pm", beta=beta, alpha=alpha)]
        for beta in (0.1, 0.5, 1.0)
        for alpha in (0.3, None)
    }
    found = chains(_points(grid, "pm/tv"))
    assert [along for _, along in found] == ["beta", "beta"]
    assert [[point.coefficients["beta"] for point in chain] for chain, _ in found] == [[0.1, 0.5, 1.0]] * 2
    assert [{point.coefficients["alpha"] for point in chain} for chain, _ in found] == [{0.3}, {None}]
    words = [text.get_text() for text in frontier(grid).axes[0].texts]
    assert sorted(words) == ["β=0.1 no α", "β=0.1 α=0.3", "β=0.5", "β=0.5", "β=1", "β=1"]


def test_other_settings_are_not_joined() -> None:
    groups = {f"pm reward={reward}": [run("pm")] for reward in ("bt", "gold")}
    assert [along for _, along in chains(_points(groups, "pm/tv"))] == [None, None]
    words = [text.get_text() for text in frontier(groups).axes[0].texts]
    assert words == ["reward=bt", "reward=gold"]


def test_labels_keep_clear_of_each_other_of_points_and_of_the_frame() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3))
    axes = figure.add_axes((0.1, 0.1, 0.8, 0.8), xlim=(0, 1), ylim=(0, 1))
    labels = [Label(f"β={number}", 0.98, 0.9 + 0.01 * number, "black") for number in range(4)]
    axes.plot([label.x for label in labels], [label.y for label in labels], "o")
    place_labels(axes, [*labels, Label("", 0.5, 0.5, "black")])
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert len(boxes) == 4
    assert not any(one.overlaps(other) for one in boxes for other in boxes if one is not other)
    frame = axes.get_window_extent(renderer)
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1 for box in boxes)
    dots = axes.transData.transform([(label.x, label.y) for label in labels])
    assert not any(box.contains(x, y) for box in boxes for x, y in dots)


# --- pairs


def pairs(policy: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    counts = {"reward_model": [1, 2, 3, 4], "reference": [4, 1, 1, 4], "policy": policy or [9, 0, 0, 1]}
    # |0.7 - 0.6| in 3 of 10 pairs and |0.5 - 0.9| in 7: ECE 0.03 + 0.28 = 0.31
    curve = {"edges": [0.5, 0.75, 1.0], "predicted": [0.6, 0.9], "observed": [0.7, 0.5], "count": [3, 7]}
    edges = [0.0, 0.25, 0.5, 0.75, 1.0]
    found = {"edges": edges, "counts": counts, "reliability": curve, "length_difference": [0, 3, 5], "pairs": 10}
    return {**found, **changes}


def test_calibration_error_weighs_bins_by_their_pairs_and_skips_empty_ones() -> None:
    assert calibration_error(pairs()["reliability"]) == pytest.approx(0.31)
    empty = {"edges": [0, 1, 2], "predicted": [0.6, None], "observed": [0.7, None], "count": [3, 0]}
    assert calibration_error(empty) == pytest.approx(0.1)


def test_pairs_are_drawn_and_nothing_is_not(tmp_path: Path) -> None:
    assert pair_figure({"pm": pairs()}, tmp_path / "pairs.png") is True
    assert width_of(tmp_path / "pairs.png") == 1800
    nothing = {"edges": [0, 1], "counts": {"reward_model": [0], "reference": [0], "policy": [0]}}
    for found in ({}, {"pm": {}}, {"pm": nothing}):
        assert pair_figure(found, tmp_path / "none.png") is False
    assert not (tmp_path / "none.png").exists()


def test_histograms_share_their_axes_and_say_what_is_certain() -> None:
    figure = pairs_figure({"pm alpha=0.1": pairs(), "dpo": pairs([0, 5, 5, 0])})
    *histograms, reliability, lengths = figure.axes
    assert [axes.get_title(loc="left") for axes in histograms] == ["reward model", "reference", "pm α=0.1", "dpo"]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in histograms}) == 1
    # 9 + 1 of 10 pairs in the first and the last bin; then none
    assert [axes.texts[0].get_text() for axes in histograms[2:]] == [
        "100 % within 0.25 of 0 or 1",
        "0 % within 0.25 of 0 or 1",
    ]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["pm α=0.1: ECE 0.310", "dpo: ECE 0.310"]
    assert "median 3" in [text.get_text() for text in lengths.texts]
    assert reliability.get_xlabel() == "confidence in the side it prefers"


def test_pairs_without_lengths_or_reference_leave_their_panels_out() -> None:
    counts = {"reward_model": [1, 1, 1, 1], "reference": [0, 0, 0, 0], "policy": [1, 1, 1, 1]}
    figure = pairs_figure({"pm": pairs(counts=counts, length_difference=[])})
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["reward model", "pm"]
    assert not figure.axes[-1].patches


def test_many_policies_take_several_rows(tmp_path: Path) -> None:
    many = {f"pm beta={number}": pairs() for number in range(10)}
    figure = pairs_figure(many)
    bottoms = {round(axes.get_position().y0, 3) for axes in figure.axes[:12]}
    assert len(bottoms) == 3
    assert figure.get_figwidth() == 9


# --- curves and bars


def log(values: tuple[float, ...]) -> list[dict[str, float]]:
    return [{"step": step, "pm/tv": value + 0.01 * step} for step in (0, 1) for value in values]


def test_the_band_is_the_range_over_seeds_and_is_explained() -> None:
    figure = _curves({"pm": log((0.1, 0.2, 0.6)), "dpo": log((0.3,))}, ["pm/tv"])
    (axes,) = figure.axes
    assert list(axes.get_lines()[0].get_ydata()) == pytest.approx([0.3, 0.31])  # (0.1 + 0.2 + 0.6) / 3
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (pytest.approx(0.1), pytest.approx(0.61))
    assert "band: from the lowest to the highest seed" in figure.legends[0].get_title().get_text()
    assert _curves({"pm": log((0.1,))}, ["pm/tv"]).legends[0].get_title().get_text() == ""


def test_the_legend_of_many_settings_stays_inside_the_figure() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _curves({f"kl_ppo alpha={a} beta={a}": log((0.1, 0.2)) for a in range(14)}, ["pm/tv"])
    FigureCanvasAgg(figure).draw()
    box, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= box.x0
    assert box.x1 <= page.x1


def test_a_bar_is_as_long_as_its_share() -> None:
    shares = {"people": [0.5, 0.3, 0.2], "reward_model": [0.2, 0.6, 0.2], "reference": [0.1, 0.1, 0.8]}
    world = {**shares, "policy": [0.2, 0.4, 0.3], "policy_offset": 0.1, "reference_offset": 0.0, "question": 0}
    world |= {"prompt": "Which?", "answers": ["a", "b", "c"], "heldout": False}
    (sheet,) = _bars([world], {"pm": [world]}, "title").axes
    boxes = [path.get_extents() for path in sheet.collections[0].get_paths()]
    lengths = [box.width / boxes[0].width * 0.5 for box in boxes]
    # Four columns: three answers, most people first, and what is off the set.
    expected = [0.5, 0.3, 0.2, 0, 0.2, 0.6, 0.2, 0, 0.1, 0.1, 0.8, 0, 0.2, 0.4, 0.3, 0.1]
    assert lengths == pytest.approx(expected)
    ticks = sheet.collections[-1].get_segments()
    assert len(ticks) == 9, "the people's share in every column but their own"
    words = [text.get_text() for text in sheet.texts]
    assert "TV 0.30" in words  # 0.5 (|0.2 - 0.5| + |0.4 - 0.3| + |0.3 - 0.2| + 0.1)


# --- style


def test_settings_of_an_algorithm_share_its_hue_in_tints() -> None:
    names = ["kl_ppo", *(f"pm beta={number}" for number in range(6)), "mine", "yours a=1", "yours a=2"]
    tints = colours(names)
    assert len(set(tints.values())) == len(names)
    assert tints["pm beta=0"] == hues(["pm"])["pm"]
    lightness = [sum(int(tints[f"pm beta={n}"][k : k + 2], 16) for k in (1, 3, 5)) for n in range(6)]
    assert lightness == sorted(lightness)
    assert len({hues(names)[name] for name in ("kl_ppo", "pm beta=0", "mine", "yours a=1")}) == 4
    assert len({markers(names)[f"pm beta={number}"] for number in range(6)}) == 6


def test_coefficients_are_written_as_letters() -> None:
    assert written("pm alpha=0.1 beta=null eta=2") == "pm α=0.1 β=null η=2"
    assert written("my_beta=1 alphabet dpo") == "my_beta=1 alphabet dpo"


def test_long_labels_take_few_legend_columns() -> None:
    assert legend_columns(["x" * 200]) == 1
    assert legend_columns(["pm", "dpo"]) > legend_columns(["pm alpha=0.1 beta=0.5"]) > 1
