"""Means over training seeds with Student's interval, and paired differences between runs of the same seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval.

    Args:
        mean: of the values.
        low, high: ends of the interval; None for one value, which says nothing of its spread.
        count: values.
        half: half the width of the interval; None for one value.
    """

    mean: float
    low: float | None
    high: float | None
    count: int
    half: float | None


def mean_interval(values: Iterable[float]) -> Interval:
    """Return the mean of n values with Student's 95 % interval: m -+ t_{0.975, n-1} s / sqrt(n).

    s is the sample standard deviation (n - 1). The values are taken to be independent and near normal.

    Args:
        values: one a seed, finite.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    found = np.array(list(values), dtype=float)
    if found.ndim != 1 or len(found) == 0:
        raise ValueError("there are no values: nothing can be averaged over seeds.")
    if not np.isfinite(found).all():
        raise ValueError(f"not all values are finite: {', '.join(f'{value:g}' for value in found)}.")
    if len(found) == 1:
        return Interval(float(found[0]), None, None, 1, None)
    if (found == found[0]).all():  # a mean of equal numbers is rounded, and has a spread of rounding errors
        return Interval(float(found[0]), float(found[0]), float(found[0]), len(found), 0.0)
    from scipy.stats import t

    mean = float(found.mean())
    half = float(t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))
    return Interval(mean, mean - half, mean + half, len(found), half)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Return the mean and interval of value minus baseline over the seeds that both have.

    What a seed does to both of them (its SFT policy, its reward model) cancels in the difference.

    Args:
        values: one by seed, finite.
        baseline: one by seed, finite.

    Raises:
        ValueError: no seed in common, or a value that is not finite.
    """
    both = sorted(values.keys() & baseline.keys())
    if not both:
        ours, theirs = (", ".join(map(str, sorted(of))) or "none" for of in (values, baseline))
        raise ValueError(f"no seed in common: {ours} against {theirs}.")
    return mean_interval(values[seed] - baseline[seed] for seed in both)
