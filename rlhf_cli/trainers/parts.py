"""What an on-policy run is made of besides the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_cli.algos.base import Algorithm
from rlhf_cli.config.schema import GenerationConfig, OnlineAlgoConfig
from rlhf_cli.models.prefix_tree import PrefixTree
from rlhf_cli.models.reward import Critic, Reward


@dataclass(frozen=True)
class OnlineParts:
    """What an on-policy run is made of besides the policy.

    Args:
        algorithm, algo: the record and its settings.
        reward: scores token ids, centred, nats.
        reward_clip: bound on |reward|, or None.
        reference: frozen causal language model, or the policy without its adapter.
        critic: state values; None with the leave-one-out baseline.
        generation: how responses are sampled and log-probs read.
        tree: closed vocabulary, or None.
    """

    algorithm: Algorithm
    algo: OnlineAlgoConfig
    reward: Reward
    reward_clip: float | None
    reference: Any
    critic: Critic | None
    generation: GenerationConfig
    tree: PrefixTree | None
