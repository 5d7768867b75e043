"""Every stage on rows that stay on disk."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from small_jobs import SMALL, read_json, write_lines
from typer.testing import Result

Rlhf = Callable[..., Result]
DATA = ["dataset=preferences", "dataset.path=rows.jsonl", "dataset.streaming=true", "dataset.max_prompt_tokens=40"]
DATA += ["dataset.max_completion_tokens=12", "dataset.eval_prompts=4", "dataset.eval_samples=2"]
DATA += ["trainer.sft.batch_size=8", "trainer.rm.batch_size=8"]
TOPICS = ["tea", "rain", "chess", "Zürich", "bread"]

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def run(rlhf: Rlhf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a command on rows of a file and returns its metrics."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def command(name: str, *overrides: str, run_dir: str) -> dict[str, Any]:
        result = rlhf(name, *SMALL, *DATA, *overrides, f"run_dir={run_dir}", "store_dir=store")
        assert result.exit_code == 0, result.output
        return read_json(Path(run_dir) / "metrics.json")

    return command


def write_pairs(count: int = 160) -> None:
    rng = random.Random(0)
    topics = [rng.choice(TOPICS) for _ in range(count)]
    rows = [
        {"prompt": f"What about {topic} {i}?", "chosen": f"I like {topic}.", "rejected": f"{topic}? No!"}
        for i, topic in enumerate(topics)
    ]
    rows += [{"prompt": f"{i} " + "Why? " * 60, "chosen": "So.", "rejected": "No."} for i in range(20)]
    write_lines(Path("rows.jsonl"), rows)


def test_all_commands_train_from_disk(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    write_pairs()
    judged = run("train-rm", "reward=pcrm_length", run_dir="rm")
    assert judged["data/dropped/prompt_too_long"] >= 10
    assert 0 <= judged["rm/accuracy"] <= 1
    aligned = run("align", "algo=pm", "reward=pcrm_length", run_dir="pm")
    assert 0 < aligned["pm/pair_tv"] < 1
    assert aligned["pm/pair_tv"] != aligned["reference/pm/pair_tv"]
    bounded = run("align", "algo=dpo", "algo/constraint=length", "reward=pcrm_length", run_dir="dpo")
    assert bounded["pm/pair_tv"] != bounded["reference/pm/pair_tv"]
    assert len(list((tmp_path / "cache" / "rlhf" / "rows").iterdir())) == 1
    assert len(list((tmp_path / "cache" / "rlhf" / "tokens").iterdir())) == 5, "each split once for the one tokenizer"
    assert not list(Path("store").glob("*/*/checkpoints"))


def test_rankings_from_disk(run: Callable[..., dict[str, Any]]) -> None:
    answers = ["I like {} very much.", "I like {}.", "{} is fine.", "{}? No!"]
    rows = [
        {
            "prompt": f"What about {TOPICS[i % 5]} {i}?",
            "responses": [text.format(TOPICS[i % 5]) for text in answers[: 2 + i % 3]],
        }
        for i in range(120)
    ]
    write_lines(Path("rows.jsonl"), rows)
    metrics = run("train-rm", run_dir="rm")
    assert 0 <= metrics["rm/accuracy"] <= 1
    assert metrics["data/reward_pairs"] > 50, "counted as the pairs they imply"
