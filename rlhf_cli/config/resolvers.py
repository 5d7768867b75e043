"""What yaml may compute: ${scaled:RATE} and ${survey_or_text:A,B}."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf


def register() -> None:
    """Make the resolvers known to OmegaConf."""
    OmegaConf.register_new_resolver("scaled", _scaled, replace=True)
    OmegaConf.register_new_resolver("survey_or_text", _survey_or_text, replace=True)


def _scaled(rate: float, *, _root_: Any) -> float:
    """Return a learning rate that is made for training all weights, times the adapters' factor if there are some."""
    return float(rate) * float(OmegaConf.select(_root_, "peft.learning_rate_factor", default=1.0))


def _survey_or_text(survey: Any, text: Any, *, _root_: Any) -> Any:
    """Return the first value on the survey world, the second on other data."""
    return survey if OmegaConf.select(_root_, "dataset.source") == "survey" else text
