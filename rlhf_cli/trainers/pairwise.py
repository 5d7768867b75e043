"""Algorithms that learn from pairs (dpo, rpo, dpm), on TRL's DPOTrainer with the algorithm's own loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from rlhf_cli.algos.base import Algorithm, PairLogps
from rlhf_cli.config.schema import AlgoConfig, StageTraining
from rlhf_cli.errors import ConfigError
from rlhf_cli.models.adapters import WithoutAdapter
from rlhf_cli.models.logps import token_logps
from rlhf_cli.models.prefix_tree import PrefixTree
from rlhf_cli.models.tokens import TokenBatch, collate
from rlhf_cli.rewards.pcrm import bound_loss
from rlhf_cli.trainers.common import (
    Computing,
    WholeBatches,
    WholeCheckpoints,
    training_arguments,
)


class PairwiseTrainer(WholeBatches, WholeCheckpoints, DPOTrainer):
    """TRL's DPOTrainer whose loss is `Algorithm.pair_loss` on per-token log-probs of policy and reference.

    Rows with a `bound` add the prior constraint -log sigmoid(delta* - logit) (arXiv 2404.00978, its DPO form).
    """

    algorithm: Algorithm
    algo: AlgoConfig
    reference: Any
    temperature: float
    tree: PrefixTree | None
    mean_tokens: float | None = None  # chosen tokens of a micro-batch of the step; None: it has one alone

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # rows are token ids already

    def _get_num_items_in_batch(self, batch_samples: list, device: Any) -> Any:
        """Return what the trainer counts; note the mean number of chosen tokens of the step's micro-batches."""
        counts = torch.tensor([_chosen_tokens(inputs) for inputs in batch_samples], device=device)
        self.mean_tokens = float(self.accelerator.gather(counts).double().mean())
        return super()._get_num_items_in_batch(batch_samples, device)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        bound = inputs.pop("bound", None)
        share = 1.0 if self.mean_tokens is None else _chosen_tokens(inputs) / self.mean_tokens
        batch = TokenBatch(**inputs)
        logps = token_logps(model, batch, temperature=self.temperature, tree=self.tree)
        with torch.no_grad():
            ref_logps = token_logps(self.reference, batch, temperature=self.temperature, tree=self.tree)
        sides = [tensor.chunk(2) for tensor in (logps, ref_logps, batch.response_mask)]
        (chosen, rejected), (ref_chosen, ref_rejected), (chosen_mask, rejected_mask) = sides
        pairs = PairLogps(chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, share)
        assert self.algorithm.pair_loss is not None
        terms = self.algorithm.pair_loss(pairs, self.algo)
        logits = terms.pop("logits", None)
        if bound is not None:
            terms |= self._constrained(terms["loss"], logits, bound)
        self._note(model, pairs, terms)
        return (terms["loss"], None) if return_outputs else terms["loss"]

    def _constrained(self, loss: Any, logits: torch.Tensor | None, bound: torch.Tensor) -> dict[str, torch.Tensor]:
        if logits is None:
            raise ConfigError(
                f"algo/constraint does not go with algo={self.algorithm.name}",
                "its pair_loss returns no logits to bound",
                "return them, as pairwise_terms in algos/dpo.py does, or use algo/constraint=none",
            )
        constraint = bound_loss(logits, bound).mean()
        return {
            "loss": loss + constraint,
            "constraint_loss": constraint.detach(),
            "bound": bound.mean(),
            "bound_half": bound.mean() / 2,
            "beyond_bound": (logits > bound).float().mean(),
        }

    def _note(self, model: Any, pairs: PairLogps, terms: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            change = ((pairs.chosen - pairs.ref_chosen) * pairs.chosen_mask).sum(-1).mean()
            shown = {
                **{key: value for key, value in terms.items() if key != "loss"},
                "chosen_logps": (pairs.chosen * pairs.chosen_mask).sum(-1).mean(),
                "rejected_logps": (pairs.rejected * pairs.rejected_mask).sum(-1).mean(),
                "chosen_logps_change": change,
            }
        for key, value in shown.items():
            self._metrics["train" if model.training else "eval"][key].append(float(value.detach()))


def _chosen_tokens(inputs: dict[str, torch.Tensor]) -> int:
    return int(inputs["response_mask"].chunk(2)[0].sum())


class PairCollator:
    """Stacks rows {"prompt_ids", "chosen_ids", "rejected_ids"} and perhaps "bound": chosen first, rejected below."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return the fields of a `TokenBatch` of 2B sequences, and the bounds (B,) of rows that have them."""
        prompts = [row["prompt_ids"] for row in rows]
        responses = [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
        batch = collate(prompts + prompts, responses, self.pad_id)
        found = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
        return found | ({"bound": torch.tensor([row["bound"] for row in rows])} if "bound" in rows[0] else {})


def pairwise_trainer(
    algorithm: Algorithm,
    algo: AlgoConfig,
    policy: Any,
    reference: Any,
    tokenizer: Any,
    pairs: list[dict] | Dataset,
    block: StageTraining,
    *,
    temperature: float,
    tree: PrefixTree | None,
    folder: Path,
    seed: int,
    computing: Computing,
) -> PairwiseTrainer:
    """Return a trainer of `algorithm` on pairs.

    Args:
        algorithm, algo: the record and its settings.
        policy: causal language model, with an adapter or without.
        reference: a frozen one, or the policy without its adapter.
        tokenizer: of both.
        pairs: {"prompt_ids", "chosen_ids", "rejected_ids"}, responses with end-of-sequence; with "bound" (delta*,
            nats) in every row or in none.
        block: optimisation settings.
        temperature, tree: how log-probs are read.
        folder: checkpoints go here.
        seed: batch order.
        computing: device and precision.
    """
    arguments = training_arguments(block, "pairwise", folder=folder, seed=seed, computing=computing)
    args = DPOConfig(**arguments, max_length=None)
    view = isinstance(reference, WithoutAdapter)  # TRL takes no such thing, and makes an adapter of its own
    trainer = PairwiseTrainer(
        policy,
        None if view else reference,
        args,
        data_collator=PairCollator(tokenizer.pad_token_id),
        train_dataset=pairs if isinstance(pairs, Dataset) else Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.reference = reference if view else trainer.ref_model
    trainer.algorithm, trainer.algo = algorithm, algo
    trainer.temperature, trainer.tree = temperature, tree
    return trainer
