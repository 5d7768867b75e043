"""The trust report of a reward model: is it right, calibrated, free of length, near gold, and where will a policy go?

Numbers in, numbers out: `trust_report` returns flat metrics (metrics/glossary.py) and plain lists, the panels, which
report/trust.py draws and trust.json keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from rlhf_cli.errors import RunError
from rlhf_cli.measure.trust_panels import PERCENTILES, trust_panels
from rlhf_cli.metrics import calibration
from rlhf_cli.metrics.bootstrap import interval
from rlhf_cli.metrics.preference import preference_distribution, total_variation


@dataclass(frozen=True)
class HeldOut:
    """Held-out preference pairs and what a reward model says about them; N pairs, arrays (N,).

    Args:
        prompts: integer id of each pair's prompt; intervals are over prompts.
        chosen, rejected: centred rewards as they are read (calibrated where calibration is on), nats.
        raw_chosen, raw_rejected: before length calibration, nats.
        calibrated_chosen, calibrated_rejected: after it, nats; None where the model has none.
        chosen_lengths, rejected_lengths: tokens, end-of-sequence included.
        label: probability that the chosen response is the better one, in [0, 1].
        length_ratio: similarity of the lengths after the first differing token, in [0, 1].
        cosine: similarity of the embeddings as the prior reads it, in [0, 1]; None where they are not computed.
        bound: delta*, nats, infinite where a pair has none; None where the loss bounds nothing.
    """

    prompts: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    raw_chosen: np.ndarray
    raw_rejected: np.ndarray
    calibrated_chosen: np.ndarray | None
    calibrated_rejected: np.ndarray | None
    chosen_lengths: np.ndarray
    rejected_lengths: np.ndarray
    label: np.ndarray
    length_ratio: np.ndarray
    cosine: np.ndarray | None = None
    bound: np.ndarray | None = None

    @property
    def difference(self) -> np.ndarray:
        """d, reward of chosen minus rejected as it is read, nats, (N,)."""
        return self.chosen - self.rejected

    @property
    def length_difference(self) -> np.ndarray:
        """Length of chosen minus rejected, tokens, (N,)."""
        return self.chosen_lengths.astype(float) - self.rejected_lengths.astype(float)

    @property
    def probability(self) -> np.ndarray:
        """sigma(d), the reward model's probability that the chosen response is the better one, (N,)."""
        return _sigmoid(self.difference)

    @property
    def direction(self) -> np.ndarray:
        """1 where the chosen response is the preferred one, -1 where the label says the other, (N,)."""
        return np.where(self.label < 0.5, -1.0, 1.0)

    @property
    def margin(self) -> np.ndarray:
        """Reward of the preferred response minus the other as it is read, nats, (N,)."""
        return self.difference * self.direction

    @property
    def bounded(self) -> np.ndarray:
        """True where a pair has a finite bound, (N,)."""
        return np.zeros(len(self.label), dtype=bool) if self.bound is None else np.isfinite(self.bound)

    @property
    def readings(self) -> dict[str, np.ndarray]:
        """Reward differences before and, where the model has it, after length calibration, {name: (N,)}."""
        found = {"raw": self.raw_chosen - self.raw_rejected}
        if self.calibrated_chosen is not None and self.calibrated_rejected is not None:
            found["calibrated"] = self.calibrated_chosen - self.calibrated_rejected
        return found

    @property
    def right(self) -> np.ndarray:
        """Share of the label on the side that is ordered first, one half for a tie, in [0, 1], (N,)."""
        return calibration.right_side(self.difference, self.label)


@dataclass(frozen=True)
class Gold:
    """Rewards of every valid answer where the world's own are known; one entry a question wording.

    Args:
        rewards: the reward model's, nats, (A,) each.
        gold: the world's, nats, (A,) each.
        trained: whether the reward model has seen the wording.
    """

    rewards: list[np.ndarray]
    gold: list[np.ndarray]
    trained: list[bool]


@dataclass(frozen=True)
class Spread:
    """Rewards of dataset responses and of a policy's samples: how far alignment pushes off the data.

    Args:
        dataset: of held-out responses, chosen and rejected, nats, (D,).
        policy: of S samples for each of P prompts, nats, (P, S).
        name: of the policy.
    """

    dataset: np.ndarray
    policy: np.ndarray
    name: str


