"""On-policy algorithms (pm, kl_ppo): PPO with a critic, or leave-one-out, as a thin layer over TRL's RLOOTrainer.

TRL >= 1.13 has no PPO trainer. Inherited: generation back ends, buffering over minibatches and epochs, checkpoints,
logging, accelerate. Added: critic, per-token rewards r_T - beta (l_t - e_t), GAE, clipped per-token ratio, clipped
value loss. The private methods overridden here are named once, in tests/test_trl_contract.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from trl import RLOOConfig, RLOOTrainer

from rlhf_cli import ranks
from rlhf_cli.algos import ppo
from rlhf_cli.algos.base import masked_sum
from rlhf_cli.config.schema import OnlineTraining
from rlhf_cli.models import logps
from rlhf_cli.models.sharding import shard_if_asked
from rlhf_cli.models.tokens import TokenBatch, collate
from rlhf_cli.trainers import engines
from rlhf_cli.trainers.common import (
    AllRanks,
    Computing,
    WholeCheckpoints,
    reading,
    training_arguments,
)
from rlhf_cli.trainers.critic import CriticTraining
from rlhf_cli.trainers.parts import OnlineParts
from rlhf_cli.trainers.rollouts import SEQUENCE_FIELDS, Rollouts, dealt
from rlhf_cli.trainers.schedule import prompt_schedule, updates

CRITIC_FILE = "critic.pt"


class OnlineTrainer(AllRanks, WholeCheckpoints, RLOOTrainer):
    """RLOOTrainer whose rollouts carry per-token advantages and whose loss is PPO's."""

    def __init__(self, parts: OnlineParts, block: OnlineTraining, **kwargs: Any) -> None:
        super().__init__(reward_funcs=cast(Any, parts.reward), **kwargs)
        self.parts, self.block = parts, block
        self.engine_logps: list[list[float]] | None = None  # of the latest rollouts
        self.cost_weight = parts.algo.beta  # RLOOTrainer.beta is 0: TRL must not load a reference of its own
        rows = cast(Dataset, self.train_dataset)
        self.prompt_ids = dict(zip(rows["prompt"], rows["prompt_ids"], strict=True))
        self.reference = parts.reference
        if isinstance(parts.reference, torch.nn.Module):  # else the policy without its adapter
            self.reference = self.accelerator.prepare_model(shard_if_asked(parts.reference), evaluation_mode=True)
        self.critic = None
        if parts.critic is not None:  # its gradients are averaged over ranks where it is stepped, not by DDP
            self.critic = self.accelerator.prepare_model(shard_if_asked(parts.critic), evaluation_mode=True)
        self.rollouts: dict[str, Tensor] = {}  # of the update, of all ranks
        self.dealt: list[dict[str, Tensor]] = []  # this rank's micro-batches of the pass
        self.critic_training = None if parts.critic is None else CriticTraining(parts.critic, block, self.args)

    # -- rollouts ---------------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list) -> tuple[list, None, dict]:
        return [self.prompt_ids[prompt] for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: list, images: Any, multimodal_fields: dict) -> list:
        inherited = partial(super()._generate_single_turn, prompt_ids, images, multimodal_fields)
        with reading(self.model):
            responses, self.engine_logps = engines.draw(self, prompt_ids, inherited)
        return responses

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        return self.parts.reward([row["prompt_ids"] for row in inputs], completion_ids_list).unsqueeze(-1)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
        prompts = [row["prompt"] for row in inputs]
        prompt_ids, completion_ids, completions = self._generate(prompts)
        pad_id = self._tokenizer.pad_token_id
        columns = self._read(collate(prompt_ids, completion_ids, pad_id, self.accelerator.device))
        scores = self._calculate_rewards(inputs, prompts, completions, completion_ids)[:, 0]
        whole = Rollouts(prompt_ids, completion_ids, scores, columns, self.engine_logps).of_all_ranks()
        batch, scores = whole.batch(pad_id), whole.scores
        self._note_read(whole.columns, batch.response_mask)
        ended = torch.tensor([ids[-1] in self.eos_token_ids for ids in whole.responses], device=scores.device)
        if self.parts.algo.missing_eos_penalty is not None:
            scores = scores - self.parts.algo.missing_eos_penalty * ~ended
        rollout = {name: getattr(batch, name) for name in SEQUENCE_FIELDS}
        rollout["old_logps"] = whole.columns["logps"]
        rollout |= self._advantages(whole.columns, batch.response_mask, scores)
        if whole.engine_logps is not None:
            weights = engines.weigh(self, whole.engine_logps, rollout["old_logps"], batch.response_mask)
            rollout["advantages"] = rollout["advantages"] * weights
        clip = self.parts.reward_clip
        seen = scores if clip is None else scores.clamp(-clip, clip)
        self._note(**{"reward/mean": seen.mean(), "reward/std": seen.std(), "eos_rate": ended.float().mean()})
        self._note(**{"length/mean": batch.response_mask.sum(-1).float().mean()})
        return rollout

    @torch.no_grad()
    def _read(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return what the models say of sampled tokens, (B, T) each: log-probs, exact KL and entropy, state values."""
        with engines.cast_once(self):
            found = batch.read(self._read_piece, self.args.per_device_train_batch_size)
        names = ("logps", "ref_logps", "kl", "entropy") + (("values",) if self.critic is not None else ())
        return dict(zip(names, found.unbind(1), strict=True))

    def _read_piece(self, piece: TokenBatch) -> Tensor:
        """Return what `_read` names, (b, names, t)."""
        how: logps.Reading = {"temperature": self.parts.generation.temperature, "tree": self.parts.tree}
        policy = logps.vocabulary_logps(self.model, piece, **how)
        reference = logps.vocabulary_logps(self.reference, piece, **how)
        found = [logps.gather_logps(each, piece.response_ids) for each in (policy, reference)]
        found += [logps.kl(policy, reference), logps.entropy(policy)]
        if self.critic is not None:
            found.append(self.critic(piece))
        return torch.stack(found, 1)

    def _note_read(self, columns: Mapping[str, Tensor], mask: Tensor) -> None:
        self._note(**{"kl/sequence": masked_sum(columns["kl"], mask).mean()})
        self._note(**{f"{name}/per_token": ppo.masked_mean(columns[name], mask) for name in ("kl", "entropy")})

    @torch.no_grad()
    def _advantages(self, columns: Mapping[str, Tensor], mask: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """Return per-token advantages (and, with a critic, old values and returns), (B, T) each."""
        algo, token_logps, ref_logps = self.parts.algo, columns["logps"], columns["ref_logps"]
        effective = self.parts.algorithm.effective_reference(ref_logps, algo)
        rewards = ppo.token_rewards(
            token_logps, effective, mask, scores, beta=self.cost_weight, reward_clip=self.parts.reward_clip
        )
        cost = float(masked_sum(token_logps - effective, mask).mean())
        self._note_cost(ref_logps, mask, scores, cost)
        if self.critic is None:
            baseline = ppo.leave_one_out(rewards.sum(-1), num_generations=self.parts.algo.num_generations)
            found = {"advantages": baseline.unsqueeze(-1).expand_as(rewards).masked_fill(~mask, 0.0)}
        else:
            values = columns["values"]
            advantages, returns = ppo.gae(rewards, values, mask, gamma=algo.gamma, lam=algo.lam)
            found = {"advantages": advantages, "old_values": values, "returns": returns}
            self._note(explained_variance=ppo.explained_variance(values, returns, mask))
        self._note(**{"advantage/std": found["advantages"][mask].std()})
        if algo.whiten_advantages:
            found["advantages"] = ppo.whiten(found["advantages"], mask)
        return found

    def _note_cost(self, ref_logps: Tensor, mask: Tensor, scores: Tensor, cost: float) -> None:
        algo, clip = self.parts.algo, self.parts.reward_clip
        clipped = (scores.abs() > clip).float().mean() if clip is not None else torch.zeros(())
        self._note(**{"cost/sequence": cost, "beta": self.cost_weight, "reward/clip_fraction": clipped})
        alpha = getattr(algo, "alpha", None)
        if alpha is not None:
            near = ((ref_logps.exp() > alpha / 2) & (ref_logps.exp() <= 2 * alpha)).float()
            self._note(**{"reference/mass_near_alpha": ppo.masked_mean(near, mask)})
        if algo.beta_schedule == "adaptive":
            self.cost_weight = ppo.adapted_beta(
                self.cost_weight, cost, target=algo.cost_target, horizon=algo.cost_horizon, responses=len(scores)
            )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Return this rank's next micro-batch; new rollouts where an update begins, a new order where a pass does."""
        args = cast(RLOOConfig, self.args)
        count = args.steps_per_generation or 1
        place, part = divmod(self._step % (count * self.num_iterations), count)
        if place == part == 0 or not self.rollouts:
            self.rollouts = self._generate_and_score_completions(generation_batch)
        if part == 0 or not self.dealt:
            accumulated = args.gradient_accumulation_steps
            update = self.state.global_step // (count // accumulated * self.num_iterations)
            key, size = (args.seed, update, place), args.per_device_train_batch_size
            self.dealt = dealt(self.rollouts, key=key, size=size, count=count, per_step=accumulated)
        return self.dealt[part]

    # -- losses -----------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        algo = self.parts.algo
        batch = TokenBatch(*(inputs[name] for name in SEQUENCE_FIELDS))
        mask = batch.response_mask
        new_logps = logps.token_logps(model, batch, temperature=self.parts.generation.temperature, tree=self.parts.tree)
        share = inputs["share"]
        loss = share * ppo.policy_loss(
            new_logps, inputs["old_logps"], inputs["advantages"], mask, clip_range=algo.clip_range
        )
        self._note(policy_loss=loss)
        ratio = (new_logps - inputs["old_logps"]).detach().exp()
        self._note(clip_fraction=share * ppo.masked_mean(((ratio - 1).abs() > algo.clip_range).float(), mask))
        if self.critic is None:
            return loss
        values = self.critic(batch)
        value_loss = share * ppo.value_loss(
            values, inputs["old_values"], inputs["returns"], mask, clip_range=algo.value_clip_range
        )
        moved = ((values - inputs["old_values"]).detach().abs() > algo.value_clip_range).float()
        self._note(value_loss=value_loss, value_clip_fraction=share * ppo.masked_mean(moved, mask))
        return loss + value_loss  # disjoint parameters: one backward serves both

    def _note(self, **metrics: Any) -> None:
        for key, value in metrics.items():
            self._metrics["train"][key].append(float(value.detach() if isinstance(value, Tensor) else value))

    # -- the critic beside the policy ---------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a micro-batch after its backward pass."""
        loss = super().training_step(*args, **kwargs)
        if self.critic_training is not None:
            self.critic_training.hold_gradients()
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Return the policy's optimizer, which steps the critic's after itself."""
        if self.critic_training is None:
            return super().create_optimizer(*args, **kwargs)
        with self.critic_training.left_out():
            optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.register_step_post_hook(self.critic_training.step)
        return optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Return the policy as it is trained; DDP takes it without a critic that lies in its module."""
        if self.critic_training is None:
            return super()._prepare_for_training(*args, **kwargs)
        with self.critic_training.left_out():
            return super()._prepare_for_training(*args, **kwargs)

    def save_extra(self, folder: Path) -> None:
        """Write critic, its optimizer and the cost weight into a checkpoint."""
        critic = {} if self.critic_training is None else self.critic_training.state()
        if not ranks.is_main():
            return
        torch.save({"cost_weight": self.cost_weight, **critic}, folder / CRITIC_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / CRITIC_FILE, map_location="cpu", weights_only=True)
        self.cost_weight = state["cost_weight"]
        if self.critic_training is not None:
            self.critic_training.load(state)


def online_trainer(
    parts: OnlineParts,
    policy: Any,
    tokenizer: Any,
    prompts: list[dict],
    block: OnlineTraining,
    *,
    max_completion_tokens: int,
    folder: Path,
    seed: int,
    computing: Computing,
) -> OnlineTrainer:
    """Return a trainer that aligns `policy` on-policy.

    Args:
        parts: algorithm, reward, reference, critic, sampling.
        policy: causal language model, with an adapter or without.
        tokenizer: its tokenizer.
        prompts: {"prompt", "prompt_ids"}.
        block: optimisation settings; batch_size counts rollouts per optimizer step.
        max_completion_tokens: responses are cut here.
        folder: checkpoints go here.
        seed: prompt order and sampling.
        computing: device and precision.
    """
    algo = parts.algo
    plan = updates(algo, block, len(prompts))
    arguments = training_arguments(block, "online", folder=folder, seed=seed, computing=computing)
    arguments.pop("num_train_epochs", None)
    arguments |= {
        "max_steps": plan.number * plan.steps,
        "save_steps": -(-block.save_every_steps // plan.steps) * plan.steps,  # whole rollouts only
    }
    longest = max(len(row["prompt_ids"]) for row in prompts) + max_completion_tokens
    args = RLOOConfig(
        **arguments,
        beta=0.0,
        num_generations=max(algo.num_generations, 2),
        generation_batch_size=None,
        steps_per_generation=algo.minibatches * arguments["gradient_accumulation_steps"],
        num_iterations=algo.ppo_epochs,
        max_completion_length=max_completion_tokens,
        temperature=parts.generation.temperature,
        top_p=parts.generation.top_p,
        top_k=0,
        shuffle_dataset=False,
        **engines.arguments(parts.generation, longest=longest, device=computing.device),
    )
    args.num_generations = algo.num_generations  # 1 is right with a critic; RLOOConfig's own check refuses it
    rows = prompt_schedule(prompts, per_update=plan.prompts, updates=plan.number, seed=seed)
    return OnlineTrainer(
        parts, block, model=policy, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
