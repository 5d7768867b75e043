"""The prior constraint on the logits of a batch of pairs (arXiv 2404.00978, its DPO form)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import BOS, EOS, PAD, TOKENIZER, tiny_policy

from rlhf_cli import algos
from rlhf_cli.config.schema import StageTraining
from rlhf_cli.errors import ConfigError
from rlhf_cli.models.logps import token_logps
from rlhf_cli.models.tokens import collate
from rlhf_cli.trainers.common import Computing
from rlhf_cli.trainers.pairwise import PairCollator, PairwiseTrainer, pairwise_trainer

Make = Callable[..., PairwiseTrainer]
PAIRS: list[dict[str, Any]] = [
    {"prompt_ids": [BOS, 4, 5], "chosen_ids": [6, 7, 8, EOS], "rejected_ids": [9, EOS]},
    {"prompt_ids": [BOS], "chosen_ids": [10, EOS], "rejected_ids": [11, 4, 6, 6, 7]},
    {"prompt_ids": [BOS, 8], "chosen_ids": [7, EOS], "rejected_ids": [5, EOS]},
]
BOUNDS = [0.1, 5.0, 0.5]
BOUNDED = [{**pair, "bound": bound} for pair, bound in zip(PAIRS, BOUNDS, strict=True)]
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.5},
    "rpo": {"beta": 0.5, "eta": 0.7, "sft_reduction": "sum", "sft_scale_by_beta": True},
    "dpm": {"beta": 0.5, "alpha": None},
}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that makes a trainer of a policy that has left its reference."""

    def trainer(rows: list[dict[str, Any]], algorithm: Any) -> PairwiseTrainer:
        block = StageTraining(
            max_steps=1, epochs=None, batch_size=len(rows), micro_batch_size=None, learning_rate=1e-3,
            lr_scheduler="constant", warmup_fraction=0.0, adam_beta2=0.99, weight_decay=0.0, max_grad_norm=1.0,
            log_every_steps=1, save_every_steps=1,
        )  # fmt: skip
        settings: Any = SimpleNamespace(**SETTINGS.get(algorithm.name, {}))
        return pairwise_trainer(
            algorithm, settings, tiny_policy(1).train(), tiny_policy(0), TOKENIZER, rows, block, temperature=1.0,
            tree=None, folder=tmp_path, seed=0, computing=Computing("cpu"),
        )  # fmt: skip

    return trainer


def loss_of(trainer: PairwiseTrainer, rows: list[dict[str, Any]]) -> torch.Tensor:
    return trainer._compute_loss(trainer.model, PairCollator(PAD)(rows))


def logits(name: str) -> list[float]:
    """Return the logit of each pair, from the log-probs of its two responses alone."""
    found = []
    for pair in PAIRS:
        sides = []
        for side in ("chosen_ids", "rejected_ids"):
            batch = collate([pair["prompt_ids"]], [pair[side]], PAD)
            ours, theirs = (
                token_logps(tiny_policy(seed), batch, temperature=1.0, tree=None).sum().item() for seed in (1, 0)
            )
            sides.append(ours - (0 if name == "dpm" else theirs))
        found.append(0.5 * (sides[0] - sides[1]))
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_is_the_algorithm_s_and_the_mean_bound_term(make: Make, name: str) -> None:
    trainer = make(BOUNDED, algos.get(name))
    plain, bounded = float(loss_of(trainer, PAIRS)), float(loss_of(trainer, BOUNDED))
    found = logits(name)
    terms = [math.log1p(math.exp(logit - bound)) for logit, bound in zip(found, BOUNDS, strict=True)]
    assert bounded == pytest.approx(plain + sum(terms) / 3, abs=1e-5)
    assert sum(terms) / 3 > 0.1, "a term that matters"
    shown = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    assert shown["constraint_loss"] == pytest.approx(sum(terms) / 3, abs=1e-5)
    assert shown["bound"] == pytest.approx(5.6 / 3)
    assert shown["bound_half"] == pytest.approx(2.8 / 3)
    assert shown["beyond_bound"] == pytest.approx(
        sum(logit > bound for logit, bound in zip(found, BOUNDS, strict=True)) / 3
    )
    assert shown["margin"] == pytest.approx(sum(found) / 3, abs=1e-5)
    if name == "dpo":
        assert plain == pytest.approx(sum(math.log1p(math.exp(-logit)) for logit in found) / 3, abs=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_far_bound_changes_nothing_and_a_near_one_pulls_back(make: Make, name: str) -> None:
    trainer = make(BOUNDED, algos.get(name))
    gradients = []
    for bound in (None, 1e4, -1e4):
        rows = PAIRS if bound is None else [{**pair, "bound": bound} for pair in PAIRS]
        trainer.model.zero_grad()
        loss_of(trainer, rows).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert (gradients[0] - gradients[2]).abs().max() > 1e-2


def test_a_loss_without_logits_cannot_be_bounded(make: Make) -> None:
    dpo = algos.get("dpo")
    own = replace(dpo, name="own", pair_loss=lambda batch, cfg: {"loss": batch.chosen.mean()})
    trainer = make(BOUNDED, own)
    assert bool(loss_of(trainer, PAIRS).isfinite())
    with pytest.raises(ConfigError, match=r"algo/constraint does not go with algo=own\. its pair_loss returns no log"):
        loss_of(trainer, BOUNDED)
