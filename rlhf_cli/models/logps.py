"""Log-probs of responses: one reading for policy and reference, in training, sampling and metrics alike."""

from __future__ import annotations

from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor

from rlhf_cli.models.prefix_tree import PrefixTree
from rlhf_cli.models.tokens import TokenBatch


class Reading(TypedDict):
    """How log-probs are read: what divides the logits, and the closed vocabulary if there is one."""

    temperature: float
    tree: PrefixTree | None


def vocabulary_logps(model: Any, batch: TokenBatch, *, temperature: float, tree: PrefixTree | None) -> Tensor:
    """Return log pi(.|x, y_<t) over the vocabulary at each response position, nats, (B, T, V).

    Args:
        model: causal language model.
        batch: the sequences.
        temperature: divides the logits, > 0.
        tree: closed vocabulary, or None.
    """
    length = batch.response_ids.shape[1]
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        position_ids=batch.position_ids,
        logits_to_keep=length + 1,
        use_cache=False,
    )
    logits = output.logits[:, :-1].float()
    if temperature != 1:  # a copy of all that is read
        logits = logits / temperature
    if tree is not None:
        logits = tree.restrict(logits, tree.states(batch.input_ids)[:, -length - 1 : -1])
    return logits.log_softmax(-1)


def gather_logps(logps: Tensor, response_ids: Tensor) -> Tensor:
    """Return the log-prob of each response token from log-probs over the vocabulary, (B, T)."""
    return logps.gather(-1, response_ids.unsqueeze(-1)).squeeze(-1)


def token_logps(model: Any, batch: TokenBatch, *, temperature: float, tree: PrefixTree | None) -> Tensor:
    """Return log pi(y_t|x, y_<t) of each response token, nats, (B, T). Values under the padding mean nothing."""
    return gather_logps(vocabulary_logps(model, batch, temperature=temperature, tree=tree), batch.response_ids)


@torch.no_grad()
def frozen_token_logps(
    model: Any, batch: TokenBatch, *, temperature: float, tree: PrefixTree | None, micro_batch: int | None = 512
) -> Tensor:
    """Return `token_logps` without gradient, read in pieces of `micro_batch` sequences, 0 under the padding, (B, T)."""
    was_training = model.training
    model.eval()
    found = batch.read(partial(token_logps, model, temperature=temperature, tree=tree), micro_batch)
    model.train(was_training)
    return found.masked_fill(~batch.response_mask, 0.0)


def entropy(logps: Tensor) -> Tensor:
    """Return the entropy of each next-token distribution over the whole vocabulary, nats, (B, T)."""
    return -(logps.exp() * logps).sum(-1)


def kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return KL(pi || pi_ref) of each next-token distribution over the whole vocabulary, exact, nats, (B, T)."""
    return (logps.exp() * (logps - ref_logps)).sum(-1)
