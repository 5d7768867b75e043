from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fabricated_runs import run_of
from rich.console import Console

from rlhf_cli.report.columns import COLUMNS, Column, columns
from rlhf_cli.report.comparison import Comparison, compare
from rlhf_cli.report.csv_tables import rows_csv, runs_csv, summaries
from rlhf_cli.report.figures import choose_questions, curves, distance, preference_bars
from rlhf_cli.report.run_groups import Kind, Run
from rlhf_cli.report.style import colours
from rlhf_cli.report.tables import markdown, metric_table, page_table, to_markdown, to_rich


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


def compared(runs: Sequence[Run], **options: Any) -> Comparison:
    return compare("a world", runs[0].kind, runs, **options)


def printed(comparison: Comparison, width: int = 100) -> tuple[str, list[str]]:
    """Return the terminal's table, and the headers that fit."""
    table, shown = to_rich(comparison, width)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text(), [column.header for column in shown]


def full_metrics(keys: Sequence[Column], value: float = -12.345) -> dict[str, float]:
    found = {column.key: value for column in keys}
    return found | {f"{key}{end}": value for key in found for end in ("/lo", "/hi")}


def test_markdown_shows_ranks_intervals_dashes_and_explains_every_column() -> None:
    runs = [run_of("rpo", seed, {"pm/tv": 0.25, "reward/mean": 12345.6}) for seed in (0, 1)]
    comparison = compared([*runs, run_of("pm", 0, {"pm/tv": 0.5, "pm/tv/lo": 0.4, "pm/tv/hi": 0.6})])
    lines = to_markdown(comparison).splitlines()
    assert lines[0] == "| policy | seeds | rank | TV | reward |", "no column without a number"
    assert lines[2] == "| pm | 1 | 2 | 0.500 [0.400, 0.600] | – |"
    assert lines[3] == "| rpo | 2 | 1 | 0.250 ± 0.000 | 1.23e+04 ± 0.000 |"
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    for column in columns(comparison):
        assert sum(line.startswith(f"- {column.header}: ") for line in lines) == 1
    assert "- rank: by pm/tv, lower is better." in lines


def test_what_is_compared_collapsed_or_failed_is_said_below() -> None:
    bad = {"pm/tv": 0.5, "pm/offset_mass": 0.4}
    runs = [run_of("kl_ppo", 0, {"pm/tv": 0.4}), run_of("pm", 0, bad), run_of("pm", 1, {})]
    runs[2] = replace(runs[2], state="failed", reason="out of\nmemory")
    comparison = compared(runs, failed=[("algo=dpo", "x" * 200)])
    text = to_markdown(comparison)
    assert "| pm ! | 1 | 2 | 0.500 | -25.0% | +0.100 | 0.400 |" in text
    assert "| kl_ppo | 1 | 1 | 0.400 | B | B | – |" in text
    assert "| pm, seed 1 | failed | – | – | – | – | – |" in text
    assert "- ! pm may have collapsed: " in text
    assert "- B, the baseline: kl_ppo. " in text
    assert "- pm, seed 1: failed: out of memory\n" in text
    assert f"- algo=dpo: failed: {'x' * 98} …\n" in text


def test_an_improvement_that_rounds_to_nothing_has_no_minus() -> None:
    runs = [run_of("kl_ppo", 0, {"pm/tv": 0.5}), run_of("pm", 0, {"pm/tv": 0.50001})]
    assert "| pm | 1 | 2 | 0.500 | +0.0% |" in to_markdown(compared(runs))


def test_a_sampler_that_is_not_the_policy_is_named() -> None:
    text = to_markdown(compared([run_of("pm", 0, {"pm/tv": 0.1, "sampler/top_p": 0.9, "sampler/temperature": 1.0})]))
    assert "- Sampled with top_p 0.9: metrics that need the policy's own samples are left out.\n" in text
    assert "Sampled with" not in to_markdown(compared([run_of("pm")]))


