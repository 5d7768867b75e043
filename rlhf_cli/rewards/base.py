"""The record a reward-model loss is, and the options every loss has.

Loss modules are imported to learn their schema before a config is known to be valid, so they call tensor methods and
leave `import torch` to the modules that need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_cli.algos.base import require_same_shape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairScores:
    """Scores of preference pairs and what the data say about them; all of one shape, (B,), or (B, T) token by token.

    Args:
        chosen, rejected: raw rewards, nats.
        label: probability that the chosen response is the better one, in [0, 1].
        margin: by how much it is better, nats; 0 where the data do not say.
        bound: delta*, the prior bound on the reward difference, nats; infinite where there is none.
    """

    chosen: Tensor
    rejected: Tensor
    label: Tensor
    margin: Tensor
    bound: Tensor


@dataclass(frozen=True)
class RewardLoss:
    """One reward-model loss.

    Args:
        name: of yaml and module.
        pair_loss: (PairScores, config) -> loss of each pair, in the shape of its scores.
        ranking_loss: (scores (B, K), best first; mask (B, K); config) -> loss of each ranking, (B,). None: a ranking
            is learned as all the pairs it implies.
    """

    name: str
    pair_loss: Callable[[PairScores, Any], Tensor]
    ranking_loss: Callable[[Tensor, Tensor, Any], Tensor] | None = None


def smoothed(label: Tensor, smoothing: float) -> Tensor:
    """Return labels in which a share `smoothing` is taken to be wrong: (1 - 2 s) p + s, same shape.

    The conservative form of a preference loss: a wrong label then has a bounded pull.

    Args:
        label: p, probability that the chosen response is the better one, in [0, 1].
        smoothing: s, in [0, 0.5).

    Raises:
        ValueError: smoothing outside [0, 0.5), or a label outside [0, 1].
    """
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing is {smoothing}: it must be in [0, 0.5).")
    if not bool(((label >= 0) & (label <= 1)).all()):  # so that NaN is refused too
        raise ValueError("a label is outside [0, 1]: it is the probability that the chosen response is the better one.")
    return (1 - 2 * smoothing) * label + smoothing


def centering_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return (r_w + r_l)^2 of each pair, same shape: keeps the rewards around 0 (arXiv:2312.09244)."""
    return (chosen + rejected) ** 2


def pair_loss(loss: RewardLoss, scores: PairScores, cfg: Any) -> Tensor:
    """Return the loss of each pair with the options every loss has: label smoothing and centering, same shape.

    Raises:
        ValueError: shapes differ, smoothing outside [0, 0.5), or a label outside [0, 1].
    """
    require_same_shape(**vars(scores))
    scores = replace(scores, label=smoothed(scores.label, cfg.label_smoothing))
    found = loss.pair_loss(scores, cfg)
    return found + cfg.centering * centering_penalty(scores.chosen, scores.rejected) if cfg.centering else found
