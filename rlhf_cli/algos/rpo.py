"""RPO (arXiv 2405.16436): DPO plus an SFT term on the chosen response, robust against over-optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_cli.algos.base import Algorithm, PairLogps, masked_sum, require_same_shape
from rlhf_cli.algos.dpo import dpo_loss, pairwise_terms
from rlhf_cli.algos.pm import effective_reference
from rlhf_cli.config.schema import AlgoConfig, setting

if TYPE_CHECKING:
    from torch import Tensor

REDUCTIONS = ("sum", "seq_mean", "token_mean")


@dataclass
class Config(AlgoConfig):
    """Keys of conf/algo/rpo.yaml."""

    eta: float = setting(ge=0)
    sft_reduction: str = setting(choices=REDUCTIONS)
    sft_scale_by_beta: bool = setting()


def rpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float, eta: float
) -> Tensor:
    """Return the RPO loss of each pair in sum form, (B,).

    -log sigmoid(beta [(log pi_w - log pi_ref,w) - (log pi_l - log pi_ref,l)]) - eta beta log pi_w
    (arXiv:2405.16436, main text; the baseline distribution is the chosen response. eta = 0 is DPO.)

    Args:
        chosen, rejected: log pi of whole responses, nats, (B,).
        ref_chosen, ref_rejected: log pi_ref of whole responses, nats, (B,).
        beta: > 0.
        eta: weight of the SFT term, >= 0.

    Raises:
        ValueError: shapes differ, beta <= 0 or eta < 0.
    """
    if eta < 0:
        raise ValueError(f"eta is {eta}: it must be >= 0.")
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta) - eta * beta * chosen


def sft_term(chosen_token_logps: Tensor, mask: Tensor, *, reduction: str) -> Tensor:
    """Return the SFT term of a batch, a scalar: the negative log-likelihood of the chosen responses, nats.

    sum: mean over sequences of the sum over tokens (main text and official recipe of arXiv:2405.16436);
    seq_mean: mean over sequences of the mean over tokens (its appendix);
    token_mean: one mean over all tokens of the batch (TRL's convention, and the `mean` of the official code).

    Args:
        chosen_token_logps: log pi of each token of the chosen responses, nats, (B, T).
        mask: True keeps a token, (B, T); numbers are read as bool.
        reduction: sum, seq_mean or token_mean.

    Raises:
        ValueError: shapes differ, an unknown reduction, or a sequence without tokens.
    """
    require_same_shape(chosen_token_logps=chosen_token_logps, mask=mask)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}: it must be one of {', '.join(REDUCTIONS)}.")
    lengths = mask.bool().sum(-1)
    if bool((lengths == 0).any()):
        raise ValueError("a sequence has no tokens under its mask: its likelihood has no mean. Drop it.")
    nll = -masked_sum(chosen_token_logps, mask)
    if reduction == "sum":
        return nll.mean()
    if reduction == "seq_mean":
        return (nll / lengths).mean()
    return nll.sum() / lengths.sum()


def _reference(ref_token_logps: Tensor, cfg: Any) -> Tensor:
    return effective_reference(ref_token_logps, alpha=1.0)


def _pair_loss(batch: PairLogps, cfg: Any) -> dict[str, Tensor]:
    terms = pairwise_terms(batch, cfg, _reference)
    sft = sft_term(batch.chosen, batch.chosen_mask, reduction=cfg.sft_reduction)
    if cfg.sft_reduction == "token_mean":
        sft = sft * batch.token_share
    weight = cfg.eta * (cfg.beta if cfg.sft_scale_by_beta else 1.0)
    return {**terms, "loss": terms["loss"] + weight * sft, "sft_term": sft.detach()}


ALGORITHM = Algorithm(
    name="rpo", family="pairwise", effective_reference=_reference, pair_loss=_pair_loss, has_optimum=False
)
