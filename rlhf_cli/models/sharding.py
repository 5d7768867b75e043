"""Models whose weights are split over the ranks, and how a whole one is read back.

The policy is sharded by the trainer, through accelerate; the roles beside it (reference, reward, critic) here.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlhf_cli import ranks


def shard(model: Any) -> Any:
    """Return `model`, each of its weights split over all ranks; a forward gathers one decoder layer at a time.

    All ranks run each forward together. A sequence classifier is read in two steps, body and head, and each gathers
    its own (models/reward.py).

    Args:
        model: a transformers model on this rank's device, the same on every rank, or a module around one.
    """
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.world(),))
    how: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}  # the outermost too, which holds the embedding
    inner = next((part for part in model.modules() if getattr(part, "_no_split_modules", None)), model)
    names = set(getattr(inner, "_no_split_modules", None) or [])
    for part in model.modules():
        if type(part).__name__ in names:
            fully_shard(part, **how)
    if hasattr(model, "score") and hasattr(model, "base_model_prefix"):
        fully_shard(getattr(model, model.base_model_prefix), **how)
        fully_shard(model.score, **how)
    else:
        fully_shard(model, **how)
    return model


def shard_if_asked(model: Any) -> Any:
    """Return `model`, sharded where launch.strategy splits models."""
    return shard(model) if ranks.world() > 1 and ranks.strategy() in ranks.SHARDING else model


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
