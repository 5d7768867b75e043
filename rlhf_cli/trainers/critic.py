"""The critic beside a policy: its own optimizer, stepped, saved and loaded with the policy's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from rlhf_cli import ranks
from rlhf_cli.config.schema import OnlineTraining
from rlhf_cli.models.reward import Critic
from rlhf_cli.models.sharding import is_sharded
from rlhf_cli.models.shared_base import RoleModel


class CriticTraining:
    """AdamW on the trained weights of a critic, with the schedule of the policy's learning rate.

    Where policy and critic share one base, the critic's adapter lies in the policy's module, and the trainer's
    optimizer, clipping and zeroing would take it for the policy's: its gradients are held here from each backward
    pass to the step.

    Args:
        critic: state values.
        block: learning rate and weight decay of the critic.
        args: the policy trainer's arguments: betas, peak learning rate, clipping.
    """

    def __init__(self, critic: Critic, block: OnlineTraining, args: Any) -> None:
        self.critic, self.block, self.args = critic, block, args
        self.weights = {name: weight for name, weight in critic.named_parameters() if weight.requires_grad}
        inside = critic.model.adapter_weights() if isinstance(critic.model, RoleModel) else {}
        self.inside: dict[str, nn.Parameter] = inside
        self.weights |= inside
        self.held: dict[str, Tensor] = {}
        self.sharded = is_sharded(critic)
        if not self.sharded:
            as_on_main(list(self.weights.values()))
        self.optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=block.critic_learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=block.weight_decay,
        )

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within it, what lies in the policy's module does not look trainable: its optimizer is made so."""
        trained = [weight for weight in self.inside.values() if weight.requires_grad]  # none: left out already
        for weight in trained:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in trained:
                weight.requires_grad_(True)

    def hold_gradients(self) -> None:
        """Take the gradients of a backward pass out of the policy's module, added to those held before."""
        for name, weight in self.inside.items():
            if weight.grad is not None:
                self.held[name] = weight.grad if name not in self.held else self.held[name] + weight.grad
                weight.grad = None

    def step(self, policy_optimizer: Any, *_: Any) -> None:
        """Average over ranks, clip, step and zero: a hook that runs after each step of the policy's optimizer.

        Without gradients it does nothing: DeepSpeed steps groups of weights one by one, and each calls this.
        """
        if not self.held and all(weight.grad is None for weight in self.weights.values()):
            return
        for name, gradient in self.held.items():
            self.inside[name].grad = gradient
        self.held = {}
        average_gradients(list(self.weights.values()))
        schedule = policy_optimizer.param_groups[0]["lr"] / self.args.learning_rate
        self.optimizer.param_groups[0]["lr"] = self.block.critic_learning_rate * schedule
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the trained weights and the optimizer. All ranks call it."""
        if self.sharded:
            how = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights, optimizer = get_state_dict(self.critic, self.optimizer, options=how)
            return {"critic": weights, "optimizer": optimizer}
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        return {"critic": weights, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        if self.sharded:
            kept = {"model_state_dict": state["critic"], "optim_state_dict": state["optimizer"]}
            set_state_dict(self.critic, self.optimizer, **kept, options=StateDictOptions(full_state_dict=True))
            return
        for name, weight in self.weights.items():
            weight.copy_(state["critic"][name])
        self.optimizer.load_state_dict(state["optimizer"])


@torch.no_grad()
def as_on_main(weights: list[nn.Parameter]) -> None:
    """Make weights on all ranks those of rank 0."""
    for weight in weights if ranks.world() > 1 else []:
        torch.distributed.broadcast(weight.data, src=0)


def average_gradients(weights: list[nn.Parameter]) -> None:
    """Make the gradient of each weight its mean over ranks; those of sharded weights are already.

    In place of DDP, whose hooks would meet in the backward pass of two modules at once.
    """
    if ranks.world() == 1:
        return
    whole = [weight for weight in weights if not isinstance(weight, DTensor)]
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in whole]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for weight, mean in zip(whole, (flat / ranks.world()).split([weight.numel() for weight in whole]), strict=True):
        weight.grad = mean.view_as(weight)
