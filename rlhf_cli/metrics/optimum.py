"""Closed-form optima of the on-policy objectives on an enumerated response set (docs/paper_index.md)."""

from __future__ import annotations

from torch import Tensor

from rlhf_cli.algos.base import masked_sum, require_same_shape
from rlhf_cli.algos.pm import effective_reference


def closed_form(ref_token_logps: Tensor, rewards: Tensor, mask: Tensor, *, beta: float, alpha: float | None) -> Tensor:
    """Return log pi* of each response, normalised over the given response set, (B,).

    pi*(y) is proportional to exp(r(y) / beta) prod_{t: pi_ref,t <= alpha} pi_ref(y_t|.)
    alpha = 1: KL, pi_ref exp(r / beta) (arXiv:2305.18290, eq. 4). alpha None: PM, exp(r / beta). Between: conditional
    PM (arXiv:2405.16455). The rows are all the responses of one prompt.

    Args:
        ref_token_logps: log pi_ref of each token of each response, nats, (B, T).
        rewards: r of each response, nats, (B,).
        mask: True keeps a token, (B, T); numbers are read as bool.
        beta: > 0.
        alpha: threshold in (0, 1], or None.

    Raises:
        ValueError: shapes differ, beta <= 0, alpha outside (0, 1].
    """
    require_same_shape(ref_token_logps=ref_token_logps, mask=mask)
    require_same_shape(rewards=rewards, sequences=ref_token_logps[:, 0])
    return optimum(masked_sum(effective_reference(ref_token_logps, alpha=alpha), mask), rewards, beta=beta)


def optimum(effective_ref: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """Return log pi* over the last dimension from summed effective references: softmax(r / beta + sum_t e_t).

    Args:
        effective_ref: sum over tokens of e_t of each response, nats, (..., A); -inf where there is no response.
        rewards: r of each response, nats, (..., A).
        beta: > 0.

    Raises:
        ValueError: shapes differ or beta <= 0.
    """
    require_same_shape(effective_ref=effective_ref, rewards=rewards)
    if beta <= 0:
        raise ValueError(f"beta is {beta}: it must be > 0.")
    return (rewards / beta + effective_ref).log_softmax(-1)
