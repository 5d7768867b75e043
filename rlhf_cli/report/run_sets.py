"""Sets of runs that may be compared: measured on the same data, by the same reward, in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.report.run_groups import (
    EVALUATE_DEFAULTS,
    REFERENCE_KEYS,
    Kind,
    Run,
    as_text,
    differing,
    latest_of_each_seed,
    model_name,
)

# Policies that differ here are measured against different targets, or differently.
TARGET_BLOCKS = ("dataset.", "reward.", "sampler.")
TARGET_KEYS = ("reward_model", "reference")
# Reward models that differ here were judged on different data.
WORLD_KEYS: tuple[str, ...] = ("dataset.name", "dataset.source", "dataset.path", "dataset.subset", "dataset.split")
WORLD_KEYS += ("dataset.parts", "dataset.weights", "dataset.max_rows", "dataset.seed", "dataset.questions")
JUDGE_KEYS = ("dataset.length_bias", "dataset.ranking_size")
# What measured.json tells of runs of one seed.
MEASURED = ("dataset", "prompts", "pool", "reward", "reference")
# Settings that name a reward or reference, by what measured.json says it is: a model can have several names.
SAME = {"reward": ("reward.", "reward_model"), "reference": ("reference",)}
KEPT_APART = ("reward.clip",)
SHOWN_KEYS = 3
SHOWN_CHARACTERS = 40
NAMES = {"dataset": "dataset", "reward": "reward", "reward_model": "reward model", "sampler": "sampler"}


@dataclass
class RunSet:
    """Runs of one kind with one target; `measured` is what each seed was measured on, where that is known.

    `left_out` are earlier runs of the same settings and seed.
    """

    kind: Kind
    target: dict[str, str]
    runs: list[Run] = field(default_factory=list)
    measured: dict[int, dict[str, Any]] = field(default_factory=dict)
    left_out: list[Run] = field(default_factory=list)

    def takes(self, run: Run) -> bool:
        """Return whether the run may be compared with those of the set, by the text of its settings."""
        if (run.kind == "rm") != (self.kind == "rm") or target(run) != self.target:
            return False
        # Of an unfinished run nothing was measured that could differ.
        return not run.finished or (run.kind == self.kind and self._agrees({run.seed: run.measured}))

    def joins(self, other: RunSet) -> bool:
        """Return whether another set has the same target by other names: all seeds that both have say so."""
        common = self.measured.keys() & other.measured.keys()
        same = [
            what
            for what in SAME
            if common and all(what in one.measured[seed] for one in (self, other) for seed in common)
        ]
        apart = _texts(self.target, same) != _texts(other.target, same)
        return self.kind == other.kind != "rm" and bool(same) and not apart and self._agrees(other.measured)

    def add(self, run: Run) -> None:
        """Put the run into the set."""
        self.runs.append(run)
        if run.finished:
            self.measured[run.seed] = {**run.measured, **self.measured.get(run.seed, {})}

    def _agrees(self, measured: dict[int, dict[str, Any]]) -> bool:
        """Return whether nothing says that other data was measured, or in any seed something else."""
        datasets = {of["dataset"] for one in (self.measured, measured) for of in one.values() if "dataset" in of}
        return len(datasets) <= 1 and not any(
            _differ(self.measured.get(seed, {}), found) for seed, found in measured.items()
        )


def _differ(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [key for key in MEASURED if key in ours and key in theirs and ours[key] != theirs[key]]


def _texts(texts: dict[str, str], same: Sequence[str]) -> dict[str, str]:
    """Return a target without the settings that only name what measured.json found to be the same."""
    names = tuple(prefix for what in same for prefix in SAME[what])
    return {key: value for key, value in texts.items() if key in KEPT_APART or not key.startswith(names)}


def target(run: Run) -> dict[str, str]:
    """Return the settings that runs must share to be compared, as text."""
    found = as_text(run.config)
    if run.kind == "rm":
        return {key: found.get(key, "null") for key in (*WORLD_KEYS, *JUDGE_KEYS)}
    return {key: value for key, value in found.items() if key.startswith(TARGET_BLOCKS) or key in TARGET_KEYS}


def comparable_sets(runs: Sequence[Run]) -> list[RunSet]:
    """Return the runs in sets that may be compared, policies first, the largest first."""
    sets: list[RunSet] = []
    # Finished runs first: they say what the others would have been measured on.
    for run in sorted(runs, key=lambda run: not run.finished):
        taken = next((one for one in sets if one.takes(run)), None)
        if taken is None:
            taken = RunSet(run.kind, target(run))
            sets.append(taken)
        taken.add(run)
    sets = _joined(sets)
    for one in sets:
        one.runs, one.left_out = latest_of_each_seed(one.runs)
    return sorted(sets, key=lambda one: (one.kind == "rm", -sum(run.finished for run in one.runs), -len(one.runs)))


def _joined(sets: Sequence[RunSet]) -> list[RunSet]:
    """Return the sets, those with one target under several names as one."""
    found: list[RunSet] = []
    # The largest first: its names are the ones that are shown.
    for one in sorted(sets, key=lambda one: -len(one.runs)):
        other = next((other for other in found if other.joins(one)), None)
        if other is None:
            found.append(one)
            continue
        for run in one.runs:
            other.add(run)
    return found


def titles(sets: Sequence[RunSet]) -> list[str]:
    """Return a title for each set, each once; those after the first of their kind say what differs from it."""
    found: list[str] = []
    for number, one in enumerate(sets):
        first = next(other for other in sets if (other.kind == "rm") == (one.kind == "rm"))
        title = _title(one) if one is first else f"{_title(one)}: {difference(one, first)}"
        found.append(title if title not in found else f"{title} ({number + 1})")
    return found


def difference(one: RunSet, first: RunSet) -> str:
    """Return why two sets may not be compared, e.g. "other reward: reward.name=gold"."""
    common = one.measured.keys() & first.measured.keys()
    same = [
        what
        for what in SAME
        if common and all({one.measured[s].get(what)} == {first.measured[s].get(what)} != {None} for s in common)
    ]
    keys = differing([_texts(one.target, same), _texts(first.target, same)])
    if keys:
        # A block's name stands for the values it brings.
        named = [key for key in keys if key.endswith((".name", ".source"))]
        blocks = {key.partition(".")[0] for key in named}
        keys = [key for key in keys if key.partition(".")[0] not in blocks or key in named]
        what = " and ".join(dict.fromkeys(_name(key) for key in keys))
        return f"other {what}: {_values(keys, one.target)}"
    if one.kind != first.kind:
        return "free text" if one.kind == "text" else "answers that can be enumerated"
    return _measured_difference(one, first)


def _measured_difference(one: RunSet, first: RunSet) -> str:
    """Return what measured.json says of two sets with the same target, and the settings that may be behind it."""
    for seed in sorted(one.measured.keys() & first.measured.keys()):
        other = _differ(one.measured[seed], first.measured[seed])
        if not other:
            continue
        configs = [
            {key: value for key, value in as_text(run.config).items() if key.startswith(REFERENCE_KEYS)}
            for run in (next(run for run in runs.runs if run.finished and run.seed == seed) for runs in (one, first))
        ]
        keys = differing(configs)
        values = f": {_values(keys, configs[0])}" if keys else " (measured.json)"
        return f"other {' and '.join(other)}{values}"
    datasets = ({of.get("dataset") for of in found.measured.values()} for found in (one, first))
    return "other dataset (measured.json)" if len(set.union(*datasets)) > 1 else "measured on something else"


def _title(one: RunSet) -> str:
    names = (one.target.get(key, "null") for key in ("dataset.name", "dataset.source"))  # older runs have no name
    world = next((name for name in names if name != "null"), "unknown data")
    if world == "survey":
        world = f"Survey world {one.target.get('dataset.seed', '')}".strip()
    elif one.target.get("dataset.path", "null") != "null":
        world = f"{world} {Path(one.target['dataset.path']).name}"
    return f"{world}, reward models" if one.kind == "rm" else f"{world}, reward {_reward(one)}"


def _reward(one: RunSet) -> str:
    """Return the name of the reward: of the first of several models, or of the config's block."""
    given = one.target.get("reward_model", "[]").strip("[]")
    if not given:
        return one.target.get("reward.name", "unknown")
    # Folders of several reward models can have one name.
    hashes = [str(one.measured[seed]["reward"])[:4] for seed in sorted(one.measured) if "reward" in one.measured[seed]]
    return " ".join([model_name(given.split(",")[0].strip("'\" ")), *hashes[:1]])


def _name(key: str) -> str:
    return NAMES.get(key.partition(".")[0], key.partition(".")[0])


def _values(keys: Sequence[str], values: dict[str, str]) -> str:
    texts = {key: values.get(key, EVALUATE_DEFAULTS.get(key, "null")) for key in keys[:SHOWN_KEYS]}
    shown = [f"{key}={text[:SHOWN_CHARACTERS]}" for key, text in texts.items()]
    return ", ".join(shown) + (f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else "")
