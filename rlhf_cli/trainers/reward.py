"""Reward-model training on preference pairs, on TRL's RewardTrainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from rlhf_cli.config.schema import StageTraining
from rlhf_cli.trainers.common import WholeCheckpoints, training_arguments

PairLoss = Callable[[Tensor, Tensor], Tensor]


class PairRewardTrainer(WholeCheckpoints, RewardTrainer):
    """TRL's RewardTrainer with the loss as a seam: (chosen, rejected) rewards (B,) -> per-pair loss (B,)."""

    pair_loss: PairLoss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs, use_cache=False)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        loss = self.pair_loss(chosen, rejected).mean()
        margin = (chosen - rejected).detach()
        shown = {"accuracy": (margin > 0).float().mean(), "margin": margin.mean(), "score/mean": outputs.logits.mean()}
        for key, value in shown.items():
            self._metrics["train" if model.training else "eval"][key].append(float(value.detach()))
        return (loss, outputs) if return_outputs else loss


def reward_trainer(
    model: Any,
    tokenizer: Any,
    pairs: list[dict],
    loss: PairLoss,
    block: StageTraining,
    *,
    folder: Path,
    seed: int,
    device: str,
) -> PairRewardTrainer:
    """Return a trainer of `loss` on pairs.

    Args:
        model: sequence classifier with one output, read at the last token.
        tokenizer: its tokenizer; its padding token differs from end-of-sequence.
        pairs: {"prompt_ids", "chosen_ids", "rejected_ids"}, responses with end-of-sequence.
        loss: per-pair loss of (chosen, rejected) rewards.
        block: optimisation settings.
        folder: checkpoints go here.
        seed: batch order.
        device: cpu or cuda.
    """
    ready = [{side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")} for row in pairs]
    args = RewardConfig(**training_arguments(block, folder=folder, seed=seed, device=device), max_length=None)
    trainer = PairRewardTrainer(model, args, train_dataset=Dataset.from_list(ready), processing_class=tokenizer)
    trainer.pair_loss = loss
    return trainer