def test_several_sets_have_titles_in_markdown_and_one_has_none() -> None:
    one = compared([run_of("pm")])
    assert markdown([one]) == to_markdown(one)
    assert markdown([one, replace(one, title="other")]).startswith("## a world\n\n| policy |")
    assert "\n\n## other\n\n| policy |" in markdown([one, replace(one, title="other")])


@pytest.mark.parametrize("kind", ["exact", "text", "rm"])
@pytest.mark.parametrize("seeds", [1, 2])
def test_terminal_table_fits_100_columns_with_nothing_cut(kind: Kind, seeds: int) -> None:
    metrics = full_metrics(COLUMNS[kind]) | ({"pool/size": 8.0} if kind == "text" else {})
    # What the baseline has as well is not compared: the improvements are wide too.
    base = dict(metrics)
    for key in ("pm/tv", "pm/divergence") if kind != "rm" else ():
        base = {name: value for name, value in base.items() if name not in (f"{key}/lo", f"{key}/hi")} | {key: 0.3}
    more: dict[str, Any] = {"stage": "rm"} if kind == "rm" else {}
    names = [("kl_ppo", 0.02, base), ("kl_ppo", None, base), ("pm", 0.02, metrics)]
    runs = [run_of(name, seed, of, algo__alpha=alpha, **more) for seed in range(seeds) for name, alpha, of in names]
    text, shown = printed(compared([*runs, replace(run_of("dpo", 7, {}, **more), state="interrupted")]))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    whole = [column.header for column in COLUMNS[kind] if not column.versus]
    assert len([header for header in shown if header in whole]) >= 7
    # Of one seed both ends of its interval are shown too.
    numbers = (text.count("-12.35") + text.count("-12.34")) / (1 if seeds > 1 else 3)
    of_baselines = {"TV", "diverg."} & set(shown) if kind != "rm" else set()
    assert numbers == pytest.approx(3 * len([x for x in shown if "vs" not in x]) - 2 * len(of_baselines))
    assert kind == "rm" or "TV vs B" in shown
    assert text.count(f"{seeds} seed") == 3
    assert "interrupted, seed 7" in " ".join(text.split())


def test_a_narrow_terminal_goes_without_the_least_important_columns() -> None:
    comparison = compared([run_of("pm", 0, full_metrics(COLUMNS["exact"])), run_of("kl_ppo", 0)])
    wide, narrow = printed(comparison)[1], printed(comparison, 80)[1]
    assert set(narrow) < set(wide)
    assert {"TV", "TV vs B", "minority", "off-set"} <= set(narrow)
    assert len(columns(comparison)) > len(wide)


@pytest.mark.parametrize("width", range(60, 200, 7))
@pytest.mark.parametrize("kind", ["exact", "text"])
def test_divergence_is_shown_only_beside_what_tells_of_a_collapse(kind: Kind, width: int) -> None:
    metrics = full_metrics(COLUMNS[kind], 0.15) | ({"pool/size": 8.0} if kind == "text" else {})
    shown = set(printed(compared([run_of("pm", 0, metrics), run_of("kl_ppo", 0, metrics)]), width)[1])
    together = {"diverg.", "div vs B"}
    assert not together & shown or together | {"TV", "KL"} <= shown
    assert kind == "text" or not together & shown or {"minority", "off-set"} <= shown
    assert width < 190 or together <= shown


def test_a_row_that_collapsed_has_no_share_of_divergence() -> None:
    base = {"pm/tv": 0.4, "pm/divergence": 1.0}
    bad = {"pm/tv": 0.5, "pm/divergence": 0.01, "pm/offset_mass": 0.4}
    text = to_markdown(compared([run_of("kl_ppo", 0, base), run_of("pm", 0, bad), run_of("dpo", 0, base)]))
    assert "| pm ! | 1 | 3 | 0.500 | -25.0% | +0.100 | 0.400 | 0.010 | – |" in text
    assert "| dpo | 1 | 1 | 0.400 | +0.0% | +0.000 | – | 1.000 | +0.0% |" in text


