"""What the jobs of a sweep may be ranked and chosen by."""

from __future__ import annotations

import re

from rlhf_cli.config.sweeps import Sweep
from rlhf_cli.errors import ConfigError
from rlhf_cli.metrics import glossary


def check(sweep: Sweep) -> None:
    """Refuse a metric by which nothing can be ranked, and an objective that training itself lowers.

    Raises:
        ConfigError: naming the metric.
    """
    better = {name: _better(name, getattr(sweep, name)) for name in ("objective", "rank")}
    key = sweep.objective
    if key is None:
        return
    if key.startswith("train/") or re.search(r"(?<!log_)loss\b", key):
        why = "Every job lowers its training loss, and jobs with other losses cannot be compared by it"
        raise ConfigError(f"objective={key} is measured in training", why, "Name a held-out metric: heldout/pm/tv")
    if "divergence" in key:
        why = "It is zero for a collapsed policy too"
        raise ConfigError(f"objective={key} is no objective", why, "Name a distance: heldout/pm/tv")
    right = "minimize" if better["objective"] == "lower" else "maximize"
    if sweep.direction != right:
        why = f"A {better['objective']} value is the better one"
        raise ConfigError(f"direction={sweep.direction} makes {key} worse", why, f"Write direction: {right}")


def _better(name: str, key: str | None) -> str | None:
    try:
        return None if key is None else glossary.rankable(key).better
    except ValueError as error:
        raise ConfigError(f"{name}={key} cannot rank the jobs of a sweep", str(error)) from None
