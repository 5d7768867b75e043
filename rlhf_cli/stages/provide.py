"""Finished stages: found in the store by the hash of their config, or trained on the spot and published there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_cli.config.compose import identity
from rlhf_cli.config.schema import CommandConfig, TrainRmConfig
from rlhf_cli.data import content
from rlhf_cli.stages import train_rm, train_sft
from rlhf_cli.stages.log import StageLog
from rlhf_cli.store import Store
from rlhf_cli.trainers.common import Log

FORMAT = 1  # raised when a stage is built differently, so that old ones are not re-used
MEASURING_ONLY = ("closed_vocabulary", "eval_prompts", "eval_samples")  # dataset keys that no earlier stage reads


def sft_identity(cfg: CommandConfig) -> dict[str, Any]:
    """Return what determines the SFT policy: model, data, optimisation, seed."""
    dataset = {key: value for key, value in identity(cfg.dataset).items() if key not in MEASURING_ONLY}
    if "path" in dataset:
        dataset["path"] = content(cfg.dataset)  # what the file holds, wherever it lies
    return {
        "format": FORMAT,
        "seed": cfg.seed,
        "model": identity(cfg.model),
        "dataset": dataset,
        "sft": identity(cfg.trainer.sft),
    }


def rm_identity(cfg: TrainRmConfig) -> dict[str, Any]:
    """Return what determines the reward model: the SFT policy it starts from, its loss, its optimisation."""
    reward = {key: value for key, value in identity(cfg.reward).items() if key != "clip"}
    return {**sft_identity(cfg), "reward": reward, "rm": identity(cfg.trainer.rm)}


def sft_policy(cfg: CommandConfig, log: Log | None = None) -> Path:
    """Return the folder of the finished SFT policy of `cfg`; `log` gets its curves, live or replayed."""
    return _provide("sft", sft_identity(cfg), cfg, lambda folder, stage: train_sft.build(cfg, folder, stage), log)


def reward_model(cfg: TrainRmConfig, log: Log | None = None) -> Path:
    """Return the folder of the finished reward model of `cfg`; `log` gets its curves, live or replayed."""
    sft = sft_policy(cfg)
    return _provide("rm", rm_identity(cfg), cfg, lambda folder, stage: train_rm.build(cfg, sft, folder, stage), log)


def _provide(
    stage: str,
    what: dict[str, Any],
    cfg: CommandConfig,
    build: Callable[[Path, StageLog], None],
    log: Log | None,
) -> Path:
    with Store(Path(cfg.store_dir)).building(stage, what) as building:
        if building.ready:
            if log is not None:
                StageLog(building.path).replay(log)
            return building.path
        build(building.path, StageLog(building.path, log))
        shutil.rmtree(building.path / "checkpoints", ignore_errors=True)
        return building.publish()
