"""Intervals over prompts: by bootstrap, and of shares by Wilson's formula."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlhf_cli.metrics.calibration import binomial_interval


def interval(
    key: str, per_prompt: np.ndarray, *, groups: np.ndarray | None = None, resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Return {key, key/lo, key/hi, key/n}: the mean over prompts and its bootstrap 95 % interval; none of one prompt.

    Args:
        key: the metric's name.
        per_prompt: one number a prompt, (P,); NaN (a prompt without the metric) is left out.
        groups: prompts with one number are drawn together (wordings of a question), (P,); None: each on its own.
            `key/n` counts groups.
        resamples: bootstrap draws with replacement, as many groups as there are.
        seed: of the draws.

    Raises:
        ValueError: no prompt has the metric.
    """
    values = np.asarray(per_prompt, dtype=float)
    kept = ~np.isnan(values)
    if not kept.any():
        raise ValueError(f"{key} has no values: there is nothing to average.")
    sums, counts = _grouped(values[kept], None if groups is None else np.asarray(groups)[kept])
    drawn = _draws(len(sums), resamples, seed)
    return _bounds(key, float(values[kept].mean()), sums[drawn].sum(-1) / counts[drawn].sum(-1), len(sums))


def share_interval(key: str, per_prompt: np.ndarray, *, groups: np.ndarray | None = None) -> dict[str, float]:
    """Return {key, key/lo, key/hi, key/n}: a mean share over prompts with Wilson's 95 % interval.

    Wilson's interval of P_eff = p (1 - p) / (s^2 / P) independent trials: as many as vary like the prompts' mean does.
    It is of P trials where all prompts agree. A bootstrap cannot draw the event that no prompt had, and covers a share
    near 0 or 1 only half the time.

    Args:
        key: the metric's name.
        per_prompt: one share a prompt, in [0, 1], (P,); NaN (a prompt without the metric) is left out.
        groups: as in `interval`; a group's share is the mean of its prompts'.

    Raises:
        ValueError: no prompt has the metric, or a share lies outside [0, 1].
    """
    values = np.asarray(per_prompt, dtype=float)
    kept = ~np.isnan(values)
    if not kept.any():
        raise ValueError(f"{key} has no values: there is nothing to average.")
    values = values[kept]
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{key}: a share lies outside [0, 1].")
    sums, counts = _grouped(values, None if groups is None else np.asarray(groups)[kept])
    shares, mean, count = sums / counts, float(values.mean()), len(sums)
    variance = float(shares.var(ddof=1)) / count if count > 1 else 0.0
    trials = max(1.0, mean * (1 - mean) / variance) if variance > 0 else float(count)
    low, high = binomial_interval(np.array([mean]), np.array([trials]))
    return {key: mean, f"{key}/lo": float(low[0]), f"{key}/hi": float(high[0]), f"{key}/n": count}


def interval_of(
    key: str,
    statistic: Callable[..., float | None],
    *columns: np.ndarray,
    groups: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Return {key, key/lo, key/hi, key/n}: a statistic that is no mean over prompts, with its bootstrap 95 % interval.

    Prompts are drawn with replacement, with all that belongs to them. The interval leaves out draws for which the
    statistic is not defined.

    Args:
        key: the metric's name.
        statistic: of the columns, e.g. the standard deviation of all samples; None or NaN where it is not defined.
        columns: one row a prompt, (P, ...) each.
        groups: as in `interval`.
        resamples: bootstrap draws with replacement.
        seed: of the draws.

    Raises:
        ValueError: columns of different lengths, no prompt, or a statistic that the columns do not define.
    """
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or lengths == {0}:
        listed = ", ".join(str(len(column)) for column in columns) or "none"
        raise ValueError(f"{key} needs one row a prompt in every column: their lengths are {listed}.")
    value = _number(statistic(*columns))
    if np.isnan(value):
        raise ValueError(f"{key} is not defined for these prompts.")
    (count,) = lengths
    of_group = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    members = [np.flatnonzero(of_group == group) for group in range(of_group.max() + 1)]
    rows = (np.concatenate([members[group] for group in drawn]) for drawn in _draws(len(members), resamples, seed))
    resampled = [_number(statistic(*(column[row] for column in columns))) for row in rows]
    return _bounds(key, value, np.array(resampled), len(members))


def _grouped(values: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of the values of each group, and their number, both (G,)."""
    if groups is None:
        return values, np.ones(len(values))
    of_group = np.unique(groups, return_inverse=True)[1]
    return np.bincount(of_group, values), np.bincount(of_group).astype(float)


def _draws(count: int, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _bounds(key: str, value: float, resampled: np.ndarray, count: int) -> dict[str, float]:
    if count == 1:  # one prompt says nothing of others
        return {key: value, f"{key}/n": count}
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return {key: value, f"{key}/lo": float(low), f"{key}/hi": float(high), f"{key}/n": count}
