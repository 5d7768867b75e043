"""The memory that a command is going to need, printed before any weights are read, beside what the device has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import yaml
from transformers import AutoConfig, OPTConfig

from rlhf_cli import ranks
from rlhf_cli.config.catalog import conf_dir
from rlhf_cli.config.schema import (
    AlignConfig,
    CommandConfig,
    LoraConfig,
    MadeModelConfig,
    OnlineAlgoConfig,
    QLoraConfig,
    TrainRmConfig,
)
from rlhf_cli.errors import UserError
from rlhf_cli.models.batches import free_memory, total_memory
from rlhf_cli.models.dry_run import Holding
from rlhf_cli.models.memory import EIGHT_BITS, FOUR_BITS, FOUR_BITS_DOUBLE, Estimate, Plan, estimate
from rlhf_cli.models.shapes import Adapters, ModelShape
from rlhf_cli.rewards.warm import Config as WarmConfig
from rlhf_cli.stages.opening import frozen
from rlhf_cli.stages.session import say
from rlhf_cli.store import Store

GB = 1e9
WORTH = 0.95  # a remedy is named if it takes the peak below this share of itself
SHOWN = 0.01  # a part of a phase is named from this share of it


def announce(cfg: CommandConfig) -> None:
    """Print what the stages of `cfg` that are not in the store take at their peak, and a watch out if it is too much.

    Raises:
        RunError: a model is not within reach, or a target of the adapters matches nothing.
    """
    stages = stages_needed(cfg)
    if not stages:
        return
    try:
        lines = report(cfg, stages)
    except UserError:
        raise
    except Exception as error:  # architectures have their own ways to fail, and a guess must not stop a run
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        lines = [f"memory: no estimate for this model ({reason})"]
    for line in lines:
        say(line)


def stages_needed(cfg: CommandConfig) -> list[str]:
    """Return the stages that the command will train: those not in the store, and align's own."""
    from rlhf_cli.stages import provide  # which imports the stages that announce

    found, store = [], Store(Path(cfg.store_dir))

    def missing(stage: str) -> bool:
        if not (store.root / stage).is_dir():  # its identity would fetch the model
            return True
        what = (
            provide.sft_identity(cfg)
            if stage == "sft" or not isinstance(cfg, TrainRmConfig)
            else provide.rm_identity(cfg)
        )
        return store.find(stage, what) is None

    if cfg.trainer.sft.max_steps != 0 and missing("sft"):
        found.append("sft")
    if isinstance(cfg, TrainRmConfig) and cfg.reward.name != "gold" and missing("rm"):
        found.append("rm")
    if isinstance(cfg, AlignConfig):
        found.append("online" if isinstance(cfg.algo, OnlineAlgoConfig) else "pairwise")
    return found


def report(cfg: CommandConfig, stages: list[str]) -> list[str]:
    """Return the lines that are printed for `stages`: one where the model is made here, else a table of the largest."""
    device = frozen(cfg).device
    policy, reward = shapes(cfg)
    found = {stage: _estimate(plan_of(cfg, stage), policy, reward) for stage in stages}
    largest = max(found.values(), key=lambda one: one.total)
    free = free_memory(device)
    fits = largest.total <= free
    if cfg.model.path is None and fits:
        return [f"memory: about {_gb(largest.total)} GB of {_gb(free)} GB free"]
    each = ", ".join(f"{stage} {_gb(one.total)}" for stage, one in found.items())
    verdict = "fits" if fits else "does not fit"
    lines = [f"memory, GB: {each}" + (f"; the largest, {largest.stage}:" if len(found) > 1 else ""), *table(largest)]
    lines.append(f"  total {_gb(largest.total)} of {_gb(free)} free ({_gb(total_memory(device))} in all): {verdict}")
    if fits:
        return lines
    others = [stage for stage, one in found.items() if free < one.total < largest.total]
    also = f", as {'do' if len(others) > 1 else 'does'} {' and '.join(others)}" if others else ""
    lines.append(f"  watch out: {largest.stage} needs more memory than {device} has free{also}; what lowers it:")
    cures = remedies(cfg, largest, free) or {"a smaller model, shorter rows": 0.0}
    width = max(len(setting) for setting in cures)
    return [
        *lines,
        *(f"    {setting:<{width}}  {_gb(total) if total else ''}".rstrip() for setting, total in cures.items()),
    ]


