"""Reward-model training on preference pairs and rankings, on TRL's RewardTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from rlhf_cli import ranks
from rlhf_cli.config.schema import StageTraining, TrainedRewardConfig
from rlhf_cli.models.reward import by_token, last_values
from rlhf_cli.models.tokens import TokenBatch, collate, shared_prefix
from rlhf_cli.rewards.base import PairScores, RewardLoss, centering_penalty, pair_loss
from rlhf_cli.trainers.common import (
    Computing,
    WholeBatches,
    WholeCheckpoints,
    training_arguments,
)

COLUMNS = ("label", "margin", "bound")


class LossRewardTrainer(WholeBatches, WholeCheckpoints, RewardTrainer):
    """TRL's RewardTrainer whose loss is a `RewardLoss`, on scores read as alignment reads them (models/reward.py)."""

    reward_loss: RewardLoss
    reward: TrainedRewardConfig

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # rows are token ids already

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        counts, columns = inputs.pop("counts"), {name: inputs.pop(name) for name in COLUMNS}
        batch = TokenBatch(**inputs)
        values = model(**inputs)
        scores = last_values(values, batch)
        best = counts.cumsum(0) - counts  # row of each judgement's best response
        chosen, rejected = scores[best], scores[best + 1]
        if self.reward.token_wise:
            per_pair = self._token_wise(values, batch, columns)
        else:
            pairs = PairScores(chosen, rejected, **columns)
            per_pair = pair_loss(self.reward_loss, pairs, self.reward)
            per_pair = self._with_rankings(per_pair, scores, counts, best)
        self._note(model, {**columns, "scores": scores, "difference": chosen - rejected})
        loss = per_pair.mean()
        return (loss, None) if return_outputs else loss

    def _with_rankings(self, per_pair: Tensor, scores: Tensor, counts: Tensor, best: Tensor) -> Tensor:
        """Return the losses with those of rankings, judgements of three or more responses, put in."""
        longest = int(counts.max())
        if longest == 2:
            return per_pair
        assert self.reward_loss.ranking_loss is not None
        place = torch.arange(longest, device=counts.device)
        mask = place < counts[:, None]
        rows = (best[:, None] + place).clamp(max=len(scores) - 1)
        ranked = scores[rows].masked_fill(~mask, 0.0)
        mean = ranked.sum(-1) / counts
        whole = self.reward_loss.ranking_loss(ranked, mask, self.reward)
        whole = whole + self.reward.centering * centering_penalty(mean, mean)  # of a pair: that of its two rewards
        return torch.where(counts > 2, whole, per_pair)

    def _token_wise(self, values: Tensor, batch: TokenBatch, columns: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of each pair over the tokens from the first differing one to the longer end, (B,).

        The official PCRM code reads the shorter response on into its padding; here it keeps its last reward.
        """
        length = batch.response_ids.shape[1]
        sizes = batch.response_mask.sum(-1, keepdim=True)
        place = torch.arange(length, device=values.device)
        held = values[:, -length:].gather(-1, torch.minimum(place.expand(len(sizes), -1), sizes - 1))
        chosen, rejected = held[0::2], held[1::2]
        longer = torch.maximum(sizes[0::2], sizes[1::2])
        mask = (place >= shared_prefix(batch)[:, None]) & (place < longer)
        spread = {name: column[:, None].expand_as(chosen) for name, column in columns.items()}
        per_token = pair_loss(self.reward_loss, PairScores(chosen, rejected, **spread), self.reward)
        return per_token.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)

    @torch.no_grad()
    def _note(self, model: Any, seen: dict[str, Tensor]) -> None:
        """Note what is seen of a micro-batch on all ranks: a spread, or a mean over some rows, is no mean of means."""
        parts = ranks.gather({name: values.detach().cpu() for name, values in seen.items()})
        seen = {name: torch.cat([part[name] for part in parts]) for name in seen}
        scores, margin, label = seen["scores"], seen["difference"], seen["label"]
        people = seen["bound"].isfinite()
        shown = {
            "accuracy": torch.where(margin == 0, 0.5, torch.where(margin > 0, label, 1 - label)).mean(),
            "margin": margin.mean(),
            "score/mean": scores.mean(),
            "score/std": scores.std(),
        }
        if bool(people.any()):
            bound, bounded = seen["bound"][people], margin[people]
            shown |= {"bound": bound.mean(), "bound_half": bound.mean() / 2, "bounded_margin": bounded.mean()}
            shown["beyond_bound"] = (bounded > bound).float().mean()
        for key, value in shown.items():
            self._metrics["train" if model.training else "eval"][key].append(float(value))


class JudgementCollator:
    """Stacks rows {"prompt_ids", "response_ids" (best first), "label", "margin", "bound"}."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """Return the fields of a `TokenBatch`, the number of responses of each row, and the columns, (B,)."""
        prompts = [row["prompt_ids"] for row in rows for _ in row["response_ids"]]
        batch = collate(prompts, [ids for row in rows for ids in row["response_ids"]], self.pad_id)
        columns = {name: torch.tensor([float(row[name]) for row in rows]) for name in COLUMNS}
        counts = torch.tensor([len(row["response_ids"]) for row in rows])
        return {**{name: getattr(batch, name) for name in batch.__dataclass_fields__}, "counts": counts, **columns}


def reward_trainer(
    model: Any,
    tokenizer: Any,
    rows: list[dict] | Dataset,
    loss: RewardLoss,
    reward: TrainedRewardConfig,
    block: StageTraining,
    *,
    folder: Path,
    seed: int,
    computing: Computing,
) -> LossRewardTrainer:
    """Return a trainer of `loss` on judgements.

    Args:
        model: sequence classifier with one output, with an adapter or without.
        tokenizer: its tokenizer; its padding token differs from end-of-sequence.
        rows: {"prompt_ids", "response_ids": two or more, best first, with end-of-sequence, "label", "margin", "bound"}.
        loss, reward: the record and its settings.
        block: optimisation settings.
        folder: checkpoints go here.
        seed: batch order.
        computing: device and precision.
    """
    arguments = training_arguments(block, "rm", folder=folder, seed=seed, computing=computing)
    args = RewardConfig(**arguments, max_length=None)
    trainer = LossRewardTrainer(
        model,
        args,
        data_collator=JudgementCollator(tokenizer.pad_token_id),
        train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    by_token(model)
    trainer.reward_loss, trainer.reward = loss, reward
    return trainer
