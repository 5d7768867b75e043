"""Metrics from samples of a policy, with bootstrap intervals over prompts (docs/paper_index.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.algos.base import Algorithm, masked_sum
from rlhf_cli.config.schema import AlgoConfig
from rlhf_cli.metrics.bootstrap import interval
from rlhf_cli.models import logps
from rlhf_cli.models.prefix_tree import PrefixTree
from rlhf_cli.models.reward import Reward
from rlhf_cli.models.sampling import sample
from rlhf_cli.models.tokens import TokenBatch, collate


@dataclass(frozen=True)
class Sampling:
    """How a policy is sampled and read for its metrics: always from its full distribution.

    Args:
        max_new_tokens: responses are cut here.
        temperature: of sampling and log-probs.
        tree: closed vocabulary, or None.
        eos_ids, pad_id: tokens.
        device: cpu or cuda.
        micro_batch: sequences per forward.
    """

    max_new_tokens: int
    temperature: float
    tree: PrefixTree | None
    eos_ids: list[int]
    pad_id: int
    device: str
    micro_batch: int = 128


def draw(policy: Any, prompts: list[list[int]], how: Sampling, seed: int) -> list[list[int]]:
    """Return one response of `policy` for each prompt; the global random state is left as it was."""
    was_training = policy.training
    policy.eval()
    responses: list[list[int]] = []
    with torch.random.fork_rng():  # the GPU's state too
        torch.manual_seed(seed)
        for start in range(0, len(prompts), how.micro_batch):
            responses += sample(
                policy,
                prompts[start : start + how.micro_batch],
                max_new_tokens=how.max_new_tokens,
                temperature=how.temperature,
                top_p=1.0,
                eos_ids=how.eos_ids,
                pad_id=how.pad_id,
                tree=how.tree,
            )
    policy.train(was_training)
    return responses


class SampledMeasure:
    """Samples `samples` responses to each prompt and measures them.

    Args:
        prompts: token ids, one list a prompt.
        samples: responses per prompt, >= 2.
        reference, reward, reward_clip: as in training.
        algorithm, algo: give beta and the effective reference of the conditional divergence.
        sampling: how.
        seed: of sampling, the same at every call, so that checkpoints are compared on equal luck.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        samples: int,
        reference: Any,
        reward: Reward,
        *,
        reward_clip: float | None,
        algorithm: Algorithm,
        algo: AlgoConfig,
        sampling: Sampling,
        seed: int,
    ) -> None:
        self.prompts = [prompt for prompt in prompts for _ in range(samples)]
        self.samples, self.reference, self.reward, self.reward_clip = samples, reference, reward, reward_clip
        self.algorithm, self.algo, self.sampling, self.seed = algorithm, algo, sampling, seed

    def draw(self, policy: Any, prompts: list[list[int]]) -> list[list[int]]:
        """Return one response for each prompt; the global random state is left as it was."""
        return draw(policy, prompts, self.sampling, self.seed)

    def clipped_rewards(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Return the rewards as training used them, on the CPU, (N,)."""
        raw = self.reward(prompts, responses).cpu().float()
        return raw if self.reward_clip is None else raw.clamp(-self.reward_clip, self.reward_clip)

    def measure(self, policy: Any) -> tuple[dict[str, float], list[list[int]], Tensor]:
        """Return metrics with their intervals, the sampled responses, and their rewards (N,)."""
        responses = self.draw(policy, self.prompts)
        rewards = self.clipped_rewards(self.prompts, responses)
        batch = collate(self.prompts, responses, self.sampling.pad_id, self.sampling.device)
        read = [self._read(policy, piece) for piece in batch.slices(self.sampling.micro_batch)]
        columns = {name: torch.cat([piece[name] for piece in read]).cpu() for name in read[0]}
        ended = torch.tensor([ids[-1] in self.sampling.eos_ids for ids in responses], dtype=torch.float)
        lengths = torch.tensor([len(ids) for ids in responses], dtype=torch.float)
        found = self._divergences(rewards, columns)
        per_token = {"kl/per_token": columns["kl"] / lengths, "entropy/per_token": columns["entropy"] / lengths}
        means = {"reward/mean": rewards, "kl/sequence": columns["kl"], "length/mean": lengths, "eos_rate": ended}
        for key, values in {**means, **per_token}.items():
            found |= interval(key, self._by_prompt(values).mean(-1))
        found["reward/std"] = float(rewards.std())
        return found, responses, rewards

    def _by_prompt(self, values: Tensor) -> np.ndarray:
        return values.view(-1, self.samples).numpy()

    @torch.no_grad()
    def _read(self, policy: Any, piece: TokenBatch) -> dict[str, Tensor]:
        """Return per response: log pi, summed effective reference, exact KL and entropy summed over its tokens."""
        reading: logps.Reading = {"temperature": self.sampling.temperature, "tree": self.sampling.tree}
        ours = logps.vocabulary_logps(policy, piece, **reading)
        theirs = logps.vocabulary_logps(self.reference, piece, **reading)
        reference = logps.gather_logps(theirs, piece.response_ids)
        effective = self.algorithm.effective_reference(reference, self.algo)
        mask = piece.response_mask
        return {
            "logps": masked_sum(logps.gather_logps(ours, piece.response_ids), mask),
            "effective": masked_sum(effective, mask),
            "kl": masked_sum(logps.kl(ours, theirs), mask),
            "entropy": masked_sum(logps.entropy(ours), mask),
        }

    def _divergences(self, rewards: Tensor, columns: dict[str, Tensor]) -> dict[str, float]:
        """Return E ((r1 - r2) - (s1 - s2))^2 over pairs of samples of one prompt, plain, tempered and conditional."""
        beta = self.algo.beta
        gaps = {
            "pm/divergence": rewards - columns["logps"],
            "pm_beta/divergence": rewards / beta - columns["logps"],
        }
        if self.algorithm.has_optimum:
            gaps["optimum/divergence"] = rewards / beta - (columns["logps"] - columns["effective"])
        found: dict[str, float] = {}
        for key, gap in gaps.items():
            found |= interval(key, 2 * self._by_prompt(gap).var(-1, ddof=1))  # unbiased for E (g1 - g2)^2
        return found


class PairMeasure:
    """`pm/pair_tv` on held-out preference pairs: mean |sigmoid(r_w - r_l) - sigmoid(log pi_w - log pi_l)|.

    Args:
        pairs: {"prompt_ids", "chosen_ids", "rejected_ids"}.
        reference, reward, reward_clip: as in training.
        sampling: how log-probs are read.
    """

    def __init__(
        self, pairs: list, reference: Any, reward: Reward, *, reward_clip: float | None, sampling: Sampling
    ) -> None:
        prompts = [pair["prompt_ids"] for pair in pairs] * 2
        responses = [pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs]
        self.batch = collate(prompts, responses, sampling.pad_id, sampling.device)
        self.sampling = sampling
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, pair in enumerate(pairs):
            rows.setdefault(tuple(pair["prompt_ids"]), []).append(row)
        self.rows_by_prompt = list(rows.values())
        scores = torch.cat([reward(prompts[i : i + 256], responses[i : i + 256]) for i in range(0, len(prompts), 256)])
        clipped = scores if reward_clip is None else scores.clamp(-reward_clip, reward_clip)
        self.preference = _first_wins(clipped.float())
        self.reference_logps = self._logps(reference)

    def _logps(self, policy: Any) -> Tensor:
        how = self.sampling
        return logps.frozen_token_logps(
            policy, self.batch, temperature=how.temperature, tree=how.tree, micro_batch=how.micro_batch
        ).sum(-1)

    def metrics(self, policy: Any) -> dict[str, float]:
        """Return pm/pair_tv with its interval; of the chosen responses perplexity, log-prob and its change."""
        ours = self._logps(policy)
        gaps = (self.preference - _first_wins(ours)).abs().cpu()
        by_prompt = [float(gaps[rows].mean()) for rows in self.rows_by_prompt]
        chosen, before = ours.chunk(2)[0], self.reference_logps.chunk(2)[0]
        tokens = self.batch.response_mask.chunk(2)[0].sum()
        return {
            **interval("pm/pair_tv", np.array(by_prompt)),
            "perplexity/chosen": float((-chosen.sum() / tokens).clamp(max=80).exp()),
            "chosen_logps": float(chosen.mean()),
            "chosen_logps_change": float((chosen - before).mean()),
        }


def _first_wins(values: Tensor) -> Tensor:
    first, second = values.chunk(2)
    return torch.sigmoid(first - second)
