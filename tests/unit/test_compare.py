from __future__ import annotations

import csv
import json
import math
import sys
from base64 import b64decode
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from fabricated_runs import POLICIES, distribution, pairs_json, write_completions, write_run

from rlhf_cli.errors import DataError, RunError
from rlhf_cli.stages import compare_page
from rlhf_cli.stages.compare import run
from rlhf_cli.stages.found_runs import completions, find_runs, load_run

Printed = pytest.CaptureFixture[str]
TABLES = ["compare.csv", "compare.html", "compare.md", "runs.csv"]


# A whole image of one black pixel.
PIXEL = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


@pytest.fixture
def real_figures() -> None:
    """Draw: most tests go without, which saves most of their time."""


@pytest.fixture(autouse=True)
def _figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_figures" not in request.fixturenames:
        monkeypatch.setattr(compare_page, "preference_bars", lambda rows, path, **_: path.write_bytes(PIXEL))
        monkeypatch.setattr(compare_page, "curves", lambda logs, path, keys: path.write_bytes(PIXEL))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def table(out: Path) -> str:
    return (out / "compare.md").read_text()


def first_cells(text: str) -> list[str]:
    return [line.split(" |")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]


def found(paths: list[str | Path]) -> list[str]:
    return [path.name for path in find_runs(paths, lambda _: None)]


# --- finding runs


def test_runs_are_found_at_any_depth_each_once_and_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write_run(tmp_path / "sweep" / "deep" / str(number), seed=number)
    write_run(tmp_path / "alone")
    assert found([tmp_path]) == ["alone", "0", "2", "10"]
    assert found([tmp_path / "sweep" / "deep" / "2", tmp_path / "sweep"]) == ["2", "0", "10"]


@pytest.mark.parametrize("pattern", ["*", "**", "*/", "**/*", "sweep/[02]", "[as]*/**"])
def test_quoted_globs_are_expanded(tmp_path: Path, pattern: str) -> None:
    for number in (0, 2):
        write_run(tmp_path / "sweep" / str(number), seed=number)
    write_run(tmp_path / "alone=[1]")
    (tmp_path / "a file").touch()
    assert sorted(found([f"{tmp_path}/{pattern}"])) in (["0", "2"], ["0", "2", "alone=[1]"])
    assert found([str(tmp_path / "alone=[1]")]) == ["alone=[1]"], "a folder whose name looks like a glob"


def test_stores_checkpoints_and_hidden_folders_are_not_entered(tmp_path: Path) -> None:
    one = write_run(tmp_path / "x")
    write_run(one / "checkpoints" / "inside a run")
    for place in ("wandb", "checkpoints", ".hidden", "store/sft"):
        write_run(tmp_path / place / "y")
    (tmp_path / "store" / ".locks").mkdir()
    assert found([tmp_path]) == ["x"]


def test_what_holds_no_run_is_named_and_left_out(tmp_path: Path, capsys: Printed) -> None:
    write_run(tmp_path / "x")
    (tmp_path / "store").mkdir()
    (tmp_path / "notes.txt").touch()
    run([tmp_path / name for name in ("x", "store", "notes.txt")], tmp_path / "out")
    notes = capsys.readouterr().err
    assert f"left out {tmp_path / 'store'}: no run is in it." in notes
    assert f"left out {tmp_path / 'notes.txt'}: no run is in it." in notes


def test_paths_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="missing is not a run folder. there is no such folder. Name folders"):
        run([tmp_path / "missing"])
    with pytest.raises(DataError, match=r"empty is not a run folder. it holds no config.yaml beside a status.json"):
        run([tmp_path / "empty"])
    with pytest.raises(DataError, match=r"No runs were found. looked for config.yaml beside .* in .*nothing\*"):
        run([f"{tmp_path}/nothing*", tmp_path / "empty"])


# --- reading runs


def test_unfinished_runs_are_listed_with_their_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "done")
    write_run(tmp_path / "going", "dpo", state="running")
    write_run(tmp_path / "bad", "pm", 1, state="failed", error="FloatingPointError: the reward is nan\n")
    write_run(tmp_path / "stopped", "rpo", 2, state="interrupted", error="KeyboardInterrupt")
    text = table(run([tmp_path]))
    assert "| pm | 1 | 1 | 0.100 |" in text, "the failed seed does not count"
    assert "| pm, seed 1 | failed | – |" in text
    assert "- pm, seed 1: failed: FloatingPointError: the reward is nan" in text
    assert "| dpo, seed 0 | running |" in text
    assert "- rpo, seed 2: interrupted: KeyboardInterrupt" in text
    lines = list(csv.DictReader((tmp_path / "compare" / "runs.csv").read_text().splitlines()))
    assert [(line["policy"], line["state"]) for line in lines] == [
        *(("pm", "finished"), ("pm", "failed"), ("dpo", "running"), ("rpo", "interrupted"))
    ]


