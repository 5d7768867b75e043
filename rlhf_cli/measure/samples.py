"""Samples of a policy with what policy and reference say of them, and their metrics (docs/paper_index.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_cli.algos.base import Algorithm, masked_sum
from rlhf_cli.config.schema import AlgoConfig
from rlhf_cli.metrics.bootstrap import interval, interval_of, share_interval
from rlhf_cli.metrics.samples import best_of, length_correlation
from rlhf_cli.models.logps import Reading
from rlhf_cli.models.prefix_tree import PrefixTree


@dataclass(frozen=True)
class Sampling:
    """How a policy is sampled and read for its metrics.

    Args:
        max_new_tokens: responses are cut here.
        temperature: of sampling and log-probs: it belongs to the policy.
        tree: closed vocabulary, or None.
        eos_ids, pad_id: tokens.
        device: cpu or cuda.
        micro_batch: sequences per forward, fewer where the memory does not do.
        sample_temperature: divides the logits once more, for drawing alone.
        top_p: nucleus, for drawing alone; with 1 and 1 the policy's full distribution is drawn from.
    """

    max_new_tokens: int
    temperature: float
    tree: PrefixTree | None
    eos_ids: list[int]
    pad_id: int
    device: str
    micro_batch: int = 128
    sample_temperature: float = 1.0
    top_p: float = 1.0

    @property
    def reading(self) -> Reading:
        """How log-probs are read."""
        return {"temperature": self.temperature, "tree": self.tree}

    @property
    def of_policy(self) -> bool:
        """Whether samples are from the policy itself, so that means over them are expectations under it."""
        return self.sample_temperature == 1 and self.top_p == 1


@dataclass(frozen=True)
class Samples:
    """S samples of a policy for each of P prompts, and what policy and reference say of them; N = P S.

    Args:
        prompts: token ids, P lists.
        per_prompt: S.
        responses: token ids, those of one prompt next to each other, N lists.
        columns: sums over tokens, (N,) each: `logps` of the policy, exact `kl` to the reference, `entropy`; nats.
        ref_token_logps: log pi_ref of each token, nats, N arrays.
    """

    prompts: list[list[int]]
    per_prompt: int
    responses: list[list[int]]
    columns: dict[str, Tensor]
    ref_token_logps: list[np.ndarray]

    def table(self, values: Tensor) -> np.ndarray:
        """Return values of the N samples laid out by prompt, (P, S)."""
        return values.view(-1, self.per_prompt).numpy()


def sample_metrics(
    samples: Samples,
    rewards: Tensor,
    *,
    algorithm: Algorithm,
    algo: AlgoConfig,
    how: Sampling,
    groups: np.ndarray | None = None,
) -> dict[str, float]:
    """Return the metrics of samples with their intervals over prompts.

    Where `how` does not draw from the policy itself, what needs its own samples is left out (KL, entropy, divergence),
    and the sampler is named.

    Args:
        samples: of one policy.
        rewards: as training used them, (N,).
        algorithm, algo: give beta and the effective reference of the conditional divergence.
        how: how the samples were drawn.
        groups: number of the question that each prompt words, (P,); None: every prompt is a question of its own.
    """
    ended = torch.tensor([ids[-1] in how.eos_ids for ids in samples.responses], dtype=torch.float)
    lengths = torch.tensor([len(ids) for ids in samples.responses], dtype=torch.float)
    means = {"reward/mean": rewards, "length/mean": lengths}
    found = share_interval("eos_rate", samples.table(ended).mean(-1), groups=groups)
    if how.of_policy:
        kl, entropy = samples.columns["kl"], samples.columns["entropy"]
        means |= {"kl/sequence": kl, "kl/per_token": kl / lengths, "entropy/per_token": entropy / lengths}
        found |= _divergences(samples, rewards, algorithm, algo, groups)
    else:
        found |= {"sampler/temperature": how.sample_temperature, "sampler/top_p": how.top_p}
    for key, values in means.items():
        found |= interval(key, samples.table(values).mean(-1), groups=groups)
    return {**found, **_reward_metrics(samples.table(rewards), samples.table(lengths), groups)}


def effective_logps(ref_token_logps: Sequence[np.ndarray], algorithm: Algorithm, algo: AlgoConfig) -> Tensor:
    """Return sum_t e_t of each response, its effective reference, nats, float64, (N,).

    Args:
        ref_token_logps: log pi_ref of each token, nats, N arrays.
        algorithm, algo: whose effective reference.
    """
    rows = [torch.from_numpy(values).double() for values in ref_token_logps]
    mask = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
    return masked_sum(algorithm.effective_reference(pad_sequence(rows, batch_first=True), algo), mask)


def _reward_metrics(rewards: np.ndarray, lengths: np.ndarray, groups: np.ndarray | None) -> dict[str, float]:
    found = interval_of("reward/std", lambda drawn: drawn.std(ddof=1), rewards, groups=groups)
    for count, best in best_of(rewards).items():
        found |= interval(f"reward/best_of_{count}", best, groups=groups)
    if length_correlation(rewards, lengths) is not None:
        found |= interval_of("reward/length_correlation", length_correlation, rewards, lengths, groups=groups)
    return found


def _divergences(
    samples: Samples, rewards: Tensor, algorithm: Algorithm, algo: AlgoConfig, groups: np.ndarray | None
) -> dict[str, float]:
    """Return E ((r1 - r2) - (s1 - s2))^2 over pairs of samples of one prompt, plain, tempered and conditional."""
    ours, beta = samples.columns["logps"], algo.beta
    gaps = {"pm/divergence": rewards - ours, "pm_beta/divergence": rewards / beta - ours}
    if algorithm.has_optimum:
        gaps["optimum/divergence"] = rewards / beta - (ours - effective_logps(samples.ref_token_logps, algorithm, algo))
    found: dict[str, float] = {}
    for key, gap in gaps.items():
        found |= interval(key, 2 * samples.table(gap).var(-1, ddof=1), groups=groups)  # unbiased for E (g1 - g2)^2
    return found
