"""Bradley-Terry on pairs, Plackett-Luce on rankings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_cli.algos.base import require_same_shape
from rlhf_cli.config.schema import TrainedRewardConfig
from rlhf_cli.rewards.base import PairScores, RewardLoss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Config(TrainedRewardConfig):
    """Keys of conf/reward/bt.yaml."""


def negative_log_sigmoid(x: Tensor) -> Tensor:
    """Return -log sigmoid(x), same shape; finite at any finite x, 0 at +infinity."""
    return x.new_zeros(()).logaddexp(-x)


def bt_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return -log sigmoid(r_w - r_l) of each pair, (B,)       (Bradley-Terry; arXiv:2203.02155, eq. 1).

    Args:
        chosen, rejected: rewards of the preferred and the other response, nats, (B,).

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    return negative_log_sigmoid(chosen - rejected)


def preference_loss(difference: Tensor, *, label: Tensor, margin: Tensor) -> Tensor:
    """Return the cross-entropy of each pair, same shape: -p log sigmoid(d - m) - (1 - p) log sigmoid(-d - m).

    The margin m as in Llama 2 (arXiv:2307.09288, eq. 2); a label p below 1 as in label smoothing.

    Args:
        difference: d = r_w - r_l, nats.
        label: p, probability that the chosen response is the better one, in [0, 1].
        margin: m, by how much the better one is better, nats; 0 is plain Bradley-Terry.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(difference=difference, label=label, margin=margin)
    won, lost = negative_log_sigmoid(difference - margin), negative_log_sigmoid(-difference - margin)
    return label * won + (1 - label) * lost


def plackett_luce_loss(scores: Tensor, mask: Tensor) -> Tensor:
    """Return -sum_k log( exp(r_k) / sum_{j >= k} exp(r_j) ) of each ranking, (B,)      (Plackett-Luce).

    With K = 2 it is the Bradley-Terry loss.

    Args:
        scores: rewards of the responses, best first, nats, (B, K).
        mask: True keeps a response, (B, K); a row keeps its first two or more.

    Raises:
        ValueError: shapes differ, or a ranking of fewer than two responses.
    """
    require_same_shape(scores=scores, mask=mask)
    mask = mask.bool()
    if bool((mask.sum(-1) < 2).any()):
        raise ValueError("a ranking has fewer than two responses: there is nothing to prefer.")
    kept = scores.masked_fill(~mask, float("-inf"))
    rest = kept.flip(-1).logcumsumexp(-1).flip(-1)  # log-sum of this response and all worse ones
    return (rest.masked_fill(~mask, 0.0) - scores.masked_fill(~mask, 0.0)).sum(-1)


def _pair_loss(scores: PairScores, cfg: Any) -> Tensor:
    return preference_loss(scores.chosen - scores.rejected, label=scores.label, margin=scores.margin)


LOSS = RewardLoss("bt", _pair_loss, ranking_loss=lambda scores, mask, cfg: plackett_luce_loss(scores, mask))
