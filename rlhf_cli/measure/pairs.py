"""A policy on held-out preference pairs: how surely it prefers, beside reward model and reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
from torch import Tensor

from rlhf_cli.measure.memo import Memo
from rlhf_cli.measure.sampled import read_logps, score
from rlhf_cli.measure.samples import Sampling
from rlhf_cli.metrics.bootstrap import interval, interval_of
from rlhf_cli.metrics.calibration import expected_calibration_error, reliability
from rlhf_cli.models.reward import Reward

BINS = 20  # of the histograms of preference probabilities
POINTS = 2000  # length differences that are kept for a figure
MAX_NATS = 80.0  # per token; a perplexity beyond it is no longer a number one can print


class PairMeasure:
    """Measures policies on held-out pairs; what does not change is read once.

    Args:
        pairs: {"prompt_ids", "chosen_ids", "rejected_ids"} and, where people differ, "label": the share of them that
            prefer the chosen response.
        reference, reward, reward_clip: as in training.
        sampling: how log-probs are read.
        memo: keeps what is read; None keeps nothing.
        identity: what the models are, for the memo: {"reward": …, "reference": …}.
        groups: number of the question that each pair's prompt words, (N,); None: every prompt is a question of its own.
    """

    def __init__(
        self,
        pairs: Sequence[Any],
        reference: Any,
        reward: Reward,
        *,
        reward_clip: float | None,
        sampling: Sampling,
        memo: Memo | None = None,
        identity: dict[str, dict[str, Any]] | None = None,
        groups: Sequence[int] | None = None,
    ) -> None:
        self.sampling = sampling
        self.prompts = [pair["prompt_ids"] for pair in pairs] * 2
        self.responses = [pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs]
        self.lengths = np.array([len(ids) for ids in self.responses])
        self.labels = np.array([pair.get("label", 1.0) for pair in pairs])
        numbers: dict[tuple[int, ...], int] = {}
        own = [numbers.setdefault(tuple(pair["prompt_ids"]), len(numbers)) for pair in pairs]
        self.group = np.unique(own if groups is None else groups, return_inverse=True)[1]
        known = identity or {"reward": {}, "reference": {}}
        keeping = memo or Memo(None)
        raw = score(reward, self.prompts, self.responses, keeping, known["reward"], "rewards").double()
        rewards = raw if reward_clip is None else raw.clamp(-reward_clip, reward_clip)
        self.preference = _first_wins(rewards.numpy())
        self.reference = self.read(reference, keeping, known["reference"])

    def against(self, rewards: Tensor) -> PairMeasure:
        """Return the same measure with the preferences of another reward model.

        Args:
            rewards: of the 2 N responses in the order of `responses`, as training would use them, nats.
        """
        other = copy(self)
        other.preference = _first_wins(rewards.double().numpy())
        return other

    def read(self, policy: Any, memo: Memo | None = None, identity: dict[str, Any] | None = None) -> np.ndarray:
        """Return log pi of the N chosen responses, then of the N rejected ones, nats, (2 N,).

        Args:
            policy: causal language model.
            memo: keeps what is read; None, while training, keeps nothing.
            identity: what the policy is, for the memo.
        """
        read = read_logps(
            policy, self.prompts, self.responses, self.sampling, memo or Memo(None), identity or {}, "responses"
        )
        return np.array([tokens.sum(dtype=float) for tokens in read])

    def metrics(self, logps: np.ndarray) -> dict[str, float]:
        """Return pm/pair_tv, calibration and length difference; of chosen responses perplexity and log-probs.

        Args:
            logps: what `read` returned of the policy.
        """
        probability = _first_wins(logps)
        gaps = np.abs(self.preference - probability)
        chosen, before = np.split(logps, 2)[0], np.split(self.reference, 2)[0]
        first, second = np.split(self.lengths, 2)
        pairs = self._by_prompt(np.ones(len(self.group)))
        sums = self._by_prompt(chosen)
        return {
            **interval("pm/pair_tv", self._by_prompt(gaps) / pairs),
            "pm/pair_ece": expected_calibration_error(probability, self.labels),
            **interval_of("pm/pair_length_difference", _mean, self._by_prompt(np.abs(first - second)), pairs),
            **interval_of("perplexity/chosen", _perplexity, sums, self._by_prompt(first)),
            **interval_of("chosen_logps", _mean, sums, pairs),
            **interval_of("chosen_logps_change", _mean, self._by_prompt(chosen - before), pairs),
        }

    def histograms(self, logps: np.ndarray) -> dict[str, Any]:
        """Return what the figures of pairs show, as plain lists (pairs.json).

        Counts of the probability that the chosen response is preferred, of reward model, reference and policy; the
        policy's reliability curve, None where a bin is empty; length differences, POINTS at most.

        Args:
            logps: what `read` returned of the policy.
        """
        probability = _first_wins(logps)
        shown = {"reward_model": self.preference, "reference": _first_wins(self.reference), "policy": probability}
        curve = reliability(probability, self.labels)
        first, second = np.split(self.lengths, 2)
        apart = np.abs(first - second)
        return {
            "edges": (np.arange(BINS + 1) / BINS).tolist(),
            "counts": {name: np.histogram(p, BINS, (0, 1))[0].tolist() for name, p in shown.items()},
            "reliability": {
                "edges": curve.edges.tolist(),
                "predicted": _plain(curve.predicted),
                "observed": _plain(curve.observed),
                "count": curve.count.tolist(),
            },
            "length_difference": apart[:: -(-len(apart) // POINTS)].tolist(),
            "pairs": len(apart),
        }

    def _by_prompt(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of values of pairs (N,) over each prompt, (P,)."""
        return np.bincount(self.group, values)


def _first_wins(values: np.ndarray) -> np.ndarray:
    """Return sigma(first - second) of values of both sides of N pairs, (2 N,) -> (N,)."""
    first, second = np.split(values, 2)
    return np.exp(-np.logaddexp(0, second - first))


def _perplexity(logps: np.ndarray, tokens: np.ndarray) -> float:
    return math.exp(min(-logps.sum() / tokens.sum(), MAX_NATS))


def _mean(sums: np.ndarray, counts: np.ndarray) -> float:
    return float(sums.sum() / counts.sum())


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
