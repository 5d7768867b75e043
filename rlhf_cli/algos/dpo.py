"""Direct preference optimisation (arXiv 2305.18290)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_cli.algos.base import Algorithm, PairLogps, masked_sum, require_same_shape
from rlhf_cli.algos.pm import effective_reference
from rlhf_cli.config.schema import AlgoConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass
class Config(AlgoConfig):
    """Keys of conf/algo/dpo.yaml."""


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float) -> Tensor:
    """Return the DPO loss of each pair, (B,).

    -log sigmoid(beta [(log pi_w - log pi_ref,w) - (log pi_l - log pi_ref,l)])           (arXiv:2305.18290, eq. 7)
    With effective references in place of log pi_ref it is direct preference matching (docs/paper_index.md).

    Args:
        chosen, rejected: log pi of whole responses, nats, (B,).
        ref_chosen, ref_rejected: the same of the (effective) reference, (B,).
        beta: > 0.

    Raises:
        ValueError: shapes differ, or beta <= 0.
    """
    require_same_shape(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if beta <= 0:
        raise ValueError(f"beta is {beta}: it must be > 0.")
    logits = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return logits.new_zeros(()).logaddexp(-logits)  # -log sigmoid, finite at any size


def pairwise_terms(batch: PairLogps, cfg: Any, reference: Callable[[Tensor, Any], Tensor]) -> dict[str, Tensor]:
    """Return the DPO loss of a batch and what is logged beside it, with `reference` as effective reference.

    Returns:
        loss, dpo_loss: scalars, mean over pairs; logits: (B,), with gradient; accuracy: share of pairs whose logit is
        positive; margin: mean logit.
    """
    chosen, rejected = masked_sum(batch.chosen, batch.chosen_mask), masked_sum(batch.rejected, batch.rejected_mask)
    ref_chosen = masked_sum(reference(batch.ref_chosen, cfg), batch.chosen_mask)
    ref_rejected = masked_sum(reference(batch.ref_rejected, cfg), batch.rejected_mask)
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=cfg.beta).mean()
    logits = cfg.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    right = (logits.detach() > 0).float().mean()
    return {
        "loss": loss,
        "logits": logits,
        "dpo_loss": loss.detach(),
        "margin": logits.detach().mean(),
        "accuracy": right,
    }


def _reference(ref_token_logps: Tensor, cfg: Any) -> Tensor:
    return effective_reference(ref_token_logps, alpha=1.0)


ALGORITHM = Algorithm(
    name="dpo",
    family="pairwise",
    effective_reference=_reference,
    pair_loss=lambda batch, cfg: pairwise_terms(batch, cfg, _reference),
)
