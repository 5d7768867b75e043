"""Who takes part when a policy is measured: its reference, the reward, further reward models as judges."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from rlhf_cli.config.compose import identity
from rlhf_cli.config.schema import AlignConfig, EvaluateConfig
from rlhf_cli.data import content
from rlhf_cli.errors import RunError
from rlhf_cli.models.folders import has_model, is_reward_model, model_folder
from rlhf_cli.stages import provide
from rlhf_cli.store import read_json

OF_SEED = re.compile(r"(^|[-,])seed=?\d+(-[0-9a-f]{8})?")  # of a run's name: judges of several seeds are one judge
REFERENCE, REWARD = "reference policy", "reward model"  # names in stages.json
STAGES_FILE = "stages.json"


@dataclass(frozen=True)
class Roles:
    """Model folders by what they do.

    Args:
        reference: the policy that others are measured beside.
        rewards: the reward models whose mean is the reward; empty: the gold reward.
        judges: further reward models by label.
        stages: what to announce, by name; a stage of the store brings its metrics.
    """

    reference: Path
    rewards: tuple[Path, ...] = ()
    judges: dict[str, Path] = field(default_factory=dict)
    stages: dict[str, Path] = field(default_factory=dict)


def of_config(cfg: AlignConfig) -> Roles:
    """Return the SFT policy and the reward of `cfg`; what is missing in the store is trained."""
    sft = provide.sft_policy(cfg)
    if cfg.reward.name == "gold":
        return Roles(sft / "model", stages={REFERENCE: sft})
    rm = provide.reward_model(cfg)
    members = {f"{REWARD} {number}": folder for number, folder in enumerate(provide.combined_members(cfg))}
    stages = {REFERENCE: sft, **members, REWARD: rm}
    return Roles(sft / "model", _rewards(stages), stages=stages)


def _rewards(stages: dict[str, Path]) -> tuple[Path, ...]:
    """Return the models whose mean is the reward: the members, where predictions are averaged, or the one model."""
    members = [folder for name, folder in stages.items() if name.startswith(f"{REWARD} ")]
    return tuple(folder / "model" for folder in members or [stages[REWARD]])


def of_evaluation(cfg: EvaluateConfig) -> Roles:
    """Return the models that `cfg` names, and those of its config for what it does not name.

    On other data than a run was aligned with, its own reference and reward model are used, not new ones.

    Raises:
        RunError: a name is no folder and no model within reach, or the folder holds the wrong kind of model.
    """
    recorded = _recorded(cfg)
    named = [reward_folder(name) for name in cfg.reward_model]
    if cfg.reference is not None:
        reference = policy_in("reference", cfg.reference)
        stages = {REFERENCE: reference}
    elif recorded:
        stages = {REFERENCE: _there(recorded[REFERENCE], REFERENCE, cfg)}
        reference = stages[REFERENCE] / "model"
    elif named or cfg.reward.name == "gold":
        sft = provide.sft_policy(cfg)
        reference, stages = sft / "model", {REFERENCE: sft}
    else:
        return of_config(cfg)
    if named:
        rewards: tuple[Path, ...] = (named[0],)
        stages[REWARD] = named[0]
    elif cfg.reward.name == "gold":
        rewards = ()
    elif REWARD in recorded:
        stages |= {name: _there(path, name, cfg) for name, path in recorded.items() if name.startswith(REWARD)}
        rewards = _rewards(stages)
    else:
        own = of_config(cfg)
        rewards, stages = own.rewards, {**own.stages, **stages}
    judges = dict(zip(labels(cfg.reward_model[1:]), named[1:], strict=True))
    return Roles(reference, rewards, judges, {**stages, **{f"judge {name}": path for name, path in judges.items()}})


def policy_in(key: str, given: str, checkpoint: str = "last") -> Path:
    """Return the model folder of a policy: of a run folder, or the folder itself, or the Hub's.

    Raises:
        RunError: there is none, it holds no model, or it holds a reward model.
    """
    folder = model_folder(key, given)
    name = "model" if checkpoint == "last" else "best"
    for place in (folder / name, folder):
        if has_model(place):
            if is_reward_model(place):
                raise RunError(
                    f"{key}={place} holds a reward model, not a policy",
                    "",
                    "give a policy, or judge a reward model with stage=rm policy=RUN_DIR, its run folder",
                )
            return place
    raise RunError(
        f"{key}={given} holds no model", f"neither {name}/config.json nor config.json is there",
        "give a finished run folder or a Hugging Face model folder",
    )  # fmt: skip


def reward_folder(given: str) -> Path:
    """Return the folder of a reward model: of a run that trained it or was aligned to it, itself, or the Hub's.

    Raises:
        RunError: there is none, or it holds another kind of model: its head would be made up.
    """
    folder = model_folder("reward_model", given)
    aligned = (read_json(folder / STAGES_FILE) or {}).get(REWARD)
    places = [folder / "model", folder, *([Path(aligned) / "model", Path(aligned)] if aligned else [])]
    found = next((place for place in places if is_reward_model(place)), None)
    if found is None:
        raise RunError(
            f"reward_model={given} holds no reward model",
            f"it was aligned to {aligned}, which is not there"
            if aligned
            else "no config.json there names a model for sequence classification",
            "give a run of rlhf train-rm, a run that was aligned to one, or a reward model in Hugging Face layout",
        )
    return found


def labels(names: Sequence[str]) -> list[str]:
    """Return a short, distinct label of each reward model, for the metric keys by/LABEL/…."""
    found: list[str] = []
    for name in names:
        path = Path(os.path.abspath(Path(name).expanduser()))  # what "." is called
        last = path.parent.name if path.name in ("model", "best") else path.name
        label = re.sub(r"[^\w.-]+", "-", OF_SEED.sub("", last)).strip("-") or "judge"
        candidates = (label if number == 1 else f"{label}-{number}" for number in count(1))
        found.append(next(candidate for candidate in candidates if candidate not in found))
    return found


def _recorded(cfg: EvaluateConfig) -> dict[str, Path]:
    """Return reference and reward models of the run that `cfg.policy` names, if it was aligned on other data."""
    stages = read_json(Path(cfg.policy) / STAGES_FILE) if cfg.policy else None
    return {name: Path(folder) for name, folder in stages.items()} if stages and _other_data(cfg) else {}


def _there(folder: Path, name: str, cfg: EvaluateConfig) -> Path:
    """Return the folder of a stage that the policy's run has recorded.

    Raises:
        RunError: the stage is not where the run left it.
    """
    if (folder / "model").is_dir():
        return folder
    key = "reference" if name == REFERENCE else "reward_model"
    raise RunError(
        f"the {name} of policy={cfg.policy} is not in {folder}",
        "the run was aligned on other data, so it cannot be trained again from this config",
        f"name it: {key}=FOLDER",
    )


def _other_data(cfg: EvaluateConfig) -> bool:
    """Return whether the run that `cfg.policy` names was aligned on other data than `cfg.dataset`, wherever it lies."""
    before: dict[str, Any] = (read_json(Path(str(cfg.policy)) / "manifest.json") or {}).get("identity", {})
    if "dataset" not in before:
        return False
    skipped = {*provide.MEASURING_ONLY, "path"}
    now = {key: value for key, value in identity(cfg.dataset).items() if key not in skipped}
    changed = any(before["dataset"].get(key) != value for key, value in now.items())
    return changed or before.get("data") != content(cfg.dataset)
