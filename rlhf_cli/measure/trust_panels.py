"""What the figure of a trust report shows, binned: plain lists and numbers, for report/trust.py and trust.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_cli.metrics import calibration

if TYPE_CHECKING:
    from rlhf_cli.measure.trust import Gold, HeldOut, Spread

PERCENTILES = (5, 25, 50, 75, 95)
LENGTH_BINS, SIMILARITY_BINS, CURVE_BINS = 5, 4, 8
PAIRS_PER_BIN = 5  # fewer bins where they would hold fewer
POINTS = 1500  # answers drawn against gold
VIEW = 4  # half bounds further out than this many times the largest margin do not widen the histogram


def trust_panels(
    heldout: HeldOut, gold: Gold | None, spread: Spread | None, metrics: dict[str, float]
) -> dict[str, Any]:
    """Return the panels by name; `scores` and `gold` are None where nothing is known of them.

    Args:
        heldout, gold, spread, metrics: as `trust_report` takes and returns them.
    """
    return {
        "reliability": _reliability(heldout, metrics["rm/ece"]),
        "margins": _margins(heldout),
        "length": _length(heldout),
        "accuracy": {"accuracy": metrics["rm/accuracy"], "groups": _accuracy(heldout)},
        "scores": _scores(spread) if spread is not None else None,
        "gold": _gold(gold, metrics) if gold is not None else None,
        "percentiles": {"levels": list(PERCENTILES), "rows": _percentiles(heldout, spread)},
    }


def _reliability(heldout: HeldOut, ece: float) -> dict[str, Any]:
    curve = calibration.reliability(heldout.probability, heldout.label)
    kept = curve.count > 0
    low, high = calibration.binomial_interval(curve.observed[kept], curve.count[kept])
    columns = {"left": curve.edges[:-1], "right": curve.edges[1:], "predicted": curve.predicted}
    columns = {name: values[kept] for name, values in {**columns, "observed": curve.observed}.items()}
    return {"ece": ece, "bins": _rows(**columns, low=low, high=high, count=curve.count[kept])}


def _margins(heldout: HeldOut) -> dict[str, Any]:
    """Counts of margins and, where pairs have a bound, of delta*/2 in the same bins, which hold every margin."""
    margin = heldout.margin
    low, high = margin.min(), margin.max()
    half = heldout.bound[heldout.bounded] / 2 if heldout.bound is not None else np.zeros(0)
    if len(half):
        furthest = VIEW * max(np.abs(margin).max(), 1.0)
        low = min(low, max(np.percentile(half, 5), -furthest))
        high = max(high, min(np.percentile(half, 95), furthest))
    edges = np.histogram_bin_edges(margin, _bin_count(margin), (low, high))
    panel: dict[str, Any] = {"edges": edges.tolist(), "count": np.histogram(margin, edges)[0].tolist()}
    panel |= {"mean": float(margin.mean()), "half": None}
    if len(half):
        count = np.histogram(half, edges)[0]
        panel["half"] = {"count": count.tolist(), "outside": int(len(half) - count.sum())}
        panel["half"] |= {"median": float(np.median(half)), "constant": bool(np.ptp(half) < 1e-9)}
    return panel


def _length(heldout: HeldOut) -> dict[str, Any]:
    """Reward of the longer minus the shorter response by how much longer it is: both orders of a pair in one."""
    lengths = heldout.length_difference
    unequal = lengths != 0
    longer, sign = np.abs(lengths[unequal]), np.sign(lengths[unequal])
    bins = _equal_count_bins(longer, CURVE_BINS)
    curves = []
    for name, values in heldout.readings.items():
        folded = values[unequal] * sign
        columns = {"tokens": [longer[rows].mean() for rows in bins], "mean": [folded[rows].mean() for rows in bins]}
        columns |= {"low": [np.percentile(folded[rows], 25) for rows in bins]}
        columns |= {"high": [np.percentile(folded[rows], 75) for rows in bins], "count": [rows.sum() for rows in bins]}
        correlation, slope = calibration.pair_correlation(values, lengths), calibration.pair_slope(values, lengths)
        curves.append({"name": name, "correlation": correlation, "slope": slope, "bins": _rows(**columns)})
    return {"curves": curves, "equal": int((~unequal).sum())}


def _accuracy(heldout: HeldOut) -> list[dict[str, Any]]:
    """Accuracy in bins of about equal count: by length (preferred minus other response) and by similarity."""
    by: dict[str, tuple[np.ndarray | None, int]] = {
        "length difference": (heldout.length_difference * heldout.direction, LENGTH_BINS),
        "length ratio": (heldout.length_ratio, SIMILARITY_BINS),
        "embedding similarity": (heldout.cosine, SIMILARITY_BINS),
    }
    groups = []
    for name, (values, count) in by.items():
        if values is None:
            continue
        bins = _equal_count_bins(values, count)
        share = np.array([heldout.right[rows].mean() for rows in bins])
        pairs = np.array([rows.sum() for rows in bins])
        low, high = calibration.binomial_interval(share, pairs)
        ends = {"from": [values[rows].min() for rows in bins], "to": [values[rows].max() for rows in bins]}
        groups.append({"by": name, "bins": _rows(**ends, accuracy=share, low=low, high=high, count=pairs)})
    return groups


def _scores(spread: Spread) -> dict[str, Any]:
    """Densities of both kinds of responses in the same bins, and the 99th percentile of dataset responses."""
    data, policy = spread.dataset, spread.policy.ravel()
    edges = np.histogram_bin_edges(np.concatenate([data, policy]), _bin_count(data))
    limit = np.percentile(data, 99)
    return {
        "name": spread.name,
        "edges": edges.tolist(),
        "dataset": np.histogram(data, edges, density=True)[0].tolist(),
        "policy": np.histogram(policy, edges, density=True)[0].tolist(),
        "dataset_percentile_99": float(limit),
        "policy_beyond": float((policy > limit).mean()),
        "policy_best_mean": float(spread.policy.max(-1).mean()),
    }


def _gold(gold: Gold, metrics: dict[str, float]) -> dict[str, Any]:
    """Rewards of answers, each question's mean taken out (a Bradley-Terry reward is free up to it); POINTS at most."""
    parts = list(zip(gold.rewards, gold.gold, gold.trained, strict=True))
    ours = np.concatenate([rewards - rewards.mean() for rewards, _, _ in parts])
    theirs = np.concatenate([known - known.mean() for _, known, _ in parts])
    trained = np.concatenate([np.full(len(rewards), seen) for rewards, _, seen in parts])
    kept = slice(None, None, -(-len(ours) // POINTS))
    points = _rows(gold=theirs[kept], reward=ours[kept], trained=trained[kept])
    return {"points": points, "spearman": metrics.get("rm/gold_spearman"), "tv": metrics.get("rm/gold_tv")}


def _percentiles(heldout: HeldOut, spread: Spread | None) -> dict[str, list[float]]:
    columns = {"margin": heldout.margin}
    if heldout.bound is not None and heldout.bounded.any():
        columns["delta*/2"] = heldout.bound[heldout.bounded] / 2
    columns |= {"chosen reward": heldout.chosen, "rejected reward": heldout.rejected}
    if spread is not None:
        columns["policy samples"] = spread.policy.ravel()
    return {name: np.percentile(values, PERCENTILES).tolist() for name, values in columns.items()}


def _equal_count_bins(values: np.ndarray, count: int) -> list[np.ndarray]:
    """Return the rows of each of at most `count` bins of about as many values, lowest first, as masks (N,)."""
    if len(values) == 0:
        return []
    count = max(1, min(count, len(values) // PAIRS_PER_BIN))
    levels = np.unique(values)
    if len(levels) > count:
        levels = np.unique(np.quantile(values, np.arange(count) / count))  # lower ends
    place = np.searchsorted(levels, values, side="right") - 1
    return [place == k for k in np.unique(place)]


def _bin_count(values: np.ndarray) -> int:
    return int(np.clip(np.sqrt(len(values)), 5, 30))


def _rows(**columns: Any) -> list[dict[str, Any]]:
    """Return columns of one length as a list of rows of plain numbers."""
    plain = [np.asarray(values).tolist() for values in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*plain, strict=True)]
