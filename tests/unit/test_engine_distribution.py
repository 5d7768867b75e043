"""Engines give one distribution: what they sample on the survey world's answers is not told apart by a χ² test."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2_contingency
from tiny_engines import drawn, engine, engine_trainer

from rlhf_cli import jobs
from rlhf_cli.config import compose
from rlhf_cli.data import load
from rlhf_cli.data.encode import encode_prompt, encode_response
from rlhf_cli.models.policy import load_policy, load_tokenizer
from rlhf_cli.run import seed_everything

WORLD = ["dataset.questions=2", "dataset.demonstrations=2000"]
SMALL = ["model.hidden_size=32", "model.ffn_size=64", "model.layers=1", "model.vocab_size=400", "tracker=none"]
SMALL += ["trainer.sft.batch_size=16", "trainer.sft.max_steps=100", "device=cpu"]
ELSE = (-1,)  # what is no valid answer
UPDATES = 4  # that the samples are spread over


class Survey:
    """A policy with a few steps of SFT on a small survey world, and what engines sample from it."""

    def __init__(self, policy: Path, places: Path) -> None:
        seed_everything(0)
        self.cfg: Any = compose.load("align", WORLD)
        self.tokenizer, self.folder, self.places = load_tokenizer(policy, training=False), policy, places
        questions = load(self.cfg.dataset).questions
        self.prompts = [encode_prompt(self.tokenizer, question.prompt) for question in questions]
        self.valid = [
            {tuple(encode_response(self.tokenizer, answer)) for answer in question.answers} for question in questions
        ]

    @cache  # noqa: B019 - one survey a session
    def counts(self, name: str, samples: int, *, seed: int = 0, **changes: Any) -> Counter[tuple[int, ...]]:
        """Return how often each valid answer to each wording was sampled, and anything else."""
        trainer = engine_trainer(
            load_policy(self.folder), self.tokenizer, self.prompts, engine(name, **changes), self.places,
            max_completion_tokens=self.cfg.dataset.max_completion_tokens, seed=seed,
        )  # fmt: skip
        per_update = samples // UPDATES
        numbers = [row % len(self.prompts) for row in range(per_update)]
        found = drawn(trainer, [self.prompts[number] for number in numbers], times=UPDATES)
        assert len(found) == samples
        rows = zip(numbers * UPDATES, map(tuple, found), strict=True)
        return Counter((number, *(ids if ids in self.valid[number] else ELSE)) for number, ids in rows)


def p_value(one: Counter[tuple[int, ...]], other: Counter[tuple[int, ...]]) -> float:
    """Return the p-value of both being drawn from one distribution; cells that expect fewer than five are joined."""
    table = np.array([[one[key], other[key]] for key in sorted(one.keys() | other.keys())])
    few = table.sum(-1) < 10
    joined = np.vstack([table[~few], table[few].sum(0, keepdims=True)])
    return float(chi2_contingency(joined[joined.sum(-1) > 0]).pvalue)


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    places = tmp_path_factory.mktemp("engines")
    run = jobs.run_one("train-sft", [*WORLD, *SMALL, f"run_dir='{places}/run'", f"store_dir='{places}/store'"], None)
    return Survey(run / "model", places / "checkpoints")


def holds(survey: Survey, name: str, samples: int) -> None:
    lean, other = survey.counts("default", samples), survey.counts(name, samples, seed=1)
    answers = sum(count for key, count in lean.items() if key[1:] != ELSE)
    assert answers > samples / 4, "the policy has learnt to answer"
    assert len([key for key, count in lean.items() if count >= 10]) > 10
    assert p_value(lean, other) > 0.001
    assert p_value(lean, survey.counts("default", samples, temperature=0.7)) < 1e-6, "a test that can tell"


@pytest.mark.parametrize("name", ["continuous", "generate"])
def test_engines_sample_one_distribution(name: str, survey: Survey) -> None:
    holds(survey, name, 2_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["continuous", "generate"])
def test_engines_sample_one_distribution_in_20000_samples(name: str, survey: Survey) -> None:
    holds(survey, name, 20_000)
