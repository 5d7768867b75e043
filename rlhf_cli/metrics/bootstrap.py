"""Intervals over prompts: by bootstrap, and of shares by Wilson's formula."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlhf_cli.metrics.calibration import binomial_interval


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
    means = values[_draws(len(values), resamples, seed)].mean(-1)
    return _bounds(key, float(values.mean()), means, len(values))


def share_interval(key: str, per_prompt: np.ndarray) -> dict[str, float]:
    """Return {key, key/lo, key/hi, key/n}: a mean share over prompts with Wilson's 95 % interval.

    Wilson's interval of P_eff = p (1 - p) / (s^2 / P) independent trials: as many as vary like the prompts' mean does.
    It is of P trials where all prompts say 0 or all 1, and has no width where all agree on a share between. A bootstrap
    cannot draw the event that no prompt had, and covers a share near 0 or 1 only half the time.

    Args:
        key: the metric's name.
        per_prompt: one share a prompt, in [0, 1], (P,); NaN (a prompt without the metric) is left out.

    Raises:
        ValueError: no prompt has the metric, or a share lies outside [0, 1].
    """
    values = np.asarray(per_prompt, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        raise ValueError(f"{key} has no values: there is nothing to average.")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{key}: a share lies outside [0, 1].")
    mean, count = float(values.mean()), len(values)
    variance = float(values.var(ddof=1)) / count if count > 1 else 0.0
    low = high = mean
    if variance > 0 or mean in (0, 1):
        trials = max(1.0, mean * (1 - mean) / variance) if variance > 0 else float(count)
        low, high = (float(end[0]) for end in binomial_interval(np.array([mean]), np.array([trials])))
    return {key: mean, f"{key}/lo": low, f"{key}/hi": high, f"{key}/n": count}


def interval_of(
    key: str, statistic: Callable[..., float | None], *columns: np.ndarray, resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Return {key, key/lo, key/hi, key/n}: a statistic that is no mean over prompts, with its bootstrap 95 % interval.

    Prompts are drawn with replacement, with all that belongs to them. The interval leaves out draws for which the
    statistic is not defined.

    Args:
        key: the metric's name.
        statistic: of the columns, e.g. the standard deviation of all samples; None or NaN where it is not defined.
        columns: one row a prompt, (P, ...) each.
        resamples: bootstrap draws of P prompts with replacement.
        seed: of the draws.

    Raises:
        ValueError: columns of different lengths, no prompt, or a statistic that the columns do not define.
    """
    counts = {len(column) for column in columns}
    if len(counts) != 1 or counts == {0}:
        lengths = ", ".join(str(len(column)) for column in columns) or "none"
        raise ValueError(f"{key} needs one row a prompt in every column: their lengths are {lengths}.")
    value = _number(statistic(*columns))
    if np.isnan(value):
        raise ValueError(f"{key} is not defined for these prompts.")
    (count,) = counts
    drawn = [_number(statistic(*(column[rows] for column in columns))) for rows in _draws(count, resamples, seed)]
    return _bounds(key, value, np.array(drawn), count)


def _draws(count: int, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _bounds(key: str, value: float, resampled: np.ndarray, count: int) -> dict[str, float]:
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return {key: value, f"{key}/lo": float(low), f"{key}/hi": float(high), f"{key}/n": count}