def table(found: Estimate) -> list[str]:
    """Return the rows of a stage: what each role holds, and what each phase adds, GB."""
    lines = [f"  {'role':<26}{'parameters':>12}{'weights':>9}{'AdamW':>8}{'gradients':>11}"]
    for role in found.roles:
        numbers = (
            f"{_count(role.parameters):>12}{_gb(role.weights):>9}{_gb(role.optimiser):>8}{_gb(role.gradients):>11}"
        )
        lines.append(f"  {role.role:<26}{numbers}" if role.parameters else f"  {role.role:<26}the policy's base")
    for phase in found.phases:
        parts = {"activations": phase.activations, "logits": phase.logits, "cache": phase.cache}
        parts["gradients"] = phase.gradients
        shown = ", ".join(f"{name} {_gb(value)}" for name, value in parts.items() if value >= SHOWN * phase.total)
        mark = "  <- the largest" if phase is found.largest and len(found.phases) > 1 else ""
        lines.append(f"  {phase.phase:<36}{_gb(phase.total):>6}  ({shown}){mark}")
    return lines


def remedies(cfg: CommandConfig, found: Estimate, free: float) -> dict[str, float]:
    """Return the settings that lower a stage's peak, each with the peak it gives, those first that cost least.

    Where none of them is enough by itself, the last one is all of them together, as far as they are needed.
    """
    policy, reward = shapes(cfg)
    start = together = plan_of(cfg, found.stage)
    totals: dict[str, float] = {}
    for setting, change in _changes(cfg, found):
        total = _estimate(change(start), policy, reward).total
        if total >= WORTH * found.total:
            continue
        totals[setting], together = total, change(together)
        if total <= free:
            return totals
        all_of_them = _estimate(together, policy, reward).total if len(totals) > 1 else total
        if all_of_them <= free:
            words = dict.fromkeys(" ".join(totals).split())  # peft=lora once
            return {**totals, " ".join(words): all_of_them}
    return totals


