"""One causal language model in memory for four roles: adapters for policy, reward model and critic, heads for two."""

from __future__ import annotations

from copy import copy, deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from rlhf_cli.errors import RunError
from rlhf_cli.models.adapters import (
    CAUSAL,
    CLASSIFIER,
    HEAD,
    OWN,
    Switched,
    adapter_base,
    adapter_layers,
    adapter_settings,
    is_adapter,
)

REWARD, CRITIC = "reward", "critic"
WEIGHTS = "adapter_model.safetensors"


class RoleModel(nn.Module):
    """A reward model or critic on a shared base: its body is the base's with its own adapter, the head its own.

    It is read as a sequence classifier is (models/reward.py). Only the head is one of its parameters.

    Args:
        shared: the base.
        name: of the adapter.
        head: of one output, in float32.
    """

    base_model_prefix = "body"

    def __init__(self, shared: SharedBase, name: str, head: nn.Linear) -> None:
        super().__init__()
        self.score, self.name = head, name
        self.place = (shared,)  # in a tuple, so that the base is not taken for a part of this module

    def body(self, **inputs: Any) -> Any:
        """Return the output of the base's body, with the adapter of this role."""
        (shared,) = self.place
        with Switched(shared.layers, self.name):
            return shared.body(**inputs)

    def adapter_weights(self) -> dict[str, nn.Parameter]:
        """Return the weights of the adapter by name."""
        return self.place[0].weights_of(self.name)

    @property
    def config(self) -> Any:
        """Return the config of the base."""
        return self.place[0].policy.config

    @property
    def device(self) -> torch.device:
        """Return where the base is."""
        return self.place[0].policy.device


class SharedBase:
    """A policy's base and what else lives on it.

    Args:
        policy: with its adapter, on the base that the reward model's adapter was trained on.
        base: folder of that base.
    """

    def __init__(self, policy: PeftModel, base: Path) -> None:
        self.policy, self.base = policy, base.resolve()
        model = cast(Any, policy.get_base_model())
        self.body = getattr(model, model.base_model_prefix)
        self.layers = adapter_layers(policy)

    def reward_model(self, folder: Path) -> RoleModel:
        """Return the reward model in `folder`, frozen.

        Raises:
            RunError: it is no adapter on this base.
        """
        if not is_adapter(folder) or adapter_settings(folder).get("task_type") != CLASSIFIER:
            raise self._refusal(folder, "a whole model, not an adapter")
        if adapter_base(folder).resolve() != self.base:
            raise self._refusal(folder, f"an adapter on {adapter_base(folder)}")
        config = cast(Any, PeftConfig.from_pretrained(str(folder)))
        config.task_type, config.modules_to_save = CAUSAL, None
        weights = load_file(folder / WEIGHTS)
        heads = {key: weights.pop(key) for key in list(weights) if key.rpartition(".")[0].endswith(f".{HEAD}")}
        self._add(REWARD, config)
        result: Any = set_peft_model_state_dict(self.policy, weights, adapter_name=REWARD)
        if result.unexpected_keys or len(weights) != len(self.weights_of(REWARD)) or len(heads) != 1:
            raise self._refusal(folder, "an adapter of other layers")
        (head,) = heads.values()
        return RoleModel(self, REWARD, self._head(head.float())).requires_grad_(False)

    def critic_like(self, reward_model: RoleModel) -> RoleModel:
        """Return a critic that starts as a copy of the reward model."""
        self._add(CRITIC, copy(self.policy.peft_config[reward_model.name]))
        with torch.no_grad():
            for name, weight in self.weights_of(reward_model.name).items():
                self.policy.get_parameter(_renamed(name, reward_model.name, CRITIC)).copy_(weight)
        critic = RoleModel(self, CRITIC, deepcopy(reward_model.score))
        return self._trained(critic)

    def fresh_critic(self, *, init_std: float) -> RoleModel:
        """Return a critic that starts from the base, with a fresh head."""
        width = cast(Any, self.policy.get_base_model()).get_output_embeddings().weight.shape[1]
        self._add(CRITIC, copy(self.policy.peft_config[OWN]))
        return self._trained(RoleModel(self, CRITIC, self._head(torch.randn(1, width) * init_std)))

    def weights_of(self, name: str) -> dict[str, nn.Parameter]:
        """Return the weights of one adapter by their name in the policy."""
        return {key: weight for key, weight in self.policy.named_parameters() if f".{name}." in key}

    def _add(self, name: str, config: Any) -> None:
        self.policy.add_adapter(name, config)
        for weight in self.weights_of(name).values():
            weight.requires_grad_(False)

    def _trained(self, critic: RoleModel) -> RoleModel:
        critic.requires_grad_(True)
        for weight in critic.adapter_weights().values():
            weight.requires_grad_(True)
        return critic

    def _head(self, weight: torch.Tensor) -> nn.Linear:
        head = nn.Linear(weight.shape[1], 1, bias=False, device=self.policy.device, dtype=torch.float32)
        with torch.no_grad():
            head.weight.copy_(weight)
        return head

    def _refusal(self, folder: Path, found: str) -> RunError:
        return RunError(
            f"model.share_base=true: the reward model in {folder} is {found}",
            f"it should be an adapter on the policy's own base, {self.base}",
            "train it with the same peft and reward=bt or pcrm_*, or use model.share_base=false",
        )


def _renamed(key: str, one: str, other: str) -> str:
    return key.replace(f".{one}.", f".{other}.")
