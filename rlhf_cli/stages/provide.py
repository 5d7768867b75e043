"""Finished stages: found in the store by the hash of their config, or trained on the spot and published there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rlhf_cli.config.compose import identity, own_modules
from rlhf_cli.config.schema import CommandConfig, LoraConfig, TrainRmConfig
from rlhf_cli.data import PLACE, content
from rlhf_cli.models.folders import base_folder, base_identity
from rlhf_cli.rewards.bt import Config as BtConfig
from rlhf_cli.rewards.warm import Config as WarmConfig
from rlhf_cli.stages import priors, train_rm, train_sft, warm
from rlhf_cli.stages.log import StageLog
from rlhf_cli.store import Store
from rlhf_cli.trainers.common import Log

FORMAT = 3  # raised when a stage is built differently, so that old ones are not re-used
# dataset keys that no earlier stage reads
MEASURING_ONLY = ("closed_vocabulary", "eval_prompts", "eval_samples", "pool_samples")
REWARD_ONLY = ("reward_path", "reward_start", "share_base")  # model keys that SFT does not read
LOADED = ("dtype", "chat_template")  # model keys that SFT reads of a model that is loaded, not made
JUDGING_ONLY = ("length_bias", "ranking_size")  # dataset keys that SFT does not read


def sft_identity(cfg: CommandConfig) -> dict[str, Any]:
    """Return what determines the SFT policy: model, data, optimisation, seed."""
    dataset = {key: value for key, value in dataset_identity(cfg).items() if key not in JUDGING_ONLY}
    settings = {key: value for key, value in identity(cfg.model).items() if key not in REWARD_ONLY}
    what = {"format": FORMAT, "seed": cfg.seed, "model": settings, "dataset": dataset, "sft": identity(cfg.trainer.sft)}
    if cfg.model.path is None:
        return what  # a model that is made is trained whole
    model = {key: settings[key] for key in LOADED} | {"path": base_identity(base_folder(cfg.model))}
    template = Path(cfg.model.chat_template).expanduser()
    if template.is_file():
        model["chat_template"] = template.read_text(encoding="utf-8")
    return {**what, "model": model, **_peft_identity(cfg)}


def _peft_identity(cfg: CommandConfig) -> dict[str, Any]:
    """Return the adapters that are trained, without what has gone into the learning rates; nothing without adapters."""
    if not isinstance(cfg.peft, LoraConfig):
        return {}
    return {"peft": {key: value for key, value in identity(cfg.peft).items() if key != "learning_rate_factor"}}


def dataset_identity(cfg: CommandConfig) -> dict[str, Any]:
    """Return what determines the rows that models are trained on."""
    dataset = {key: value for key, value in identity(cfg.dataset).items() if key not in MEASURING_ONLY}
    if (rows := content(cfg.dataset)) is not None:  # what they are, wherever they lie
        return {key: value for key, value in dataset.items() if key not in PLACE} | {"rows": rows}
    return dataset


def rm_identity(cfg: TrainRmConfig) -> dict[str, Any]:
    """Return what determines the reward model: the SFT policy it starts from, its loss, its optimisation."""
    reward = identity(cfg.reward, training=True)
    if "encoder" in reward:
        reward["encoder"] = priors.encoder_identity(reward["encoder"])
    own = own_modules(cfg).get("reward")
    what = {**sft_identity(cfg), "dataset": dataset_identity(cfg), "reward": reward, "rm": identity(cfg.trainer.rm)}
    what |= {"init_std": cfg.model.init_std, **_peft_identity(cfg)}
    if cfg.model.reward_path is not None or cfg.model.reward_start == "base":
        what["base"] = base_identity(base_folder(cfg.model, reward=True))
    return {**what, **({"own_module": own} if own else {})}


def sft_policy(cfg: CommandConfig, log: Log | None = None) -> Path:
    """Return the folder of the finished SFT policy of `cfg`; `log` gets its curves, live or replayed."""
    return _provide("sft", sft_identity(cfg), cfg, lambda folder, stage: train_sft.build(cfg, folder, stage), log)


def reward_model(cfg: TrainRmConfig, log: Log | None = None) -> Path:
    """Return the folder of the finished reward model of `cfg`; `log` gets its curves, live or replayed."""
    if not isinstance(cfg.reward, WarmConfig):
        return _reward_model(cfg, log)
    members = reward_members(cfg)

    def build(folder: Path, stage: StageLog) -> None:
        warm.build(cfg, sft_policy(cfg), members, folder, stage)

    return _provide("rm", rm_identity(cfg), cfg, build, log)


def reward_members(cfg: TrainRmConfig) -> list[Path]:
    """Return the folders of the members of `cfg.reward`, which is a `WarmConfig`: `bt` models of one initialisation."""
    assert isinstance(cfg.reward, WarmConfig)
    shared = {field.name: getattr(cfg.reward, field.name) for field in fields(BtConfig)}
    as_bt = replace(cfg, reward=BtConfig(**{**shared, "name": "bt"}))
    return [_reward_model(as_bt, None, member) for member in range(cfg.reward.members)]


def combined_members(cfg: TrainRmConfig) -> list[Path]:
    """Return the reward models whose predictions are averaged; empty where one model is read."""
    averaged = isinstance(cfg.reward, WarmConfig) and cfg.reward.combine == "predictions"
    return reward_members(cfg) if averaged else []


def _reward_model(cfg: TrainRmConfig, log: Log | None, member: int = 0) -> Path:
    sft = sft_policy(cfg)
    what = {**rm_identity(cfg), **({"member": member} if member else {})}  # member 0 is the reward model of this seed
    return _provide("rm", what, cfg, lambda folder, stage: train_rm.build(cfg, sft, folder, stage, member), log)


def _provide(
    stage: str,
    what: dict[str, Any],
    cfg: CommandConfig,
    build: Callable[[Path, StageLog], None],
    log: Log | None,
) -> Path:
    with Store(Path(cfg.store_dir)).building_together(stage, what) as building:
        if building.ready:
            if log is not None:
                StageLog(building.path).replay(log)
            return building.path
        build(building.path, StageLog(building.path, log))
        shutil.rmtree(building.path / "checkpoints", ignore_errors=True)
        return building.publish()
