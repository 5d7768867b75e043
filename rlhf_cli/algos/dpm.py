"""Direct preference matching: DPO's loss with PM's effective reference, the offline twin of pm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_cli.algos.base import Algorithm
from rlhf_cli.algos.dpo import pairwise_terms
from rlhf_cli.algos.pm import effective_reference
from rlhf_cli.config.schema import AlgoConfig, setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Config(AlgoConfig):
    """Keys of conf/algo/dpm.yaml. `alpha`: likely-token threshold in (0, 1]; null: preference maximum likelihood."""

    alpha: float | None = setting(gt=0, le=1)


def _reference(ref_token_logps: Tensor, cfg: Any) -> Tensor:
    return effective_reference(ref_token_logps, alpha=cfg.alpha)


ALGORITHM = Algorithm(
    name="dpm",
    family="pairwise",
    effective_reference=_reference,
    pair_loss=lambda batch, cfg: pairwise_terms(batch, cfg, _reference),
)
