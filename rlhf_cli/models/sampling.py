"""A lean batched sampler with a key-value cache: what `generate` does, without its bookkeeping per token.

Each row has a stream of random numbers of its own, so what it draws does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.errors import RunError
from rlhf_cli.models.cache import roomy_cache
from rlhf_cli.models.prefix_tree import PrefixTree
from rlhf_cli.models.sharding import ends_everywhere, is_sharded
from rlhf_cli.models.tokens import pad_left

FEW = 0.5  # rows that have ended are dropped once so many are left: less often, and their copies cost little


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
    positions, width = (attention.cumsum(-1) - 1).clamp(min=0), ids.shape[1]
    states = tree.states(ids)[:, -1] if tree is not None else None
    ends, rows = torch.tensor(list(eos_ids), device=device), torch.arange(len(ids), device=device)
    luck = uniforms(streams, max_new_tokens).to(device)
    drawn = torch.full((len(ids), max_new_tokens), pad_id, device=device)
    finished, apart = torch.zeros(len(ids), dtype=torch.bool, device=device), is_sharded(model)
    cache, step_ids = roomy_cache(model.config, width + max_new_tokens), ids
    for step in range(max_new_tokens):
        seen = width + step
        logits = model(
            input_ids=step_ids, attention_mask=attention[:, :seen], past_key_values=cache, use_cache=True,
            position_ids=positions[:, seen - step_ids.shape[1] : seen], logits_to_keep=1,
        ).logits[:, -1].float() / temperature  # fmt: skip
        if tree is not None and states is not None:
            logits = tree.restrict(logits, states)
        tokens = draw(logits, top_p, luck[:, step]).masked_fill(finished, pad_id)
        drawn[rows, step] = tokens
        finished = finished | torch.isin(tokens, ends)
        left = len(rows) - int(finished.sum())
        if ends_everywhere(left == 0, apart):
            break
        if tree is not None and states is not None:
            states = tree.advance(states, tokens)
        if 0 < left <= FEW * len(rows):
            kept = (~finished).nonzero().squeeze(-1)
            rows, tokens, finished, luck = rows[kept], tokens[kept], finished[kept], luck[kept]
            attention, positions, states = attention[kept], positions[kept], None if states is None else states[kept]
            cache.batch_select_indices(kept)
        step_ids = tokens.unsqueeze(-1)
    return trim(drawn[:, : step + 1], eos_ids)


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
    probabilities = logits.softmax(-1)  # one that is not finite makes all of its row so
    if not bool(probabilities[:, 0].isfinite().all()):
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
