"""A lean batched sampler with a key-value cache: what `generate` does, without its bookkeeping per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_cli.errors import RunError
from rlhf_cli.models.prefix_tree import PrefixTree
from rlhf_cli.models.tokens import pad_left


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos_ids: Sequence[int],
    pad_id: int,
    tree: PrefixTree | None = None,
) -> list[list[int]]:
    """Return a sampled response for each prompt: token ids, end-of-sequence included unless cut at max_new_tokens.

    Args:
        model: causal language model.
        prompts: token ids, one list a prompt.
        max_new_tokens: >= 1.
        temperature: divides the logits, > 0.
        top_p: nucleus, in (0, 1]; 1 is the full distribution.
        eos_ids: tokens that end a response.
        pad_id: padding token.
        tree: closed vocabulary, or None.
    """
    device = next(model.parameters()).device
    ids, mask = (tensor.to(device) for tensor in pad_left(prompts, pad_id))
    attention = torch.nn.functional.pad(mask.long(), (0, max_new_tokens), value=1)
    states = tree.states(ids)[:, -1] if tree is not None else None
    ends = torch.tensor(list(eos_ids), device=device)
    finished = torch.zeros(len(ids), dtype=torch.bool, device=device)
    cache, step_ids, width, columns = DynamicCache(config=model.config), ids, ids.shape[1], []
    for step in range(max_new_tokens):
        seen = attention[:, : width + step]
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -step_ids.shape[1] :]
        logits = model(
            input_ids=step_ids, attention_mask=seen, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        ).logits[:, -1].float() / temperature  # fmt: skip
        if tree is not None and states is not None:
            logits = tree.restrict(logits, states)
        tokens = draw(logits, top_p).masked_fill(finished, pad_id)
        columns.append(tokens)
        finished = finished | torch.isin(tokens, ends)
        if bool(finished.all()):
            break
        if tree is not None and states is not None:
            states = tree.advance(states, tokens)
        step_ids = tokens.unsqueeze(-1)
    return trim(torch.stack(columns, dim=1), eos_ids)


def draw(logits: Tensor, top_p: float) -> Tensor:
    """Return one token a row, drawn from softmax(logits) restricted to its `top_p` nucleus, (B,).

    Raises:
        RunError: a probability is not finite.
    """
    probabilities = logits.softmax(-1)
    if not bool(probabilities.isfinite().all()):
        raise RunError(
            "the policy gives probabilities that are not finite",
            "its training diverged",
            "lower the learning_rate of the stage that trained it (trainer.sft, online or pairwise)",
        )
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0.0))
    return torch.multinomial(probabilities, 1).squeeze(-1)


def trim(tokens: Tensor, eos_ids: Sequence[int]) -> list[list[int]]:
    """Return each row of `tokens` (B, T) as a list up to and with its first end-of-sequence token."""
    ends, rows = set(eos_ids), []
    for row in tokens.tolist():
        stop = next((position for position, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(row[: stop + 1])
    return rows
