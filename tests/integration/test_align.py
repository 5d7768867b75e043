"""Every algorithm end to end: an aligned policy, and a run folder that holds everything and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from small_jobs import ALGORITHMS, files, gap, read_json, read_lines, sft_folder, weights

from rlhf_cli import __version__
from rlhf_cli.metrics.glossary import known

Finished = Callable[[str], Path]
RUN_FILES = {
    ".lock", "best", "best.json", "checkpoints", "completions.jsonl", "config.yaml", "curves.png",
    "distributions.json", "manifest.json", "measured.json", "metrics.json", "model", "overrides.json", "pairs.json",
    "pairs.png", "preferences.png", "stages.json", "status.json", "training_log.jsonl",
}  # fmt: skip

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


@every_algorithm
def test_training_moves_the_policy_and_leaves_no_other_files(name: str, finished: Finished, store: Path) -> None:
    run_dir = finished(name)
    moved = gap(weights(run_dir / "model"), weights(sft_folder(store, run_dir) / "model"))
    assert 1e-6 < moved < 1
    assert files(run_dir) == RUN_FILES
    assert files(store / ".work") == set()


@every_algorithm
def test_the_run_folder_says_what_was_run(name: str, finished: Finished) -> None:
    run_dir = finished(name)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["algo"]["name"] == name.split("_rloo")[0].split("_closed")[0]
    assert config["trainer"]["online"]["max_steps"] == 4
    record = read_json(run_dir / "overrides.json")
    assert (record["command"], record["config_dir"]) == ("align", None)
    assert set(ALGORITHMS[name]) <= set(record["overrides"])
    manifest = read_json(run_dir / "manifest.json")
    assert manifest["versions"]["rlhf-cli"] == __version__
    assert all(manifest["versions"][package] for package in ("python", "torch", "transformers", "trl"))
    assert manifest["identity"]["command"] == "align"
    status = read_json(run_dir / "status.json")
    assert (status["state"], status["error"]) == ("finished", None)


@every_algorithm
def test_metrics_and_curves_are_finite_and_every_key_is_defined(name: str, finished: Finished) -> None:
    run_dir = finished(name)
    metrics, log = read_json(run_dir / "metrics.json"), read_lines(run_dir / "training_log.jsonl")
    for line in (metrics, *log):
        assert [key for key in line if not known(key)] == []
        assert [key for key, value in line.items() if value is None or not math.isfinite(value)] == []
    assert [line["step"] for line in log] == [0, 2, 2, 4, 4]
    for key in ("pm/tv", "gold/tv", "pm/offset_mass", "reference/pm/tv", "best/pm/tv", "eos_rate"):
        assert 0 <= metrics[key] <= 1
    assert metrics["pm/pair_tv/lo"] <= metrics["pm/pair_tv"] <= metrics["pm/pair_tv/hi"]
    assert metrics["best/step"] in {2, 4}
    assert ("optimum/tv" in metrics) == (name != "rpo")
    assert log[3]["pm/tv"] == pytest.approx(metrics["pm/tv"], abs=1e-5), "the last point of the curve is the result"


@every_algorithm
def test_completions_distributions_and_figures_can_be_read(name: str, finished: Finished) -> None:
    run_dir = finished(name)
    rows = read_lines(run_dir / "completions.jsonl")
    prompts = {row["prompt"] for row in read_json(run_dir / "distributions.json") if not row["heldout"]}
    assert {row["prompt"] for row in rows} == prompts
    for row in rows:
        ours, theirs = {"completion", "reward", "tokens", "ended"}, {"reference", "reference_reward", "reference_ended"}
        assert set(row) == {"prompt", *ours, *theirs}
        assert 1 <= row["tokens"] <= 12
        assert math.isfinite(row["reward"])
    for row in read_json(run_dir / "distributions.json"):
        assert sum(row["people"]) == pytest.approx(1, abs=1e-4)
        assert sum(row["policy"]) + row["policy_offset"] == pytest.approx(1, abs=1e-4)
        assert len(row["answers"]) == len(row["policy"]) == len(row["reference"]) == len(row["reward_model"])
    for figure in ("preferences.png", "curves.png"):
        assert (run_dir / figure).read_bytes().startswith(b"\x89PNG")


@every_algorithm
def test_last_and_best_policy_open_as_hugging_face_models(name: str, finished: Finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in ("model", "best"):
        tokenizer = AutoTokenizer.from_pretrained(finished(name) / folder)
        model = AutoModelForCausalLM.from_pretrained(finished(name) / folder)
        output = model.generate(**tokenizer("What is", return_tensors="pt"), max_new_tokens=2)
        assert isinstance(tokenizer.decode(output[0]), str)
        assert model.config.vocab_size == len(tokenizer)


def test_a_closed_vocabulary_leaves_no_mass_off_the_answers(finished: Finished) -> None:
    metrics = read_json(finished("pm_closed") / "metrics.json")
    assert metrics["pm/offset_mass"] < 1e-4
    assert metrics["eos_rate"] == 1
    assert metrics["pm/tv"] == pytest.approx(metrics["gold/tv"], abs=1e-5), "the reward is the people's"
    answers = {a for row in read_json(finished("pm_closed") / "distributions.json") for a in row["answers"]}
    assert {row["completion"] for row in read_lines(finished("pm_closed") / "completions.jsonl")} <= answers


@pytest.mark.parametrize(
    ("name", "keys"),
    {
        "pm": {
            "policy_loss",
            "value_loss",
            "explained_variance",
            "cost/sequence",
            "train/kl/per_token",
            "train/reward/mean",
        },
        "pm_rloo": {"policy_loss", "advantage/std", "beta", "clip_fraction"},
        "dpo": {"dpo_loss", "train/chosen_logps", "train/chosen_logps_change", "accuracy", "margin"},
        "rpo": {"dpo_loss", "sft_term"},
    }.items(),
)
def test_what_an_algorithm_must_log(name: str, keys: set[str], finished: Finished) -> None:
    lines = [line for line in read_lines(finished(name) / "training_log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(keys <= set(line) for line in lines)
    assert ("value_loss" in lines[0]) == (name == "pm")


SETTINGS = {
    "one-response-a-prompt": ["algo=pm", "algo.num_generations=1"],
    "three-responses-a-prompt": ["algo=pm", "algo.num_generations=3", "trainer.online.batch_size=12"],
    "transformers-generate": ["algo=pm", "generation=generate", "generation.top_p=0.9"],
    "continuous-batching": ["algo=pm", "generation=continuous"],
    "temperature": ["algo=kl_ppo", "generation.temperature=0.7"],
    "no-reward-clip": ["algo=pm", "reward.clip=null", "reward.negative_share=0"],
    "epochs": ["algo=pm", "trainer.online.max_steps=null", "trainer.online.epochs=4"],
    "pairwise-epochs": [
        "algo=dpm",
        "algo.alpha=null",
        "trainer.pairwise.max_steps=null",
        "trainer.pairwise.epochs=0.125",
    ],
    "pairwise-closed-vocabulary": ["algo=dpo", "dataset.closed_vocabulary=true"],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_other_settings(setting: str, small: Callable[..., Path], store: Path) -> None:
    run_dir = small("align", *SETTINGS[setting])
    metrics = read_json(run_dir / "metrics.json")
    assert [key for key, value in metrics.items() if value is None or not math.isfinite(value)] == []
    assert read_lines(run_dir / "training_log.jsonl")[-1]["step"] == 4
    assert gap(weights(run_dir / "model"), weights(sft_folder(store, run_dir) / "model")) > 1e-6


def test_a_response_that_does_not_end_is_penalised(small: Callable[..., Path], finished: Finished) -> None:
    common = ("algo=pm", "reward.clip=null", "trainer.online.log_every_steps=1")
    run_dir = small("align", *common, "algo.missing_eos_penalty=3")
    plain = small("align", *common, name="plain")
    (first, *_), (other, *_) = (
        [line for line in read_lines(run / "training_log.jsonl") if "loss" in line] for run in (run_dir, plain)
    )
    ended, mean = other["train/eos_rate"], other["train/reward/mean"]
    assert first["train/eos_rate"] == ended < 1
    assert first["train/reward/mean"] == pytest.approx(mean - 3 * (1 - ended), abs=1e-4)


def test_rollouts_are_trained_on_as_a_whole(small: Callable[..., Path]) -> None:
    run_dir = small("align", "algo=pm", "algo.ppo_epochs=2", "algo.minibatches=2", "trainer.online.max_steps=5")
    assert read_lines(run_dir / "training_log.jsonl")[-1]["step"] == 8, "two rollouts of four steps"


def test_another_model_is_trained_on(small: Callable[..., Path], finished: Finished) -> None:
    start = finished("pm") / "model"
    run_dir = small("train-sft", f"model.path={start}", "trainer.sft.learning_rate=1e-9")
    assert gap(weights(run_dir / "model"), weights(start)) < 1e-6
