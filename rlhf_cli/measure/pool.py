"""Preference matching on free text: a fixed pool of candidate responses for each prompt stands for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.algos.base import Algorithm
from rlhf_cli.config.schema import AlgoConfig
from rlhf_cli.errors import DataError
from rlhf_cli.measure.exact import GOLD_KEYS
from rlhf_cli.measure.samples import effective_logps
from rlhf_cli.metrics.bootstrap import interval
from rlhf_cli.metrics.glossary import describe
from rlhf_cli.metrics.optimum import optimum
from rlhf_cli.metrics.preference import forward_kl, preference_distribution, preference_metrics, total_variation

OF_POLICY = ("offset_mass", "divergence")  # of pi itself, which a pool does not show


@dataclass(frozen=True)
class Pool:
    """Different candidate responses of each of P prompts, two at least.

    Args:
        prompts: token ids, P lists.
        candidates: token ids of the candidates of each prompt, P lists of lists.
        sources: where each comes from, "dataset" or "reference", P lists.
    """

    prompts: list[list[int]]
    candidates: list[list[list[int]]]
    sources: list[list[str]]

    def rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return the prompt and the response of every candidate, those of one prompt next to each other, N each."""
        prompts = [prompt for prompt, listed in zip(self.prompts, self.candidates, strict=True) for _ in listed]
        return prompts, [ids for listed in self.candidates for ids in listed]


def build_pool(
    prompts: Sequence[list[int]],
    dataset: Sequence[Sequence[list[int]]],
    reference_samples: Sequence[Sequence[list[int]]],
) -> Pool:
    """Return the pool: responses of the dataset, then samples of the reference, each once.

    Prompts with fewer than two candidates are left out: nothing can be preferred there.

    Args:
        prompts: token ids, P lists.
        dataset, reference_samples: token ids of the responses of each prompt, P lists of lists.

    Raises:
        DataError: no prompt has two candidates.
    """
    kept = Pool([], [], [])
    for prompt, known, drawn in zip(prompts, dataset, reference_samples, strict=True):
        sources = {tuple(ids): "reference" for ids in drawn} | {tuple(ids): "dataset" for ids in known}
        candidates = list(dict.fromkeys(tuple(ids) for ids in [*known, *drawn]))
        if len(candidates) > 1:
            kept.prompts.append(prompt)
            kept.candidates.append([list(ids) for ids in candidates])
            kept.sources.append([sources[ids] for ids in candidates])
    if not kept.prompts:
        raise DataError(
            f"none of {len(prompts)} prompts has two different candidate responses",
            "preference matching compares them",
            "raise dataset.pool_samples",
        )
    return kept


class PoolMeasure:
    """Measures policies against the reward model's preferences on a pool; both are normalised over its candidates.

    Args:
        pool: N candidates of P prompts.
        rewards: of every candidate, clipped as in training, nats, (N,).
        reference_token_logps: log pi_ref of each token of every candidate, nats, N arrays.
        algorithm, algo: whose optimum `optimum/…` is; absent for pairwise algorithms, which learn from a reward that
            nobody knows on free text.
    """

    def __init__(
        self,
        pool: Pool,
        rewards: Tensor,
        reference_token_logps: Sequence[np.ndarray],
        *,
        algorithm: Algorithm,
        algo: AlgoConfig,
    ) -> None:
        counts = torch.tensor([len(listed) for listed in pool.candidates])
        self.pool, self.beta = pool, algo.beta
        self.mask = torch.arange(int(counts.max())) < counts.unsqueeze(-1)
        self.rewards = self._table(rewards.double().cpu(), 0.0)
        self.target = preference_distribution(self.rewards, self.mask)
        self.reference = self._normalised(reference_token_logps)
        self.optimum: Tensor | None = None
        if algorithm.has_optimum and algorithm.family == "online":
            effective = self._table(effective_logps(reference_token_logps, algorithm, algo), -torch.inf)
            self.optimum = optimum(effective, self.rewards, beta=self.beta)

    def metrics(self, token_logps: Sequence[np.ndarray]) -> dict[str, float]:
        """Return the metrics of a policy on the pool with their intervals, and the worst prompt of each distance.

        Args:
            token_logps: log pi of each token of every candidate, nats, N arrays.
        """
        size = float(self.mask.sum()) / len(self.mask)
        return {**self._summary(self._normalised(token_logps)), "pool/size": size, "pool/prompts": len(self.mask)}

    def reference_metrics(self) -> dict[str, float]:
        """Return the same metrics of the reference, keys under `reference/`."""
        return {f"reference/{key}": value for key, value in self._summary(self.reference).items()}

    def _summary(self, logps: Tensor) -> dict[str, float]:
        found: dict[str, float] = {}
        for key, values in self._per_prompt(logps).items():
            if key == "pm/rank_correlation" and bool(values.isnan().all()):  # no prompt's candidates can be ranked
                continue
            found |= interval(key, values.numpy())
            if describe(key).better == "lower":
                found[f"{key}_max"] = float(values.max())
        return found

    def _per_prompt(self, logps: Tensor) -> dict[str, Tensor]:
        mask, rewards = self.mask, self.rewards
        plain = preference_metrics(self.target, rewards, logps, mask)
        found = {f"pm/{name}": values for name, values in plain.items() if name not in OF_POLICY}
        if self.beta != 1:
            tempered = preference_distribution(rewards, mask, beta=self.beta)
            metrics = preference_metrics(tempered, rewards / self.beta, logps, mask)
            found |= {f"pm_beta/{name}": metrics[name] for name in GOLD_KEYS if name not in OF_POLICY}
        if self.optimum is not None:
            found["optimum/tv"] = total_variation(self.optimum, logps, mask)
            found["optimum/kl"] = forward_kl(self.optimum, logps, mask)
        return found

    def _normalised(self, token_logps: Sequence[np.ndarray]) -> Tensor:
        """Return log pi of each candidate given that it is one of the pool, (P, A); -inf where there is none."""
        sums = torch.tensor([values.sum(dtype=float) for values in token_logps], dtype=torch.float64)
        return self._table(sums, -torch.inf).log_softmax(-1)

    def _table(self, values: Tensor, fill: float) -> Tensor:
        """Return values of the N candidates laid out by prompt, (P, A)."""
        table = torch.full(self.mask.shape, fill, dtype=values.dtype)
        table[self.mask] = values
        return table
