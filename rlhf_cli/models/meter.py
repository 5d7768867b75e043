"""Bytes of tensors while code runs, and models on tensors without data to run it with."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RUN = 4  # decoder layers that are run: the second stands for all between the first and the last two
STAND_IN = 1
APPLIED = 3  # where this one begins, what is left of the stand-in's tensors is there to stay


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors that come to be within it, as long as they live.

    Where fewer layers are run than the model has, what one of them has made and leaves behind once the next is done
    counts for all that it stands for: activations for the backward pass, casts of weights, the key-value cache.

    Args:
        vocab_size: tensors whose rows are this long are logits.
        model: its weights and gradients do not count.
    """

    def __init__(self, vocab_size: int, model: nn.Module) -> None:
        super().__init__()
        self.vocab_size, self.live, self.logits, self.peak, self.peak_logits = vocab_size, 0.0, 0.0, 0.0, 0.0
        self.known: dict[int, tuple[float, bool]] = {}  # bytes, whether logits
        for tensor in (*model.parameters(), *model.buffers()):
            for held in (tensor, tensor.grad):
                if held is not None:
                    self.known[held.untyped_storage()._cdata] = (0.0, False)
        self.factor, self.inside = 1.0, False
        self.made: set[int] = set()  # by the stand-in, in this forward pass

    def restart(self) -> None:
        """Forget the peak so far; what is alive stays."""
        self.peak, self.peak_logits = self.live, self.logits

    def stand_in(self, layers: Sequence[nn.Module], depth: int) -> None:
        """Count one of `layers`, which are RUN, for all that a model of `depth` layers has more."""
        self.factor = 1.0 + depth - len(layers)
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, number=number: self._begin(number))
            layer.register_forward_hook(lambda *_: self._end())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        self._look()
        return found

    def _look(self) -> None:
        if self.live > self.peak:
            self.peak, self.peak_logits = self.live, self.logits

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self.known:
            return
        size, logits = float(storage.nbytes()), tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size
        self.known[place] = (size, logits)
        self._add(size, logits)
        if self.inside:
            self.made.add(place)
        weakref.finalize(storage, self._freed, place)

    def _freed(self, place: int) -> None:
        size, logits = self.known.pop(place)
        self.made.discard(place)
        self._add(-size, logits)

    def _add(self, size: float, logits: bool) -> None:
        self.live, self.logits = self.live + size, self.logits + size * logits

    def _begin(self, number: int) -> None:
        if in_backward():  # there, layers are only run again one at a time
            return
        self.inside = number == STAND_IN
        if number == STAND_IN:
            self.made = set()
        elif number == APPLIED:
            self._apply()

    def _end(self) -> None:
        self.inside = False

    def _apply(self) -> None:
        for place in self.made:
            size, logits = self.known[place]
            self.known[place] = (size * self.factor, logits)
            self._add(size * (self.factor - 1), logits)
        self.made = set()
        self._look()


def in_backward() -> bool:
    """Return whether autograd's backward pass is running."""
    return bool(torch._C._current_graph_task_id() != -1)


def without_data(model: nn.Module) -> None:
    """Put tensors that claim to be on the CPU in the place of those on the meta device, gradients beside them.

    To be called within a FakeTensorMode: they take no memory either, but kernels and autocast are chosen as on the CPU.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, so that no other takes its id
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = (tensor, _empty_like(tensor))
                held[name] = made[id(tensor)][1]  # type: ignore[assignment]


def _empty_like(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        empty.grad = torch.empty_like(empty) if tensor.requires_grad else None
    return empty
