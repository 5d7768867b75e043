"""Exact metrics of a policy on prompts whose responses can be enumerated (docs/paper_index.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.algos.base import Algorithm, masked_sum
from rlhf_cli.config.schema import AlgoConfig
from rlhf_cli.data.rows import Question
from rlhf_cli.metrics.glossary import describe
from rlhf_cli.metrics.optimum import optimum
from rlhf_cli.metrics.preference import forward_kl, preference_distribution, preference_metrics, total_variation
from rlhf_cli.models.logps import Reading, frozen_token_logps
from rlhf_cli.models.prefix_tree import PrefixTree
from rlhf_cli.models.reward import Reward
from rlhf_cli.models.tokens import TokenBatch, collate

GOLD_KEYS = (
    "tv",
    "kl_rm_policy",
    "kl_policy_rm",
    "minority_mass",
    "minority_mass_target",
    "minority_coverage",
    "divergence",
)
HELDOUT_KEYS = ("pm/tv", "pm/kl_rm_policy", "pm/offset_mass", "pm/minority_mass", "pm/minority_mass_target")


@dataclass(frozen=True)
class Enumeration:
    """Every valid response to every question, tokenised; P questions with at most A answers.

    Args:
        questions: the P rows.
        batch: all responses of all questions below each other, N sequences.
        mask: True where a question has an answer, (P, A).
        prompt_ids, response_ids: the same N sequences as lists.
    """

    questions: list[Question]
    batch: TokenBatch
    mask: Tensor
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]

    def table(self, values: Tensor, fill: float) -> Tensor:
        """Return values of the N responses laid out by question, (P, A); `fill` where there is no answer."""
        table = torch.full(self.mask.shape, fill, dtype=values.dtype, device=values.device)
        table[self.mask] = values
        return table


def enumerate_answers(
    questions: list[Question], prompts: list[list[int]], answers: list[list[list[int]]], pad_id: int, device: str
) -> Enumeration:
    """Return the enumeration of `questions`.

    Args:
        prompts: token ids of each question, P lists.
        answers: token ids of each answer of each question, end-of-sequence included.
        pad_id: padding token.
        device: cpu or cuda.
    """
    counts = torch.tensor([len(rows) for rows in answers])
    mask = torch.arange(int(counts.max())) < counts.unsqueeze(-1)
    prompt_ids = [prompt for prompt, rows in zip(prompts, answers, strict=True) for _ in rows]
    response_ids = [ids for rows in answers for ids in rows]
    batch = collate(prompt_ids, response_ids, pad_id, device)
    return Enumeration(questions, batch, mask.to(device), prompt_ids, response_ids)


class ExactMeasure:
    """Measures policies against reward model, people and closed-form optimum; what does not change is read once.

    Args:
        enumeration: the response sets.
        reference: frozen policy the algorithm regularises towards.
        reward: centred rewards of token ids, as training used them.
        reward_clip: bound on |reward|, or None.
        algorithm, algo: whose optimum `optimum/…` is; pairwise algorithms are measured against the gold reward's.
        temperature, tree: how log-probs are read.
        gold_offset: gold reward of anything that is no answer, nats; None where gold is not known.
    """

    def __init__(
        self,
        enumeration: Enumeration,
        reference: Any,
        reward: Reward,
        *,
        reward_clip: float | None,
        algorithm: Algorithm,
        algo: AlgoConfig,
        temperature: float,
        tree: PrefixTree | None,
        gold_offset: float | None = None,
    ) -> None:
        self.enumeration, self.beta, self.gold_offset = enumeration, algo.beta, gold_offset
        self.reading: Reading = {"temperature": temperature, "tree": tree}
        mask = enumeration.mask
        scores = reward(enumeration.prompt_ids, enumeration.response_ids)
        clipped = scores if reward_clip is None else scores.clamp(-reward_clip, reward_clip)
        self.rewards = enumeration.table(clipped.float(), 0.0)
        self.target = preference_distribution(self.rewards, mask)
        shares = [share for question in enumeration.questions for share in question.people or ()]
        self.people = enumeration.table(torch.tensor(shares, device=mask.device), 0.0).log() if shares else None
        reference_logps = frozen_token_logps(reference, enumeration.batch, **self.reading)
        self.reference = self._table(reference_logps)
        effective = masked_sum(algorithm.effective_reference(reference_logps, algo), enumeration.batch.response_mask)
        self.effective = enumeration.table(effective, -torch.inf)
        self.optimum = self._optimum(algorithm.family) if algorithm.has_optimum else None
        self.trained = torch.tensor([not question.heldout for question in enumeration.questions], device=mask.device)

    def _table(self, token_logps: Tensor) -> Tensor:
        return self.enumeration.table(token_logps.sum(-1), -torch.inf)

    def _optimum(self, family: str) -> Tensor:
        rewards = self.rewards
        if family == "pairwise" and self.people is not None:
            rewards = self.people.masked_fill(~self.enumeration.mask, 0.0)
        return optimum(self.effective, rewards, beta=self.beta)

    def weight_on_set(self) -> Tensor:
        """Return r / beta + sum_t e_t of every response, the optimum's unnormalised log weight, (P, A)."""
        return self.rewards / self.beta + self.effective

    def policy_logps(self, policy: Any) -> Tensor:
        """Return log pi of every response, (P, A); -inf where there is no answer."""
        return self._table(frozen_token_logps(policy, self.enumeration.batch, **self.reading))

    def metrics(self, policy: Any) -> dict[str, float]:
        """Return every exact metric of `policy`: averages over trained wordings, `_max`, and `heldout/`."""
        logps = self.policy_logps(policy)
        return summarise(self._per_prompt(logps), self.trained)

    def reference_metrics(self) -> dict[str, float]:
        """Return the same metrics of the reference, keys under `reference/`."""
        found = summarise(self._per_prompt(self.reference), self.trained)
        return {f"reference/{key}": value for key, value in found.items()}

    def _per_prompt(self, logps: Tensor) -> dict[str, Tensor]:
        mask, rewards = self.enumeration.mask, self.rewards
        found = {f"pm/{k}": v for k, v in preference_metrics(self.target, rewards, logps, mask).items()}
        if self.beta != 1:
            tempered = preference_distribution(rewards, mask, beta=self.beta)
            metrics = preference_metrics(tempered, rewards / self.beta, logps, mask)
            found |= {f"pm_beta/{k}": metrics[k] for k in GOLD_KEYS}
        if self.people is not None:
            metrics = preference_metrics(self.people, self.people.masked_fill(~mask, 0.0), logps, mask)
            found |= {f"gold/{k}": metrics[k] for k in GOLD_KEYS}
            if self.gold_offset is not None:  # of an answer: the log of its share
                on_set = (logps.exp() * self.people).masked_fill(~mask | logps.isneginf(), 0.0).sum(-1)
                found["gold/reward"] = on_set + metrics["offset_mass"] * self.gold_offset
        if self.optimum is not None:
            found["optimum/tv"] = total_variation(self.optimum, logps, mask)
            found["optimum/kl"] = forward_kl(self.optimum, logps, mask)
        return found

    def distributions(self, policy: Any) -> list[dict[str, Any]]:
        """Return every distribution of every question as plain lists (distributions.json, the bar charts)."""
        logps = self.policy_logps(policy)
        rows = []
        for number, question in enumerate(self.enumeration.questions):
            size = len(question.answers)

            def shares(table: Tensor | None, number: int = number, size: int = size) -> list[float] | None:
                return None if table is None else [round(x, 6) for x in table[number, :size].exp().tolist()]

            policy_shares, reference_shares = shares(logps), shares(self.reference)
            assert policy_shares is not None
            assert reference_shares is not None
            rows.append(
                {
                    "question": question.index,
                    "prompt": question.prompt,
                    "heldout": question.heldout,
                    "answers": list(question.answers),
                    "people": shares(self.people),
                    "reward_model": shares(self.target),
                    "reference": reference_shares,
                    "policy": policy_shares,
                    "optimum": shares(self.optimum),
                    "policy_offset": max(0.0, 1 - sum(policy_shares)),
                    "reference_offset": max(0.0, 1 - sum(reference_shares)),
                }
            )
        return rows


def summarise(per_prompt: dict[str, Tensor], trained: Tensor) -> dict[str, float]:
    """Return means and worst cases over the trained prompts, and means over the held-out ones.

    `_max` is the worst prompt, so only what is better the lower has one. A prompt without a rank correlation is left
    out of its mean, and a mean without prompts has no key; NaN in anything else is a fault and stays to be seen.

    Args:
        per_prompt: {key: (P,)}.
        trained: bool, True for a prompt whose wording was trained on, (P,).
    """
    found: dict[str, float] = {}
    for key, values in per_prompt.items():
        kept = trained & ~values.isnan() if key.endswith("/rank_correlation") else trained
        if bool(kept.any()):
            found[key] = float(values[kept].mean())
        if describe(key).better == "lower":
            found[f"{key}_max"] = float(values[trained].max())
        if key in HELDOUT_KEYS and not bool(trained.all()):
            found[f"heldout/{key}"] = float(values[~trained].mean())
    return found
