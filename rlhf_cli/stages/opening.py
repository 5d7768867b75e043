"""How a stage opens models: number format and device, whole or with an adapter, from which base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.config.schema import AlignConfig, CommandConfig, LoraConfig, TrainRmConfig
from rlhf_cli.models.adapters import with_adapter
from rlhf_cli.models.classifier import require_classifier
from rlhf_cli.models.folders import base_folder
from rlhf_cli.models.loading import Loading, loading
from rlhf_cli.models.quantisation import keep_trainable, quantised
from rlhf_cli.models.sharding import shard
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.trainers.common import Computing, resolve_device


def frozen(cfg: CommandConfig) -> Loading:
    """Return how models are opened that are only read."""
    return loading(cfg.model, resolve_device(cfg.device))


def trained(cfg: CommandConfig) -> Loading:
    """Return how a model is opened that is to be trained: in float32, but the base of an adapter as frozen ones are."""
    how = replace(frozen(cfg), ready=False)
    return quantised(how, cfg.peft) if isinstance(cfg.peft, LoraConfig) else how.trained()


def adapted(cfg: CommandConfig, model: Any, base: Path) -> Any:
    """Return a model opened as `trained` says: with an adapter around it, or as it is where all weights are trained."""
    if isinstance(cfg.peft, LoraConfig):
        model = with_adapter(keep_trainable(model), cfg.peft, base=base)
    return split(cfg, model)


def split(cfg: CommandConfig, model: Any) -> Any:
    """Return a model opened as `trained` says, its weights split over ranks where they are to be."""
    how = trained(cfg)
    return shard(model, how.device, frozen(cfg).dtype) if how.split else model


def computing(cfg: CommandConfig) -> Computing:
    """Return how trainers compute: in the number format of frozen models."""
    how = frozen(cfg)
    bf16 = how.dtype is torch.bfloat16
    return Computing(how.device, bf16=bf16, gradient_checkpointing=cfg.model.gradient_checkpointing)


def check_bases(cfg: TrainRmConfig) -> None:
    """Refuse a base that reward model or critic cannot start from; asked before the first stage is trained.

    Raises:
        RunError: its family has no classifier, or it brings no tokenizer that can be used.
    """
    gold = cfg.reward.name == "gold"
    critic = isinstance(cfg, AlignConfig) and getattr(cfg.algo, "advantage", None) == "gae"
    given = cfg.model.path if gold else cfg.model.reward_path or cfg.model.path
    if given is None or (gold and not critic):
        return
    base = base_folder(cfg.model, reward=not gold)
    load_tokenizer(base, chat_template=cfg.model.chat_template)
    require_classifier(base)


def reward_start(cfg: CommandConfig, sft: Path) -> Path:
    """Return the folder of the model that the reward model starts from: the SFT policy, or a base.

    Raises:
        RunError: the base is not within reach.
    """
    if cfg.model.reward_path is None and cfg.model.reward_start == "sft":
        return sft / "model"
    return base_folder(cfg.model, reward=True)
