"""Models whose weights are split over the ranks, and how a whole one is read back.

Under FSDP2 every model is split here, as it is opened; accelerate leaves the policy as it is. Under ZeRO-3 DeepSpeed
splits the policy, and the roles beside it (reference, reward, critic) are split here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlhf_cli import ranks
from rlhf_cli.errors import RunError


def shard(model: Any, device: str | None = None, computes_in: torch.dtype | None = None) -> Any:
    """Return `model` with rank 0's weights, each split over all ranks; a forward gathers a decoder layer at a time.

    All ranks run each forward together. Weights come to `device` a layer at a time, and no more than a layer and the
    parts of this rank is there at any time; ranks but 0 need no weights (`Loading.split`). Random numbers go on from
    rank 0's: the others may have drawn none. Of a sequence classifier body and head are read apart, and gathered so;
    the head is left in its own number format.

    Args:
        model: a transformers model, with an adapter or without, or a module around one; the same on all ranks.
        device: where it will be; None: where it is.
        computes_in: format that float32 weights are gathered and gradients averaged in; None: their own.
    """
    place = torch.device(device or next(model.parameters()).device.type)
    mesh = init_device_mesh(place.type, (ranks.world(),))
    ignored = {weight for weight in model.parameters() if not weight.is_floating_point()}  # of a few bits: left whole
    how: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": ignored}
    exact = dict(how)
    if computes_in not in (None, torch.float32):
        how["mp_policy"] = MixedPrecisionPolicy(computes_in, computes_in, computes_in)
    arrival = _Arrival(model, torch.device(place.type, torch.cuda.current_device()) if place.type == "cuda" else place)
    for part, alone in _units(model):
        arrival.of(part)
        fully_shard(part, **(exact if alone else how))
    torch.set_rng_state(ranks.broadcast(torch.get_rng_state()))
    for weight in model.parameters():  # accelerate tells weights apart by their address, and nothing has none
        if isinstance(weight, DTensor) and not weight.to_local().numel():
            weight._local_tensor.data_ptr = partial(id, weight)  # type: ignore[method-assign]
    return model


def _units(model: Any) -> list[tuple[Any, bool]]:
    """Return the modules that are gathered one by one, inner ones first, and whether in their own number format."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    inner: Any = next((part for part in whole.modules() if getattr(part, "_no_split_modules", None)), whole)
    names = set(getattr(inner, "_no_split_modules", None) or [])
    units = [part for part in whole.modules() if type(part).__name__ in names][::-1]
    if isinstance(inner, PreTrainedModel):
        embedding, output = inner.get_input_embeddings(), inner.get_output_embeddings()
        if output is None or output.weight is not embedding.weight:
            units.append(embedding)
        if head := getattr(inner, "score", None):
            units.append(getattr(inner, inner.base_model_prefix))
            return [(part, False) for part in units] + [(head, True), (model, False)]
    return [(part, False) for part in [*units, model]]


class _Arrival:
    """Brings rank 0's weights to all ranks, those of a module at a time.

    Other ranks forget theirs at once. They take over what rank 0's have in common, too: which weights are tied may
    depend on whether they are equal, and without weights that cannot be seen.

    Args:
        model: whose weights they are.
        device: where they go.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device = device
        places: dict[str, tuple[dict, str]] = {}
        for prefix, part in model.named_modules(remove_duplicate=False):
            for held in (part._parameters, part._buffers):
                places |= {f"{prefix}.{key}": (held, key) for key, tensor in held.items() if tensor is not None}
        first: dict[int, str] = {}
        mine = {
            name: (tuple(held[key].shape), held[key].dtype, first.setdefault(id(held[key]), name))
            for name, (held, key) in places.items()
        }
        theirs = ranks.broadcast(mine)
        if {name: shape for name, (shape, *_) in mine.items()} != {name: shape for name, (shape, *_) in theirs.items()}:
            raise RunError("a model has other weights on another process", "", "give all machines the same files")
        for name, (shape, dtype, one) in theirs.items() if not ranks.is_main() else ():
            held, key = places[name]
            if name != one:
                held[key] = places[one][0][places[one][1]]
            elif dtype.is_floating_point:
                empty = torch.empty(shape, dtype=dtype, device="meta")
                trained = isinstance(held[key], nn.Parameter)
                held[key] = nn.Parameter(empty, held[key].requires_grad) if trained else empty
        self.holders: dict[int, list[tuple[dict, str]]] = {}  # a tied weight has several
        for held, key in places.values():
            self.holders.setdefault(id(held[key]), []).append((held, key))
        for buffer in list(model.buffers()):
            self._bring(buffer)

    def of(self, part: Any) -> None:
        """Bring the weights of a module that are not there yet."""
        for weight in [weight for weight in part.parameters() if not isinstance(weight, DTensor)]:
            if weight.is_floating_point():
                self._bring(weight)

    @torch.no_grad()
    def _bring(self, tensor: torch.Tensor) -> None:
        if ranks.is_main():
            value = tensor.detach().to(self.device).contiguous()
        else:
            value = torch.empty_like(tensor, device=self.device)
        if value.numel():
            torch.distributed.broadcast(value.view(-1).view(torch.uint8), src=0)  # the bits, whatever the format
        new = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        for held, name in self.holders[id(tensor)]:
            held[name] = new


def shard_if_asked(model: Any, device: str | None = None) -> Any:
    """Return `model`, sharded where launch.strategy splits models and it is not yet."""
    asked = ranks.world() > 1 and ranks.strategy() in ranks.SHARDING
    return shard(model, device) if asked and not is_sharded(model) else model


def is_sharded(model: nn.Module) -> bool:
    """Return whether this process holds only a part of the weights of `model`."""
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())


def ends_everywhere(ended: bool, sharded: bool) -> bool:
    """Return whether this rank may stop calling a model: of a sharded one, once all ranks have `ended`."""
    return all(ranks.gather(ended)) if sharded else ended


@torch.no_grad()
def whole_state(model: Any) -> dict[str, Any] | None:
    """Return the whole weights of a sharded model on rank 0's CPU, empty elsewhere; None of one that is not sharded.

    Of a model with an adapter, what is trained. All ranks call it.
    """
    if not is_sharded(model):
        return None
    kept = {name for name, weight in model.named_parameters() if weight.requires_grad}
    only = kept if isinstance(model, PeftModel) and kept else None
    found: dict[str, Any] = {}
    seen: set[int] = set()  # a weight under two names is kept under the first, as in the file of a whole model
    for name, weight in model.state_dict(keep_vars=True).items():
        if id(weight) not in seen and (only is None or name in only):
            seen.add(id(weight))
            whole = _gathered(weight)
            if ranks.is_main():
                found[name] = whole
    return found


def _gathered(weight: Any) -> torch.Tensor:
    if isinstance(weight, DTensor):
        return weight.full_tensor().detach().cpu()
    if hasattr(weight, "ds_id"):  # DeepSpeed ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().cpu().clone()
    return weight.detach().cpu()
