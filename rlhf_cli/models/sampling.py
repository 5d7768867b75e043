"""A lean batched sampler with a key-value cache: what `generate` does, without its bookkeeping per token.

Each row has a stream of random numbers of its own, so what it draws does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
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
    streams: Sequence[int],
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
        streams: number of the stream of random numbers of each row (`row_streams`).
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
    luck = uniforms(streams, max_new_tokens).to(device)
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
        tokens = draw(logits, top_p, luck[:, step]).masked_fill(finished, pad_id)
        columns.append(tokens)
        finished = finished | torch.isin(tokens, ends)
        if bool(finished.all()):
            break
        if tree is not None and states is not None:
            states = tree.advance(states, tokens)
        step_ids = tokens.unsqueeze(-1)
    return trim(torch.stack(columns, dim=1), eos_ids)


def row_streams(*key: int, rows: Sequence[int]) -> list[int]:
    """Return the stream of each row: a hash of `key` and the row's number, below 2^32.

    Args:
        key: what the rows are drawn for, each >= 0: seed and, say, update.
        rows: their numbers, >= 0.
    """
    if not rows:
        return []
    words = np.random.SeedSequence([len(key), *key]).generate_state(max(rows) + 1)  # a word depends on its place alone
    return words[list(rows)].tolist()


def uniforms(streams: Sequence[int], count: int) -> Tensor:
    """Return the first `count` numbers of each stream, uniform in [0, 1), float64, (B, count)."""
    draws = [torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in streams]
    return torch.stack(draws) if draws else torch.empty(0, count, dtype=torch.float64)


def draw(logits: Tensor, top_p: float, luck: Tensor) -> Tensor:
    """Return one token a row, drawn from softmax(logits) restricted to its `top_p` nucleus, (B,).

    It is the first whose cumulative probability exceeds `luck` times the total, so none of probability 0 is drawn.

    Args:
        logits: (B, V).
        top_p: nucleus, in (0, 1].
        luck: uniform in [0, 1), float64, (B,).

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
        probabilities = probabilities * nucleus(probabilities, top_p)
    reached = probabilities.cumsum(-1, dtype=torch.float64)  # float32 would lose the rare tokens of a long vocabulary
    total = reached[:, -1:]
    aim = torch.minimum(luck.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, aim, right=True).squeeze(-1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Return which tokens are in the nucleus: the likeliest, as few as reach `top_p` together, bool, (..., V)."""
    ordered, order = probabilities.sort(-1, descending=True)
    inside = ordered.cumsum(-1) - ordered < top_p  # the token that crosses top_p stays
    return torch.zeros_like(inside).scatter(-1, order, inside)


def trim(tokens: Tensor, eos_ids: Sequence[int]) -> list[list[int]]:
    """Return each row of `tokens` (B, T) as a list up to and with its first end-of-sequence token."""
    ends, rows = set(eos_ids), []
    for row in tokens.tolist():
        stop = next((position for position, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(row[: stop + 1])
    return rows
