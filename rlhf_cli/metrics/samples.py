"""Numbers of a policy's samples: S responses to each of P prompts, arrays (P, S); pure, numpy alone."""

from __future__ import annotations

import math

import numpy as np

from rlhf_cli.metrics.calibration import pair_correlation


def best_of(rewards: np.ndarray) -> dict[int, np.ndarray]:
    """Return the expected best reward of k samples, k = 1, 2, 4, … <= S, nats, {k: (P,)}.

    sum_i C(i - 1, k - 1) / C(S, k) r_(i),  r_(1) <= … <= r_(S)
    the mean of the maximum over all sets of k of the S samples, so unbiased for k fresh ones; k = 1 is the mean.

    Args:
        rewards: of S >= 1 samples for each prompt, nats, finite, (P, S).

    Raises:
        ValueError: the array is not (P, S), or S is 0.
    """
    ordered = np.sort(_table("rewards", rewards), axis=-1)
    size = ordered.shape[1]
    if size == 0:
        raise ValueError("there are no samples: the best of none is not defined.")
    found = {}
    for k in (2**power for power in range(size.bit_length())):
        weights = [math.comb(below, k - 1) / math.comb(size, k) for below in range(size)]
        found[k] = ordered @ np.array(weights)
    return found


def length_correlation(rewards: np.ndarray, lengths: np.ndarray) -> float | None:
    """Return Pearson's correlation of reward and length within prompts, in [-1, 1]; None where either never varies.

    sum d l / sqrt(sum d^2 sum l^2) over all samples, d and l the deviations from the means of their prompt: a
    Bradley-Terry reward is free up to a constant a prompt, so a correlation across prompts says nothing.

    Args:
        rewards: nats, (P, S).
        lengths: tokens, (P, S).

    Raises:
        ValueError: shapes differ or are not (P, S).
    """
    rewards, lengths = _table("rewards", rewards), _table("lengths", lengths)
    _same_shape(rewards=rewards, lengths=lengths)
    return pair_correlation(_deviations(rewards).ravel(), _deviations(lengths).ravel())


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return the share of a prompt's samples that score above their counterparts, a tie counts 1/2, in [0, 1], (P,).

    Args:
        ours: scores of our samples, (P, S).
        theirs: scores of the samples of the same prompt and number, (P, S). NaN in either gives NaN.

    Raises:
        ValueError: shapes differ or are not (P, S).
    """
    ours, theirs = _table("ours", ours), _table("theirs", theirs)
    _same_shape(ours=ours, theirs=theirs)
    return (0.5 + 0.5 * np.sign(ours - theirs)).mean(-1)


def _deviations(values: np.ndarray) -> np.ndarray:
    deviations = values - values.mean(-1, keepdims=True)
    constant = values.max(-1, keepdims=True) == values.min(-1, keepdims=True)
    return np.where(constant, 0.0, deviations)  # a mean of equal numbers is rounded too


def _table(name: str, values: np.ndarray) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    if found.ndim != 2:
        raise ValueError(f"{name} has shape {found.shape}: one row a prompt is needed, (P, S).")
    return found


def _same_shape(**arrays: np.ndarray) -> None:
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"arrays differ in shape: {shapes}. They must be equal.")
