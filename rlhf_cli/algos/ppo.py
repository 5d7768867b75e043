"""The mathematics every on-policy algorithm shares (docs/paper_index.md; official PM code of arXiv 2405.16455)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_cli.algos.base import masked_sum, require_same_shape

MAX_LOG_RATIO = 20.0  # nats; beyond it a ratio overflows, and inf times a clipped gradient of 0 is NaN


def token_rewards(
    token_logps: Tensor,
    effective_ref: Tensor,
    mask: Tensor,
    scores: Tensor,
    *,
    beta: float,
    reward_clip: float | None,
) -> Tensor:
    """Return the reward of each response token, (B, T); 0 where masked.

    R_t = -beta (log pi(y_t|.) - e_t), plus clip(r, -reward_clip, reward_clip) on the last token
    (arXiv:2405.16455, official code `compute_rewards`; e_t from the algorithm).

    Args:
        token_logps: log pi of each response token at sampling, nats, (B, T).
        effective_ref: e_t, nats, (B, T).
        mask: True keeps a token, (B, T); numbers are read as bool.
        scores: reward r of each response, (B,).
        beta: weight of the per-token cost, > 0.
        reward_clip: bound on |r|, > 0, or None.

    Raises:
        ValueError: shapes differ, beta <= 0 or reward_clip <= 0.
    """
    require_same_shape(token_logps=token_logps, effective_ref=effective_ref, mask=mask)
    require_same_shape(scores=scores, sequences=token_logps[:, 0])
    if beta <= 0:
        raise ValueError(f"beta is {beta}: it must be > 0.")
    if reward_clip is not None and reward_clip <= 0:
        raise ValueError(f"reward_clip is {reward_clip}: it must be > 0, or None for no clipping.")
    keep = mask.bool()
    rewards = (-beta * (token_logps - effective_ref)).masked_fill(~keep, 0.0)
    clipped = scores if reward_clip is None else scores.clamp(-reward_clip, reward_clip)
    positions = torch.arange(keep.shape[1], device=keep.device)
    is_last = keep & (positions == (positions * keep).amax(-1, keepdim=True))
    at_end = clipped.to(rewards.dtype).unsqueeze(-1).expand_as(rewards)
    return rewards + at_end.masked_fill(~is_last, 0.0)


def gae(token_rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return generalised advantages and returns of each response token, (B, T) each; 0 where masked.

    A_t = sum_k (gamma lam)^k delta_{t+k},  delta_t = R_t + gamma V_{t+1} - V_t,  V after the end = 0;
    returns = A + V                      (arXiv:1506.02438, eq. 16; settings of arXiv:2405.16455's official code)

    Args:
        token_rewards: reward R_t of each token, (B, T).
        values: critic's value before each token, (B, T).
        mask: True keeps a token, (B, T); numbers are read as bool. Kept tokens form a prefix of the row.
        gamma, lam: in [0, 1].

    Raises:
        ValueError: shapes differ, gamma or lam outside [0, 1].
    """
    require_same_shape(token_rewards=token_rewards, values=values, mask=mask)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma is {gamma} and lam is {lam}: both must be in [0, 1].")
    keep = mask.bool()
    rewards, values = token_rewards.masked_fill(~keep, 0.0), values.masked_fill(~keep, 0.0)
    carried = next_value = torch.zeros_like(values[:, 0])
    advantages = []
    for step in reversed(range(values.shape[1])):
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        carried = delta + gamma * lam * carried
        advantages.append(carried)
        next_value = values[:, step]
    stacked = torch.stack(advantages[::-1], dim=1).masked_fill(~keep, 0.0)
    return stacked, stacked + values


