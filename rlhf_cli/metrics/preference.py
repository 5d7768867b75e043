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
    return policy_logps.exp().masked_fill(~_minority(target_logps, mask), 0.0).sum(-1)


def minority_coverage(target_logps: Tensor, policy_logps: Tensor, mask: Tensor) -> Tensor:
    """Return sum min(pi, q) / sum q over all responses but q's most likely one, in [0, 1], (P,).

    How much of the minorities' mass pi keeps: 1 where pi gives each its due, 0 where it gives them none. Mass that pi
    gives one of them beyond its due does not make up for another. 1 where q has no minority mass.
    """
    require_same_shape(target_logps=target_logps, policy_logps=policy_logps, mask=mask)
    others = ~_minority(target_logps, mask)
    due = target_logps.exp().masked_fill(others, 0.0)
    kept = torch.minimum(policy_logps, target_logps).exp().masked_fill(others, 0.0)
    total = due.sum(-1)
    return torch.where(total > 0, kept.sum(-1) / total, 1.0)


def _minority(target_logps: Tensor, mask: Tensor) -> Tensor:
    """Return True for every response but q's most likely one, the first of several, (P, A)."""
    majority = target_logps.masked_fill(~mask.bool(), -torch.inf).argmax(-1, keepdim=True)
    return mask.bool().scatter(-1, majority, False)


def rank_correlation(rewards: Tensor, policy_logps: Tensor, mask: Tensor) -> Tensor:
    """Return Spearman's rank correlation of r and log pi over the responses of each prompt, in [-1, 1], (P,).

    Pearson's correlation of the ranks, the mean rank for ties. NaN where there are fewer than two responses, or where
    all of them tie in r or in log pi: it is not defined there.
    """
    require_same_shape(rewards=rewards, policy_logps=policy_logps, mask=mask)
    x, y = (_centred_ranks(values, mask.bool()) for values in (rewards, policy_logps))
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def _centred_ranks(values: Tensor, mask: Tensor) -> Tensor:
    """Return the ranks of each prompt's responses minus their mean, multiples of 1/2, (P, A); 0 where masked."""
    column, row = values.unsqueeze(-1), values.unsqueeze(-2)
    places = (row < column).double() - (row > column).double()  # below minus above: twice the centred rank
    centred = places.masked_fill(~mask.unsqueeze(-2), 0.0).sum(-1) / 2
    return centred.masked_fill(values.isnan(), torch.nan).masked_fill(~mask, 0.0)


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
        "minority_coverage": minority_coverage(target_logps, policy_logps, mask),
        "rank_correlation": rank_correlation(rewards, policy_logps, mask),
        "offset_mass": offset_mass(policy_logps, mask),
        "divergence": divergence(rewards, policy_logps, mask),
    }