def test_jobs_without_a_folder_are_rows_too(tmp_path: Path) -> None:
    out = run([write_run(tmp_path / "x")], failed=[("algo=dpo,seed=1", "no pairs are left")])
    assert "| algo=dpo,seed=1 | failed | – |" in table(out)
    assert "- algo=dpo,seed=1: failed: no pairs are left" in table(out)


def test_nothing_finished_is_refused_with_nothing_written(tmp_path: Path) -> None:
    write_run(tmp_path / "going", state="interrupted")
    with pytest.raises(DataError, match="None of the 1 run folders can be compared.*; these are interrupted"):
        run([tmp_path])
    assert names(tmp_path) == ["going"]


def test_runs_without_metrics_and_of_earlier_stages_are_named_and_skipped(tmp_path: Path, capsys: Printed) -> None:
    folder = write_run(tmp_path / "sft")
    (folder / "config.yaml").write_text("seed: 0\n")
    (write_run(tmp_path / "lost", "dpo") / "metrics.json").unlink()
    write_run(tmp_path / "none", "rpo", metrics={})
    text = table(run([write_run(tmp_path / "x"), *(tmp_path / name for name in ("sft", "lost", "none"))]))
    assert first_cells(text) == ["policy", "---", "sft", "pm"]
    notes = capsys.readouterr().err
    assert f"skipped {folder}: it aligns no policy and trains no reward model." in notes
    for name in ("lost", "none"):
        assert f"skipped {tmp_path / name}: it is finished, and has no metrics." in notes


