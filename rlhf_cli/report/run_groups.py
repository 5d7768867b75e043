"""Runs and what they have in common: settings, groups of one setting and several seeds, the reference they start at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Kind = Literal["exact", "text", "rm"]

REFERENCE = "sft"
OTHER_REFERENCE = "reference "  # one that the config does not train, by its name
# Row order: from the policy everything starts at to the methods built on the baselines; others follow by name.
ORDER = (REFERENCE, "kl_ppo", "pm", "dpm", "dpo", "rpo", "bt")
# What cannot change a result: places, hardware, tracking, cadence of logs. Any other key separates runs into rows.
# So are the judges: what a policy is judged by makes a set (run_sets.py), and no other policy.
IGNORED = {"seed", "run_dir", "store_dir", "device", "tracker", "policy", "stage", "reward_model", "reference", "judge"}
IGNORED_LEAVES = {"log_every_steps", "save_every_steps", "eval_every_steps"}
IGNORED_LEAVES |= {"engine", "mode", "server_url", "gpu_memory_utilization", "tensor_parallel"}  # generation.name tells
# The part of a config that makes the reference policy and the target it is measured against.
REFERENCE_KEYS = ("model.", "dataset.", "reward.", "generation.", "trainer.sft.", "trainer.rm.")
# Only `rlhf evaluate` has these; a run without them was measured as if they had these values.
EVALUATE_DEFAULTS = {
    "checkpoint": "last",
    "reference": "null",
    "reward_model": "[]",
    "sampler.temperature": "1.0",
    "sampler.top_p": "1.0",
}
INTERVAL_ENDS = ("/lo", "/hi", "/n")
# The target of an algorithm: the reference has none of its own.
OF_ALGORITHM = ("optimum/", "pm_beta/")
MODEL_FOLDERS = ("model", "best")


@dataclass(frozen=True)
class Run:
    """A run, read from its folder: whose it is, resolved config, flat metrics, and what else was measured.

    `algorithm` is the policy's name, or a reward model's. `state` and `reason` are those of status.json; a run that is
    not finished has no metrics. `ended` is the time of its end (ISO 8601), `measured` what measured.json says it was
    measured on, `pairs` the histograms of pairs.json.
    """

    path: Path
    algorithm: str
    config: dict[str, Any]
    metrics: dict[str, float]
    distributions: list[dict[str, Any]]
    log: list[dict[str, Any]]
    state: str = "finished"
    reason: str = ""
    ended: str = ""
    measured: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    @property
    def is_reference(self) -> bool:
        """Return whether it measured the reference itself, not a policy beside it."""
        of_sft = self.algorithm == REFERENCE and not self.config.get("reference")
        return of_sft or self.algorithm.startswith(OTHER_REFERENCE)

    @property
    def kind(self) -> Kind:
        """Return what the run measured: a policy on enumerable answers or on text, or a reward model."""
        if "algo" not in self.config or self.config.get("stage") == "rm":
            return "rm"
        return "exact" if "pm/tv" in self.metrics and "pool/size" not in self.metrics else "text"


def flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf of a nested config."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_text(config: dict[str, Any]) -> dict[str, str]:
    """Return dotted key to value as text, without what `rlhf evaluate` adds and leaves as it is by default."""
    found = {key: "null" if value is None else str(value) for key, value in flatten(config)}
    return {key: value for key, value in found.items() if value != EVALUATE_DEFAULTS.get(key)}


def settings(run: Run) -> dict[str, str]:
    """Return what makes a run's row, as text: its config without seed, places and logging."""
    shown = {key: value for key, value in run.config.items() if key not in IGNORED}
    found = {}
    for key, value in as_text(shown).items():
        of_reference = not (run.is_reference or run.algorithm == REFERENCE) or key.startswith(REFERENCE_KEYS)
        if key.rsplit(".", 1)[-1] not in IGNORED_LEAVES and of_reference:
            found[key] = value
    # Of a model that no run here made, the place is all that is known.
    if run.kind != "rm" and not run.is_reference and run.algorithm not in (REFERENCE, run.config["algo"]["name"]):
        found["policy"] = str(run.config.get("policy"))
    return found


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return runs by display name: the algorithm, plus the settings by which several groups of it differ.

    Runs that differ only in their seed (or in places and logging) share a name. Names come in a fixed order.
    """
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.algorithm, tuple(sorted(settings(run).items()))), []).append(run)
    named: dict[str, list[Run]] = {}
    for algorithm in sorted({name for name, _ in groups}, key=lambda name: (_position(name), name)):
        variants = [dict(values) for name, values in groups if name == algorithm]
        members = [group for (name, _), group in groups.items() if name == algorithm]
        labelled = zip((_label(variant, variants) for variant in variants), members, strict=True)
        for label, group in sorted(labelled, key=lambda pair: pair[0]):
            named[f"{algorithm} {label}".strip()] = sorted(group, key=lambda run: run.seed)
    return named


def differing(variants: Sequence[dict[str, str]]) -> list[str]:
    """Return the keys whose values tell the variants apart; a block's name stands for the values it brings."""
    keys = sorted({key for variant in variants for key in variant})
    found = [key for key in keys if len({variant.get(key) for variant in variants}) > 1]
    if "dataset.name" in found and "dataset.source" in found:  # its loader says nothing more
        found.remove("dataset.source")
    named = {key.rsplit(".", 1)[0] for key in found if key.endswith((".name", ".source"))}
    short = [key for key in found if key.rsplit(".", 1)[0] not in named or key.endswith((".name", ".source"))]
    # Unless other values of the block were changed too.
    return short if _told_apart(short, variants) == _told_apart(found, variants) else found


