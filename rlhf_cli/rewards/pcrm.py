"""Prior-constrained reward models (arXiv 2404.00978): what is known of a pair before training bounds its margin."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING, Any

from rlhf_cli.algos.base import require_same_shape
from rlhf_cli.config.schema import (
    CosinePrior,
    FixedPrior,
    LengthPrior,
    RandomPrior,
    TrainedRewardConfig,
)
from rlhf_cli.rewards.base import PairScores, RewardLoss
from rlhf_cli.rewards.bt import negative_log_sigmoid, preference_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class LengthConfig(TrainedRewardConfig, LengthPrior):
    """Keys of conf/reward/pcrm_length.yaml."""


@dataclass
class CosineConfig(TrainedRewardConfig, CosinePrior):
    """Keys of conf/reward/pcrm_cosine.yaml."""


@dataclass
class FixedConfig(TrainedRewardConfig, FixedPrior):
    """Keys of conf/reward/pcrm_fixed.yaml."""


@dataclass
class RandomConfig(TrainedRewardConfig, RandomPrior):
    """Keys of conf/reward/pcrm_random.yaml."""


CONFIGS = {
    "pcrm_length": LengthConfig,
    "pcrm_cosine": CosineConfig,
    "pcrm_fixed": FixedConfig,
    "pcrm_random": RandomConfig,
}


def length_ratio(chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
    """Return min(|y_w|, |y_l|) / max(|y_w|, |y_l|) of each pair, in [0, 1], (B,)      (arXiv:2404.00978, length prior).

    Lengths are counted in tokens after the first differing token, as in the official code. There the text is cut at
    the first padding token, so that a pad equal to end-of-sequence loses the end; here end-of-sequence always counts.

    Args:
        chosen_lengths, rejected_lengths: tokens, >= 0, (B,).

    Raises:
        ValueError: shapes differ, a negative length, or a pair without a token on either side (equal responses).
    """
    require_same_shape(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    longer, shorter = chosen_lengths.maximum(rejected_lengths), chosen_lengths.minimum(rejected_lengths)
    if bool((shorter < 0).any()):
        raise ValueError("a length is negative: lengths count tokens.")
    if bool((longer == 0).any()):
        count = int((longer == 0).sum())
        raise ValueError(f"{count} pairs have no token after their first difference: their responses are equal.")
    return shorter / longer


def cosine_similarity(chosen_embeddings: Tensor, rejected_embeddings: Tensor) -> Tensor:
    """Return the cosine of each pair of embeddings, clamped to [0, 1], (B,).

    Args:
        chosen_embeddings, rejected_embeddings: of a frozen encoder, (B, H).

    Raises:
        ValueError: shapes differ, or an embedding is zero or not finite.
    """
    require_same_shape(chosen_embeddings=chosen_embeddings, rejected_embeddings=rejected_embeddings)
    directions = []
    for embeddings in (chosen_embeddings, rejected_embeddings):
        norms = embeddings.norm(dim=-1, keepdim=True)
        if not bool(((norms > 0) & norms.isfinite()).all()):
            raise ValueError("an embedding is zero or not finite: it has no direction.")
        directions.append(embeddings / norms)  # each by its own norm: their product may overflow in half precision
    return (directions[0] * directions[1]).sum(-1).clamp(0, 1)


def angle(cosine: Tensor) -> Tensor:
    """Return (pi - arccos c) / pi, in [1/2, 1] for a cosine c in [0, 1], same shape (arXiv:2404.00978)."""
    return (pi - cosine.arccos()) / pi


def angular_similarity(chosen_embeddings: Tensor, rejected_embeddings: Tensor) -> Tensor:
    """Return (pi - arccos c) / pi of each pair, c = clamp(cos, 0, 1), in [1/2, 1], (B,).

    (arXiv:2404.00978, cosine prior.)

    Args:
        chosen_embeddings, rejected_embeddings: of a frozen encoder, (B, H).

    Raises:
        ValueError: shapes differ, or an embedding is zero or not finite.
    """
    return angle(cosine_similarity(chosen_embeddings, rejected_embeddings))


def margin_bound(similarity: Tensor, *, beta1: float, beta2: float, beta3: float) -> Tensor:
    """Return delta* = beta1 / (similarity + beta2) + beta3 of each pair, nats, without gradient, (B,).

    (arXiv:2404.00978.) The alike may not differ much. Under `pcrm_loss` a pair's own optimum is delta*/2.

    Args:
        similarity: in [0, 1], (B,).
        beta1: > 0. beta2: > 0, keeps the bound finite at similarity 0. beta3: nats.

    Raises:
        ValueError: a similarity outside [0, 1], or beta1 or beta2 <= 0.
    """
    if beta1 <= 0 or beta2 <= 0:
        raise ValueError(f"beta1 is {beta1} and beta2 is {beta2}: both must be > 0.")
    if not bool(((similarity >= 0) & (similarity <= 1)).all()):
        raise ValueError("a similarity is outside [0, 1].")
    return (beta1 / (similarity + beta2) + beta3).detach()


def bound_loss(difference: Tensor, bound: Tensor) -> Tensor:
    """Return -log sigmoid(delta* - d) of each pair, same shape: the term that bounds a margin. 0 at delta* infinite.

    Args:
        difference: d, reward difference or DPO logit, nats.
        bound: delta*, nats; no gradient flows through it.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(difference=difference, bound=bound)
    return negative_log_sigmoid(bound.detach() - difference)


def pcrm_loss(chosen: Tensor, rejected: Tensor, bound: Tensor) -> Tensor:
    """Return -log sigmoid(d) - log sigmoid(delta* - d) of each pair, d = r_w - r_l, (B,)         (arXiv:2404.00978).

    Its minimum over d is at delta*/2. With the two sides of the DPO logit as rewards it is the paper's DPO form.

    Args:
        chosen, rejected: rewards, nats, (B,).
        bound: delta*, nats, (B,); no gradient flows through it. Infinite: plain Bradley-Terry.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(chosen=chosen, rejected=rejected, bound=bound)
    return negative_log_sigmoid(chosen - rejected) + bound_loss(chosen - rejected, bound)


def _pair_loss(scores: PairScores, cfg: Any) -> Tensor:
    """PCRM with soft labels: each order of the pair is bounded, weighted by its probability."""
    difference = scores.chosen - scores.rejected
    bounded = scores.label * bound_loss(difference, scores.bound)
    bounded = bounded + (1 - scores.label) * bound_loss(-difference, scores.bound)
    return preference_loss(difference, label=scores.label, margin=scores.margin) + bounded


LOSS = RewardLoss("pcrm", _pair_loss)