@pytest.mark.parametrize("name", ["metrics.json", "status.json", "config.yaml", "training_log.jsonl"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    (write_run(tmp_path / "x") / name).write_text("{")
    with pytest.raises(DataError, match=rf"{name} cannot be read"):
        run([tmp_path])


def test_numbers_that_are_not_finite_are_infinite(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", metrics={"pm/tv": 0.1, "pm/kl_rm_policy": None, "pm/kl_policy_rm": float("inf")})
    loaded = load_run(folder, lambda _: None)
    assert loaded is not None
    assert loaded.metrics == {"pm/tv": 0.1, "pm/kl_rm_policy": math.inf, "pm/kl_policy_rm": math.inf}


def test_a_metric_that_is_not_finite_in_one_seed_is_shown_and_not_ranked(tmp_path: Path) -> None:
    for seed, value in ((0, 0.1), (1, None)):
        write_run(tmp_path / f"pm{seed}", "pm", seed, metrics={"pm/tv": value, "pm/kl_rm_policy": 1.0})
        write_run(tmp_path / f"dpo{seed}", "dpo", seed, metrics={"pm/tv": 0.3, "pm/kl_rm_policy": 1.0})
    text = table(run([tmp_path]))
    assert "| pm | 2 | – | ∞ | 1.000 ± 0.000 |" in text
    assert "| dpo | 2 | 1 | 0.300 ± 0.000 |" in text
    assert "- ∞: not finite in a seed at least" in text


def test_completions_may_hold_any_separator(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x")
    loaded = load_run(folder, lambda _: None)
    assert loaded is not None
    assert completions(loaded) == []
    write_completions(folder, ["one\u2028two", "", "three\x85four\n"])
    assert [row["completion"] for row in completions(loaded)] == ["one\u2028two", "", "three\x85four\n"]


def test_an_evaluated_policy_is_named_by_what_it_is(tmp_path: Path) -> None:
    aligned = write_run(tmp_path / "pm")
    runs = [write_run(tmp_path / "sft", "pm", policy=None), write_run(tmp_path / "hf", "pm", policy="models/opt-x")]
    runs.append(write_run(tmp_path / "ev", "dpo", policy=str(aligned)))
    assert first_cells(table(run(runs, tmp_path / "out")))[2:] == ["sft", "dpo", "opt-x"]


def test_an_evaluation_replaces_the_run_it_judges_again(tmp_path: Path, capsys: Printed) -> None:
    aligned = write_run(tmp_path / "pm", metrics={"pm/tv": 0.1})
    later = {"policy": str(aligned), "checkpoint": "last", "judge": {"name": "none"}, "ended": "2026-01-02"}
    write_run(tmp_path / "a", metrics={"pm/tv": 0.3}, **later)
    assert "| pm | 1 | 1 | 0.300 |" in table(run([tmp_path]))
    assert f"left out {aligned}: a run with the same settings and seed ended after it." in capsys.readouterr().err


def test_a_model_inside_a_run_is_named_after_the_run(tmp_path: Path) -> None:
    aligned = write_run(tmp_path / "run" / "a", "pm")
    for name, policy in (("one", aligned / "model"), ("two", aligned / "best"), ("gone", tmp_path / "opt-x" / "model")):
        write_run(tmp_path / "ev" / name, "dpo", policy=str(policy), seed=len(name))
    assert first_cells(table(run([tmp_path / "ev"], tmp_path / "out")))[2:] == [
        *("sft", f"pm policy={aligned / 'best'}", f"pm policy={aligned / 'model'}", "opt-x")
    ]


def test_what_a_language_model_judged_is_added_to_the_seed(tmp_path: Path) -> None:
    aligned = write_run(
        tmp_path / "pm",
        metrics={"pm/tv": 0.1, "gold/tv": 0.4, "pm/pair_tv": 0.2, "pm/pair_tv/lo": 0.1, "pm/pair_tv/hi": 0.3},
    )
    judge = {"name": "openai", "model": "m", "prompts": 8}
    later = {"policy": str(aligned), "judge": judge, "ended": "2026-01-02"}
    write_run(tmp_path / "ev", metrics={"pm/tv": 0.3, "pm/pair_tv": 0.5, "win_rate/llm": 0.7}, **later)
    out = run([tmp_path])
    assert first_cells(table(out))[2:] == ["pm"]
    lines = {line["metric"]: line for line in csv.DictReader((out / "compare.csv").read_text().splitlines())}
    assert {key: float(line["mean"]) for key, line in lines.items()} == {
        **{"pm/tv": 0.3, "gold/tv": 0.4, "pm/pair_tv": 0.5, "win_rate/llm": 0.7}
    }
    assert lines["pm/pair_tv"]["lo"] == "", "no end of an interval about another mean"
    # A run trained anew is another policy: nothing of the earlier one is kept.
    write_run(tmp_path / "again", metrics={"pm/tv": 0.2}, ended="2026-01-03")
    assert "judge wins" not in table(run([tmp_path]))


def test_the_caption_of_pairs_names_the_seed_that_is_shown(tmp_path: Path) -> None:
    for name, algo, seed in (("a", "pm", 0), ("b", "pm", 1), ("c", "dpo", 1)):
        folder = write_run(tmp_path / name, algo, seed)
        (folder / "pairs.json").write_text(json.dumps(pairs_json()))
    assert "of a held-out pair (seed 1)" in (run([tmp_path]) / "compare.html").read_text()
    assert "of a held-out pair<" in (run([tmp_path / "a"], tmp_path / "out") / "compare.html").read_text()


def test_reward_models_that_judge_are_named_by_their_settings_not_their_seed(tmp_path: Path) -> None:
    judges = [write_rm(tmp_path / f"rm{seed}", "bt", seed, 0.8) for seed in (0, 1)]
    other = write_rm(tmp_path / "other", "pcrm_length", 1, 0.8)
    for seed, judge in enumerate([*judges, other]):
        write_run(tmp_path / "runs" / str(seed), "pm", seed, reward_model=[str(judge)], policy=str(tmp_path / "gone"))
    (_, first), (_, second) = _sets(run([tmp_path / "runs"]))
    assert first_cells(first)[2:] == ["sft", "gone"]
    assert "| gone | 2 |" in first
    assert "| gone | 1 |" in second


# --- what is written


@pytest.mark.usefixtures("real_figures")
def test_a_folder_of_runs_becomes_tables_figures_and_a_page(tmp_path: Path, capsys: Printed) -> None:
    for number, (algo, seed) in enumerate((a, s) for a in POLICIES for s in (0, 1)):
        write_completions(write_run(tmp_path / f"{number}_algo={algo}", algo, seed), ["spring"])
    (tmp_path / "store").mkdir()
    out = run([tmp_path])
    assert out == tmp_path / "compare"
    assert names(out) == sorted([*TABLES, "compare.png", "curves.png"])
    # (0.10 + 0.11) / 2; half: t 12.706 * 0.00707 / sqrt 2 = 0.064
    assert "| pm | 2 | 1 | 0.105 ± 0.064 | ~+0.0% | +0.000 ± 0.000 |" in table(out)
    # 0.600 - 0.105; the same half as of the baseline alone
    assert "| sft | 2 | 4 | 0.600 ± 0.000 | -471% | +0.495 ± 0.064 |" in table(out)
    page = (out / "compare.html").read_text()
    assert "Comparison of sft, kl_ppo, pm, dpo" in page
    printed, notes = capsys.readouterr()
    assert "0.105" in printed
    assert f"wrote {out / 'compare.png'}" in printed
    assert f"wrote {out / 'compare.html'}" in printed
    assert notes == ""


def test_out_is_used_and_figures_of_an_earlier_comparison_there_are_removed(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a" / "x"), write_run(tmp_path / "b" / "y", "dpo")
    out = run([one, two], tmp_path / "deep" / "out")
    assert out == tmp_path / "deep" / "out"
    before = table(out)
    for name in ("frontier.png", "pairs-2.png", "compare-3.png", "mine.png"):
        (out / name).touch()
    assert run([one, two, tmp_path / "a"], out) == out
    assert table(out) == before, "a run named twice counts once"
    assert names(out) == sorted([*TABLES, "compare.png", "curves.png", "mine.png"])
    assert run([one, two]) == tmp_path / "compare"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"The comparison cannot be written to .*file"):
        run([folder], tmp_path / "file")


def test_free_text_has_its_table_and_no_bars(tmp_path: Path) -> None:
    metrics = {"pm/pair_tv": 0.3, "pm/pair_tv/lo": 0.25, "pm/pair_tv/hi": 0.36, "reward/mean": None}
    folder = write_run(tmp_path / "x", metrics=metrics)
    (folder / "training_log.jsonl").unlink()
    out = run([folder], tmp_path / "out")
    assert "| pm | 1 | – | 0.300 [0.250, 0.360] |" in table(out)
    assert names(out) == TABLES
    (folder / "pairs.json").write_text(json.dumps(pairs_json()))
    assert names(run([folder], tmp_path / "out")) == sorted([*TABLES, "pairs.png"])


@pytest.mark.usefixtures("real_figures")
def test_a_lone_reference_is_drawn(tmp_path: Path) -> None:
    out = run([write_run(tmp_path / "sft", "pm", policy=None)], tmp_path / "out")
    assert (out / "compare.png").is_file()


@pytest.mark.usefixtures("real_figures")
def test_a_policy_measured_on_other_questions_is_left_out_of_the_bars(tmp_path: Path, capsys: Printed) -> None:
    write_run(tmp_path / "a")
    entry = {**distribution("rpo"), "prompt": "Which colour?"}
    (write_run(tmp_path / "b", "rpo") / "distributions.json").write_text(json.dumps([entry]))
    assert (run([tmp_path]) / "compare.png").is_file()
    assert "compare.png leaves out rpo: no run on the same questions" in capsys.readouterr().err


def test_rank_and_baseline_reach_the_table(tmp_path: Path) -> None:
    for algo, value in (("pm", 0.3), ("dpo", 0.2), ("kl_ppo", 0.1)):
        write_run(tmp_path / algo, algo, metrics={"pm/tv": 0.5, "gold/tv": value})
    out = run([tmp_path], baseline="dpo", rank="gold/tv")
    assert first_cells(table(out))[2:] == ["kl_ppo", "dpo", "pm"]
    assert "- rank: by gold/tv, lower is better." in table(out)
    assert "- B, the baseline: dpo." in table(out)
    before = names(out)
    with pytest.raises(DataError, match=r"--baseline 'dpp' is no row. .* Did you mean 'dpo'\?"):
        run([tmp_path], baseline="dpp")
    with pytest.raises(DataError, match=r"--rank gold/tvv: no run has this metric. Did you mean gold/tv\?"):
        run([tmp_path], rank="gold/tvv")
    assert names(out) == before


def test_a_comparison_is_handed_to_wandb_with_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    calls: list[Any] = []
    fake = ModuleType("compare_wandb")
    fake.publish = lambda *args: calls.append(args) or "wandb sync here"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rlhf_cli.stages.compare_wandb", fake)
    write_run(tmp_path / "x", tracker={"name": "wandb", "group": "mine"})
    write_run(tmp_path / "y", "pm", 1, state="failed", tracker={"name": "wandb", "group": "other"})
    out = run([tmp_path], wandb=True)
    [(folder, title, rows, figures, html, trackers)] = calls
    assert "W&B: wandb sync here" in capsys.readouterr().out
    assert trackers == [{"name": "wandb", "group": "mine"}]
    assert (folder, title, html) == (out, "Comparison of sft, pm", out / "compare.html")
    assert [row["status"] for row in rows] == ["finished", "finished", "failed"]
    assert [row["policy"] for row in rows] == ["sft", "pm", "pm"]
    assert figures == [out / "compare.png", out / "curves.png"]
    run([tmp_path])
    assert len(calls) == 1


# --- sets


def _sets(out: Path) -> list[tuple[str, str]]:
    """Return (title, table) of each set in compare.md."""
    blocks = table(out).split("## ")[1:]
    return [(block.partition("\n")[0], block.partition("\n")[2]) for block in blocks]


@pytest.mark.usefixtures("real_figures")
@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"dataset": {"source": "survey", "seed": 1}}, "Survey world 1, reward bt: other dataset: dataset.seed=1"),
        ({"reward": {"name": "gold"}}, "Survey world 0, reward gold: other reward: reward.name=gold"),
        ({"metrics": {"pm/pair_tv": 0.3}}, "Survey world 0, reward bt: free text"),
    ],
)
def test_runs_that_may_not_be_compared_have_tables_and_figures_of_their_own(
    tmp_path: Path, capsys: Printed, changes: dict[str, Any], title: str
) -> None:
    write_run(tmp_path / "a"), write_run(tmp_path / "b", "dpo")
    other = write_run(tmp_path / "c", "rpo", **changes)
    if "metrics" not in changes:
        entry = {**distribution("rpo"), "prompt": "Which colour?"}
        (other / "distributions.json").write_text(json.dumps([entry]))
    out = run([tmp_path])
    (first, main), (second, apart) = _sets(out)
    assert (first, second) == ("Survey world 0, reward bt", title)
    assert first_cells(main)[2:] == ["sft", "pm", "dpo"]
    assert "| rpo | 1 |" in apart
    assert "rpo" not in main
    assert (out / "compare.png").is_file()
    assert (out / "compare-2.png").is_file() == ("metrics" not in changes)
    printed, notes = capsys.readouterr()
    assert title in printed
    assert printed.count("rank: by pm/tv, lower is better.") == 1, "no line is printed twice"
    assert notes == ""


