"""An on-policy trainer around any policy, for what samples its rollouts; it is not meant to learn anything."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from rlhf_cli import algos
from rlhf_cli.algos.pm import Config as PmConfig
from rlhf_cli.config import schema
from rlhf_cli.config.compose import load
from rlhf_cli.config.schema import AlignConfig, OnlineTraining, Prior
from rlhf_cli.models.logps import frozen_token_logps
from rlhf_cli.models.tokens import collate
from rlhf_cli.trainers.common import Computing
from rlhf_cli.trainers.online import OnlineTrainer, online_trainer
from rlhf_cli.trainers.parts import OnlineParts


@cache
def engine(name: str, **changes: Any) -> schema.GenerationConfig:
    """Return the shipped settings of generation=NAME, some of them changed."""
    cfg = load("align", [f"generation={name}", *(f"generation.{key}={value}" for key, value in changes.items())])
    assert isinstance(cfg, AlignConfig)
    return cfg.generation


def engine_trainer(
    policy: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    generation: schema.GenerationConfig,
    folder: Path,
    *,
    max_completion_tokens: int,
    reference: Any = None,
    steps: int = 2,
    seed: int = 0,
    **computing: Any,
) -> OnlineTrainer:
    """Return a trainer of pm without critic whose reward is minus the length."""

    def reward(asked: Any, given: Any) -> torch.Tensor:
        return -torch.tensor([float(len(ids)) for ids in given])

    algo = PmConfig(
        name="pm", beta=0.1, constraint=Prior("none"), advantage="rloo", gamma=1.0, lam=0.95, clip_range=0.2,
        value_clip_range=0.2, missing_eos_penalty=None, whiten_advantages=False, ppo_epochs=1, minibatches=1,
        num_generations=4, beta_schedule="fixed", cost_target=1.0, cost_horizon=100, alpha=0.1,
    )  # fmt: skip
    parts = OnlineParts(
        algorithm=algos.get("pm"), algo=algo, reward=reward, reward_clip=5.0, critic=None, generation=generation,
        reference=policy if reference is None else reference, tree=None,
    )  # fmt: skip
    block = OnlineTraining(
        max_steps=steps, epochs=None, batch_size=8, micro_batch_size=None, learning_rate=5e-3, lr_scheduler="constant",
        warmup_fraction=0.0, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=0.5, log_every_steps=1,
        save_every_steps=1, eval_every_steps=100, critic_learning_rate=1e-2,
    )  # fmt: skip
    rows = [{"prompt": str(number), "prompt_ids": ids} for number, ids in enumerate(prompts)]
    return online_trainer(
        parts, policy, tokenizer, rows, block, max_completion_tokens=max_completion_tokens, folder=folder, seed=seed,
        computing=Computing("cpu", **computing),
    )  # fmt: skip


def drawn(trainer: OnlineTrainer, prompts: list[list[int]], *, times: int = 1) -> list[list[int]]:
    """Return a response for each prompt as each of the next `times` updates would draw it."""
    found: list[list[int]] = []
    for _ in range(times):
        found += trainer._generate_single_turn(prompts, None, {})
        trainer.state.global_step += 1
    return found


def read(
    trainer: OnlineTrainer, prompts: list[list[int]], responses: list[list[int]], temperature: float
) -> list[torch.Tensor]:
    """Return training's log-probs of each response's tokens."""
    batch = collate(prompts, responses, trainer._tokenizer.pad_token_id)
    rows = frozen_token_logps(trainer.model, batch, temperature=temperature, tree=None)
    return [row[: len(ids)] for row, ids in zip(rows, responses, strict=True)]
