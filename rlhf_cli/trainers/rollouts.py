"""The rollouts of an update over all ranks: gathered, so that each computes with all of them, and dealt out in batches.

Ranks sample and read their own share. What is a mean, a baseline or an order over rollouts is computed on all of them,
on every rank alike, and is therefore the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_cli import ranks
from rlhf_cli.models.batches import by_length
from rlhf_cli.models.tokens import TokenBatch, collate, widened

SEQUENCE_FIELDS = ("input_ids", "attention_mask", "response_ids", "response_mask")  # a TokenBatch's
ORDER_STREAM = 17  # of the order of minibatches, beside the other streams of a seed


@dataclass(frozen=True)
class Rollouts:
    """Sampled responses of one update.

    Args:
        prompts, responses: token ids, B lists each.
        scores: rewards of the responses, (B,).
        columns: what was read of their tokens, (B, T) each; under the padding it means nothing.
        engine_logps: the engine's own log-probs of the tokens, nats, B lists; None where its numbers are training's.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    scores: Tensor
    columns: Mapping[str, Tensor]
    engine_logps: list[list[float]] | None = None

    def of_all_ranks(self) -> Rollouts:
        """Return those of all ranks, in the order of ranks."""
        if ranks.world() == 1:
            return self
        columns = {name: column.cpu() for name, column in self.columns.items()}
        parts = ranks.gather((self.prompts, self.responses, self.scores.cpu(), columns, self.engine_logps))
        prompts, responses, scores, found, engine = zip(*parts, strict=True)
        width, device = max(len(ids) for part in responses for ids in part), self.scores.device
        return Rollouts(
            [ids for part in prompts for ids in part],
            [ids for part in responses for ids in part],
            torch.cat(scores).to(device),
            {name: torch.cat([widened(part[name], width) for part in found]).to(device) for name in columns},
            None if self.engine_logps is None else [row for part in engine for row in part],
        )

    def batch(self, pad_id: int) -> TokenBatch:
        """Return the sequences."""
        return collate(self.prompts, self.responses, pad_id, self.scores.device)


def dealt(
    rollouts: Mapping[str, Tensor], *, key: Sequence[int], size: int, count: int, per_step: int
) -> list[dict[str, Tensor]]:
    """Return this rank's micro-batches of one pass over the rollouts of all ranks.

    Chance says which rollouts an optimizer step has: the same for any number of ranks and size of micro-batch. Within
    it those of like length go together, the longest first, without columns that are padding in all of them.

    Args:
        rollouts: of all ranks: the fields of a TokenBatch, and others of its response tokens, (B, T) each.
        key: decides the order: seed, update, pass; each >= 0.
        size: rollouts of a micro-batch.
        count: micro-batches of a pass, on each rank; size * count * ranks is B.
        per_step: of them, in an optimizer step.

    Returns:
        The micro-batches, each with `share`, (): its tokens over the mean of its step's micro-batches on all ranks.
        The trainer averages them with equal weight, and a mean over the tokens of the step needs this one.

    Raises:
        ValueError: the rollouts do not make as many micro-batches.
    """
    world, total = ranks.world(), len(rollouts["response_mask"])
    if total != size * count * world or count % per_step:
        raise ValueError(f"{total} rollouts are no {count} micro-batches of {size} on {world} ranks.")
    stream = np.random.SeedSequence([ORDER_STREAM, *key]).generate_state(1)[0]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(int(stream)))
    lengths = rollouts["attention_mask"].sum(-1).cpu()
    order = torch.stack([step[by_length(lengths[step].tolist())] for step in order.view(count // per_step, -1)])
    tokens = rollouts["response_mask"].sum(-1).cpu()[order].view(count // per_step, per_step, world, size).sum(-1)
    shares = tokens / tokens.double().mean((1, 2), keepdim=True)
    mine = order.view(count, world, size)[:, ranks.rank()]
    device = rollouts["response_mask"].device
    return [
        {**_taken(rollouts, rows.to(device)), "share": share.to(device)}
        for rows, share in zip(mine, shares.view(count, world)[:, ranks.rank()].float(), strict=True)
    ]


def _taken(rollouts: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    batch = TokenBatch(*(rollouts[name] for name in SEQUENCE_FIELDS)).of(rows)
    sequences = {name: getattr(batch, name) for name in SEQUENCE_FIELDS}
    tokens = batch.response_ids.shape[1]
    return sequences | {name: rollouts[name][rows, :tokens] for name in rollouts if name not in SEQUENCE_FIELDS}
