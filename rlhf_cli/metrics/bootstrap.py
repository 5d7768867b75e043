"""Bootstrap intervals over prompts."""

from __future__ import annotations

import numpy as np


def interval(key: str, per_prompt: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """Return {key, key/lo, key/hi, key/n}: the mean over prompts with its bootstrap 95 % interval.

    Args:
        key: the metric's name.
        per_prompt: one number a prompt, (P,); NaN (a prompt without the metric) is left out.
        resamples: bootstrap draws of P prompts with replacement.
        seed: of the draws.

    Raises:
        ValueError: no prompt has the metric.
    """
    values = np.asarray(per_prompt, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        raise ValueError(f"{key} has no values: there is nothing to average.")
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[draws].mean(-1), [2.5, 97.5])
    return {key: float(values.mean()), f"{key}/lo": float(low), f"{key}/hi": float(high), f"{key}/n": len(values)}
