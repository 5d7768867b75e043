"""Distances between a policy and a preference distribution on enumerated response sets (docs/paper_index.md).

Everywhere: rows are prompts (P), columns responses (A); `mask` (P, A) is True where a response exists. Policies are
given as log-probs of whole responses and may leave mass off the set; targets are normalised on it. Numbers are read
as bool in a mask; tensors of different shapes are refused with ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.algos.base import require_same_shape


def preference_distribution(rewards: Tensor, mask: Tensor, *, beta: float = 1.0) -> Tensor:
    """Return log q, q = softmax(r / beta) over the responses of each prompt, (P, A); -inf where masked."""
    return (rewards / beta).masked_fill(~mask.bool(), -torch.inf).log_softmax(-1)


def total_variation(target_logps: Tensor, policy_logps: Tensor, mask: Tensor) -> Tensor:
    """Return TV(q, pi) = 1/2 (sum |pi - q| + mass of pi off the set), in [0, 1], (P,)."""
    require_same_shape(target_logps=target_logps, policy_logps=policy_logps, mask=mask)
    gaps = (policy_logps.exp() - target_logps.exp()).abs().masked_fill(~mask.bool(), 0.0).sum(-1)
    return 0.5 * (gaps + offset_mass(policy_logps, mask))


def offset_mass(policy_logps: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - sum of pi over the set, in [0, 1], (P,)."""
    return (1 - policy_logps.exp().masked_fill(~mask.bool(), 0.0).sum(-1)).clamp(min=0.0)


def forward_kl(target_logps: Tensor, policy_logps: Tensor, mask: Tensor) -> Tensor:
    """Return KL(q || pi) in nats with pi as it is (mass off the set counts against it), (P,)."""
    require_same_shape(target_logps=target_logps, policy_logps=policy_logps, mask=mask)
    return _expectation(target_logps, target_logps - policy_logps, mask)


def reverse_kl(target_logps: Tensor, policy_logps: Tensor, mask: Tensor) -> Tensor:
    """Return KL(pi || q) in nats with pi renormalised on the set, (P,)."""
    require_same_shape(target_logps=target_logps, policy_logps=policy_logps, mask=mask)
    on_set = policy_logps.masked_fill(~mask.bool(), -torch.inf).log_softmax(-1)
    return _expectation(on_set, on_set - target_logps, mask)


def minority_mass(target_logps: Tensor, policy_logps: Tensor, mask: Tensor) -> Tensor:
    """Return the mass pi gives to all responses but q's most likely one, in [0, 1], (P,)."""
    require_same_shape(target_logps=target_logps, policy_logps=policy_logps, mask=mask)
    majority = target_logps.masked_fill(~mask.bool(), -torch.inf).argmax(-1, keepdim=True)
    minority = mask.bool().scatter(-1, majority, False)
    return policy_logps.exp().masked_fill(~minority, 0.0).sum(-1)


def divergence(rewards: Tensor, policy_logps: Tensor, mask: Tensor) -> Tensor:
    """Return E_{y1,y2~pi} ((r1 - r2) - (log pi(y1) - log pi(y2)))^2 with pi renormalised on the set, (P,).

    The official metric of arXiv:2405.16455, exactly: twice the variance of r - log pi under pi. Zero for a collapsed
    policy, so it is never ranked alone.
    """
    require_same_shape(rewards=rewards, policy_logps=policy_logps, mask=mask)
    on_set = policy_logps.masked_fill(~mask.bool(), -torch.inf).log_softmax(-1)
    gap = rewards - on_set
    mean = _expectation(on_set, gap, mask)
    return 2 * _expectation(on_set, (gap - mean.unsqueeze(-1)) ** 2, mask)


def _expectation(logps: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    probabilities = logps.exp()  # 0 times an infinite value counts as 0
    return (probabilities * values).masked_fill(~mask.bool() | (probabilities == 0), 0.0).sum(-1)


def preference_metrics(target_logps: Tensor, rewards: Tensor, policy_logps: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return every distance of this module for each prompt: {name: (P,)}."""
    return {
        "tv": total_variation(target_logps, policy_logps, mask),
        "kl_rm_policy": forward_kl(target_logps, policy_logps, mask),
        "kl_policy_rm": reverse_kl(target_logps, policy_logps, mask),
        "minority_mass": minority_mass(target_logps, policy_logps, mask),
        "minority_mass_target": minority_mass(target_logps, target_logps, mask),
        "offset_mass": offset_mass(policy_logps, mask),
        "divergence": divergence(rewards, policy_logps, mask),
    }
