"""Batches of token ids: prompts padded on the left, responses on the right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.models.batches import by_length


@dataclass(frozen=True)
class TokenBatch:
    """Prompts and responses of B sequences.

    Args:
        input_ids: prompts padded left, then responses padded right, (B, P + T).
        attention_mask: bool, True on real tokens, (B, P + T).
        response_ids: the last T columns of input_ids, (B, T).
        response_mask: bool, True on response tokens (end-of-sequence included), (B, T).
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor

    @property
    def position_ids(self) -> Tensor:
        """Position of each token, counted from the first real one, (B, P + T); not every model skips left padding."""
        return (self.attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def of(self, rows: Tensor) -> TokenBatch:
        """Return the sequences at `rows`, (B',), without columns that are padding in all of them."""
        prompt = self.input_ids.shape[1] - self.response_ids.shape[1]
        mask = self.response_mask[rows]
        tokens = max(1, int(mask.sum(-1).max()))
        lead = prompt - int((self.attention_mask[rows, :prompt]).sum(-1).max())
        ids, seen = (field[rows, lead : prompt + tokens] for field in (self.input_ids, self.attention_mask))
        return TokenBatch(ids, seen, self.response_ids[rows, :tokens], mask[:, :tokens])

    def pieces(self, size: int | None) -> list[tuple[Tensor, TokenBatch]]:
        """Return the batch in pieces of at most `size` sequences (None: one piece), the longest first.

        Returns:
            (rows, piece): where the sequences stand in the batch, and they, padded no further than to their longest.
        """
        order = torch.tensor(by_length(self.attention_mask.sum(-1).tolist()), device=self.input_ids.device)
        return [(rows, self.of(rows)) for rows in order.split(size or len(order))]

    def read(self, reader: Callable[[TokenBatch], Tensor], size: int | None) -> Tensor:
        """Return what `reader` says of the sequences, in their order; it sees at most `size` of like length at a time.

        Args:
            reader: returns (b, ...) of b sequences; if that has more than one dimension, the last is their response
                tokens', and is widened to T by zeros.
            size: sequences at a time; None: all.
        """
        width = self.response_ids.shape[1]
        pieces = self.pieces(size)
        found = [reader(piece) for _, piece in pieces]
        values = torch.cat([part if part.ndim == 1 else widened(part, width) for part in found])
        return values[torch.cat([rows for rows, _ in pieces]).argsort()]


def widened(values: Tensor, width: int) -> Tensor:
    """Return `values`, (..., t), with zeros behind, (..., width)."""
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]))


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids (B, P), padded on the left, and their bool mask."""
    width = max(len(ids) for ids in sequences)
    padded = [[pad_id] * (width - len(ids)) + list(ids) for ids in sequences]
    mask = [[False] * (width - len(ids)) + [True] * len(ids) for ids in sequences]
    return torch.tensor(padded), torch.tensor(mask)


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids (B, T), padded on the right, and their bool mask."""
    width = max(len(ids) for ids in sequences)
    padded = [list(ids) + [pad_id] * (width - len(ids)) for ids in sequences]
    mask = [[True] * len(ids) + [False] * (width - len(ids)) for ids in sequences]
    return torch.tensor(padded), torch.tensor(mask)


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str = "cpu",
) -> TokenBatch:
    """Return the batch of `prompts` and `responses`, lists of token ids of equal number.

    Raises:
        ValueError: the numbers differ, or there are none.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses: they must be equal in number, >= 1.")
    prompt_ids, prompt_mask = pad_left(prompts, pad_id)
    response_ids, response_mask = pad_right(responses, pad_id)
    return TokenBatch(
        torch.cat([prompt_ids, response_ids], 1).to(device),
        torch.cat([prompt_mask, response_mask], 1).to(device),
        response_ids.to(device),
        response_mask.to(device),
    )


def shared_prefix(batch: TokenBatch) -> Tensor:
    """Return how many leading tokens the two responses of each pair share, (B,); rows are chosen, rejected, chosen …"""
    first, second = batch.response_ids[0::2], batch.response_ids[1::2]
    same = (first == second) & batch.response_mask[0::2] & batch.response_mask[1::2]
    return same.long().cumprod(-1).sum(-1)