def test_an_improvement_that_may_be_none_is_marked() -> None:
    # pm: differences 0.1 and -0.2, whose interval holds 0; dpo: -0.2 in both seeds
    values = {"kl_ppo": (0.4, 0.4), "pm": (0.5, 0.2), "dpo": (0.2, 0.2)}
    runs = [run_of(name, seed, {"pm/tv": of[seed]}) for name, of in values.items() for seed in (0, 1)]
    text = to_markdown(compared(runs))
    assert "| ~+12.5% | -0.050 ± 1.906 |" in text  # 12.706 * 0.2121 / sqrt 2
    assert "| +50.0% | -0.200 ± 0.000 |" in text
    assert "- ~: the 95 % interval of the paired difference from B contains 0." in text
    assert "~" not in to_markdown(compared([run for run in runs if run.algorithm != "pm"]))


def test_other_win_rates_have_columns() -> None:
    headers = [column.header for column in columns(compared([run_of("pm", 0, {"pm/tv": 0.1, "win_rate/gold": 0.6})]))]
    assert headers == ["TV", "gold wins"]
    judged = compared([run_of("pm", 0, {"pm/pair_tv": 0.1, "win_rate/llm": 0.6})])
    assert [column.header for column in columns(judged)] == ["pairs", "judge wins"]


def test_free_text_has_its_own_columns() -> None:
    pools = compared([run_of("pm", 0, {"pm/tv": 0.3, "pool/size": 8.0, "pm/pair_tv": 0.2, "distinct_2": 0.9})])
    assert [column.header for column in columns(pools)] == ["TV", "pairs", "variety"]
    assert "- TV: Total variation from the reward model's preferences over the candidate pools" in to_markdown(pools)


def test_the_page_has_a_tip_for_every_header_and_a_mark_for_every_row() -> None:
    runs = [run_of("kl_ppo", 0, {"pm/tv": 0.4, "reference/pm/tv": 0.6}), run_of("pm", 0, {"pm/tv": 0.1})]
    runs += [run_of("dpo", 0, {"pm/tv": 0.1, "pm/offset_mass": 0.5}), replace(run_of("rpo", 3), state="running")]
    comparison = compared(runs)
    table = page_table(comparison)
    assert len(table.headers) == len(table.tips)
    assert {len(row) for row in table.rows} == {len(table.headers)}
    assert table.emphasis == ["reference", "", "", "flagged", "failed"]
    assert table.rows[-1][:2] == ["rpo\nrunning", "running, seed 3"]
    assert table.rows[3][0] == "dpo !"


def test_all_metrics_stand_in_one_table_with_their_differences() -> None:
    metrics = {"pm/tv": 0.4, "mine": 2.0, "pm/tv/n": 9, "reference/pm/tv": 0.6}
    runs = [run_of("kl_ppo", seed, metrics) for seed in (0, 1)]
    table = metric_table(compared([*runs, *(run_of("pm", seed, {"pm/tv": 0.1}) for seed in (0, 1))]))
    assert table.headers == ["metric", "meaning", "sft", "kl_ppo", "pm"]
    assert table.tips[4] == "Seeds 0, 1; Δ: minus kl_ppo, same seeds"
    assert [row[0] for row in table.rows] == ["mine", "pm/tv"]
    assert table.rows[0][1:] == ["", "–", "2.000\n±0.000", "–"]
    assert table.rows[1][1].startswith("Total variation from the reward model's preferences [share, lower is better]")
    assert table.rows[1][3:] == ["0.400\n±0.000", "0.100\n±0.000\nΔ -0.300 ±0.000"]


