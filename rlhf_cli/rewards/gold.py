"""The world's own reward: nothing is trained, so there is no loss."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.config.schema import RewardConfig


@dataclass
class Config(RewardConfig):
    """Keys of conf/reward/gold.yaml."""
