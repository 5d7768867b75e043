"""train-sft, train-rm, evaluate, compare and data on the small survey world."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_jobs import files, gap, read_json, read_lines, sft_folder, weights
from typer.testing import Result

from rlhf_cli.errors import RunError
from rlhf_cli.metrics.glossary import known

Small = Callable[..., Path]
Finished = Callable[[str], Path]


@pytest.mark.parametrize(("command", "stage"), [("train-sft", "sft"), ("train-rm", "rm")])
def test_a_trained_stage_is_in_the_run_folder_and_in_the_store(
    small: Small, tmp_path: Path, trained: list[str], command: str, stage: str
) -> None:
    run_dir, store = small(command, store=tmp_path / "store"), tmp_path / "store"
    assert trained == ["DemonstrationTrainer", "LossRewardTrainer"][: 1 + (stage == "rm")]
    (published,) = (store / stage).iterdir()
    assert gap(weights(run_dir / "model"), weights(published / "model")) == 0
    assert files(published) == {"identity.json", "metrics.json", "model", "training_log.jsonl"}
    metrics, log = read_json(run_dir / "metrics.json"), read_lines(run_dir / "training_log.jsonl")
    stored = read_json(published / "metrics.json")
    again = {"rm/accuracy", "rm/log_loss"} if stage == "rm" else set()  # means over prompts in the trust report
    assert {key: metrics[key] for key in stored.keys() - again} == {key: stored[key] for key in stored.keys() - again}
    assert (metrics.keys() == stored.keys()) == (stage == "sft")
    assert [line["step"] for line in log] == [2, 4, 6]
    for line in (metrics, *log):
        assert all(known(key) and math.isfinite(value) for key, value in line.items())
    assert files(run_dir) == {
        ".lock", "config.yaml", "manifest.json", "metrics.json", "model", "overrides.json", "status.json",
        "training_log.jsonl", *(["trust.json", "trust.png"] if stage == "rm" else []),
    }  # fmt: skip
    again = small(command, store=store, name="again")
    assert len(trained) == 1 + (stage == "rm"), "found in the store"
    assert read_lines(again / "training_log.jsonl") == log, "curves are replayed"


def test_the_reward_model_opens_with_its_head_and_centre(small: Small) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = small("train-rm") / "model"
    assert math.isfinite(read_json(folder / "reward.json")["chosen_mean_score"])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert gap({"head": model.score.weight}, {"head": weights(folder)["score.weight"]}) == 0


def test_evaluate_without_a_policy_measures_the_sft_policy(small: Small, finished: Finished) -> None:
    reference = read_json(finished("pm") / "metrics.json")
    metrics = read_json(small("evaluate", "policy=null") / "metrics.json")
    for key in ("pm/tv", "gold/tv", "optimum/tv", "pm/offset_mass"):
        assert metrics[key] == pytest.approx(metrics[f"reference/{key}"], abs=1e-6)
        assert metrics[key] == pytest.approx(reference[f"reference/{key}"], abs=1e-6)
    assert metrics["kl/sequence"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("algo", ["pm", "dpo", "pm_closed"])
def test_evaluate_of_a_run_folder_repeats_its_numbers(
    rlhf: Callable[..., Result], finished: Finished, trained: list[str], algo: str
) -> None:
    policy = finished(algo)
    trained.clear()
    result = rlhf("evaluate", f"policy={policy}", "run_dir=again")
    assert result.exit_code == 0, result.output
    assert trained == []
    run, again = read_json(policy / "metrics.json"), read_json(Path("again/metrics.json"))
    assert again == {key: value for key, value in run.items() if not key.startswith("best/")}
    for name in ("completions.jsonl", "distributions.json", "measured.json", "pairs.json", "stages.json"):
        assert Path("again", name).read_text() == (finished(algo) / name).read_text(), name
    assert files(Path("again")) == {
        ".lock", "completions.jsonl", "config.yaml", "distributions.json", "manifest.json", "measured.json",
        "metrics.json", "overrides.json", "pairs.json", "pairs.png", "preferences.png", "stages.json", "status.json",
    }  # fmt: skip


def test_evaluate_of_the_best_checkpoint_finds_its_numbers(rlhf: Callable[..., Result], finished: Finished) -> None:
    assert rlhf("evaluate", f"policy={finished('pm')}", "checkpoint=best", "run_dir=best").exit_code == 0
    best, again = read_json(finished("pm") / "best.json"), read_json(Path("best/metrics.json"))
    assert again["pm/tv"] == pytest.approx(best["best/pm/tv"], abs=1e-5)


def test_evaluate_takes_a_plain_model_folder(small: Small, finished: Finished) -> None:
    metrics = read_json(small("evaluate", f"policy={finished('dpo') / 'model'}") / "metrics.json")
    assert metrics["pm/tv"] == pytest.approx(read_json(finished("dpo") / "metrics.json")["pm/tv"], abs=1e-5)


def test_evaluate_takes_a_model_without_its_tokenizer(small: Small, finished: Finished, tmp_path: Path) -> None:
    folder = shutil.copytree(finished("dpo") / "model", tmp_path / "bare")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    metrics = read_json(small("evaluate", f"policy={folder}") / "metrics.json")
    assert metrics["pm/tv"] == pytest.approx(read_json(finished("dpo") / "metrics.json")["pm/tv"], abs=1e-5)


def test_evaluate_refuses_a_policy_with_another_vocabulary(small: Small, finished: Finished, tmp_path: Path) -> None:
    other = small("train-sft", "dataset.questions=3", name="other")
    with pytest.raises(RunError, match=r"has another vocabulary than its reference\. \d+ tokens against \d+"):
        small("evaluate", f"policy={other / 'model'}", name="refused")
    assert not (tmp_path / "refused").exists()


def test_evaluate_refuses_a_damaged_model_folder(small: Small, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(RunError, match="no policy could be opened in"):
        small("evaluate", f"policy={tmp_path / 'broken'}", name="refused")
    assert not (tmp_path / "refused").exists()


def test_evaluate_refuses_the_best_checkpoint_of_a_run_without_one(
    small: Small, store: Path, finished: Finished
) -> None:
    stage = sft_folder(store, finished("pm"))
    with pytest.raises(RunError, match="holds no model"):
        small("evaluate", f"policy={stage}", "checkpoint=best")


def test_compare_writes_a_table_and_figures(rlhf: Callable[..., Result], finished: Finished) -> None:
    runs = [str(finished(name)) for name in ("pm", "kl_ppo", "dpo", "rpo")]
    result = rlhf("compare", *runs, "--out", "out")
    assert result.exit_code == 0, result.output
    tables = {"compare.csv", "compare.html", "compare.md", "runs.csv"}
    assert files(Path("out")) == {*tables, "compare.png", "curves.png", "frontier.png", "pairs.png"}
    table = Path("out/compare.md").read_text()
    for name in ("pm", "kl_ppo", "dpo", "rpo", "sft"):
        assert f"| {name} " in table
    value = read_json(finished("pm") / "metrics.json")["pm/tv"]
    assert f"{value:.3f}" in table


def test_data_prints_the_world(rlhf: Callable[..., Result], finished: Finished) -> None:
    result = rlhf("data", "dataset.questions=2")
    assert result.exit_code == 0, result.output
    for row in read_json(finished("pm") / "distributions.json"):
        assert row["prompt"] in result.stdout
        assert all(answer in result.stdout for answer in row["answers"])
    assert "held out of training" in result.stdout
