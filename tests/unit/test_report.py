from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf_cli.report.figures import _colours, choose_questions, curves, distance, preference_bars
from rlhf_cli.report.tables import Run, columns, comparison_table, group_runs, legend, to_csv, to_markdown, to_rich


def run_of(name: str, seed: int = 0, metrics: dict[str, float] | None = None, **settings: Any) -> Run:
    config: dict[str, Any] = {"seed": seed, "run_dir": f"{name}{seed}", "algo": {"name": name, "beta": 1.0}}
    config |= {"dataset": {"source": "survey", "seed": 0}, "tracker": {"name": "none"}, "reward": {"name": "bt"}}
    for key, value in settings.items():
        group, _, leaf = key.partition("__")
        if leaf:
            config[group] = {**config.get(group, {}), leaf: value}
        else:
            config[group] = value
    return Run(Path(f"{name}{seed}"), name, config, {"pm/tv": 0.5} if metrics is None else metrics, [], [])


def entry(question: int, people: list[float], reference: list[float], **changes: Any) -> dict[str, Any]:
    shares: dict[str, Any] = dict.fromkeys(("reward_model", "policy"), people)
    answers = [f"answer {letter}" for letter in "abcdefgh"[: len(people)]]
    head = {"question": question, "prompt": f"Question {question}?", "heldout": False, "answers": answers}
    offsets = {"policy_offset": 0.0, "reference_offset": 0.0}
    return {**head, "people": people, "reference": reference, "optimum": None, **shares, **offsets, **changes}


def size_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


# --- tables


def test_seeds_share_a_row_with_mean_and_sample_deviation() -> None:
    # values 0.1, 0.2, 0.3: mean 0.2, sample variance (0.01 + 0 + 0.01) / 2 = 0.01, deviation 0.1
    (row,) = comparison_table([run_of("pm", seed, {"pm/tv": 0.1 * (seed + 1)}) for seed in range(3)])
    assert (row.name, row.runs) == ("pm", 3)
    cell = row.cells["pm/tv"]
    assert cell.mean == pytest.approx(0.2)
    assert cell.spread == pytest.approx(0.1)


def test_settings_that_differ_name_the_row_and_places_do_not() -> None:
    runs = [run_of("pm", 0, algo__alpha=0.02), run_of("pm", 0, algo__alpha=None), run_of("kl_ppo", 0)]
    runs.append(run_of("pm", 1, algo__alpha=0.02, tracker={"name": "wandb"}, store_dir="elsewhere"))
    groups = group_runs(runs)
    assert {name: [run.seed for run in group] for name, group in groups.items()} == {
        "kl_ppo": [0],
        "pm alpha=0.02": [0, 1],
        "pm alpha=null": [0],
    }


def test_a_group_s_name_stands_for_the_values_it_brings() -> None:
    runs = [run_of("pm", reward={"name": "bt", "negative_share": 0.25})]
    runs.append(run_of("pm", reward={"name": "gold", "negative_share": 0.0}))
    assert list(group_runs(runs)) == ["pm reward=bt", "pm reward=gold"]
    runs.append(run_of("pm", reward={"name": "bt", "negative_share": 0.5}))
    names = list(group_runs(runs))
    assert len(names) == 3
    assert "pm reward=bt reward.negative_share=0.5" in names


def test_rows_are_ordered_and_unknown_algorithms_follow() -> None:
    runs = [run_of(name) for name in ("zeta", "rpo", "pm", "sft", "kl_ppo")]
    assert [row.name for row in comparison_table(runs)] == ["sft", "kl_ppo", "pm", "rpo", "zeta"]


