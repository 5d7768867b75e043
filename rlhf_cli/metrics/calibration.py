"""How well the probabilities sigma(r_w - r_l) of a reward model agree with what was preferred; pure, numpy alone.

A pair has no natural order: listing the winner first would make every outcome 1. So each pair counts in both orders,
(p, y) and (1 - p, 1 - y); every quantity here is the same for either, and `reliability` folds the two into one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Reliability:
    """A reliability curve; K bins of equal width on the confidence max(p, 1 - p) in [1/2, 1].

    Args:
        edges: of the bins, (K + 1,).
        predicted: mean confidence in each bin, (K,); NaN where it is empty.
        observed: share of the pairs in which the more confident side won, (K,); NaN where empty.
        count: pairs, (K,).
    """

    edges: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    count: np.ndarray


def logistic_loss(difference: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Return -y log sigma(d) - (1 - y) log sigma(-d) of each pair, the log-loss, finite at any d, nats, >= 0, (N,).

    Args:
        difference: d, reward of the first response minus the second, nats, finite, (N,).
        outcome: y, whether the first is preferred; a share where people differ, in [0, 1], (N,).

    Raises:
        ValueError: shapes differ, or an outcome outside [0, 1].
    """
    d, y = np.asarray(difference, dtype=float), _shares("outcome", outcome)
    _same_shape(d, y)
    return y * np.logaddexp(0, -d) + (1 - y) * np.logaddexp(0, d)


def brier(probability: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Return (p - y)^2 of each pair, in [0, 1], (N,).

    Args:
        probability: p, that the first response is preferred, in [0, 1], (N,).
        outcome: y, whether it was; a share where people differ, in [0, 1], (N,).

    Raises:
        ValueError: shapes differ, or a value outside [0, 1].
    """
    p, y = _pairs(probability, outcome)
    return (p - y) ** 2


def right_side(difference: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Return the share of the outcome on the side with the larger reward, in [0, 1], one half for a tie, (N,).

    Its mean is the accuracy.

    Args:
        difference: d, reward of the first response minus the second, nats, (N,).
        outcome: y, whether the first is preferred; a share where people differ, in [0, 1], (N,).

    Raises:
        ValueError: shapes differ, or an outcome outside [0, 1].
    """
    d, y = np.asarray(difference, dtype=float), _shares("outcome", outcome)
    _same_shape(d, y)
    return np.where(d > 0, y, np.where(d < 0, 1 - y, 0.5))


def reliability(probability: np.ndarray, outcome: np.ndarray, *, bins: int = 10) -> Reliability:
    """Return how often the side held more likely won, by how likely it was held: a `Reliability` of K = `bins` bins.

    c = max(p, 1 - p),  won = y where p > 1/2, 1 - y where p < 1/2, 1/2 where p = 1/2
    which is the curve on [0, 1] of both orders of every pair: its halves mirror each other (arXiv:1706.04599, sec. 2).
    Bins are closed below; the last one holds 1.

    Args:
        probability, outcome: as in `brier`, (N,).
        bins: K, >= 1.

    Raises:
        ValueError: shapes differ, a value outside [0, 1], no pair, or bins < 1.
    """
    p, y = _pairs(probability, outcome)
    if bins < 1 or len(p) == 0:
        raise ValueError(f"{len(p)} pairs in {bins} bins: a reliability curve needs one of each.")
    confidence = np.maximum(p, 1 - p)
    won = np.where(p == 0.5, 0.5, np.where(p > 0.5, y, 1 - y))
    edges = np.linspace(0.5, 1, bins + 1)
    place = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        predicted = np.bincount(place, confidence, bins) / count
        observed = np.bincount(place, won, bins) / count
    return Reliability(edges, predicted, observed, count)


def expected_calibration_error(probability: np.ndarray, outcome: np.ndarray, *, bins: int = 10) -> float:
    """Return ECE = sum_k n_k / N |observed_k - predicted_k|, in [0, 1]      (arXiv:1706.04599, eq. 3).

    The paper bins the confidence in the predicted class on [0, 1]; of two classes that confidence is at least 1/2, so
    here the K bins share [1/2, 1]. With few pairs a bin it is biased upwards.

    Args:
        probability, outcome: as in `brier`, (N,).
        bins: K, >= 1.

    Raises:
        ValueError: as `reliability`.
    """
    found = reliability(probability, outcome, bins=bins)
    kept = found.count > 0
    gaps = np.abs(found.observed[kept] - found.predicted[kept])
    return float((found.count[kept] * gaps).sum() / found.count.sum())


def binomial_interval(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of Wilson's 95 % interval of a share of `count` pairs, in [0, 1], both (K,).

    (s + z^2/2n -+ z sqrt(s (1 - s)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96. Inside [0, 1] also at a share of 0 or 1.

    Args:
        share: s, in [0, 1], (K,). Of soft outcomes the interval is too wide rather than too narrow.
        count: n, >= 1, (K,).

    Raises:
        ValueError: shapes differ, a share outside [0, 1], or a count below 1.
    """
    s, n = np.asarray(share, dtype=float), np.asarray(count, dtype=float)
    _same_shape(s, n)
    if not ((s >= 0) & (s <= 1)).all() or not (n >= 1).all():
        raise ValueError("a share is outside [0, 1], or rests on no pair.")
    z = 1.959964
    middle, half = s + z**2 / (2 * n), z * np.sqrt(s * (1 - s) / n + (z / (2 * n)) ** 2)
    low, high = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
    return np.clip(low, 0, 1), np.clip(high, 0, 1)


def pair_correlation(difference: np.ndarray, length_difference: np.ndarray) -> float | None:
    """Return sum(d l) / sqrt(sum d^2 sum l^2), in [-1, 1]; None where all d or all l are 0.

    Pearson's correlation of reward and length within pairs: of d and l over both orders of each pair, where both means
    are 0. A Bradley-Terry reward is free up to a constant a prompt, so a correlation across prompts says nothing.

    Args:
        difference: d, reward of the first response minus the second, nats, (N,).
        length_difference: l, its length minus that of the second, tokens, (N,).

    Raises:
        ValueError: shapes differ.
    """
    d, lengths = np.asarray(difference, dtype=float), np.asarray(length_difference, dtype=float)
    _same_shape(d, lengths)
    if not d.any() or not lengths.any():
        return None
    d, lengths = d / np.abs(d).max(), lengths / np.abs(lengths).max()  # no square over- or underflows
    return float(np.clip((d @ lengths) / np.sqrt((d @ d) * (lengths @ lengths)), -1, 1))


def pair_slope(difference: np.ndarray, length_difference: np.ndarray) -> float | None:
    """Return sum(d l) / sum(l^2), nats per token; None where all l are 0.

    The least-squares line of d on l through the origin: what one token more is worth, over both orders of each pair.

    Args:
        difference, length_difference: as in `pair_correlation`, (N,).

    Raises:
        ValueError: shapes differ.
    """
    d, lengths = np.asarray(difference, dtype=float), np.asarray(length_difference, dtype=float)
    _same_shape(d, lengths)
    return float((d @ lengths) / (lengths @ lengths)) if lengths.any() else None


def _pairs(probability: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, y = _shares("probability", probability), _shares("outcome", outcome)
    _same_shape(p, y)
    return p, y


def _shares(name: str, values: np.ndarray) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"a value of {name} is outside [0, 1].")
    return found


def _same_shape(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"shapes {first.shape} and {second.shape}: one number a pair is needed, (N,) and (N,).")
