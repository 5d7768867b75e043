"""The Bradley-Terry loss of reward modelling."""

from __future__ import annotations

from torch import Tensor

from rlhf_cli.algos.base import require_same_shape


def bt_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return -log sigmoid(r_w - r_l) of each pair, (B,)       (Bradley-Terry; arXiv:2203.02155, eq. 1).

    Args:
        chosen, rejected: rewards of the preferred and the other response, nats, (B,).

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    return chosen.new_zeros(()).logaddexp(rejected - chosen)