def write_rm(folder: Path, reward: str, seed: int, accuracy: float, **more: Any) -> Path:
    """Write a finished run of a reward model."""
    metrics = {"rm/accuracy": accuracy, "rm/accuracy/lo": accuracy - 0.1, "rm/accuracy/hi": accuracy + 0.1}
    run_folder = write_run(folder, seed=seed, metrics=metrics, reward={"name": reward, "calibration": "none"}, **more)
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    if config.get("stage") != "rm":
        del config["algo"]
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    log = [{"step": step, "rm/loss": 0.7 - step / 100} for step in (0, 10)]
    (run_folder / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return run_folder


def test_reward_models_have_a_table_of_their_own(tmp_path: Path, capsys: Printed) -> None:
    for reward, accuracy in (("pcrm_length", 0.7), ("bt", 0.8)):
        for seed in (0, 1):
            write_rm(tmp_path / f"{reward}{seed}", reward, seed, accuracy + 0.02 * seed)
    write_rm(tmp_path / "judged", "warm", 0, 0.9, stage="rm")  # of rlhf evaluate stage=rm
    out = run([tmp_path])
    text = table(out)
    assert text.startswith("| reward model | seeds | rank | right |")
    # (0.80 + 0.82) / 2; 12.706 * 0.01414 / sqrt 2
    assert "| bt | 2 | 2 | 0.810 ± 0.127 |" in text
    assert "| warm | 1 | 1 | 0.900 [0.800, 1.000] |" in text
    assert text.index("| bt |") < text.index("| pcrm_length |")
    assert names(out) == sorted([*TABLES, "curves.png"])
    assert capsys.readouterr().err == "", "another loss is no other target for a reward model"


def test_reward_models_beside_policies_have_a_table_after_them(tmp_path: Path) -> None:
    write_run(tmp_path / "pm"), write_rm(tmp_path / "rm", "bt", 0, 0.8)
    policies, models = _sets(run([tmp_path]))
    assert policies[1].startswith("\n| policy |")
    assert models[0] == "Survey world 0, reward models"
    assert models[1].startswith("\n| reward model |")
