"""A prefix tree over valid prompt + response sequences: the closed vocabulary of an enumerable world."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ROOT, FREE = 0, 1  # before the first token; off the tree or after the end, where nothing is restricted
DISALLOWED = -1e9  # logit of a token that is not allowed: its probability underflows to exactly 0


class PrefixTree:
    """Says which next tokens keep a sequence inside a set of valid prompt + response sequences.

    Sequences are read from their first token (left padding skipped). Inside the prompt nothing is restricted; inside a
    response only tokens that continue a valid one are allowed, the end-of-sequence token included.

    Args:
        sequences: (prompt ids, response ids with end-of-sequence) of every valid sequence.
        vocab_size: size of the model's output.
        pad_id: padding token.
    """

    def __init__(self, sequences: Iterable[tuple[Sequence[int], Sequence[int]]], vocab_size: int, pad_id: int) -> None:
        self.pad_id = pad_id
        children: list[dict[int, int]] = [{}, {}]
        continuations: list[set[int]] = [set(), set()]  # inside a response; empty: nothing is restricted
        for prompt, response in sequences:
            node = ROOT
            for position, token in enumerate([*prompt, *response]):
                if position >= len(prompt):
                    continuations[node].add(token)
                if token not in children[node]:
                    children[node][token] = len(children)
                    children.append({})
                    continuations.append(set())
                node = children[node][token]
        self.next = torch.full((len(children), vocab_size), FREE, dtype=torch.long)
        self.allowed = torch.ones(len(children), vocab_size, dtype=torch.bool)
        for node, branches in enumerate(children):
            if continuations[node]:
                self.allowed[node] = False
                self.allowed[node, list(continuations[node])] = True
            for token, child in branches.items():
                self.next[node, token] = child
        self.next[ROOT, pad_id] = ROOT

    def to(self, device: torch.device | str) -> PrefixTree:
        """Move the tables to `device` and return self."""
        self.next, self.allowed = self.next.to(device), self.allowed.to(device)
        return self

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states after reading one more token each, (B,)."""
        return self.next[states, tokens]

    def states(self, input_ids: Tensor) -> Tensor:
        """Return the state before each token and after the last, (B, L + 1)."""
        states = [torch.full((len(input_ids),), ROOT, dtype=torch.long, device=input_ids.device)]
        for position in range(input_ids.shape[1]):
            states.append(self.advance(states[-1], input_ids[:, position]))
        return torch.stack(states, dim=1)

    def restrict(self, logits: Tensor, states: Tensor) -> Tensor:
        """Return `logits` (..., V) with every token not allowed in `states` (...) made impossible."""
        return logits.masked_fill(~self.allowed[states], DISALLOWED)
