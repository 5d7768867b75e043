"""Preference matching RLHF (arXiv 2405.16455): a policy proportional to exp(reward)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_cli.algos.base import Algorithm
from rlhf_cli.config.schema import OnlineAlgoConfig, setting

if TYPE_CHECKING:
    from torch import Tensor


ROUNDING = 1e-6  # nats; a reference probability of exactly alpha is not likely, whatever exp and log round to


@dataclass
class Config(OnlineAlgoConfig):
    """Keys of conf/algo/pm.yaml. `alpha`: likely-token threshold in (0, 1]; null is unconditional PM."""

    alpha: float | None = setting(gt=0, le=1)


def effective_reference(ref_token_logps: Tensor, *, alpha: float | None) -> Tensor:
    """Return the reference log-probs that conditional preference matching regularises towards, (B, T).

    e_t = 0 where pi_ref(y_t|.) > alpha, else log pi_ref(y_t|.)      (arXiv:2405.16455, conditional PM RLHF)
    so that the cost log pi - e_t is an entropy term on likely tokens and a KL term on unlikely ones.
    The official code takes log(alpha) of a Python float, which crashes, and uses alpha = 0 for plain KL; here plain
    KL is alpha = 1 and alpha -> 0 is unconditional PM, as the formula says.

    Args:
        ref_token_logps: log pi_ref of each response token, nats, <= 0, any shape.
        alpha: probability threshold in (0, 1]; 1 is plain KL. None is unconditional PM: e_t = 0 everywhere.

    Raises:
        ValueError: alpha outside (0, 1].
    """
    if alpha is None:
        return ref_token_logps.new_zeros(ref_token_logps.shape)
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}: it is a probability threshold in (0, 1]. Use None for unconditional PM.")
    return ref_token_logps.masked_fill(ref_token_logps > math.log(alpha) + ROUNDING, 0.0)


ALGORITHM = Algorithm(
    name="pm",
    family="online",
    effective_reference=lambda ref_token_logps, cfg: effective_reference(ref_token_logps, alpha=cfg.alpha),
)
