"""The numbers of a row: each metric's mean over the runs of one setting, its interval, and the bounds crossed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.metrics.guard import crossed
from rlhf_cli.metrics.seeds import Interval, mean_interval
from rlhf_cli.report.run_groups import INTERVAL_ENDS, Run


@dataclass(frozen=True)
class Cell:
    """A metric of a row: mean over `seeds` runs with its 95 % interval, and the paired difference from the baseline.

    `mean` is infinite where a run's number is not finite. `source` says over what the interval is: training seeds, the
    prompts of the one run, or that there is none. `prompts` is how many prompts the one run's number rests on.
    """

    seeds: int
    mean: float
    low: float | None = None
    high: float | None = None
    half: float | None = None
    source: Literal["seeds", "prompts", "none"] = "none"
    difference: Interval | None = None
    prompts: int | None = None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.mean)

    @property
    def unsure(self) -> bool:
        """Return whether the interval of the paired difference contains 0."""
        found = self.difference
        return found is not None and found.low is not None and found.high is not None and found.low <= 0 <= found.high


def cells(group: Sequence[Run]) -> dict[str, Cell]:
    """Return metric key to its numbers over the runs of one row."""
    return {key: _cell(group, key) for key in dict.fromkeys(key for run in group for key in metric_keys(run.metrics))}


def flags(group: Sequence[Run]) -> list[str]:
    """Return the bounds of collapse that the mean over seeds crosses, or else those that single seeds cross."""
    values: dict[str, list[float]] = {}
    for run in group:
        for key, value in finite(run.metrics).items():
            values.setdefault(key, []).append(value)
    of_mean = crossed({key: sum(found) / len(found) for key, found in values.items()})
    if of_mean or len(group) == 1:
        return of_mean
    return [f"seed {run.seed}: {sentence}" for run in group for sentence in crossed(finite(run.metrics))]


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that are numbers."""
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def metric_keys(metrics: Mapping[str, float]) -> list[str]:
    """Return the keys of the metrics themselves, without the ends and counts of their intervals."""
    return sorted(key for key in metrics if not key.endswith(INTERVAL_ENDS))


def _cell(group: Sequence[Run], key: str) -> Cell:
    having = [run for run in group if key in run.metrics]
    count = having[0].metrics.get(f"{key}/n") if len(having) == 1 else None
    prompts = None if count is None or not math.isfinite(count) else int(count)
    values = [run.metrics[key] for run in having]
    if not all(map(math.isfinite, values)):
        return Cell(len(values), math.inf, prompts=prompts)
    found = mean_interval(values)
    if found.half is not None:
        return Cell(found.count, found.mean, found.low, found.high, found.half, "seeds")
    low, high = (having[0].metrics.get(f"{key}{end}") for end in ("/lo", "/hi"))
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        return Cell(1, found.mean, low, high, None, "prompts", prompts=prompts)
    return Cell(found.count, found.mean, prompts=prompts)
