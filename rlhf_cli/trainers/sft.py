"""Supervised fine-tuning on demonstrations, on TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from rlhf_cli.config.schema import StageTraining
from rlhf_cli.trainers.common import (
    Computing,
    WholeBatches,
    WholeCheckpoints,
    training_arguments,
)


class DemonstrationTrainer(WholeBatches, WholeCheckpoints, SFTTrainer):
    """TRL's SFTTrainer with whole batches and checkpoints."""


def sft_trainer(
    model: Any,
    tokenizer: Any,
    rows: list[dict] | Dataset,
    block: StageTraining,
    *,
    folder: Path,
    seed: int,
    computing: Computing,
) -> DemonstrationTrainer:
    """Return a trainer of -log pi(response | prompt), mean over the response tokens of a batch.

    Args:
        model: causal language model, with an adapter or without.
        tokenizer: its tokenizer.
        rows: {"prompt_ids", "completion_ids"}; loss is on the completion alone.
        block: optimisation settings.
        folder: checkpoints go here.
        seed: batch order.
        computing: device and precision.
    """
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    args = SFTConfig(
        **training_arguments(block, "sft", folder=folder, seed=seed, computing=computing),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    return DemonstrationTrainer(model, args, train_dataset=data.with_transform(_labelled), processing_class=tokenizer)


def _labelled(columns: dict[str, list]) -> dict[str, list]:
    """Return the columns that the trainer reads, made of prompt_ids and completion_ids whenever it reads some rows."""
    rows = list(zip(columns["prompt_ids"], columns["completion_ids"], strict=True))
    labels = [[-100] * len(prompt) + completion for prompt, completion in rows]
    return {"input_ids": [prompt + completion for prompt, completion in rows], "labels": labels}
