"""Supervised fine-tuning on demonstrations, on TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from rlhf_cli.config.schema import StageTraining
from rlhf_cli.trainers.common import WholeCheckpoints, training_arguments


class DemonstrationTrainer(WholeCheckpoints, SFTTrainer):
    """TRL's SFTTrainer with whole checkpoints."""


def sft_trainer(
    model: Any, tokenizer: Any, rows: list[dict], block: StageTraining, *, folder: Path, seed: int, device: str
) -> DemonstrationTrainer:
    """Return a trainer of -log pi(response | prompt), mean over the response tokens of a batch.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        rows: {"prompt_ids", "completion_ids"}; loss is on the completion alone.
        block: optimisation settings.
        folder: checkpoints go here.
        seed: batch order.
        device: cpu or cuda.
    """
    ready = [
        {
            "input_ids": row["prompt_ids"] + row["completion_ids"],
            "labels": [-100] * len(row["prompt_ids"]) + row["completion_ids"],
        }
        for row in rows
    ]
    args = SFTConfig(
        **training_arguments(block, folder=folder, seed=seed, device=device),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    return DemonstrationTrainer(model, args, train_dataset=Dataset.from_list(ready), processing_class=tokenizer)
