"""What became of the weights of one job, for the checks of model families: all moved, or the adapters alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from model_readings import gap
from torch import Tensor, nn

from rlhf_cli.models.adapters import OWN


@dataclass
class Outcome:
    """One job: its run folder, the trainers it used as they ended, and what was measured of it."""

    folder: Path
    trainers: list[Any]
    seconds: float
    measured: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def require(self, fine: bool, failure: str) -> None:
        """Note a failure unless `fine`."""
        if not fine:
            self.failures.append(failure)

    def bound(self, name: str, value: float, limit: float) -> None:
        """Note a measured value, and a failure where it is beyond its limit."""
        self.measured[name] = value
        self.require(value <= limit, f"{name} is {value:.2g}, more than {limit:g}")


def everything_moved(found: Outcome, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Every tensor changed."""
    found.require(before.keys() == after.keys(), f"other tensors: {sorted(before.keys() ^ after.keys())[:3]}")
    gaps = {name: gap(before[name], after[name]) for name in before.keys() & after.keys()}
    still = [name for name, moved in gaps.items() if moved == 0]
    found.require(not still, f"not trained: {still}")
    found.measured["moved"] = max(gaps.values())


def linear_layers_moved(found: Outcome, before: dict[str, Tensor], model: Any) -> None:
    """Of a merged model the linear layers of the body changed, and nothing else, bit by bit."""
    output = model.get_output_embeddings()
    adapted = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }
    after = dict(model.state_dict())
    gaps = {name: gap(before[name], after[name]) for name in after}
    still = [name for name in adapted if gaps[name] == 0]
    strayed = [name for name in gaps if name not in adapted and gaps[name] != 0]
    found.require(not still, f"not trained: {still}")
    found.require(not strayed, f"changed beside the adapters: {strayed}")
    found.measured["moved"] = max(gaps.values())


def adapters_moved(found: Outcome, before: dict[str, Tensor], model: Any, adapter: str = OWN) -> None:
    """Every B of the adapter left 0, the head its copy, and the base did not change, bit by bit."""
    moved, strayed, seen = {}, [], 0
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if f"lora_B.{adapter}." in name:
            moved[name] = float(weight.detach().abs().max())
        elif "modules_to_save" in name:
            was = weights[name.replace(f"modules_to_save.{adapter}", "original_module")]
            moved[name] = gap(was, weight)
        elif "lora_" not in name and "original_module" not in name:
            seen += 1
            origin = before[name.removeprefix("base_model.model.").replace(".base_layer", "")]
            if not torch.equal(weight.detach().float().cpu(), origin.float()):
                strayed.append(name)
    still = [name for name, by in moved.items() if by == 0]
    found.require(bool(moved) and not still, f"not trained: {still or 'there is no adapter'}")
    found.require(seen > 0 and not strayed, f"the base changed: {strayed}")
    found.measured["moved"] = max(moved.values(), default=0.0)


def weights_held(roles: Sequence[Any]) -> int:
    """Return how many numbers the weights of several models hold, adapters left out, shared ones counted once."""
    weights = {
        weight.data_ptr(): weight.numel()
        for role in roles
        for name, weight in (
            role.named_parameters() if hasattr(role, "named_parameters") else enumerate(role.parameters())
        )
        if "lora_" not in str(name)
    }
    return sum(weights.values())
