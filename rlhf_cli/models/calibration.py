"""Post-hoc length calibration: take out of the reward what the length of a response explains (arXiv 2409.17407)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.errors import DataError, RunError

CALIBRATION_FILE = "length_calibration.json"
MIN_POINTS = 20  # responses; with fewer, a window of LOWESS follows single responses


@dataclass(frozen=True)
class LengthCalibration:
    """What length explains of the reward: r_calibrated = r - offset(length).

    Args:
        lengths: knots, tokens with end-of-sequence, ascending and distinct, (K,).
        offsets: at the knots, nats, (K,).
    """

    lengths: tuple[float, ...]
    offsets: tuple[float, ...]

    def offset(self, lengths: Tensor) -> Tensor:
        """Return what to subtract from the rewards, nats, float32: linear between the knots, constant beyond them.

        Args:
            lengths: tokens with end-of-sequence, any shape and device; the result has the same.
        """
        found = np.interp(lengths.detach().cpu().double().numpy(), self.lengths, self.offsets)
        return torch.as_tensor(found, dtype=torch.float32, device=lengths.device)

    def save(self, path: Path) -> None:
        """Write the knots to the file `path`, such that `load` gives the same numbers to the last digit."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> LengthCalibration:
        """Return what `save` wrote to the file `path`.

        Raises:
            RunError: there is no such file.
        """
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(
                f"the reward model in {path.parent} has no length calibration",
                f"it needs at least {MIN_POINTS} held-out responses of more than one length, and the data had fewer",
                "train it on data with more held-out pairs, or use reward.calibration=none",
            ) from None
        return cls(tuple(stored["lengths"]), tuple(stored["offsets"]))


def fit_length_calibration(
    lengths: np.ndarray, scores: np.ndarray, *, centre: np.ndarray | None = None, frac: float = 2 / 3
) -> LengthCalibration:
    """Return the LOWESS fit of the scores on length, less its mean over the responses in `centre`.

    b(l) = local linear fit around l of the frac N nearest responses, tricube weights; offset(l) = b(l) - mean b
    (arXiv:2409.17407.) The mean reward of the responses in `centre` stays where it was.
    Unlike the official code (statsmodels' default of three), no robust re-weighting: its weights are undefined where
    the fit is exact or most responses have one length, and without it the fit is linear in the scores.

    Args:
        lengths: tokens with end-of-sequence, (N,).
        scores: held-out rewards, raw or centred, nats, (N,).
        centre: bool, True on the responses whose mean reward is kept, (N,); all when None.
        frac: share of the responses in each local fit, in (0, 1].

    Raises:
        ValueError: shapes differ, a value that is not finite, nothing in `centre`, or frac out of range.
        DataError: fewer than MIN_POINTS responses, or all of one length.
    """
    x, y = np.asarray(lengths, dtype=float), np.asarray(scores, dtype=float)
    keep = np.ones(x.shape, dtype=bool) if centre is None else np.asarray(centre, dtype=bool)
    _check(x, y, keep, frac)
    knots, which = np.unique(x, return_inverse=True)
    if len(knots) == 1:
        raise DataError(
            f"all {len(x)} held-out responses have length {knots[0]:g}",
            "length explains nothing of the reward: there is nothing to calibrate",
            "use reward.calibration=none",
        )
    bias = _lowess(x, y, knots, frac)
    # A window that closes on a single length: the fit there is the mean of that length.
    means = np.bincount(which, weights=y) / np.bincount(which)
    bias = np.where(np.isfinite(bias), bias, means)
    offsets = bias - bias[which][keep].mean()
    return LengthCalibration(tuple(knots.tolist()), tuple(offsets.tolist()))


def _lowess(x: np.ndarray, y: np.ndarray, knots: np.ndarray, frac: float) -> np.ndarray:
    """Return the LOWESS fit at the knots, (K,); NaN where fewer than two responses carry weight."""
    from statsmodels.nonparametric.smoothers_lowess import lowess  # slow to import

    with np.errstate(invalid="ignore"):
        # Fitted at the distinct lengths alone: as exact as at every response, and quick at any N.
        return lowess(y, x, frac=frac, it=0, xvals=knots)


def _check(x: np.ndarray, y: np.ndarray, keep: np.ndarray, frac: float) -> None:
    if x.ndim != 1 or x.shape != y.shape or x.shape != keep.shape:
        raise ValueError(f"lengths {x.shape}, scores {y.shape} and centre {keep.shape} must have one shape (N,).")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a length or a score is not finite.")
    if not 0 < frac <= 1:
        raise ValueError(f"frac is {frac}: it must be in (0, 1].")
    if len(x) < MIN_POINTS:
        raise DataError(
            f"length calibration has {len(x)} held-out responses",
            f"it needs at least {MIN_POINTS} to tell what length explains from chance",
            "add held-out pairs, or use reward.calibration=none",
        )
    if not keep.any():
        raise ValueError("centre keeps no response: there is no mean reward to keep.")
