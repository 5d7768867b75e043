"""A key-value cache with its room made at once: one that grows by a token copies all it holds at each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer's keys and values in memory for `room` tokens, of which those seen so far are shown."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.whole_keys = self.whole_values = torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all tokens, after those of more tokens were added, (B, heads, tokens, size)."""
        before = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.whole_keys, self.whole_values = (self._made(states) for states in (key_states, value_states))
        tokens = before + key_states.shape[-2]
        self.whole_keys[:, :, before:tokens] = key_states
        self.whole_values[:, :, before:tokens] = value_states
        return self._show(tokens)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`, (B,)."""
        tokens = self.get_seq_length()
        self.whole_keys, self.whole_values = self.whole_keys[indices], self.whole_values[indices]
        self._show(tokens)

    def _made(self, states: Tensor) -> Tensor:
        return states.new_empty(*states.shape[:2], self.room, states.shape[-1])

    def _show(self, tokens: int) -> tuple[Tensor, Tensor]:
        shown = self.whole_keys[:, :, :tokens], self.whole_values[:, :, :tokens]
        self.keys, self.values = shown
        return shown


def roomy_cache(config: Any, room: int) -> DynamicCache:
    """Return an empty cache for `room` tokens; layers that see a window of them grow as they do in transformers.

    Args:
        config: of the model.
        room: tokens of a sequence, prompt and response.
    """
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