def trust_report(heldout: HeldOut, gold: Gold | None, spread: Spread | None) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the metrics of the report and its panels (plain lists and numbers).

    Accuracy, log-loss and Brier are means over prompts of the mean over their pairs; all else is over pairs. A metric
    that is not defined (a correlation of constant scores, a class without pairs) has no key.

    Raises:
        RunError: no held-out pair, or a score that is not finite.
        ValueError: columns of different lengths, or a label outside [0, 1].
    """
    _require_usable(heldout, gold, spread)
    metrics = {**_pair_metrics(heldout), **_margin_metrics(heldout), **_length_metrics(heldout)}
    metrics |= _gold_metrics(gold) if gold is not None else {}
    metrics |= _spread_metrics(spread) if spread is not None else {}
    return metrics, trust_panels(heldout, gold, spread, metrics)


def _require_usable(heldout: HeldOut, gold: Gold | None, spread: Spread | None) -> None:
    count = len(heldout.prompts)
    columns = {field.name: getattr(heldout, field.name) for field in fields(heldout)}
    wrong = [name for name, column in columns.items() if column is not None and np.shape(column) != (count,)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: one number for each of the {count} pairs is needed.")
    if count == 0:
        raise RunError("There are no held-out pairs", "a reward model is judged on them", "give the dataset more rows")
    given = [columns[name] for name in columns if name.endswith(("chosen", "rejected")) and columns[name] is not None]
    given += [spread.dataset, spread.policy.ravel()] if spread is not None else []
    scores = np.concatenate([*given, *(gold.rewards if gold is not None else [])])
    lost = int((~np.isfinite(scores)).sum())
    if lost:
        what = f"{lost} of {len(scores)} scores of the reward model are not finite"
        raise RunError(what, "nothing can be said of it", "train it again with a lower trainer.rm.learning_rate")


def _pair_metrics(heldout: HeldOut) -> dict[str, float]:
    probability, label = heldout.probability, heldout.label
    per_pair = {
        "rm/accuracy": heldout.right,
        "rm/log_loss": calibration.logistic_loss(heldout.difference, label),
        "rm/brier": calibration.brier(probability, label),
    }
    _, group = np.unique(heldout.prompts, return_inverse=True)
    found: dict[str, float] = {}
    for key, values in per_pair.items():
        found |= interval(key, np.bincount(group, values) / np.bincount(group))
    found["rm/ece"] = calibration.expected_calibration_error(probability, label)
    longer = np.sign(heldout.length_difference) * heldout.direction
    for name, sign in {"longer_won": 1, "shorter_won": -1, "equal_length": 0}.items():
        of_class = (longer == sign) & (label != 0.5)
        if of_class.any():
            found[f"rm/accuracy_{name}"] = float(heldout.right[of_class].mean())
    return found


def _margin_metrics(heldout: HeldOut) -> dict[str, float]:
    margin = heldout.margin
    found = {"rm/margin/mean": float(margin.mean()), "rm/margin/std": float(margin.std())}
    found |= {f"rm/margin/q{level:02d}": float(np.percentile(margin, level)) for level in PERCENTILES}
    if heldout.bound is not None and heldout.bounded.any():
        bound, margin = heldout.bound[heldout.bounded], margin[heldout.bounded]
        found |= {"rm/bound/mean": float(bound.mean()), "rm/bound/half": float(bound.mean() / 2)}
        found["rm/beyond_bound"] = float((margin > bound).mean())
        found["rm/beyond_half"] = float((margin > bound / 2).mean())
    return found


def _length_metrics(heldout: HeldOut) -> dict[str, float]:
    lengths = heldout.length_difference
    readings = {"": heldout.difference, **{f"_{name}": values for name, values in heldout.readings.items()}}
    found: dict[str, float | None] = {}
    for suffix, values in readings.items():
        found[f"rm/length_correlation{suffix}"] = calibration.pair_correlation(values, lengths)
        found[f"rm/length_slope{suffix}"] = calibration.pair_slope(values, lengths)
    found["rm/length_correlation_labels"] = calibration.pair_correlation(2 * heldout.label - 1, lengths)
    return {key: value for key, value in found.items() if value is not None}


def _gold_metrics(gold: Gold) -> dict[str, float]:
    """Return agreement with gold, means over questions: trained wordings plain, the others under heldout/."""
    from scipy.stats import kendalltau, spearmanr

    found: dict[str, float] = {}
    for prefix, trained in (("", True), ("heldout/", False)):
        rows = [(r, g) for r, g, seen in zip(gold.rewards, gold.gold, gold.trained, strict=True) if seen is trained]
        ranked = [(r, g) for r, g in rows if len(r) >= 3 and np.ptp(r) > 0 and np.ptp(g) > 0]
        for key, correlation in (("rm/gold_spearman", spearmanr), ("rm/gold_kendall", kendalltau)):
            if ranked:
                found[prefix + key] = float(np.mean([correlation(r, g).statistic for r, g in ranked]))
        if rows:
            gaps = [_softmax_gap(r, g) for r, g in rows]
            found |= {f"{prefix}rm/gold_tv": float(np.mean(gaps)), f"{prefix}rm/gold_tv_max": max(gaps)}
    return found


def _softmax_gap(rewards: np.ndarray, gold: np.ndarray) -> float:
    mask = torch.ones(1, len(rewards), dtype=torch.bool)
    ours, theirs = (
        preference_distribution(torch.as_tensor(v, dtype=torch.float64)[None], mask) for v in (rewards, gold)
    )
    return float(total_variation(theirs, ours, mask))


def _spread_metrics(spread: Spread) -> dict[str, float]:
    data, policy = spread.dataset, spread.policy
    found = {
        "rm/score_dataset/mean": data.mean(),
        "rm/score_dataset/std": data.std(),
        "rm/score_policy/mean": policy.mean(),
        "rm/score_policy/std": policy.std(),
        "rm/score_policy_best/mean": policy.max(-1).mean(),
        "rm/score_policy_beyond": (policy > np.percentile(data, 99)).mean(),
    }
    if np.ptp(data) > 0:
        found["rm/score_shift"] = (policy.mean() - data.mean()) / data.std()
    return {key: float(value) for key, value in found.items()}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)
