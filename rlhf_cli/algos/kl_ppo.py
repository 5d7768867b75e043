"""KL-regularised RLHF: optimum pi_ref * exp(r / beta). Preference matching's alpha = 1 (docs/paper_index.md)."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.algos.base import Algorithm
from rlhf_cli.algos.pm import effective_reference
from rlhf_cli.config.schema import OnlineAlgoConfig


@dataclass
class Config(OnlineAlgoConfig):
    """Keys of conf/algo/kl_ppo.yaml."""


ALGORITHM = Algorithm(
    name="kl_ppo",
    family="online",
    effective_reference=lambda ref_token_logps, cfg: effective_reference(ref_token_logps, alpha=1.0),
)
