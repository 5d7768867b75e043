"""The models that an alignment holds in memory: policy, reference, reward and critic, each on a base or all on one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema import AlignConfig, LoraConfig
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.models.adapters import (
    WithoutAdapter,
    adapter_base,
    is_adapter,
    open_adapter,
    plain,
    recompute_activations,
    trained_size,
)
from rlhf_cli.models.folders import has_tokenizer
from rlhf_cli.models.policy import freeze, load_policy, load_tokenizer
from rlhf_cli.models.quantisation import keep_trainable
from rlhf_cli.models.reward import Critic, Reward, load_reward_model, new_reward_model
from rlhf_cli.models.shared_base import RoleModel, SharedBase
from rlhf_cli.run import seed_everything
from rlhf_cli.stages.opening import adapted, frozen, split, trained
from rlhf_cli.stages.reward_reading import model_reward, read_reward
from rlhf_cli.stages.roles import REWARD, Roles
from rlhf_cli.stages.session import say
from rlhf_cli.trainers.common import resolve_device


@dataclass(frozen=True)
class RoleModels:
    """What is in memory besides the critic.

    Args:
        reference: frozen, or the policy without its adapter.
        reward: centred rewards of token ids.
        policy: to be trained; None where nothing is.
        shared: the base that all roles are adapters on, or None.
        shared_reward: the reward model on it, or None.
    """

    reference: Any
    reward: Reward
    policy: Any = None
    shared: SharedBase | None = None
    shared_reward: RoleModel | None = None


def read_models(cfg: AlignConfig, roles: Roles, data: PreferenceData, tokenizer: Any) -> RoleModels:
    """Return reference and reward, where nothing is trained."""
    reference = freeze(load_policy(roles.reference, how=frozen(cfg)))
    return RoleModels(reference, read_reward(cfg, data, tokenizer, roles.rewards, resolve_device(cfg.device)))


def training_models(cfg: AlignConfig, roles: Roles, data: PreferenceData, tokenizer: Any) -> RoleModels:
    """Return policy, reference and reward for training the policy.

    With adapters no second copy of the policy's base is made: without its adapter it is the reference.

    Raises:
        RunError: model.share_base is true and the reward model is no adapter on the policy's base.
    """
    policy = load_policy(roles.reference, how=trained(cfg))
    if not isinstance(cfg.peft, LoraConfig):
        policy = split(cfg, policy)
        found = read_models(cfg, roles, data, tokenizer)
        return RoleModels(found.reference, found.reward, policy)
    seed_everything(cfg.seed)  # the adapter's weights are drawn
    policy = adapted(cfg, policy, roles.reference)
    count, share = trained_size(policy)
    say(f"policy: adapter of {count:,} parameters ({share:.2%}) on the reference")
    shared = SharedBase(policy, roles.reference) if cfg.model.share_base else None
    if shared is not None and roles.rewards:
        (folder,) = roles.rewards  # rules.py has refused reward models that are several, or averaged
        reward_model, device = shared.reward_model(folder), resolve_device(cfg.device)
        reward = model_reward(cfg, data, tokenizer, folder, device, model=reward_model)
        return RoleModels(WithoutAdapter(policy), reward, policy, shared, reward_model)
    reward = read_reward(cfg, data, tokenizer, roles.rewards, resolve_device(cfg.device))
    return RoleModels(WithoutAdapter(policy), reward, policy, shared)


def critic_model(cfg: AlignConfig, roles: Roles, models: RoleModels, tokenizer: Any) -> Critic:
    """Return a critic that starts as a copy of the reward model.

    With gold rewards, and where the reward model reads other tokens than the policy, it starts from the policy's base
    with a fresh head.
    """
    if models.shared is not None:
        return Critic(
            models.shared.fresh_critic(init_std=cfg.model.init_std)
            if models.shared_reward is None
            else models.shared.critic_like(models.shared_reward)
        )
    model = plain(_critic_body(cfg, roles, tokenizer))
    if cfg.model.gradient_checkpointing:
        recompute_activations(model)
    return Critic(model)


def _critic_body(cfg: AlignConfig, roles: Roles, tokenizer: Any) -> Any:
    stage = roles.stages.get(REWARD)
    source = None if stage is None else stage / "model"
    if source is not None and not _same_tokens(source, tokenizer):
        say(f"critic: starts from the SFT policy, because the reward model in {source} reads other tokens")
        source = None
    if source is None:
        return adapted(
            cfg, new_reward_model(roles.reference, init_std=cfg.model.init_std, how=trained(cfg)), roles.reference
        )
    if not is_adapter(source):
        return adapted(cfg, load_reward_model(source, how=trained(cfg)), source)
    base = keep_trainable(new_reward_model(adapter_base(source), init_std=cfg.model.init_std, how=trained(cfg)))
    return split(cfg, open_adapter(base, source, trainable=True))


def _same_tokens(source: Path, tokenizer: Any) -> bool:
    own = load_tokenizer(source, training=False) if has_tokenizer(source) else tokenizer
    return bool(own.get_vocab() == tokenizer.get_vocab())
