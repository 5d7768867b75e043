"""How policies and reward models are read in the checks of model families: alone, in batches, by greedy sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.data.encode import encode_prompt, encode_response
from rlhf_cli.models.adapters import plain
from rlhf_cli.models.logps import token_logps, vocabulary_logps
from rlhf_cli.models.reward import sequence_scores
from rlhf_cli.models.sampling import sample
from rlhf_cli.models.tokens import TokenBatch, collate

PROMPTS = ("Tea?", "What do you say about chess and the garden this spring?", "Human: hi")
RESPONSES = ("I like tea, and the newspaper too.", "No!", "Ask a doctor.")


def probe(tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts and responses of different lengths as token ids."""
    prompts = [list(encode_prompt(tokenizer, text)) for text in PROMPTS]
    return prompts, [list(encode_response(tokenizer, text)) for text in RESPONSES]


def probe_batch(tokenizer: Any) -> TokenBatch:
    """Return the probe as one batch."""
    return collate(*probe(tokenizer), tokenizer.pad_token_id)


def policy_reader(model: Any) -> Callable[[TokenBatch], Tensor]:
    """Return a function of a batch: the log-prob of each response token, 0 under the padding, (B, T)."""

    @torch.no_grad()
    def read(batch: TokenBatch) -> Tensor:
        return token_logps(model, batch, temperature=1.0, tree=None).masked_fill(~batch.response_mask, 0.0)

    return read


def reward_reader(model: Any) -> Callable[[TokenBatch], Tensor]:
    """Return a function of a batch: the score of each response, (B, 1)."""

    @torch.no_grad()
    def read(batch: TokenBatch) -> Tensor:
        return sequence_scores(plain(model), batch).unsqueeze(-1)

    return read


def padding_gap(
    read: Callable[[TokenBatch], Tensor], prompts: list[list[int]], responses: list[list[int]], pad_id: int
) -> float:
    """Return how far readings of sequences alone are from those beside a longer prompt and a longer response.

    The padding is read as two tokens: what stands under it must not matter.
    """
    longest = [*prompts, max(prompts, key=len) * 2], [*responses, max(responses, key=len) * 2]
    gaps = []
    for padding in (pad_id, prompts[0][-1]):
        together = read(collate(*longest, padding))
        for row, pair in enumerate(zip(prompts, responses, strict=True)):
            alone = read(collate([pair[0]], [pair[1]], pad_id))
            gaps.append(gap(alone[0], together[row, : alone.shape[1]]))
    return max(gaps)


def greedy(model: Any, tokenizer: Any, prompts: list[list[int]]) -> bool:
    """Return whether the most likely tokens, drawn with the cache of keys and values, are those that reading finds."""
    drawn = sample(
        model, prompts, streams=range(len(prompts)), max_new_tokens=8, temperature=1e-6, top_p=1.0,
        eos_ids=[tokenizer.eos_token_id], pad_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return agrees(model, prompts, drawn, tokenizer)


@torch.no_grad()
def agrees(model: Any, prompts: list[list[int]], drawn: Sequence[Sequence[int]], tokenizer: Any) -> bool:
    """Return whether each drawn token is the one that the model finds most likely there."""
    batch = collate(prompts, [list(ids) for ids in drawn], tokenizer.pad_token_id)
    best = vocabulary_logps(model, batch, temperature=1.0, tree=None).argmax(-1)
    return bool((best == batch.response_ids)[batch.response_mask].all())


def gap(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two tensors of one shape."""
    return float((one.detach().float().cpu() - other.detach().float().cpu()).abs().max())
