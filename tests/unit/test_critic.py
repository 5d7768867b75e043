"""The critic's own optimizer, stepped by a hook of the policy's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_cli.trainers import critic as critic_module
from rlhf_cli.trainers.critic import CriticTraining


class Values(nn.Module):
    """A critic in little: what it trains, and no reward model inside."""

    model = None

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1)


def averaged(weights: list[nn.Parameter]) -> None:
    """Give each weight a gradient, as the mean over several ranks does."""
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad


def test_the_critic_steps_once_however_often_the_policys_optimizer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed steps each group of weights by itself, and AdamW with gradients of 0 goes on by its momentum."""
    monkeypatch.setattr(critic_module, "average_gradients", averaged)
    torch.manual_seed(0)
    critic: Any = Values()
    args: Any = SimpleNamespace(adam_beta1=0.9, adam_beta2=0.99, learning_rate=1.0, max_grad_norm=1.0)
    training = CriticTraining(critic, SimpleNamespace(critic_learning_rate=0.1, weight_decay=0.1), args)  # type: ignore[arg-type]
    policy = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}])
    seen = []
    for _ in range(2):
        critic.head(torch.ones(2, 3)).sum().backward()
        for _ in range(2):  # once for each of the groups
            training.step(policy)
            seen.append(critic.head.weight.detach().clone())
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[1], seen[2])
    assert all(int(state["step"]) == 2 for state in training.optimizer.state.values())
