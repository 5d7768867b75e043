"""A tiny policy, reward model and critic with adapters, in models of their own or on one base, and their training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import BOS, PAD, TOKENIZER, tiny_policy

from rlhf_cli import algos
from rlhf_cli.algos.pm import Config as PmConfig
from rlhf_cli.config.schema import GenerationConfig, LoraConfig, OnlineTraining, Prior
from rlhf_cli.models.adapters import WithoutAdapter, open_adapter, save_model, with_adapter
from rlhf_cli.models.policy import freeze, load_policy
from rlhf_cli.models.reward import Critic, load_reward_model, new_reward_model, sequence_scores
from rlhf_cli.models.shared_base import SharedBase
from rlhf_cli.models.tokens import collate
from rlhf_cli.trainers.common import Computing
from rlhf_cli.trainers.online import OnlineTrainer, online_trainer
from rlhf_cli.trainers.parts import OnlineParts

LORA = LoraConfig(name="lora", rank=4, alpha=8, targets=["all-linear"], learning_rate_factor=1)
PROMPTS = [{"prompt": word, "prompt_ids": [BOS, number]} for number, word in enumerate("abcd", start=4)]


def disturb(model: Any, seed: int, std: float = 0.3) -> None:
    """Give the adapter of a model, whose second factor starts at zero, something to say."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(std * torch.randn(weight.shape, generator=draws))


def adapted_policy(folder: Path, peft: LoraConfig = LORA) -> Any:
    """Return the policy that is (or will be) in `folder`, with a fresh adapter."""
    if not folder.exists():
        tiny_policy().save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
    torch.manual_seed(7)
    return with_adapter(load_policy(folder), peft, base=folder)


def reward_adapter(base: Path, folder: Path, peft: LoraConfig = LORA) -> Any:
    """Return a reward model with an adapter on `base`, as it was written to `folder`."""
    torch.manual_seed(8)
    model = with_adapter(new_reward_model(base, init_std=0.5), peft, base=base)
    disturb(model, seed=9)
    save_model(model, folder)
    TOKENIZER.save_pretrained(folder)
    return model


@dataclass
class Trained:
    """A trainer and what it is made of."""

    trainer: OnlineTrainer
    policy: Any
    shared: SharedBase | None
    reward_model: Any
    critic: Any


def trained_roles(
    places: Path,
    folder: Path,
    *,
    shared: bool,
    advantage: str = "gae",
    steps: int = 4,
    micro: int | None = None,
    generation: GenerationConfig | None = None,
    **computing: Any,
) -> Trained:
    """Return a trainer of pm on four prompts; `places` holds base/ and rm/, and is filled if it does not."""
    policy = adapted_policy(places / "base")
    if not (places / "rm").exists():
        reward_adapter(places / "base", places / "rm")
    common = SharedBase(policy, places / "base") if shared else None
    critic: Any = None
    if common is not None:
        reward_model: Any = common.reward_model(places / "rm")
        critic = common.critic_like(reward_model) if advantage == "gae" else None
    else:
        reward_model = freeze(load_reward_model(places / "rm"))
        base = new_reward_model(places / "base", init_std=0.5)
        critic = open_adapter(base, places / "rm", trainable=True).get_base_model() if advantage == "gae" else None

    @torch.no_grad()
    def reward(prompts: Any, responses: Any) -> torch.Tensor:
        return sequence_scores(reward_model, collate(prompts, responses, PAD))

    algo = PmConfig(
        name="pm", beta=0.1, constraint=Prior("none"), advantage=advantage, gamma=1.0, lam=0.95, clip_range=0.2,
        value_clip_range=0.2, missing_eos_penalty=None, whiten_advantages=False, ppo_epochs=1, minibatches=2,
        num_generations=4, beta_schedule="fixed", cost_target=1.0, cost_horizon=100, alpha=0.1,
    )  # fmt: skip
    parts = OnlineParts(
        algorithm=algos.get("pm"), algo=algo, reward=reward, reward_clip=5.0, reference=WithoutAdapter(policy),
        critic=None if critic is None else Critic(critic),
        generation=generation or GenerationConfig(name="default", engine="lean", temperature=1.0, top_p=1.0), tree=None,
    )  # fmt: skip
    block = OnlineTraining(
        max_steps=steps, epochs=None, batch_size=8, micro_batch_size=micro, learning_rate=5e-3, lr_scheduler="linear",
        warmup_fraction=0.0, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=0.5, log_every_steps=1,
        save_every_steps=2, eval_every_steps=100, critic_learning_rate=1e-2,
    )  # fmt: skip
    trainer = online_trainer(
        parts, policy, TOKENIZER, PROMPTS, block, max_completion_tokens=5, folder=folder, seed=0,
        computing=Computing("cpu", **computing),
    )  # fmt: skip
    return Trained(trainer, policy, common, reward_model, critic)


def curve(trainer: OnlineTrainer) -> list[dict[str, float]]:
    """Return what was logged at every step, without times."""
    skipped = ("epoch", "runtime", "per_second", "flos", "step_time", "num_tokens")
    return [
        {key: value for key, value in line.items() if not any(word in key for word in skipped)}
        for line in trainer.state.log_history
        if "loss" in line
    ]