def test_reference_row_counts_each_seed_once_and_has_no_optimum() -> None:
    metrics = {"pm/tv": 0.1, "optimum/tv": 0.2, "reference/pm/tv": 0.6, "reference/optimum/tv": 0.7}
    runs = [
        run_of(name, seed, metrics, algo__beta=beta) for name, beta in (("pm", 1.0), ("dpo", 0.1)) for seed in (0, 1)
    ]
    rows = {row.name: row for row in comparison_table(runs)}
    assert rows["sft"].runs == 2
    assert rows["sft"].cells["pm/tv"].mean == pytest.approx(0.6)
    assert "optimum/tv" not in rows["sft"].cells
    assert rows["pm"].cells["optimum/tv"].mean == pytest.approx(0.2)


def test_references_with_different_targets_stay_apart() -> None:
    metrics = {"pm/tv": 0.1, "reference/pm/tv": 0.6}
    rows = comparison_table([run_of("pm", 0, metrics), run_of("pm", 0, metrics, reward={"name": "gold"})])
    assert [row.name for row in rows] == ["sft reward=bt", "sft reward=gold", "pm reward=bt", "pm reward=gold"]


def test_no_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        comparison_table([])


def test_markdown_shows_missing_numbers_as_a_dash_and_explains_every_column() -> None:
    rows = comparison_table([run_of("rpo", seed, {"pm/tv": 0.25, "reward/mean": 12345.6}) for seed in (0, 1)])
    lines = to_markdown(rows).splitlines()
    assert lines[2] == "| rpo | 2 | 0.250 ± 0.000 | – | – | – | – | – | – | – | 1.23e+04 ± 0.000 | – |"
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    for _, header in columns(rows):
        assert sum(line.startswith(f"- {header}: ") for line in lines) == 1


def test_free_text_has_its_own_columns_and_intervals() -> None:
    metrics = {"pm/pair_tv": 0.3, "pm/pair_tv/lo": 0.25, "pm/pair_tv/hi": 0.36, "pm/pair_tv/n": 200, "eos_rate": 1.0}
    rows = comparison_table([run_of("pm", 0, metrics)])
    assert "| 0.300 [0.250, 0.360] |" in to_markdown(rows)
    assert [key for key, _ in columns(rows)][:2] == ["pm/pair_tv", "pm/divergence"]
    assert "pm/pair_tv/lo" not in rows[0].cells


def full_metrics() -> dict[str, float]:
    keys = "pm/tv pm/tv_max pm/kl_rm_policy pm/minority_mass pm/minority_mass_target pm/offset_mass optimum/tv gold/tv"
    return {key: -12.345 for key in (*keys.split(), "reward/mean", "kl/sequence")}


def test_terminal_table_fits_100_columns_with_nothing_cut() -> None:
    runs = [run_of("kl_ppo", seed, full_metrics(), algo__alpha=alpha) for seed in (0, 1) for alpha in (0.02, None)]
    console = Console(width=100, record=True, file=io.StringIO())
    rows = comparison_table(runs)
    console.print(to_rich(rows))
    text = console.export_text()
    assert "…" not in text
    assert text.count("-12.35") + text.count("-12.34") == 2 * len(columns(rows))
    assert "2 seeds" in text
    assert all(len(line) <= 100 for line in legend(rows)[:-1])


def test_infinite_values_are_shown_as_they_are() -> None:
    rows = comparison_table(
        [run_of("pm", 0, {"pm/tv": 0.1, "pm/kl_rm_policy": value}) for value in (1.0, float("inf"))]
    )
    assert "| inf ± nan |" in to_markdown(rows)


def test_csv_holds_every_metric_with_its_own_count() -> None:
    runs = [run_of("pm", 0, {"pm/tv": 0.1, "gold/tv": 0.3}), run_of("pm", 1, {"pm/tv": 0.3})]
    lines = list(csv.DictReader(io.StringIO(to_csv(comparison_table(runs)))))
    assert [(line["metric"], line["seeds"]) for line in lines] == [("gold/tv", "1"), ("pm/tv", "2")]
    assert float(lines[1]["mean"]) == pytest.approx(0.2)
    assert lines[0]["std"] == ""


# --- figures


