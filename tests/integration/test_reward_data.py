"""Reward models from rankings, labels and margins, and the evaluation of a reward model by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_jobs import SMALL, files, gap, read_json, read_lines, weights, write_lines
from typer.testing import Result

from rlhf_cli.rewards import bt

Small = Callable[..., Path]
Rlhf = Callable[..., Result]
TEXT = ["dataset=preferences", "dataset.path=rows.jsonl", "dataset.max_prompt_tokens=40", "dataset.eval_prompts=4"]
TEXT += ["dataset.max_completion_tokens=12", "trainer.sft.batch_size=8", "trainer.rm.batch_size=8"]
TOPICS = ["tea", "rain", "chess", "bread", "jazz"]
TRUST_FILES = {".lock", "config.yaml", "manifest.json", "metrics.json", "overrides.json", "status.json"}
TRUST_FILES |= {"trust.json", "trust.png"}

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list that gains, for each batch with a ranking, how many responses each of its judgements has."""
    found: list[list[int]] = []
    loss = bt.plackett_luce_loss

    def noted(scores: Any, mask: Any) -> Any:
        found.append(mask.sum(-1).tolist())
        return loss(scores, mask)

    monkeypatch.setattr(bt, "plackett_luce_loss", noted)
    return found


# -- rankings ----------------------------------------------------------------------------------------------------------


def test_rankings_of_the_survey_world(small: Small, ranked: list[list[int]]) -> None:
    run_dir = small("train-rm", "dataset.ranking_size=4", name="ranked")
    sizes = [size for batch in ranked for size in batch]
    assert len(ranked) >= 5, "nearly every step has some"
    assert set(sizes) <= {2, 3, 4}
    assert sizes.count(4) > 10
    assert 0.3 < sizes.count(2) / len(sizes) < 0.5, "damaged pairs are negative_share (0.4) of the judgements"
    metrics = read_json(run_dir / "metrics.json")
    assert 0 <= metrics["rm/accuracy"] <= 1
    assert metrics["data/reward_pairs"] > 300, "counted as the pairs they imply"


@pytest.mark.parametrize("setting", ["reward=pcrm_length", "reward.label_smoothing=0.1", "reward.token_wise=true"])
def test_what_is_defined_on_pairs_learns_rankings_as_pairs(small: Small, ranked: list[list[int]], setting: str) -> None:
    run_dir = small("train-rm", "dataset.ranking_size=4", setting)
    assert ranked == []
    assert ("rm/bound" in read_lines(run_dir / "training_log.jsonl")[0]) == (setting == "reward=pcrm_length")


def row(number: int, **columns: Any) -> dict[str, Any]:
    return {"prompt": f"What about {TOPICS[number % 5]} {number}?", **columns}


def answers(number: int) -> list[str]:
    topic = TOPICS[number % 5]
    return [f"I like {topic} very much.", f"I like {topic}.", f"{topic} is fine.", f"{topic}? No!"]


def trained_on(rlhf: Rlhf, rows: list[dict[str, Any]], name: str) -> Path:
    """Train a reward model on the rows of a file and return its run folder."""
    write_lines(Path("rows.jsonl"), rows)
    result = rlhf("train-rm", *SMALL, *TEXT, f"run_dir={name}", "store_dir=store")
    assert result.exit_code == 0, result.output
    return Path(name)


def test_rankings_in_a_file(rlhf: Rlhf, ranked: list[list[int]]) -> None:
    run_dir = trained_on(rlhf, [row(i, responses=answers(i)[: 2 + i % 3]) for i in range(80)], "run")
    metrics = read_json(run_dir / "metrics.json")
    assert {2, 3, 4} == {size for batch in ranked for size in batch}
    assert 0 <= metrics["rm/accuracy"] <= 1


@pytest.mark.parametrize("column", [{"label": 0.6}, {"label": 0.1}, {"margin": 2.0}])
def test_labels_and_margins_in_a_file_count(rlhf: Rlhf, column: dict[str, float]) -> None:
    models = []
    for name, more in {"plain": {}, "more": column}.items():
        lines = [row(i, chosen=answers(i)[0], rejected=answers(i)[3], **(more if i % 2 else {})) for i in range(80)]
        run_dir = trained_on(rlhf, lines, name)
        models.append((weights(run_dir / "model"), read_lines(run_dir / "training_log.jsonl")[0]["rm/loss"]))
    assert gap(models[0][0], models[1][0]) > 1e-6
    assert abs(models[0][1] - models[1][1]) > 1e-5


# -- evaluate stage=rm -------------------------------------------------------------------------------------------------


def evaluated(rlhf: Rlhf, *overrides: str) -> tuple[Path, dict[str, Any]]:
    result = rlhf("evaluate", "stage=rm", *overrides, "run_dir=report")
    assert result.exit_code == 0, result.output
    return Path("report"), read_json(Path("report/metrics.json"))


def test_a_reward_model_s_run_brings_its_settings(rlhf: Rlhf, small: Small, trained: list[str]) -> None:
    rm = small("train-rm", "reward=pcrm_length", "reward.beta1=12", "reward.calibration=length")
    trained.clear()
    report, metrics = evaluated(rlhf, f"policy={rm}")
    assert trained == []
    assert metrics == read_json(rm / "metrics.json")
    assert files(report) == TRUST_FILES
    assert read_json(report / "trust.json") == read_json(rm / "trust.json")


def test_without_a_policy_the_sft_policy_is_sampled(small: Small, trained: list[str]) -> None:
    rm = small("train-rm", name="rm")
    trained.clear()
    report = small("evaluate", "stage=rm", name="report")
    assert trained == []
    assert read_json(report / "metrics.json") == read_json(rm / "metrics.json")
    assert files(report) == TRUST_FILES


def test_an_aligned_policy_s_samples_are_scored(rlhf: Rlhf, small: Small) -> None:
    reference = read_json(small("train-rm", name="rm") / "metrics.json")
    longer = ("trainer.pairwise.max_steps=40", "trainer.pairwise.eval_every_steps=40")
    policy = small("align", "algo=dpo", *longer, "trainer.pairwise.learning_rate=5e-3", name="dpo")
    _, metrics = evaluated(rlhf, f"policy={policy}")
    assert metrics["rm/score_policy/mean"] != reference["rm/score_policy/mean"]
    same = {key for key in metrics if metrics[key] == reference[key]}
    assert metrics.keys() - same <= {key for key in metrics if key.startswith(("rm/score_policy", "rm/score_shift"))}
    panel = read_json(Path("report/trust.json"))["panels"]["scores"]
    assert str(policy) in str(panel)
    result = rlhf("evaluate", "stage=rm", f"policy={policy}", "checkpoint=best", "run_dir=best")
    assert result.exit_code == 0, result.output
    assert "best" in str(read_json(Path("best/trust.json"))["panels"]["scores"])