def leave_one_out(rewards: Tensor, *, num_generations: int) -> Tensor:
    """Return each response's reward minus the mean reward of its siblings, (B,)      (RLOO, arXiv:2402.14740).

    Args:
        rewards: summed token rewards of each response, (B,); the responses of one prompt are neighbours.
        num_generations: responses per prompt, >= 2.

    Raises:
        ValueError: num_generations < 2, or B is not a multiple of it.
    """
    if num_generations < 2 or rewards.shape[0] % num_generations:
        raise ValueError(f"{rewards.shape[0]} responses cannot be split into groups of {num_generations} (>= 2).")
    groups = rewards.reshape(-1, num_generations)
    siblings = (groups.sum(-1, keepdim=True) - groups) / (num_generations - 1)
    return (groups - siblings).reshape(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `values` over the entries that `mask` keeps, a scalar; 0 if it keeps none."""
    return masked_sum(values, mask).sum() / mask.bool().sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` with mean 0 and variance 1 over the kept entries, 0 elsewhere, same shape."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return ((values - mean) * torch.rsqrt(variance + 1e-8)).masked_fill(~mask.bool(), 0.0)


def policy_loss(
    new_token_logps: Tensor, old_token_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float
) -> Tensor:
    """Return PPO's clipped policy loss, a scalar: mean over the kept tokens.

    -min(A rho, A clip(rho, 1 - clip_range, 1 + clip_range)),  rho = pi_new(y_t|.) / pi_old(y_t|.)
    (arXiv:1707.06347, eq. 7; per token as in arXiv:2405.16455's official code `actor_loss_fn`)

    Args:
        new_token_logps, old_token_logps: log-probs of each response token, nats, (B, T).
        advantages: (B, T).
        mask: True keeps a token, (B, T); numbers are read as bool.
        clip_range: > 0.

    Raises:
        ValueError: shapes differ or clip_range <= 0.
    """
    require_same_shape(
        new_token_logps=new_token_logps, old_token_logps=old_token_logps, advantages=advantages, mask=mask
    )
    if clip_range <= 0:
        raise ValueError(f"clip_range is {clip_range}: it must be > 0.")
    log_ratio = (new_token_logps - old_token_logps).masked_fill(~mask.bool(), 0.0)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return masked_mean(-torch.minimum(advantages * ratio, advantages * clipped), mask)


def importance_weights(token_logps: Tensor, engine_logps: Tensor, mask: Tensor, *, cap: float | None) -> Tensor:
    """Return the weight of each token that an engine drew whose numbers differ from training's, (B, T); 1 where masked.

    min(pi(y_t|.) / mu(y_t|.), cap),  pi as training reads the policy, mu as the engine did
    (truncated importance sampling, as in TRL's GRPO with token_truncate). Multiplied with the advantages, it multiplies
    the policy loss, since that is linear in an advantage of either sign.

    Args:
        token_logps: log pi of each response token at sampling, nats, (B, T).
        engine_logps: log mu, nats, (B, T).
        mask: True keeps a token, (B, T); numbers are read as bool.
        cap: >= 1, or None for the ratio itself.

    Raises:
        ValueError: shapes differ or cap < 1.
    """
    require_same_shape(token_logps=token_logps, engine_logps=engine_logps, mask=mask)
    if cap is not None and cap < 1:
        raise ValueError(f"cap is {cap}: it must be >= 1, or None.")
    log_ratio = (token_logps - engine_logps).masked_fill(~mask.bool(), 0.0)
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp().clamp(max=math.inf if cap is None else cap)


def value_loss(new_values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float) -> Tensor:
    """Return PPO's clipped value loss, a scalar: half the mean over the kept tokens.

    1/2 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2)
    (arXiv:2405.16455's official code `critic_loss_fn`)

    Args:
        new_values, old_values: critic's values now and at sampling, (B, T).
        returns: regression targets, (B, T).
        mask: True keeps a token, (B, T); numbers are read as bool.
        clip_range: > 0.

    Raises:
        ValueError: shapes differ or clip_range <= 0.
    """
    require_same_shape(new_values=new_values, old_values=old_values, returns=returns, mask=mask)
    if clip_range <= 0:
        raise ValueError(f"clip_range is {clip_range}: it must be > 0.")
    # Masked before squaring, so that the gradient too is free of what lies under the mask.
    new, old, target = (values.masked_fill(~mask.bool(), 0.0) for values in (new_values, old_values, returns))
    clipped = torch.clamp(new, old - clip_range, old + clip_range)
    return 0.5 * masked_mean(torch.maximum((new - target) ** 2, (clipped - target) ** 2), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns) over the kept tokens, a scalar; 0 if returns do not vary."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    total = variance(returns)
    return torch.where(total > 1e-12, 1 - variance(returns - values) / total.clamp(min=1e-12), torch.zeros_like(total))


def adapted_beta(beta: float, cost: float, *, target: float, horizon: int, responses: int) -> float:
    """Return the coefficient of the next update, moved so that the measured cost approaches its target.

    beta (1 + clip(cost / target - 1, -0.2, 0.2) responses / horizon)              (arXiv:1909.08593, section 2.2)
    responses / horizon is bounded by 1: a short horizon would otherwise turn beta negative.

    Args:
        beta: the coefficient in force, > 0.
        cost: the regulariser's mean cost of a response, sum_t (log pi - e_t), nats.
        target: the cost to aim at, > 0.
        horizon: responses over which beta adapts, >= 1.
        responses: responses in this update.
    """
    error = min(max(cost / target - 1, -0.2), 0.2)
    return beta * (1 + error * min(responses / horizon, 1.0))
