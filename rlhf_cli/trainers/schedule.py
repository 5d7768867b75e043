"""What an on-policy run does when: updates, rollouts of an update, and the prompts of each, laid out in advance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf_cli.config.schema import OnlineAlgoConfig, OnlineTraining


@dataclass(frozen=True)
class Updates:
    """How an on-policy run is cut into updates.

    Args:
        number: of updates: one batch of rollouts each.
        prompts: prompts of an update.
        steps: optimizer steps of an update.
    """

    number: int
    prompts: int
    steps: int


def updates(algo: OnlineAlgoConfig, block: OnlineTraining, prompts: int) -> Updates:
    """Return the updates of a run that has `prompts` different prompts."""
    steps = algo.ppo_epochs * algo.minibatches
    per_update = block.batch_size * algo.minibatches // algo.num_generations
    if block.max_steps:
        return Updates(-(-block.max_steps // steps), per_update, steps)
    return Updates(max(1, round((block.epochs or 1) * prompts / per_update)), per_update, steps)


def prompt_schedule(prompts: list[dict], *, per_update: int, updates: int, seed: int) -> list[dict]:
    """Return the prompts of every update in order: passes over all prompts, each in a fresh order.

    Laid out in advance, the order does not depend on where a run was interrupted, and fewer prompts than one batch
    needs repeat instead of training nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < per_update * updates:
        order += torch.randperm(len(prompts), generator=generator).tolist()
    return [prompts[index] for index in order[: per_update * updates]]
