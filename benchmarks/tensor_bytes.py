"""Bytes of the tensors of a program, as PyTorch's allocator counts them on a GPU, where there is none."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts, within it, the bytes of all tensors that an operator returns, as long as they live.

    What an operator takes and gives back within itself is not seen. Threads other than this one are not either.

    Args:
        models: their weights are counted from the start.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        self.live = self.peak = 0.0
        self.known: dict[int, float] = {}
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                self._note(tensor)

    def restart(self) -> None:
        """Forget the peak so far; what is alive stays."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return found

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self.known:
            return
        self.known[place] = float(storage.nbytes())
        self.live += self.known[place]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, place)

    def _freed(self, place: int) -> None:
        self.live -= self.known.pop(place)
