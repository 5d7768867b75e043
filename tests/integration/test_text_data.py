"""All four commands on real-text data: dialogues in the HH form, and plain preference rows."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_jobs import SMALL, read_json, read_lines, write_lines
from typer.testing import Result

from rlhf_cli.metrics.glossary import known

Rlhf = Callable[..., Result]
TEXT = ["dataset.max_prompt_tokens=40", "dataset.max_completion_tokens=12"]
TEXT += ["dataset.eval_prompts=8", "dataset.eval_samples=2", "trainer.sft.batch_size=8", "trainer.rm.batch_size=8"]
LONG = 5  # rows whose prompt does not fit

pytestmark = pytest.mark.usefixtures("no_figures")


def rows(count: int = 80) -> list[dict[str, str]]:
    """Return questions about numbers with a friendly and a rude answer, the last `LONG` with endless prompts."""
    rng = random.Random(0)
    made = []
    for number in range(count):
        topic = rng.choice(["tea", "rain", "chess", "Zürich", "bread"])
        question = f"What about {topic} {number}?" if number < count - LONG else f"{number} " + "Why? " * 60
        made.append({"prompt": question, "chosen": f"I like {topic}.", "rejected": f"{topic}? No!"})
    return made


def dialogue(row: dict[str, str], side: str) -> str:
    return f"\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}"


@pytest.fixture(params=["hh_rlhf", pytest.param("preferences", marks=pytest.mark.slow)])
def dataset(request: pytest.FixtureRequest, rlhf: Rlhf) -> list[str]:
    """The overrides of a dataset with its file in the working directory."""
    if request.param == "preferences":
        write_lines(Path("rows.jsonl"), rows())
        return [*TEXT, "dataset=preferences", "dataset.path=rows.jsonl"]
    lines = [json.dumps({side: dialogue(row, side) for side in ("chosen", "rejected")}) for row in rows()]
    Path("rows.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return [*TEXT, "dataset=hh_rlhf", "dataset.path=rows.jsonl.gz"]


def finite(run: str) -> dict[str, Any]:
    """Return the metrics of a run, all of them known and finite."""
    metrics = read_json(Path(run) / "metrics.json")
    for line in (metrics, *read_lines(Path(run) / "training_log.jsonl")) if run != "evaluate" else (metrics,):
        assert [key for key in line if not known(key)] == []
        assert [key for key, value in line.items() if value is None or not math.isfinite(value)] == []
    return metrics


def test_all_commands(rlhf: Rlhf, dataset: list[str]) -> None:
    def run(command: str, name: str, *overrides: str) -> dict[str, Any]:
        result = rlhf(command, *SMALL, *dataset, *overrides, f"run_dir={name}", "store_dir=store")
        assert result.exit_code == 0, result.output
        return finite(name)

    assert run("train-sft", "sft")["data/dropped/prompt_too_long"] >= LONG
    assert 0 <= run("train-rm", "rm")["rm/accuracy"] <= 1
    for algo in ("pm", "dpo"):
        metrics = run("align", algo, f"algo={algo}")
        assert 0 < metrics["pm/pair_tv"] < 1
        assert metrics["pm/divergence"] > 0
        for key in ("pm/pair_tv", "pm/divergence", "reward/mean", "kl/sequence", "entropy/per_token", "length/mean"):
            assert metrics[f"{key}/lo"] <= metrics[key] <= metrics[f"{key}/hi"]
            assert metrics[f"{key}/n"] >= 5
        assert 0 <= metrics["eos_rate"] <= 1
        assert metrics["length/mean"] <= 12
        assert metrics["data/dropped/prompt_too_long"] >= LONG
        assert 2 <= metrics["pool/size"] <= 10, "two responses of the dataset, eight of the reference"
        assert metrics["pool/prompts"] == metrics["pm/tv/n"] >= 5
        assert 0 < metrics["pm/tv"] < 1
        assert "pm/offset_mass" not in metrics
        assert not Path(algo, "distributions.json").exists()
        completions = read_lines(Path(algo, "completions.jsonl"))
        assert len(completions) == 2 * metrics["reward/mean/n"]
        assert all("\ufffd" not in row["prompt"] for row in completions)
    metrics = run("evaluate", "evaluate", "policy=pm")
    before = read_json(Path("pm/metrics.json"))
    assert metrics == {key: value for key, value in before.items() if not key.startswith("best/")}
    result = rlhf("compare", "pm", "dpo")
    assert result.exit_code == 0, result.output


def test_prior_constraints_on_text(rlhf: Rlhf, dataset: list[str]) -> None:
    def run(command: str, name: str, *overrides: str) -> dict[str, Any]:
        result = rlhf(command, *SMALL, *dataset, *overrides, f"run_dir={name}", "store_dir=store")
        assert result.exit_code == 0, result.output
        return finite(name)

    judged = run("train-rm", "rm", "reward=pcrm_cosine")
    assert judged["rm/bound/mean"] >= 20 / 1.001 - 15  # that of equal embeddings, the least there is
    assert judged["rm/bound/half"] == judged["rm/bound/mean"] / 2
    assert "rm/gold_tv" not in judged
    assert len(list(Path("store/similarity").iterdir())) == 2, "training and held-out pairs, embedded once"
    aligned = run("align", "pm", "algo=pm", "reward=pcrm_length")
    assert 0 < aligned["pm/pair_tv"] < 1
    assert len(list(Path("store/rm").iterdir())) == 2
    run("align", "rpo", "algo=rpo", "algo/constraint=length", "reward=pcrm_length")
    assert len(list(Path("store/rm").iterdir())) == 2


def test_data_counts_the_rows(rlhf: Rlhf, dataset: list[str]) -> None:
    result = rlhf("data", *dataset)
    assert result.exit_code == 0, result.output
    rows = [line.split(maxsplit=2) for line in result.stdout.splitlines() if line.lstrip()[:1].isdigit()]
    counts = {name: int(count) for count, name, _ in rows}
    used = sum(counts[name] for name in ("demonstrations", "reward_pairs", "policy_pairs", "heldout_pairs"))
    assert used == 80 - LONG
    assert f"{LONG}  left out        the prompt is longer than dataset.max_prompt_tokens\n" in result.stdout
    assert re.search(r"\ntokens of all 80 rows .*\nprompts .* 40  6\.2% left out\nresponses ", result.stdout)


def test_a_dataset_named_as_the_other_form_is_recognised(rlhf: Rlhf) -> None:
    write_lines(Path("rows.jsonl"), rows())
    result = rlhf("data", "dataset=hh_rlhf", "dataset.path=rows.jsonl")
    assert result.exit_code == 2
    assert "these rows look like dataset=preferences" in result.stderr


def test_a_mixture_of_forms_goes_through_alignment(rlhf: Rlhf) -> None:
    def turns(row: dict[str, str], side: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]

    plain, asked = rows()[:40], rows()[40 : 80 - LONG]
    write_lines(Path("plain.jsonl"), plain)
    write_lines(Path("asked.jsonl"), [{side: turns(row, side) for side in ("chosen", "rejected")} for row in asked])
    mixture = [*TEXT, "dataset=mixture", "dataset.parts=[plain.jsonl,asked.jsonl]", "trainer.pairwise.batch_size=4"]
    result = rlhf("align", *SMALL, *mixture, "algo=dpo", "run_dir=dpo", "store_dir=store")
    assert result.exit_code == 0, result.output
    assert 2 <= finite("dpo")["pool/size"] <= 10
    prompts = {line["prompt"] for line in read_lines(Path("dpo/completions.jsonl"))}
    assert {prompt.startswith("\n\nHuman: What") for prompt in prompts} == {True, False}