def _changes(cfg: CommandConfig, found: Estimate) -> Iterator[tuple[str, Callable[[Plan], Plan]]]:
    """Yield settings that are not in force, each with what it does to a plan."""
    plan, stage = plan_of(cfg, found.stage), found.stage
    if plan.micro_batch > 1:
        fewer = max(plan.micro_batch // 4, 1)
        yield f"trainer.{stage}.micro_batch_size={fewer}", lambda one: replace(one, micro_batch=fewer, accumulates=True)
    if not plan.how.checkpointing:
        yield "model.gradient_checkpointing=true", lambda one: replace(one, how=replace(one.how, checkpointing=True))
    if stage == "online" and found.largest.cache and plan.rollouts > 1:
        half = cfg.trainer.online.batch_size // 2
        yield f"trainer.online.batch_size={half}", lambda one: replace(one, rollouts=plan.rollouts // 2)
    adapters = plan.how.adapters or _default_adapters()
    if plan.how.adapters is None and cfg.model.path is not None:
        yield "peft=lora", lambda one: replace(one, how=replace(one.how, adapters=adapters))
    if stage == "online" and cfg.model.path is not None and not plan.share_base and _one_base(cfg) and not _splits():
        yield (
            "model.share_base=true" if plan.how.adapters else "peft=lora model.share_base=true",
            lambda one: replace(one, how=replace(one.how, adapters=adapters), share_base=True),
        )
    if plan.how.on_gpu and plan.weight_bytes is None and cfg.model.path is not None:
        yield (
            "peft=qlora",
            lambda one: replace(one, how=replace(one.how, adapters=adapters), weight_bytes=FOUR_BITS_DOUBLE),
        )


def _estimate(plan: Plan, policy: ModelShape, reward: ModelShape | None) -> Estimate:
    found = estimate(plan, policy, reward)
    return found.over(ranks.world()) if _splits() else found


def _splits() -> bool:
    return ranks.strategy() in ranks.SHARDING


def _default_adapters() -> Adapters:
    lora = yaml.safe_load((conf_dir() / "peft" / "lora.yaml").read_text(encoding="utf-8"))
    return Adapters(lora["rank"], tuple(lora["targets"]))


def _one_base(cfg: CommandConfig) -> bool:
    """Return whether a reward model could be an adapter on the policy's base."""
    averaged = isinstance(cfg, TrainRmConfig) and isinstance(cfg.reward, WarmConfig)
    return cfg.model.reward_path is None and cfg.model.reward_start == "sft" and not averaged


# -- from config to plan -----------------------------------------------------------------------------------------------


def plan_of(cfg: CommandConfig, stage: str) -> Plan:
    """Return what decides the memory of a stage of `cfg`: sft | rm | pairwise | online."""
    how, block = frozen(cfg), getattr(cfg.trainer, stage)
    made = stage == "sft" and cfg.model.path is None  # no base worth keeping: all its weights are trained
    peft = cfg.peft if isinstance(cfg.peft, LoraConfig) and not made else None
    share = max(1, block.batch_size // ranks.world())
    micro = min(block.micro_batch_size or share, share)
    plan = Plan(
        stage=stage,
        how=Holding(
            dtype=how.dtype,
            attention=how.attention,
            checkpointing=cfg.model.gradient_checkpointing,
            adapters=None if peft is None else Adapters(peft.rank, tuple(peft.targets)),
            on_gpu=how.device != "cpu",
        ),
        prompt_tokens=cfg.dataset.max_prompt_tokens,
        completion_tokens=cfg.dataset.max_completion_tokens,
        micro_batch=micro,
        accumulates=share > micro,
        weight_bytes=_weight_bytes(peft) if isinstance(peft, QLoraConfig) else None,
    )
    if stage != "online":
        return plan
    assert isinstance(cfg, AlignConfig)
    assert isinstance(cfg.algo, OnlineAlgoConfig)
    averaged = isinstance(cfg.reward, WarmConfig) and cfg.reward.combine == "predictions"
    return replace(
        plan,
        share_base=cfg.model.share_base,
        rollouts=block.batch_size * cfg.algo.minibatches,
        critic=cfg.algo.advantage == "gae",
        reward_models=0 if cfg.reward.name == "gold" else cfg.reward.members if averaged else 1,  # type: ignore[attr-defined]
    )


def shapes(cfg: CommandConfig) -> tuple[ModelShape, ModelShape | None]:
    """Return the shapes of the policy and of the reward model's body, None where that is the policy's.

    Of a model on the Hub only config.json is read, which the command has fetched when it checked the name.
    """
    if cfg.model.path is None:
        assert isinstance(cfg.model, MadeModelConfig)
        policy = ModelShape.of(_made(cfg.model, cfg.dataset.max_prompt_tokens + cfg.dataset.max_completion_tokens))
    else:
        policy = ModelShape.of(AutoConfig.from_pretrained(cfg.model.path, trust_remote_code=False))
    other = cfg.model.reward_path
    return policy, None if other is None else ModelShape.of(AutoConfig.from_pretrained(other, trust_remote_code=False))


def _made(sizes: MadeModelConfig, positions: int) -> OPTConfig:
    """Return the config of a model that is made here, with as large a vocabulary as it may get."""
    return OPTConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        word_embed_proj_dim=sizes.hidden_size,
        ffn_dim=sizes.ffn_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=positions,
    )


def _weight_bytes(peft: QLoraConfig) -> float:
    if peft.bits == "int8":
        return EIGHT_BITS
    return FOUR_BITS_DOUBLE if peft.double_quant else FOUR_BITS


def _gb(size: float) -> str:
    if not size:
        return "-"
    return f"{size / GB:.1f}" if size >= 0.05 * GB else f"{size / GB:.2f}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