def latest_of_each_seed(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Return (kept, left out): of finished runs of a set with the same settings and seed, the one that ended last.

    The same seed twice is one draw, so it must not count as two. An evaluation has no log of its training: it takes
    that of the run it replaces. What only the earlier one measured is kept where both measured one policy.
    """
    latest: dict[tuple[str, int, str], Run] = {}
    left_out: list[Run] = []
    for run in sorted((run for run in runs if run.finished), key=lambda run: run.ended):
        key = (run.algorithm, run.seed, str(sorted(settings(run).items())))
        before = latest.get(key)
        if before is not None:
            left_out.append(next(other for other in runs if other.path == before.path))
            run = _merged(before, run) if _policy(before) == _policy(run) else run
            run = run if run.log else replace(run, log=before.log)
        latest[key] = run
    places = {run.path: run for run in latest.values()}
    return [places.get(run.path, run) for run in runs if not run.finished or run.path in places], left_out


def reference_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the reference policies the runs were measured beside, each once per seed and setting, as runs."""
    found: dict[tuple[str, int], Run] = {}
    finished = [run for run in runs if run.finished]
    for run in sorted(finished, key=lambda run: (not run.is_reference, bool(run.config.get("reference")))):
        metrics, name = run.metrics, run.algorithm
        if not run.is_reference:
            metrics = {key[len("reference/") :]: v for key, v in run.metrics.items() if key.startswith("reference/")}
            given = run.config.get("reference")
            name = f"{OTHER_REFERENCE}{model_name(str(given))}" if given else REFERENCE
        metrics = {key: value for key, value in metrics.items() if not key.startswith(OF_ALGORITHM)}
        reference = Run(run.path, name, run.config, metrics, run.distributions, [], ended=run.ended)
        reference = replace(reference, measured=run.measured)
        if metrics:
            found.setdefault((str(sorted(settings(reference).items())), run.seed), reference)
    return list(found.values())


def model_name(path: str) -> str:
    """Return the name of a model folder: of its run where it is the model inside one."""
    place = Path(path)
    return place.absolute().parent.name if place.name in MODEL_FOLDERS else place.name


def _policy(run: Run) -> str:
    """Return the place of the policy that a run trained or measured."""
    if "policy" not in run.config:
        return str(run.path.resolve())
    given = run.config["policy"]
    if not given:
        return REFERENCE
    place = Path(given).resolve()
    return str(place.parent if place.name == "model" else place)


def _merged(before: Run, run: Run) -> Run:
    """Return a later measurement of a policy with what only an earlier one has."""

    def stale(key: str) -> bool:
        end = next((end for end in INTERVAL_ENDS if key.endswith(end)), "")
        return key.removesuffix(end) in run.metrics

    metrics = {key: value for key, value in before.metrics.items() if not stale(key)}
    return replace(
        run,
        metrics={**metrics, **run.metrics},
        distributions=run.distributions or before.distributions,
        pairs=run.pairs or before.pairs,
    )


def _position(algorithm: str) -> int:
    return ORDER.index(algorithm) if algorithm in ORDER else len(ORDER)


def _label(variant: dict[str, str], variants: Sequence[dict[str, str]]) -> str:
    """Return the settings of one variant that tell it from the others, e.g. "alpha=0.1 beta=0.5"."""
    words = (
        f"{key.removeprefix('algo.').removesuffix('.name')}={variant.get(key, EVALUATE_DEFAULTS.get(key, 'null'))}"
        for key in differing(variants)
    )
    return " ".join(words)


def _told_apart(keys: Sequence[str], variants: Sequence[dict[str, str]]) -> int:
    return len({tuple(variant.get(key) for key in keys) for variant in variants})