def test_distance_counts_mass_off_the_set() -> None:
    # 0.5 * (|.6 - .3| + |.4 - .4| + .3) = 0.3
    assert distance([0.6, 0.4], [0.3, 0.4], 0.3) == pytest.approx(0.3)


def test_questions_with_the_largest_gap_and_real_minorities_come_first() -> None:
    lopsided = entry(0, [0.9, 0.1], [0.1, 0.9])
    far, near = entry(1, [0.6, 0.4], [0.1, 0.9]), entry(2, [0.5, 0.5], [0.4, 0.6])
    heldout = entry(1, [0.6, 0.4], [0.1, 0.9], heldout=True, prompt="Another wording?")
    chosen = choose_questions([lopsided, heldout, near, far])
    assert [item["prompt"] for item in chosen] == ["Question 1?", "Question 2?", "Question 0?"]
    assert len(choose_questions([entry(i, [0.6, 0.4], [0.5, 0.5]) for i in range(9)])) == 4


def test_bars_are_written_at_readme_width_and_widen_for_many_policies(tmp_path: Path) -> None:
    worlds = [entry(0, [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]), entry(1, [0.6, 0.4], [0.2, 0.8])]
    preference_bars(worlds, tmp_path / "one.png", title="one")
    preference_bars(worlds, tmp_path / "many.png", title="many", policies={f"pm {i}": worlds for i in range(8)})
    assert size_of(tmp_path / "one.png")[0] == 1800
    assert size_of(tmp_path / "many.png")[0] > 1800


def test_bars_refuse_nothing_and_other_questions(tmp_path: Path) -> None:
    world = [entry(0, [0.6, 0.4], [0.2, 0.8])]
    with pytest.raises(ValueError, match="No distributions"):
        preference_bars([], tmp_path / "x.png", title="")
    with pytest.raises(ValueError, match="No distributions"):
        preference_bars(world, tmp_path / "x.png", title="", policies={})
    with pytest.raises(ValueError, match="dpo has no distribution over the answers to 'Question 0"):
        preference_bars(world, tmp_path / "x.png", title="", policies={"dpo": [entry(1, [0.6, 0.4], [0.2, 0.8])]})
    assert not (tmp_path / "x.png").exists()


def test_curves_are_written_and_empty_logs_refused(tmp_path: Path) -> None:
    log = [{"step": step, "loss": 1.0, "pm/tv": value} for step in (0, 25) for value in (0.5, 0.7)]
    curves({"pm": log, "dpo": [{"step": 5, "loss": 1.0}]}, tmp_path / "curves.png", ["pm/tv", "pm/offset_mass"])
    assert size_of(tmp_path / "curves.png")[0] == 1800
    with pytest.raises(ValueError, match="No log line holds any of the metrics pm/tv"):
        curves({"pm": [{"step": 1, "loss": 1.0}]}, tmp_path / "none.png", ["pm/tv"])


def test_curves_average_over_seeds_and_draw_the_target() -> None:
    from rlhf_cli.report.figures import _curves

    log = [{"step": 25, "pm/minority_mass": 0.5}, {"step": 0, "pm/minority_mass": 0.2, "pm/minority_mass_target": 0.6}]
    log.append({"step": 25, "pm/minority_mass": 0.7})
    (axes,) = _curves({"pm": log}, ["pm/minority_mass"]).axes
    mean, target = axes.get_lines()
    assert list(mean.get_xdata()) == [0, 25]
    assert list(mean.get_ydata()) == pytest.approx([0.2, 0.6])
    assert list(target.get_ydata()) == pytest.approx([0.6, 0.6])


def test_every_policy_has_a_colour_of_its_own() -> None:
    colours = _colours(["kl_ppo", "pm alpha=0.02", "pm alpha=null", "mine"])
    assert len(set(colours.values())) == 4
    assert colours["pm alpha=0.02"] == _colours(["pm"])["pm"]