def test_csv_holds_every_metric_with_its_own_count_and_difference() -> None:
    runs = [run_of("pm", 0, {"pm/tv": 0.1, "gold/tv": 0.3}), run_of("pm", 1, {"pm/tv": 0.3})]
    runs += [run_of("kl_ppo", seed, {"pm/tv": 0.6}) for seed in (0, 1)]
    runs.append(replace(run_of("rpo", 5), state="failed", metrics={}))
    lines = list(csv.DictReader(io.StringIO(rows_csv([compared(runs)]))))
    found = {(line["policy"], line["metric"]): line for line in lines}
    assert list(found) == [("kl_ppo", "pm/tv"), ("pm", "gold/tv"), ("pm", "pm/tv"), ("rpo", "")]
    tv = found["pm", "pm/tv"]
    assert [tv[key] for key in ("set", "status", "seeds", "source", "rank")] == [
        "a world",
        "finished",
        "2",
        "seeds",
        "1",
    ]
    assert [float(tv[key]) for key in ("mean", "difference")] == pytest.approx([0.2, -0.4])
    assert float(tv["hi"]) - float(tv["mean"]) == pytest.approx(float(tv["half"]))
    assert float(tv["mean"]) - float(tv["lo"]) == pytest.approx(float(tv["half"]))
    assert float(tv["difference_hi"]) > -0.4 > float(tv["difference_lo"])
    assert (tv["baseline"], float(tv["improvement_percent"])) == ("kl_ppo", pytest.approx(100 * 0.4 / 0.6))
    gold = found["pm", "gold/tv"]
    assert (gold["seeds"], gold["half"], gold["source"], gold["difference"]) == ("1", "", "none", "")
    assert found["rpo", ""]["status"] == "failed"


def test_csv_says_the_ranking_metric_the_prompts_and_why_a_run_stopped() -> None:
    metrics = {"pm/tv": 0.1, "pm/tv/n": 40.0, "reference/pm/tv": 0.5}
    runs = [run_of("pm", 0, metrics), replace(run_of("rpo", 5), state="failed", metrics={}, reason="no\npairs")]
    lines = {line["policy"]: line for line in csv.DictReader(io.StringIO(rows_csv([compared(runs)])))}
    assert [lines["pm"][key] for key in ("metric", "rank_by", "n")] == ["pm/tv", "pm/tv", "40"]
    assert (lines["rpo"]["status"], lines["rpo"]["reason"]) == ("failed", "no pairs")
    assert "reference/pm/tv" not in rows_csv([compared(runs)])


def test_every_run_has_a_line_with_what_differs() -> None:
    runs = [run_of("pm", 0, {"pm/tv": 0.1}, algo__alpha=0.02), run_of("pm", 1, {"gold/tv": 0.2}, algo__alpha=0.1)]
    runs.append(replace(run_of("dpo", 3), state="failed", reason="no\npairs", metrics={}))
    lines = {line["path"]: line for line in csv.DictReader(io.StringIO(runs_csv([compared(runs)])))}
    assert list(lines["pm0"]) == [
        *("path", "set", "policy", "seed", "state", "reason", "algo.alpha", "algo.name", "gold/tv", "pm/tv")
    ]
    assert [lines["pm0"][key] for key in ("policy", "algo.alpha", "pm/tv")] == ["pm alpha=0.02", "0.02", "0.1"]
    assert (lines["pm1"]["pm/tv"], lines["pm1"]["gold/tv"]) == ("", "0.2")
    assert (lines["dpo3"]["state"], lines["dpo3"]["reason"]) == ("failed", "no pairs")


def test_summaries_share_their_keys() -> None:
    failed = replace(run_of("dpo"), state="failed", reason="no pairs", metrics={})
    rows = summaries([compared([run_of("pm", seed, {"pm/tv": 0.1}) for seed in (0, 1)] + [failed])])
    assert rows[0].keys() == rows[1].keys()
    assert (rows[0]["policy"], rows[0]["pm/tv"], rows[0]["pm/tv ±"], rows[0]["rank"]) == ("pm", 0.1, 0.0, 1)
    assert (rows[1]["policy"], rows[1]["status"], rows[1]["pm/tv"]) == ("dpo", "failed: no pairs", None)


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
    tints = colours(["kl_ppo", "pm alpha=0.02", "pm alpha=null", "mine"])
    assert len(set(tints.values())) == 4
    assert tints["pm alpha=0.02"] == colours(["pm"])["pm"]
